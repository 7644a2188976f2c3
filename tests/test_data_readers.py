"""Readers of data sets: what they give is what stands in the files, in every form, place and process."""

import itertools
import json
import multiprocessing
import pickle
import subprocess
import sys
import tarfile
from pathlib import Path

import datasets
import numpy as np
import pytest
from data_files import as_json, encoded, record, records, turns, write_tar
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from cdistill.data import scan
from cdistill.data.hub import HubDataset, load_hub
from cdistill.data.images import open_image
from cdistill.data.llava import LlavaJson
from cdistill.data.mix import Mix, Order, Part, open_source
from cdistill.data.samples import BadSampleError, ImageBytes, ImageFile, Mark
from cdistill.data.shards import TarShards, find_shards

ROOT = Path(__file__).parent.parent


def spoken(sample):
    """Roles and texts, marks written out."""
    return [(m.role, "".join(p if isinstance(p, str) else "<image>" for p in m.parts)) for m in sample.messages]


def characters(sample):
    return sum(len(p) for m in sample.messages for p in m.parts if isinstance(p, str))


def expected(record):
    roles = {"human": "user", "gpt": "assistant"}
    said = [(roles[turn["from"]], turn["value"]) for turn in record["conversations"]]
    return said[1:] if said[0][0] == "assistant" else said


def reason(source, index):
    with pytest.raises(BadSampleError) as raised:
        source[index]
    assert "\n" not in str(raised.value)
    return raised.value.reason


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


def test_bad_lines_are_bad_samples_with_line_and_column(tmp_path):
    good = json.dumps(record(1, 0))
    cut = good[:20] + "\n"
    (tmp_path / "set.txt").write_text(
        good + "\n\n" + '  {"id": nope}\n' + good + "\r\n" + cut + "9" * 5000 + "\n" + cut
    )
    source = LlavaJson(tmp_path / "set.txt")
    assert [spoken(source[i])[1][1] for i in (0, 2)] == ["it is 1"] * 2
    assert [reason(source, i) for i in (1, 3, 4, 5)] == ["unreadable JSON"] * 4
    with pytest.raises(BadSampleError, match=r"set.txt\[1\] line 3 column 10: Expecting value"):
        source[1]
    assert list(source.sizes().characters[[1, 3]]) == [0, 0]


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
        ({"image": "", "conversations": turns("<image>q", "a")}, "bad image path"),
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
    with pytest.raises(BadSampleError, match=r"set.json\[1\] line"):
        source[1]


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
        {"conversations": [system, *turns("greeting", says=("gpt",)), *turns("q", "a")], "image": None},
    ]
    (tmp_path / "set.jsonl").write_bytes(as_json(made, lines=True))
    source = LlavaJson(tmp_path / "set.jsonl")
    assert spoken(source[0]) == [("system", "be brief"), ("user", "see <image> there"), ("assistant", "yes")]
    assert source[0].messages[1].parts == ("see ", Mark.IMAGE, " there")
    assert (source[1].images, source[1].id) == ((ImageFile(tmp_path / "b.jpg"),), "1")
    assert reason(source, 2) == "image count"
    assert spoken(source[3]) == [("system", "be brief"), ("user", "q"), ("assistant", "a")]
    for i in (0, 1, 3):
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


PLAIN = [
    ({"conversations": turns("<image>\nwhat?", "this")}, None),
    ({"messages": [{"role": "user", "content": "<image>\nwhat?"}, {"role": "assistant", "content": "this"}]}, None),
    ({"question": "what?", "answer": "this"}, None),
    ({"query": "<image>\nwhat?", "response": "this", "text": "other"}, None),
    ({"q": "what?", "answer": "this", "caption": "other"}, {"question": "q"}),
    ({"caption": "this", "conversations": turns("no", "no")}, {"caption": "caption"}),
    ({"said": turns("<image>\nwhat?", "this"), "question": "no", "answer": "no"}, {"conversations": "said"}),
]


