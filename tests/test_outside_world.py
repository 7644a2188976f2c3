"""What the machine and strangers' files do to a command: one line that names the path or key, and nothing half written."""

import errno
import json
import os
import pickle
import resource
import subprocess
import sys
import threading
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from builtin_models import recipe_values, save_base, save_teacher
from transformers import TrainerCallback

from cdistill import cli
from cdistill.files import disk_full, entries, owned
from cdistill.runtime.errors import LONGEST, RunError, line_of, printable
from cdistill.runtime.json_lines import read_lines, say_damaged, write_lines
from cdistill.train import load_recipe, run
from cdistill.train.cache import index_crc, read_index
from cdistill.train.run_log import RunLog, _silent_writer


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    save_teacher(folder / "teacher")
    save_base(folder / "base")
    return folder


@pytest.fixture
def recipe(models, tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe_values(tmp_path / "run", models, save_steps=1)))
    return path


def said(capsys, words, code=2):
    """The one line that a command ends with."""
    assert cli.main(list(map(str, words))) == code
    captured = capsys.readouterr()
    lines = [line for line in captured.err.replace("\r", "\n").splitlines() if line and "it/s" not in line]  # bars
    (line,) = lines
    assert line.startswith("cdistill: error: ") and line.isprintable() and len(line) < LONGEST + 20
    return line


LONG = "a" * 300


@pytest.mark.parametrize(
    ("words", "names"),
    [
        (["train", "{recipe}", "output={file}/x"], "{file}/x"),
        (["train", "{recipe}", "output=/proc/x/y"], "/proc/x"),
        (["train", LONG], LONG),
        (["eval", LONG, "--n", "1"], LONG[:200]),
        (["plan", "{recipe}", "--gpu", "24GB", f"teacher={LONG}"], LONG[:200]),
        (["eval", "builtin:teacher", "--n", "1", "--json", "{file}/x"], "{file}"),
        (["cache", "{recipe}", "teacher_memory.cache={file}/c", "teacher_memory.top_k=8"], "{file}/c"),
        (["demo", "--output", "{file}/x"], "{file}/x"),
        (["reproduce", "table2", "--output", "{file}/x"], "{file}/x"),
        (["export", "builtin:teacher", "{file}/x"], "{file}/x"),
        (["builtin", "write", "--task", "sugarcrepe", "{file}/x"], "{file}/x"),
        (["train", "{folder}"], "{folder}"),
        (["train", "{recipe}", "seed=5000000000"], "seed"),
        (["train", "{recipe}", "vat.weight=.inf"], "vat.weight"),
        (["train", "{recipe}", "stage.dft.learning_rate=.inf"], "learning_rate"),
        (["train", "{recipe}", "stages=['a b']"], "stages"),
        (
            ["train", "{recipe}", "stage.dft-2={objective: sft, samples: 64, learning_rate: 0.1}"],
            "letters, digits and _",
        ),
        (
            ["train", "{recipe}", "stage.x/y={objective: sft, samples: 64, learning_rate: 0.1}"],
            "letters, digits and _",
        ),
        (["plan", "{recipe}", "--gpu", "9" * 400 + "GB"], "gpu"),
        (["plan", "{recipe}", "--gpu", "24GB", "--length", "9" * 21], "length"),
        (["plan", "{recipe}", "--gpu", "24GB", "--gpus", "9" * 21], "gpus"),
        (["train", "{recipe}", "vat.engine=flash_attn_2"], "vat.engine"),
    ],
)
def test_what_cannot_be_is_one_line(recipe, tmp_path, capsys, words, names):
    (tmp_path / "file").write_text("precious")
    (tmp_path / "folder").mkdir()
    places = {name: str(tmp_path / name) for name in ("file", "folder")} | {"recipe": str(recipe)}
    fill = lambda text: text.format(**places) if "{recipe}" in text or "{file}" in text or "{folder}" in text else text  # noqa: E731
    line = said(capsys, [fill(word) for word in words])
    assert fill(names) in line
    assert not (tmp_path / "run").exists() and (tmp_path / "file").read_text() == "precious"


@pytest.mark.parametrize("text", ["extends: 5", "a: " + "[" * 3000 + "]" * 3000, "name: \x1b[31mred\nname: x", "- a"])
def test_recipes_that_are_none(tmp_path, capsys, text):
    (tmp_path / "bad.yaml").write_text(text)
    assert "bad.yaml" in said(capsys, ["train", tmp_path / "bad.yaml"])


