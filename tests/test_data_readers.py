"""LLaVA's JSON gives what stands in the file, in every form; and every reader in worker processes."""

import json
import multiprocessing
import pickle
import subprocess
import sys
from pathlib import Path

import datasets
import pytest
from data_files import as_json, characters, encoded, reason, record, records, spoken, turns, write_tar
from hypothesis import given, settings
from hypothesis import strategies as st

from cdistill.data import scan
from cdistill.data.images import open_image
from cdistill.data.llava import LlavaJson
from cdistill.data.mix import open_source
from cdistill.data.samples import BadSampleError, ImageFile, Mark

ROOT = Path(__file__).parent.parent


def expected(record):
    roles = {"human": "user", "gpt": "assistant"}
    said = [(roles[turn["from"]], turn["value"]) for turn in record["conversations"]]
    return said[1:] if said[0][0] == "assistant" else said


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("sets")


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    st.lists(records(), min_size=1, max_size=5),
    st.fixed_dictionaries(
        {
            "lines": st.booleans(),
            "ascii": st.booleans(),
            "indent": st.sampled_from([None, 0, 2]),
            "newline": st.sampled_from(["\n", "\r\n"]),
            "bom": st.booleans(),
            "space": st.sampled_from(["", " \n\t\r\n", " " * 300]),
        }
    ),
    st.sampled_from([1, 2, 7, 64, 1 << 22]),
)
def test_llava_json_gives_what_was_written(folder, made, form, chunk):
    path = folder / "set.json"
    path.write_bytes(as_json(made, **form))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scan, "CHUNK", chunk)
        source = LlavaJson(path, folder)
    assert len(source) == len(made)
    for i, wanted in enumerate(made):
        sample = source[i]
        assert source.record(i) == wanted == json.loads(source.raw(i))
        assert spoken(sample) == expected(wanted)
        assert sample.id == str(wanted["id"])
        names = wanted.get("image", [])
        names = [names] if isinstance(names, str) else names
        assert sample.images == tuple(ImageFile(folder / name) for name in names)
        assert source.sizes().characters[i] == characters(sample)
        assert source.sizes().images[i] == len(names)
        line = int(sample.place.rpartition(" ")[2])
        assert path.read_bytes().split(b"\n")[line - 1].strip()


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.lists(records(), min_size=1, max_size=3), st.sampled_from([None, 1]), st.data())
def test_a_list_that_is_cut_or_damaged_is_refused_with_line_and_column(folder, made, indent, data):
    whole = as_json(made, lines=False, indent=indent)
    cut = data.draw(st.integers(1, len(whole) - 1))
    damaged = whole[:cut] + data.draw(st.sampled_from([b"", b"}" + whole[cut:], b'"' + whole[cut:]]))
    try:
        json.loads(damaged.decode("utf-8", "surrogateescape"))
        return
    except json.JSONDecodeError as error:
        wanted = f"line {error.lineno} column {error.colno}:"
    path = folder / "damaged.json"
    path.write_bytes(damaged)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(ValueError) as raised:
        patch.setattr(scan, "CHUNK", data.draw(st.sampled_from([5, 1 << 22])))
        LlavaJson(path)
    assert wanted in str(raised.value) and "\n" not in str(raised.value) and str(path) in str(raised.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b" \n\t ", "is empty"),
        (b"hello\n", "neither a JSON list nor JSON Lines: line 1 column 1"),
        (b"\x1f\x8b\x08\x00", "neither a JSON list nor JSON Lines"),
        (b"5\n6\n", "no line holds an object"),
        (b"[1, 2,]", "line 1 column 7"),
        (b"[1, 2] 3", "text after the end"),
        (b"[", "line 1 column 2"),
        (b"[" * 100_000, "line 1 column 2: maximum recursion"),
        (b"[" + b"9" * 5000 + b"]", "line 1 column 2"),
    ],
)
def test_files_that_are_no_set_are_refused(tmp_path, content, message):
    (tmp_path / "set.json").write_bytes(content)
    with pytest.raises(ValueError) as raised:
        open_source(str(tmp_path / "set.json"))
    assert message in str(raised.value) and "\n" not in str(raised.value)


def test_no_file_and_no_records(tmp_path):
    with pytest.raises(ValueError, match="no such file"):
        LlavaJson(tmp_path / "none.json")
    (tmp_path / "set.json").write_text(" [ ]\n")
    source = LlavaJson(tmp_path / "set.json")
    assert len(source) == 0 and len(source.sizes().characters) == 0
    with pytest.raises(IndexError):
        source[0]


@pytest.mark.parametrize("chunk", [1, 2, 3, 5])
def test_values_cut_by_the_end_of_a_chunk(tmp_path, monkeypatch, chunk):
    values = [12345, -1.5e3, True, None, "\u00e9\U0001f600", [], {}, 7]
    (tmp_path / "set.json").write_text(json.dumps(values))
    monkeypatch.setattr(scan, "CHUNK", chunk)
    source = LlavaJson(tmp_path / "set.json")
    assert [source.record(i) for i in range(len(source))] == values