@pytest.mark.parametrize(("text", "columns"), PLAIN)
def test_columns_are_found_or_named(text, columns):
    data = datasets.Dataset.from_list([{"image": {"bytes": b"x", "path": "a.jpg"}, "id": 7, **text}])
    data = data.cast_column("image", datasets.Image())
    source = HubDataset(data, columns=columns, name="rows")
    sample = source[0]
    asked = "<image>" if columns == {"caption": "caption"} else "<image>\nwhat?"
    assert spoken(sample) == [("user", asked), ("assistant", "this")]
    assert sample.images == (ImageBytes("rows[0]", b"x"),) and sample.id == "7"
    assert source.sizes().images.tolist() == [1]
    plain = {key: value for key, value in text.items() if isinstance(value, str)}
    if "conversations" in source.columns or plain.get("query"):
        assert source.sizes().characters.tolist() == [characters(sample)]


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (None, "say which hold conversations or question and answer or caption; there are image, x"),
        ({"caption": "y"}, "caption is 'y', there are image, x"),
        ({"captions": "x"}, "'captions' is none of conversations"),
        ({"question": "x"}, "say which hold"),
    ],
)
def test_columns_that_do_not_fit_are_refused(columns, message):
    data = datasets.Dataset.from_list([{"image": "a.jpg", "x": "y"}])
    with pytest.raises(ValueError, match=message):
        HubDataset(data, columns=columns, name="rows")


@pytest.mark.parametrize("form", ["parquet", "arrow", "json", "csv", "saved", "split", "folder"])
@pytest.mark.parametrize("streaming", [False, True])
def test_local_sets_of_datasets(tmp_path, monkeypatch, form, streaming):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    by_path = form in ("json", "csv")
    images = [encoded(seed) for seed in ("PNG", "JPEG", "GIF")]
    column = [f"{i}.img" if by_path else {"bytes": images[i], "path": None} for i in range(3)]
    for i in range(3):
        (tmp_path / f"{i}.img").write_bytes(images[i])
    rows = datasets.Dataset.from_dict({"image": column, "question": ["a", "b", "c"], "answer": ["007", "NA", "x"]})
    path = tmp_path / {"saved": "saved", "split": "saved", "folder": "files/x.parquet"}.get(form, f"set.{form}")
    path.parent.mkdir(exist_ok=True)
    if form == "arrow":
        rows.save_to_disk(tmp_path / "made")
        path = next((tmp_path / "made").glob("*.arrow"))
    elif form in ("saved", "split"):
        (rows if form == "saved" else datasets.DatasetDict(val=rows)).save_to_disk(path)
    else:
        getattr(rows, f"to_{'parquet' if form == 'folder' else form}")(path)
    path = path.parent if form == "folder" else path
    split = "val" if form == "split" else None
    options = {"streaming": True, "size": 3} if streaming else {}
    source = open_source(str(path), split=split, columns={"answer": "answer"}, images=str(tmp_path), **options)
    assert len(source) == 3
    order = [1, 1, 2, 0, 2, -1]  # on, again, and back
    for i in order:
        sample = source[i]
        assert spoken(sample) == [("user", "<image>\n" + "abc"[i]), ("assistant", ["007", "NA", "x"][i])]
        assert np.array_equal(open_image(sample.images[0]), open_image(ImageBytes("", images[i])))
    sizes = source.sizes()
    assert sizes is None if streaming else sizes.images.tolist() == [1, 1, 1]
    again = pickle.loads(pickle.dumps(source))
    assert spoken(again[2]) == spoken(source[2])


def test_streams_need_a_size_and_end_somewhere():
    stream = datasets.Dataset.from_dict({"image": [b"x"], "caption": ["y"]}).to_iterable_dataset()
    with pytest.raises(ValueError, match="size must be given for rows"):
        HubDataset(stream, name="rows")
    source = HubDataset(stream, size=2, name="rows")
    assert spoken(source[0]) == [("user", "<image>"), ("assistant", "y")]
    assert reason(source, 1) == "end of stream"


