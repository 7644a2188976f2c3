"""`cdistill data check` on made-up sets: it finds the faults that were put in, no others, and leaves a clean copy."""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import datasets
import forks
import pytest
import yaml
from data_check_cases import KINDS, Given, Maker, listed, made_up_set, said, write
from data_files import write_tar
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from cdistill.cli import main
from cdistill.data import check as checking
from cdistill.data.samples import BadSampleError, ImageBytes, Mark, Message, Sample


@given(
    faults=st.fixed_dictionaries({kind: st.integers(0, 3) for kind in KINDS}),
    lines=st.booleans(),
    seed=st.integers(0, 2**32),
)
@settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
def test_finds_what_was_put_in(tmp_path_factory, capsys, faults, lines, seed):
    folder = tmp_path_factory.mktemp("set") / "root"
    records, bad = made_up_set(folder, faults, seed=seed)
    path = folder / ("set.jsonl" if lines else "set.json")
    texts = write(path, records, lines=lines)
    fixed = folder / "fixed.json"

    assert main(["data", "check", str(path), "--workers", "1", "--fix", str(fixed)]) == 1

    found = listed(folder / f"{path.name}.bad.jsonl")
    assert {entry["id"]: entry["reason"] for entry in found} == bad
    assert [entry["id"] for entry in found] == [record["id"] for record in records if record["id"] in bad]
    assert all(entry["place"] and entry["detail"] and "\n" not in entry["detail"] for entry in found)
    out = capsys.readouterr().out
    for kind in set(bad.values()):
        count = sum(reason == kind for reason in bad.values())
        assert any(
            line.split("  ")[0] == kind and line.split()[len(kind.split())] == str(count) for line in out.splitlines()
        )
    assert f"{len(records) - len(bad)} good records" in out

    good = [text for text, record in zip(texts, records, strict=True) if record["id"] not in bad]
    assert [line.rstrip(",") for line in fixed.read_text(encoding="utf-8").splitlines() if line not in "[]"] == good
    if not lines:
        assert json.loads(fixed.read_text(encoding="utf-8")) == [r for r in records if r["id"] not in bad]
    assert main(["data", "check", str(fixed), "--workers", "1"]) == 0
    assert not (folder / "fixed.json.bad.jsonl").exists()
    out = capsys.readouterr().out
    assert "misnamed image        2" in out and "duplicate id          2" in out