def test_bad_lines_are_bad_samples_with_line_and_column(tmp_path):
    good = json.dumps(record(1, 0))
    cut = good[:20] + "\n"
    (tmp_path / "set.txt").write_text(
        good + "\n\n" + '  {"id": nope}\n' + good + "\r\n" + cut + "9" * 5000 + "\n" + cut
    )
    source = LlavaJson(tmp_path / "set.txt")
    assert [spoken(source[i])[1][1] for i in (0, 2)] == ["it is 1"] * 2
    assert [reason(source, i) for i in (1, 3, 4, 5)] == ["unreadable JSON"] * 4
    with pytest.raises(BadSampleError, match=r"set.txt\[1\] line 3: unreadable JSON: column 10: Expecting value"):
        source[1]
    assert list(source.sizes().characters[[1, 3]]) == [0, 0]


@pytest.mark.parametrize("form", ["{}\n{}\n", "[{},\n{}]"])
def test_a_key_that_stands_twice_is_no_reading(tmp_path, form):
    """Of two images, or two answers, the later one would silently count."""
    good = json.dumps(record(1, 0))
    twice = good.replace('"value"', '"value": "lost", "value"', 1)
    (tmp_path / "set.json").write_text(form.format(good, twice))
    source = LlavaJson(tmp_path / "set.json")
    assert spoken(source[0])[1][1] == "it is 1"
    with pytest.raises(BadSampleError, match=r"line 2: unreadable JSON: .*the key 'value' stands twice in an object"):
        source[1]


@pytest.mark.parametrize(
    ("bad", "why"),
    [
        (5, "not a record"),
        (None, "not a record"),
        ([], "not a record"),
        ({}, "not a record"),
        ({"conversations": None}, "not a record"),
        ({"conversations": "hello"}, "not a record"),
        ({"conversations": [5]}, "not a record"),
        ({"conversations": turns("q", None)}, "not a record"),
        ({"conversations": turns("q", 5)}, "not a record"),
        ({"conversations": [{"role": "user", "content": [{"type": "video"}]}]}, "not a record"),
        ({"conversations": [{"role": "user", "content": ["hello"]}]}, "not a record"),
        ({"conversations": turns("q", "a", says=("human", "bing"))}, "unknown role"),
        ({"conversations": turns("q", "a", says=("human", ["gpt"]))}, "unknown role"),
        ({"conversations": [{"value": "q"}]}, "unknown role"),
        ({"conversations": []}, "wrong order of turns"),
        ({"conversations": turns("q")}, "wrong order of turns"),
        ({"conversations": turns("q", "a", "q")}, "wrong order of turns"),
        ({"conversations": turns("q", " \n")}, "empty answer"),
        ({"conversations": turns("<image>q", "a")}, "image count"),
        ({"image": "x.jpg", "conversations": turns("q", "a")}, "image count"),
        ({"image": ["x.jpg"], "conversations": turns("<image><image>", "a")}, "image count"),
        ({"image": "x.jpg", "conversations": turns("q", "<image>a")}, "image in an answer"),
        ({"image": 5, "conversations": turns("<image>q", "a")}, "bad image path"),
        ({"image": "", "conversations": turns("<image>q", "a")}, "image count"),
        ({"conversations": turns("\ud800", "a")}, "unreadable text"),
    ],
)
@pytest.mark.parametrize("lines", [False, True])
def test_bad_records_are_bad_samples_and_stop_nothing(tmp_path, bad, why, lines):
    path = tmp_path / "set.json"
    path.write_bytes(as_json([record(0, 0), bad, record(2)], lines=lines, ascii=True))
    source = LlavaJson(path)
    assert reason(source, 1) == why
    assert [len(source[i].images) for i in (0, 2)] == [0, 1]
    assert source[-1] == source[2]
    with pytest.raises(BadSampleError, match=r"set.json\[1\] line"):
        source[1]


def test_faults_are_told_in_one_short_line(tmp_path):
    long, ask = "\n\u2028\x9b" * 10_000, turns("<image>q", "a")
    made = [
        {"image": "\\" + long, "conversations": ask},
        {"image": "C:" + "\u2028\x9b" * 300, "conversations": ask},
        {"image": {"x": long}, "conversations": ask},
        {"conversations": turns("q", "a", says=("human", long))},
        {"conversations": [{"role": "user", "content": [{"type": long}]}]},
    ]
    (tmp_path / "set.json").write_bytes(as_json(made, lines=False))
    source = LlavaJson(tmp_path / "set.json")
    for i in range(len(source)):
        with pytest.raises(BadSampleError) as raised:
            source[i]
        assert len(raised.value.detail) <= 500 and raised.value.detail.isprintable()
        assert str(pickle.loads(pickle.dumps(raised.value))) == str(raised.value)


def test_bytes_that_are_no_utf8_spoil_their_own_record_only(tmp_path):
    path = tmp_path / "set.json"
    path.write_bytes(
        as_json([record(0, 0), record(1, 0), record(2, 0)], lines=False).replace(b"it is 1", b"it is \xff")
    )
    source = LlavaJson(path)
    assert reason(source, 1) == "unreadable text"
    assert spoken(source[2])[1] == ("assistant", "it is 2")