def test_rows_that_are_bad(tmp_path):
    rows = {"image": ["a.jpg", None, "../a.jpg", "a.jpg"], "caption": ["x", "x", "x", " "]}
    source = HubDataset(datasets.Dataset.from_dict(rows), images=tmp_path, name="rows")
    assert source[0].images == (ImageFile(tmp_path / "a.jpg"),)
    assert [reason(source, i) for i in (1, 2, 3)] == ["image count", "image outside its root", "empty answer"]
    assert source.sizes().images.tolist() == [1, 0, 1, 1]
    assert reason(HubDataset(datasets.Dataset.from_dict(rows), name="rows"), 0) == "bad image path"


def test_images_of_pil_and_lists_of_images():
    picture = Image.new("RGB", (3, 2), "red")
    features = datasets.Features({"images": datasets.List(datasets.Image()), "caption": datasets.Value("string")})
    data = datasets.Dataset.from_dict(
        {"images": [[picture, picture], []], "caption": ["two", "none"]}, features=features
    )
    source = HubDataset(data, name="rows")
    assert [open_image(image).getpixel((0, 0)) for image in source[0].images] == [(255, 0, 0)] * 2
    assert source.sizes().images.tolist() == [2, 0]

    def rows():
        yield {"image": picture, "caption": "one"}

    source = HubDataset(datasets.IterableDataset.from_generator(rows), size=1, name="rows")
    assert open_image(source[0].images[0]).size == (3, 2)


def test_a_saved_set_without_the_split(tmp_path):
    datasets.DatasetDict(val=datasets.Dataset.from_dict({"text": ["x"]})).save_to_disk(tmp_path / "saved")
    with pytest.raises(ValueError, match="has no split 'train', it has val"):
        load_hub(str(tmp_path / "saved"))


def test_tars_group_members_by_key(tmp_path):
    said = json.dumps(record(1, 2)).encode()
    members = [
        ("./a/1.jpg", b"one"),
        ("a/2.txt", "a birdŁs eye\n".encode()),
        ("a/1.json", said),
        ("a/2.b.PNG", b"two"),
        ("x/1.cls", b"5"),
        ("x/1.json", b'{"caption": "meta", "url": "http://x"}'),
        ("x/1.webp", b"three"),
        ("x/2.json", json.dumps(record(0, 0)).encode()),
        ("x/3.jpg", b"alone"),
        ("x/4.json", b'{"id": '),
    ]
    members += [(f"many.{n}.jpg", str(n).encode()) for n in (10, 9, 0)]
    members += [("many.jpg", b"first"), ("many.txt", b"caption")]
    write_tar(tmp_path / "set.tar", members)
    source = TarShards(tmp_path / "set.tar")
    assert source.name == "set" and len(source) == 7
    assert reason(source, 0) == "image count"  # two marks, one image
    assert spoken(source[1]) == [("user", "<image>"), ("assistant", "a birdŁs eye")]
    assert source[1].images == (ImageBytes(f"{tmp_path}/set.tar:a/2.b.PNG", b"two"),)
    assert source[1].id == "a/2" and source[1].place == f"{tmp_path}/set.tar:a/2"
    assert spoken(source[2])[1] == ("assistant", "meta")
    assert (source[3].id, source[3].images) == ("0", ())
    assert [reason(source, i) for i in (4, 5)] == ["not a record", "unreadable JSON"]
    assert [image.data for image in source[6].images] == [b"first", b"0", b"9", b"10"]
    assert source.sizes().images.tolist() == [1, 1, 1, 0, 1, 0, 4]
    assert source.sizes().characters[0] == len(said)
    with pytest.raises(IndexError):
        source[7]