def test_a_recipe_that_is_not_utf8_is_named(tmp_path, capsys):
    (tmp_path / "bad.yaml").write_bytes(b"name: caf\xe9\n")
    assert "bad.yaml" in said(capsys, ["train", tmp_path / "bad.yaml"])


@pytest.mark.parametrize("port", ["-1", "99999", "x", "1e3", "9" * 50])
def test_ports_that_are_none(recipe, tmp_path, capsys, monkeypatch, port):
    monkeypatch.setenv("MASTER_PORT", port)
    assert "MASTER_PORT" in said(capsys, ["train", recipe, "processes=2"])
    assert not (tmp_path / "run").exists()


def test_errors_are_lines_that_a_terminal_can_show():
    assert line_of(FileNotFoundError(2, "No such file or directory", "a\n\x1b[2Jb")) == (
        "a \\x1b[2Jb: No such file or directory"
    )
    assert line_of(OSError(18, "Invalid cross-device link", "a", None, "b")) == "a -> b: Invalid cross-device link"
    assert line_of(ValueError("one\n  two\u202e")) == "one two\\u202e"
    assert line_of(ValueError()) == "ValueError"
    assert len(line_of(ValueError("x" * 10**6))) == LONGEST
    assert printable("caf\u00e9 \u4e2d") == "caf\u00e9 \u4e2d"


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_the_runs_error(monkeypatch, capsys, number):
    def fail(options):
        raise OSError(number, os.strerror(number), "/full/file")

    monkeypatch.setitem(cli.COMMANDS, "recipes", cli.Command("", lambda parser: None, fail))
    assert said(capsys, ["recipes"], code=1) == f"cdistill: error: /full/file: {os.strerror(number)}"


@pytest.mark.parametrize("full", [True, False])
def test_output_that_nobody_takes(full):
    code = "import sys; from cdistill.cli import main; sys.exit(main(['recipes']))"
    read, write = os.pipe()
    os.close(read)
    with open("/dev/full", "w") as sink:
        done = subprocess.run(
            [sys.executable, "-c", code], stdout=sink if full else write, stderr=subprocess.PIPE, text=True
        )
    os.close(write)
    assert done.returncode == (1 if full else 141)
    assert "Traceback" not in done.stderr and "ignored" not in done.stderr
    assert len(done.stderr.splitlines()) == full


def test_the_thread_of_tensorboard_tells_nobody_of_a_full_disk(tmp_path, monkeypatch):
    told, log = [], RunLog(tmp_path, "1-dpt", "dpt", per_step=4, steps=2)
    monkeypatch.setattr(threading, "excepthook", told.append)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, hard))
    try:
        with pytest.raises(OSError) as error:
            log.on_train_begin(None, SimpleNamespace(is_world_process_zero=True, global_step=0), None)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        log.close()
    assert disk_full(error.value) and told == []
    with _silent_writer():
        thread = threading.Thread(target=lambda: 1 / 0)
        thread.start()
        thread.join()
    assert [failed.exc_type for failed in told] == [ZeroDivisionError], "of other threads it is told"


# Two runs in one folder.