def test_messages_are_read_as_conversations_are(tmp_path):
    parts = [{"type": "text", "text": "see "}, {"type": "image"}, {"type": "text", "text": " there"}]
    named = [{"type": "image", "image": "b.jpg"}, {"type": "text", "text": "this"}]
    answer = {"role": "assistant", "content": "yes"}
    system = {"role": "system", "content": "be brief"}
    made = [
        {"messages": [system, {"role": "user", "content": parts}, answer], "images": ["a.jpg"]},
        {"messages": [{"role": "user", "content": named}, answer]},
        {"messages": [{"role": "user", "content": named}, answer], "image": "a.jpg"},
        {"messages": [{"from": None, "role": "user", "value": None, "content": "q"}, {"from": None, **answer}]},
        {"conversations": [system, *turns("greeting", says=("gpt",)), *turns("q", "a")], "image": None},
    ]
    (tmp_path / "set.jsonl").write_bytes(as_json(made, lines=True))
    source = LlavaJson(tmp_path / "set.jsonl")
    assert spoken(source[0]) == [("system", "be brief"), ("user", "see <image> there"), ("assistant", "yes")]
    assert source[0].messages[1].parts == ("see ", Mark.IMAGE, " there")
    assert (source[1].images, source[1].id) == ((ImageFile(tmp_path / "b.jpg"),), "1")
    assert reason(source, 2) == "image count"
    assert spoken(source[3]) == [("user", "q"), ("assistant", "yes")]
    assert spoken(source[4]) == [("system", "be brief"), ("user", "q"), ("assistant", "a")]
    for i in (0, 1, 3, 4):
        assert source.sizes().characters[i] == characters(source[i])
        assert source.sizes().images[i] == len(source[i].images)


def test_a_file_that_changes_is_noticed(tmp_path):
    path = tmp_path / "set.json"
    path.write_bytes(as_json([record(i) for i in range(3)], lines=True))
    source = LlavaJson(path)
    path.write_bytes(as_json([record(i) for i in range(4)], lines=True))
    with pytest.raises(ValueError, match=r"set.json was changed while it was in use") as raised:
        source[1]
    assert not isinstance(raised.value, BadSampleError)


def read_all(source):
    return [source[i] for i in range(len(source))]


@pytest.fixture
def every_source(tmp_path):
    """One source of each reader, with images."""
    made = [record(i) for i in range(6)]
    for i in range(6):
        (tmp_path / f"{i}-0.jpg").write_bytes(encoded())
    (tmp_path / "set.json").write_bytes(as_json(made, lines=False))
    members = [m for i in range(6) for m in ((f"{i}.json", json.dumps(made[i]).encode()), (f"{i}.jpg", encoded()))]
    write_tar(tmp_path / "set.tar", members)
    rows = datasets.Dataset.from_list([{**r, "image": {"bytes": encoded(), "path": None}} for r in made])
    rows.save_to_disk(tmp_path / "saved")
    (tmp_path / "mix.yaml").write_text("[{path: set.json}, {path: set.tar, cap: 3}, {path: saved}]")
    return [open_source(str(tmp_path / name)) for name in ("set.json", "set.tar", "saved", "mix.yaml")]


def test_workers_read_the_same_however_they_are_started(every_source):
    wanted = [read_all(source) for source in every_source]
    assert [len(samples) for samples in wanted] == [6, 6, 6, 15]
    assert all(open_image(image).size == (24, 16) for samples in wanted for s in samples for image in s.images)
    for start in ("fork", "spawn"):
        with multiprocessing.get_context(start).Pool(1) as pool:
            assert pool.map(read_all, every_source) == wanted


def test_a_copy_for_a_worker_holds_no_records(tmp_path):
    sizes = []
    for count in (1000, 2000):
        path = tmp_path / f"{count}.json"
        path.write_bytes(as_json([record(i) | {"text": "x" * 1000} for i in range(count)], lines=False))
        sizes.append(len(pickle.dumps(LlavaJson(path))))
    assert sizes[1] - sizes[0] < 1000 * 30


GROWTH = """
import sys
from cdistill.data import scan
from cdistill.data.llava import LlavaJson

scan.CHUNK = 1 << 16

def resident(field):
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith(field))

LlavaJson(sys.argv[1])
before = resident("VmHWM")
source = LlavaJson(sys.argv[2])
print(resident("VmHWM") - before, len(source))
"""


@pytest.mark.parametrize("lines", [False, True])
def test_memory_to_open_is_a_few_bytes_a_record(tmp_path, lines):
    for count in (100, 20_000):
        made = as_json([record(i) | {"text": "x" * 1000} for i in range(count)], lines=lines)
        (tmp_path / f"{count}.json").write_bytes(made)
    command = [sys.executable, "-c", GROWTH, tmp_path / "100.json", tmp_path / "20000.json"]
    out = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    growth, count = map(int, out.stdout.split())
    assert count == 20_000
    assert growth < 100 * count