def test_several_tars_by_pattern(tmp_path):
    for i in (8, 9, 10, 11):
        write_tar(tmp_path / f"s-{i:03d}.tar", [("k.txt", b"text"), ("k.jpg", str(i).encode())])
    wanted = [f"s-{i:03d}.tar" for i in (8, 9, 10, 11)]
    for pattern in ("s-{008..011}.tar", "s-*.tar", "", "s-0{0..1}{0..9}.tar"):
        if pattern.startswith("s-0{"):
            assert len(find_shards(str(tmp_path / pattern))) == 20
            continue
        source = open_source(str(tmp_path / pattern))
        assert [source[i].images[0].data for i in range(4)] == [b"8", b"9", b"10", b"11"]
        assert [path.name for path in find_shards(str(tmp_path / pattern))] == wanted
    with pytest.raises(ValueError, match=r"no such file: .*s-012.tar"):
        TarShards(tmp_path / "s-{011..012}.tar")
    with pytest.raises(ValueError, match="no tar at"):
        TarShards(tmp_path / "t-*.tar")


def test_long_names_in_every_form_of_tar(tmp_path):
    key = "d/" * 60 + "é" * 40
    for form in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        write_tar(tmp_path / "x.tar", [(key + ".txt", b"text"), (key + ".jpg", b"data")], format=form)
        source = TarShards(tmp_path / "x.tar")
        assert (source[0].id, source[0].images[0].data) == (key, b"data")


class Numbers:
    """A source of so many samples that nobody reads."""

    name = "numbers"

    def __init__(self, count, in_order=False):
        self.count, self.in_order = count, in_order

    def __len__(self):
        return self.count