def test_a_folder_in_use_is_refused_by_all_that_write_there(models, recipe, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("cdistill.files.WAIT_SECONDS", 0.0)
    for folder in ("run", "cache", "answers"):
        (tmp_path / folder).mkdir()
    (tmp_path / "cache" / "1-dpt").mkdir()
    cache = ["cache", recipe, f"teacher_memory.cache={tmp_path / 'cache'}", "teacher_memory.top_k=8"]
    asked = ["eval", "builtin:teacher", "--task", "builtin", "--n", "1", "--output", tmp_path / "answers"]
    held = {"run": ["train", recipe], "cache/1-dpt": cache, "answers": asked}
    for folder, words in held.items():
        with owned(tmp_path / folder):
            line = said(capsys, words)
        assert f"{tmp_path / folder} is in use by another run (process {os.getpid()} on " in line
        assert entries(tmp_path / folder) == []


# Logs and lists that are damaged.


def test_lines_that_can_be_read_are(tmp_path, capsys):
    path = tmp_path / "log.jsonl"
    assert read_lines(path) == ([], 0)
    write_lines(path, [{"stage": "a", "x": 1}, {"stage": "b"}])
    with path.open("ab") as file:
        file.write(b'5\n\xe9\n[]\n{"x": 1}\n\n{"stage": "c"}\n{"stage": "d"')
    found, damaged = read_lines(path, "stage")
    assert [entry["stage"] for entry in found] == ["a", "b", "c"] and damaged == 4
    path.write_bytes(b'{"stage": "a"}')  # the last newline is lost
    assert read_lines(path, "stage") == ([{"stage": "a"}], 0)
    say_damaged(path, 0)
    say_damaged(path, 1)
    say_damaged(path, 2)
    assert capsys.readouterr().out.splitlines() == [
        f"{path}: 1 line could not be read and is left out",
        f"{path}: 2 lines could not be read and are left out",
    ]


@pytest.mark.parametrize(
    "change", [{"per_shard": 0}, {"per_shard": 512}, {"per_shard": "x"}, {"finished": True}, {"crc": None}]
)
def test_an_index_that_has_changed_is_refused(tmp_path, change):
    index = {"made_of": {"a": [1, 2]}, "per_shard": 256, "finished": False, "crc": index_crc({"a": [1, 2]}, 256, False)}
    (tmp_path / "index.json").write_text(json.dumps(index))
    assert read_index(tmp_path, {"a": (1, 2)})["per_shard"] == 256
    (tmp_path / "index.json").write_text(json.dumps(index | change))
    with pytest.raises(ValueError, match=r"^teacher_memory.cache: .*index\.json is corrupt .*; delete "):
        read_index(tmp_path, {"a": (1, 2)})


class Stop(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 2:
            raise KeyboardInterrupt


@pytest.mark.parametrize("damage", [b"5\n", b"\xe9\n", None])
def test_a_damaged_log_costs_no_result(recipe, tmp_path, capsys, damage):
    chosen = load_recipe(recipe, ["stages=[dpt]"])
    with pytest.raises(KeyboardInterrupt):
        run(chosen, callbacks=[Stop()])
    path = tmp_path / "run" / "metrics.jsonl"
    if damage is None:
        path.unlink()
    else:
        path.write_bytes(damage + path.read_bytes())
    run(chosen, resume=True)
    assert str(path) in capsys.readouterr().out
    steps = [json.loads(line)["step"] for line in path.read_text().splitlines()]
    assert steps == ([2, 3] if damage is None else [1, 2, 3])[-len(steps) :] and (tmp_path / "run" / "1-dpt").is_dir()


# Not finite.


def test_a_stage_that_has_learned_nothing_is_not_done(recipe, tmp_path, capsys):
    words = ["train", recipe, "stages=[sft]", "stage.sft.learning_rate=1e29", "stage.sft.samples=40"]
    line = said_last(capsys, words)
    assert "1-sft" in line and "learning_rate" in line
    assert not (tmp_path / "run" / "1-sft").exists()


def said_last(capsys, words):
    assert cli.main(list(map(str, words))) == 1
    lines = [line for line in capsys.readouterr().err.replace("\r", "\n").splitlines() if "error" in line]
    assert len(lines) == 1
    return lines[0]


# Checkpoints of a stranger.


class Evil:
    def __init__(self, mark):
        self.mark = str(mark)

    def __reduce__(self):
        return (open, (self.mark, "w"))


@pytest.mark.parametrize("zero", [0, 2, 3])
def test_code_of_a_checkpoint_is_not_run(recipe, tmp_path, zero, ranks):
    ranks.call(_resume_a_strangers, str(recipe), zero, str(tmp_path / "ran"), world=1)
    assert not (tmp_path / "ran").exists()


def _resume_a_strangers(recipe, zero, mark):
    """In a process of its own, as engines are not used twice."""
    from cdistill.runtime.checkpoints import COMPLETE, seal

    chosen = load_recipe(recipe, ["stages=[sft]", f"deepspeed={zero}"])
    with suppress(KeyboardInterrupt):
        run(chosen, callbacks=[Stop()])
    for folder in Path(chosen.output).glob("checkpoints/1-sft/checkpoint-*"):
        facts = json.loads((folder / COMPLETE).read_text())
        for path in folder.rglob("*_states.pt"):
            state = torch.load(path, weights_only=False)
            state["harmless"] = Evil(mark)
            torch.save(state, path)
        seal(folder, **{name: value for name, value in facts.items() if name != "files"})
    with pytest.raises(RunError, match="holds more than numbers"):
        run(chosen, resume=True)


def test_the_evil_one_is_evil(tmp_path):
    pickle.loads(pickle.dumps(Evil(tmp_path / "ran"))).close()
    assert (tmp_path / "ran").exists()