def test_does_not_depend_on_the_number_of_processes(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(checking, "CHUNK", 3)
    records, bad = made_up_set(tmp_path / "root", dict.fromkeys(KINDS, 2), seed=5)
    path = tmp_path / "root" / "set.jsonl"
    write(path, records, lines=True)
    results = []
    for workers in (1, 3):
        listed_in = tmp_path / f"bad{workers}.jsonl"
        assert main(["data", "check", str(path), "--workers", str(workers), "--bad", str(listed_in)]) == 1
        results.append((listed_in.read_text(), capsys.readouterr().out.replace(listed_in.name, "")))
    assert results[0] == results[1]
    assert len(results[0][0].splitlines()) == len(bad)


def test_unreadable_lines_are_told_with_line_and_column(tmp_path, capsys):
    maker = Maker(tmp_path)
    texts = write(tmp_path / "set.jsonl", [maker.record(None) for _ in range(3)], lines=True)
    broken = texts[1].replace('"conversations"', "'conversations'")
    (tmp_path / "set.jsonl").write_text("\n".join([texts[0], broken, texts[2]]), encoding="utf-8")
    assert main(["data", "check", str(tmp_path / "set.jsonl"), "--fix", str(tmp_path / "fixed.jsonl")]) == 1
    (entry,) = listed(tmp_path / "set.jsonl.bad.jsonl")
    assert entry["reason"] == "unreadable JSON" and entry["place"].endswith("line 2")
    assert f"column {broken.index(chr(39)) + 1}" in entry["detail"]
    assert (tmp_path / "fixed.jsonl").read_text(encoding="utf-8").splitlines() == [texts[0], texts[2]]

    (tmp_path / "list.json").write_text(f"[{texts[0]},\n  {broken}]", encoding="utf-8")
    capsys.readouterr()
    assert main(["data", "check", str(tmp_path / "list.json")]) == 2
    told = capsys.readouterr().err
    assert "line 2" in told and f"column {broken.index(chr(39)) + 3}" in told


def test_a_clean_set_leaves_no_list_and_removes_an_old_one(tmp_path, capsys):
    maker = Maker(tmp_path)
    path = tmp_path / "set.json"
    write(path, [maker.record(), maker.record(None)], lines=False)
    (tmp_path / "set.json.bad.jsonl").write_text('{"source": "set"}\n')
    assert main(["data", "check", str(path)]) == 0
    assert not (tmp_path / "set.json.bad.jsonl").exists()
    assert not list(tmp_path.glob("*.part"))


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["none.json"], "none.json"),
        (["set.json", "--workers", "0"], "workers"),
        (["set.json", "--preset", "x"], "llava-665k"),
        (["set.json", "--fix", "set.json"], "fix"),
        (["set.json", "--fix", "link.json"], "fix"),
        (["set.json", "--fix", "no/where.json"], "fix"),
        (["mix.yaml", "--fix", "new.json"], "fix"),
        (["set.json", "--bad", "no/where.jsonl"], "bad"),
        (["set.json", "--bad", "set.json"], "bad"),
        (["set.json", "--bad", "mix.yaml"], "bad"),
        (["set.json", "--bad", "pictures"], "bad"),
        (["set.json", "--fix", "new.json", "--bad", "new.json"], "bad"),
        (["set.json", "--fix", "/proc/new.json"], "fix"),
        (["set.json", "--bad", "/proc/new.jsonl"], "bad"),
        (["set.json", "--streaming"], "size"),
        (["set.json", "--config", "x"], "config"),
        (["set.json", "--columns", "images"], "columns"),
        (["set.json", "--max-length", "9"], "max_length needs a model"),
        (["set.json", "--processor", "builtin:teacher", "--max-length", "1"], "max_length"),
    ],
)
def test_mistakes_of_users_change_nothing(tmp_path, monkeypatch, capsys, arguments, told):
    monkeypatch.chdir(tmp_path)
    maker = Maker(tmp_path)
    write(tmp_path / "set.json", [maker.record(None), maker.faulty("empty answer")], lines=False)
    (tmp_path / "link.json").symlink_to("set.json")
    sources = [{"path": "set.json"}, {"path": "set.json", "name": "again"}]
    (tmp_path / "mix.yaml").write_text(yaml.safe_dump({"sources": sources}))
    before = {path: path.read_bytes() for path in tmp_path.glob("*.*")}
    assert main(["data", "check", *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1 and told in captured.err
    assert {path: path.read_bytes() for path in tmp_path.glob("*.*")} == before


def test_a_mix_is_told_by_source(tmp_path, capsys):
    maker = Maker(tmp_path)
    write(tmp_path / "one.json", [maker.record(), maker.faulty("missing image")], lines=False)
    write(tmp_path / "two.jsonl", [maker.record(None), maker.faulty("missing image"), maker.record()], lines=True)
    sources = [{"path": "one.json"}, {"path": "two.jsonl"}]
    (tmp_path / "mix.yaml").write_text(yaml.safe_dump({"sources": sources}))
    assert main(["data", "check", str(tmp_path / "mix.yaml")]) == 1
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["one", "2", "1", "1", "2", "0"] in rows
    assert ["two", "3", "2", "1", "2", "1"] in rows
    assert ["all", "5", "3", "2", "4", "1"] in rows
    assert [entry["source"] for entry in listed(tmp_path / "mix.yaml.bad.jsonl")] == ["one", "two"]


def test_any_source_will_do_and_equal_bytes_are_the_same_image(tmp_path):
    maker = Maker(tmp_path)
    one, two = ((tmp_path / maker.image()).read_bytes() for _ in range(2))
    image = (ImageBytes("1.jpg", one),)
    items = [
        said("a", "b", *image, id="1"),
        said("a", "b", ImageBytes("2.jpg", two), id="2"),
        said("a", "b", ImageBytes("3.jpg", one), id="3"),
        said("ab", "", id="4"),
        said("a", "b", id="5"),
        BadSampleError("some reason", "some detail"),
        Sample("7", (Message("user", ("a", Mark.IMAGE)), Message("assistant", ("b",))), image, "elsewhere"),
    ]
    bad = []
    (totals,) = checking.check([Given(items)], workers=1, on_bad=lambda source, record: bad.append(record))
    assert totals.good.tolist() == [True, True, False, True, True, False, True]
    assert [record.reason for record in bad] == ["duplicate record", "some reason"]
    assert (totals.images, totals.text_only) == (4, 2)


@pytest.mark.parametrize("workers", [1, 2])
def test_with_a_processor_it_finds_what_training_would(tmp_path, capsys, monkeypatch, workers):
    monkeypatch.setattr(checking, "CHUNK", 3)
    maker = Maker(tmp_path)
    records = [maker.record() for _ in range(5)]
    records.insert(3, {"id": "sys", "system": "Be brief.", **maker.record(turns=1)} | {"id": "sys"})
    maker.image()
    thin = "pictures/thin.png"
    (tmp_path / "pictures").mkdir(exist_ok=True)
    Image.new("RGB", (3000, 1)).save(tmp_path / thin)
    records.append(maker.record(thin) | {"id": "thin"})
    records.append(
        {"id": "long", "conversations": [{"from": "human", "value": "a " * 400}, {"from": "gpt", "value": "b"}]}
    )
    write(tmp_path / "set.json", records, lines=False)
    arguments = ["data", "check", str(tmp_path / "set.json"), "--workers", str(workers)]
    assert main(arguments) == 0
    assert main([*arguments, "--processor", "builtin:teacher", "--max-length", "300"]) == 1
    listed = [json.loads(line) for line in (tmp_path / "set.json.bad.jsonl").read_text().splitlines()]
    assert {bad["id"]: bad["reason"] for bad in listed} == {"sys": "chat template", "long": "too long"}
    capsys.readouterr()


def test_what_is_not_read_is_told(tmp_path, capsys):
    maker = Maker(tmp_path)
    records = [maker.record() | {"model": "x", "source": None} for _ in range(3)]
    write(tmp_path / "a.json", records, lines=False)
    write(tmp_path / "b.json", [maker.record() | {"score": 0}], lines=True)
    (tmp_path / "mix.yaml").write_text("[{path: a.json}, {path: b.json}]")
    assert main(["data", "check", str(tmp_path / "a.json"), "--workers", "1"]) == 0
    assert "\nnot read: model (3)\n" in capsys.readouterr().out
    assert main(["data", "check", str(tmp_path / "mix.yaml"), "--workers", "1"]) == 0
    out = capsys.readouterr().out
    assert "not read of a: model (3)" in out and "not read of b: score (1)" in out


def test_a_process_that_dies_ends_the_check(tmp_path, monkeypatch):
    monkeypatch.setattr(checking, "CHUNK", 1)
    with pytest.raises(checking.CheckError, match="workers"):
        checking.check([Given([said("a", "b"), None, said("c", "d")])], workers=2)


def test_interrupted_it_leaves_no_process_and_no_file(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(checking, "CHUNK", 1)
    maker = Maker(tmp_path)
    path = tmp_path / "set.jsonl"
    write(path, [maker.record() for _ in range(20)] + [maker.faulty("missing image")], lines=True)
    real, before = checking.check, set(multiprocessing.active_children())

    def stop(records):
        raise KeyboardInterrupt

    monkeypatch.setattr(checking, "check", lambda *given, **options: real(*given, **(options | {"progress": stop})))
    assert main(["data", "check", str(path), "--workers", "2"]) == 130
    assert capsys.readouterr().err.strip().endswith("interrupted")
    assert set(multiprocessing.active_children()) <= before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["pictures", "set.jsonl"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_ended_from_outside_it_leaves_no_process(tmp_path, number):
    maker = Maker(tmp_path)
    path = tmp_path / "set.jsonl"
    write(path, [maker.record(None) for _ in range(2000)] + [maker.record() for _ in range(6)], lines=True)
    for image in tmp_path.glob("pictures/*/*.jpg"):
        Image.new("RGB", (8000, 8000)).save(image)  # takes a while
    shown = forks.Fork("forks:run_command", ["-m", "cdistill", "data", "check", str(path), "--workers", "2"])
    children = Path(f"/proc/{shown.pid}/task/{shown.pid}/children")
    while len(found := children.read_text().split()) < 2:
        time.sleep(0.05)
    time.sleep(0.5)  # what a handler raises within a fork, Python ignores
    shown.send_signal(number)
    assert shown.wait(30) == (128 + number if number == signal.SIGTERM else -number)
    end = time.monotonic() + 20
    while any(Path(f"/proc/{child}/exe").exists() for child in found):
        assert time.monotonic() < end
        time.sleep(0.05)
    if number == signal.SIGTERM:
        assert sorted(p.name for p in tmp_path.iterdir()) == ["pictures", "set.jsonl"]


def test_text_that_the_terminal_cannot_write(tmp_path):
    turns = [{"from": "human", "value": "<image>q"}, {"from": "gpt", "value": "ä"}]
    record = {"id": "a\ud800", "image": "\x9b\u2028ä.jpg", "conversations": turns}
    path = tmp_path / os.fsdecode(b"x\xff.json")
    path.write_text(json.dumps([record]))
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    for arguments, code in (
        (["check", path], 1),
        (["show", path], 0),
        (["show", path, "--html", tmp_path / "p.html"], 0),
    ):
        done = forks.python("-m", "cdistill", "data", *arguments, env=environment)
        assert (done.returncode, "Traceback" in done.stderr) == (code, False)
        assert "missing image" in done.stdout or "p.html" in done.stdout
        assert done.stdout.isascii() and all(line.isprintable() for line in done.stdout.splitlines())
    (entry,) = listed(path.with_name(path.name + ".bad.jsonl"))
    assert entry["id"] == "a\ud800"


def test_output_that_nobody_reads_on(tmp_path):
    write(tmp_path / "set.jsonl", [Maker(tmp_path).record(None) for _ in range(5)], lines=True)
    command = [sys.executable, "-m", "cdistill", "data", "show", tmp_path / "set.jsonl"]
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert (done.returncode, done.stderr) == (128 + signal.SIGPIPE, "")


def test_lists_after_much_white_space_stay_lists(tmp_path):
    record = Maker(tmp_path).record(None)
    path = tmp_path / "set.json"
    path.write_text(" " * 70_000 + json.dumps([record]))
    assert main(["data", "check", str(path), "--fix", str(tmp_path / "new.json")]) == 0
    assert json.loads((tmp_path / "new.json").read_text()) == [record]


def test_bad_samples_of_every_reader_have_ids(tmp_path, capsys):
    turns = [{"from": "human", "value": "q"}, {"from": "gpt", "value": ""}]
    write_tar(
        tmp_path / "a.tar", [("key.txt", b"no image"), ("k2.json", json.dumps({"conversations": turns}).encode())]
    )
    datasets.Dataset.from_list([{"id": 7, "conversations": turns}]).save_to_disk(tmp_path / "b")
    for name, ids in (("a.tar", ["key", "k2"]), ("b", ["7"])):
        assert main(["data", "check", str(tmp_path / name)]) == 1
        assert [entry["id"] for entry in listed(tmp_path / f"{name}.bad.jsonl")] == ids


def test_a_folder_counts_by_the_end_of_a_path(tmp_path):
    maker = Maker(tmp_path / "vg" / "images")
    image = ImageBytes("/data/vg/coco/train/x.jpg", (maker.folder / maker.image()).read_bytes())
    (totals,) = checking.check([Given([said("a", "b", image)])], workers=1, folders=["vg", "coco/train", "gqa"])
    assert totals.folders == {"coco/train": 1}