parts = st.lists(
    st.tuples(st.integers(0, 12), st.sampled_from([0.5, 1.0, 2.0, 2.5, 0.3, 1 / 3]), st.booleans()),
    min_size=1,
    max_size=4,
)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(parts, st.integers(0, 2**40))
def test_every_sample_comes_as_often_as_its_weight_says(made, seed):
    mix = Mix([Part(Numbers(n, in_order), np.arange(n), w) for n, w, in_order in made], name="mix")
    if not sum(round(n * w) for n, w, _ in made):
        with pytest.raises(ValueError, match="mix has no samples"):
            Order(mix, seed)
        return
    order = Order(mix, seed)
    size = order.epoch_size
    epochs = [[order[e * size + i] for i in range(size)] for e in range(4)]
    assert epochs == [order.epoch(e).tolist() for e in range(4)]
    start = 0
    for n, w, in_order in made:
        mine = [[x - start for x in epoch if start <= x < start + n] for epoch in epochs]
        start += n
        for epoch in mine:
            assert len(epoch) == round(n * w)
            times = np.bincount(epoch, minlength=n)
            assert times.min(initial=99) >= int(w) or not n
            assert times.max(initial=0) <= int(w) + 1
            if in_order:
                assert sum(b < a for a, b in itertools.pairwise(epoch)) <= int(w)
        if w == 0.5 and n % 2 == 0:
            assert sorted(mine[0] + mine[1]) == list(range(n))
    numbers = [3 * size + size // 2, 1, 0, 2 * size]
    assert [pickle.loads(pickle.dumps(order))[i] for i in numbers] == [Order(mix, seed)[i] for i in numbers]


def test_orders_differ_by_epoch_and_seed_and_are_what_they_were():
    orders = [Order(Numbers(1000), seed).epoch(epoch).tolist() for seed in (0, 1) for epoch in (0, 1)]
    assert all(sorted(order) == list(range(1000)) for order in orders)
    assert len({tuple(order) for order in orders}) == 4
    assert np.mean([np.corrcoef(order, range(1000))[0, 1] ** 2 for order in orders]) < 0.01
    assert Order(Numbers(10), 0).epoch(0).tolist() == [3, 2, 1, 8, 6, 0, 7, 4, 5, 9]


def test_mix_of_files(tmp_path):
    (tmp_path / "sets" / "deep").mkdir(parents=True)
    (tmp_path / "sets" / "a.json").write_bytes(as_json([record(i) for i in range(10)], lines=False))
    (tmp_path / "sets" / "deep" / "b.json").write_bytes(as_json([record(i, 0) for i in range(4)], lines=True))
    write_tar(tmp_path / "c.tar", [("k.txt", b"text"), ("k.jpg", b"1")])
    text = """
sources:
  - {path: sets/a.json, images: pictures, cap: 3, weight: 2, name: first}
  - path: sets/deep/b.json
    images: {x: one, "": two}
  - {path: c.tar, weight: 0.5}
"""
    (tmp_path / "mix.yaml").write_text(text)
    mix = open_source(str(tmp_path / "mix.yaml"), seed=3)
    assert [part.source.name for part in mix.parts] == ["first", "b", "c"] and mix.name == "mix"
    assert len(mix) == 8 and Order(mix, 0).epoch_size == 6 + 4 + round(0.5)
    kept = mix.parts[0].kept.tolist()
    assert kept == sorted(set(kept)) and len(kept) == 3
    assert [mix[i].id for i in range(3)] == [str(i) for i in kept]
    assert mix[0].images[0].path == tmp_path / "pictures" / f"{kept[0]}-0.jpg"
    assert mix.locate(3) == (1, 0) and mix.locate(7) == (2, 0) and mix[-1].images[0].data == b"1"
    assert mix.sizes().images.tolist() == [1] * 3 + [0] * 4 + [1]
    others = {tuple(open_source(str(tmp_path / "mix.yaml"), seed=s).parts[0].kept) for s in range(20)}
    assert len(others) > 10
    assert np.array_equal(open_source(str(tmp_path / "mix.yaml"), seed=3).parts[0].kept, mix.parts[0].kept)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is no mix"),
        ("sources: []", "is no mix"),
        ("{source: []}", "unknown key 'source'"),
        ("{sources: [{path: a.json}], seed: 3}", "unknown key 'seed'"),
        ("[a.json]", "source 1: a source is a mapping with a path, got 'a.json'"),
        (
            "[{path: a.json}, {path: a.json, weigth: 2}]",
            "source 2: unknown key 'weigth', there are path, images, weight",
        ),
        ("[{path: a.json, weight: 0}]", "weight must be above 0"),
        ("[{path: a.json, weight: .nan}]", "weight must be above 0"),
        ("[{path: a.json, weight: '2'}]", "weight must be above 0"),
        ("[{path: a.json, cap: 1.5}]", "cap must be a whole number"),
        ("[{path: 5}]", "path must be a string"),
        ("[{path: none.json}]", "source 1: no such file"),
        ("[{path: mix.yaml}]", "a mix holds no mixes"),
        ("[{path: a.json", "is no YAML"),
        ("!!python/object/apply:os.system ['true']", "is no YAML"),
    ],
)
def test_mixes_that_are_refused(tmp_path, text, message):
    (tmp_path / "a.json").write_bytes(as_json([record(0)], lines=False))
    (tmp_path / "mix.yaml").write_text(text)
    with pytest.raises(ValueError) as raised:
        open_source(str(tmp_path / "mix.yaml"))
    assert message in str(raised.value) and "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("x.tar", {"images": "y"}, "images of tars lie within them"),
        ("x.tar", {"columns": {"caption": "y"}}, "columns is for sets of datasets"),
        ("x.yaml", {"split": "val"}, "split is for sets of datasets"),
        ("x.yaml", {"images": "y"}, "stand in the mix itself"),
        ("x.json", {"config": "y"}, "config is for names on the hub"),
        ("", {}, "is a folder without tars"),
        ("none.parquet", {}, "no such files"),
        ("x.xml", {"columns": {"caption": "y"}}, "datasets are read from .json"),
    ],
)
def test_sources_that_are_refused(tmp_path, name, options, message):
    for other in ("x.json", "x.yaml"):
        (tmp_path / other).write_text("[]")
    with pytest.raises(ValueError, match=message):
        open_source(str(tmp_path / name), **options)
