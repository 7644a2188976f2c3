"""Sets of Hugging Face datasets as samples: every form of file, streams, columns."""

import json
import pickle

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from data_files import characters, encoded, reason, spoken, turns
from PIL import Image

from cdistill.data.hub import HubDataset, load_hub
from cdistill.data.images import open_image
from cdistill.data.mix import open_source
from cdistill.data.samples import ImageBytes, ImageFile

PLAIN = [
    ({"conversations": turns("<image>\nwhat?", "this")}, None),
    ({"messages": [{"role": "user", "content": "<image>\nwhat?"}, {"role": "assistant", "content": "this"}]}, None),
    ({"question": "what?", "answer": "this"}, None),
    ({"query": "<image>\nwhat?", "response": "this", "text": "other"}, None),
    ({"q": "what?", "answer": "this", "caption": "other"}, {"question": "q"}),
    ({"caption": "this", "conversations": turns("no", "no")}, {"caption": "caption"}),
    ({"conversations": json.dumps(turns("<image>\nwhat?", "this"))}, None),
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
    stream = datasets.Dataset.from_dict({"image": [b"x", b"z"], "caption": ["y", "y"]}).to_iterable_dataset()
    with pytest.raises(ValueError, match="size must be given for rows"):
        HubDataset(stream, name="rows")
    source = HubDataset(stream, size=5, name="rows")
    assert spoken(source[0]) == [("user", "<image>"), ("assistant", "y")]
    assert [source[i].images[0].data for i in (1, 2, 4, 3)] == [b"z", b"x", b"x", b"z"], "it begins again at its end"


def test_rows_that_are_bad(tmp_path):
    rows = {"image": ["a.jpg", None, "../a.jpg", "a.jpg"], "caption": ["x", "x", "x", " "]}
    source = HubDataset(datasets.Dataset.from_dict(rows), images=tmp_path, name="rows")
    assert source[0].images == (ImageFile(tmp_path / "a.jpg"),)
    assert [reason(source, i) for i in (1, 2, 3)] == ["image count", "image outside its root", "empty answer"]
    assert source.sizes().images.tolist() == [1, 0, 1, 1]
    assert reason(HubDataset(datasets.Dataset.from_dict(rows), name="rows"), 0) == "bad image path"


@pytest.mark.parametrize("turns", [{"from": ["human", "gpt"], "value": ["q"]}, '[{"from": "human"', "[" * 10_000, None])
def test_turns_that_cannot_be_read_are_bad_samples(turns):
    data = datasets.Dataset.from_list([{"conversations": turns, "id": "x7"}])
    source = HubDataset(data, columns={"conversations": "conversations"}, name="rows")
    assert reason(source, 0) == "not a record"
    assert source.sizes().characters.tolist() == [0]
    assert source.record(0) == {"conversations": turns, "id": "x7"}


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


@pytest.mark.parametrize("streaming", [False, True])
def test_files_that_cannot_be_read_are_told_in_one_line(tmp_path, monkeypatch, streaming):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    datasets.Dataset.from_dict({"text": [f"words {i}" for i in range(500)]}).to_parquet(tmp_path / "whole.parquet")
    whole = (tmp_path / "whole.parquet").read_bytes()
    (tmp_path / "cut.parquet").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "damaged.parquet").write_bytes(whole[:4] + bytes(len(whole) // 2) + whole[4 + len(whole) // 2 :])
    (tmp_path / "bytes.csv").write_bytes(b"text\n\xff\xfe")
    (tmp_path / "saved").mkdir()
    (tmp_path / "saved" / "state.json").write_text("{")
    for name in ("cut.parquet", "damaged.parquet", "bytes.csv", "saved"):
        with pytest.raises(ValueError) as raised:
            source = HubDataset(load_hub(str(tmp_path / name), streaming=streaming), size=500, name="rows")
            [source[i] for i in range(500)]
        assert "\n" not in str(raised.value)
        if not streaming or name in ("cut.parquet", "saved"):
            assert str(tmp_path / name) in str(raised.value)


@pytest.mark.parametrize(
    ("texts", "words"),
    [
        (["question,answer\nHow many?,One.,unsure\n"], "its rows have 3 values, its header names 2 columns"),
        (["question,answer,answer\nHow many?,One.,Two.\n"], "has the column 'answer' twice"),
        (["question,answer\nA?,b\n", "question,answer,image\nC?,d,e.png\n"], "has columns question, answer, image"),
    ],
)
def test_csv_that_pandas_would_read_otherwise_is_refused(tmp_path, texts, words):
    """It would take the question for a row number, rename a column, and leave one out that the first file has not."""
    for i, text in enumerate(texts):
        (tmp_path / f"{i}.csv").write_text(text)
    with pytest.raises(ValueError, match=words) as raised:
        load_hub(str(tmp_path / "*.csv"), streaming=True)
    assert "\n" not in str(raised.value)


def test_a_saved_set_without_the_split(tmp_path):
    datasets.DatasetDict(val=datasets.Dataset.from_dict({"text": ["x"]})).save_to_disk(tmp_path / "saved")
    with pytest.raises(ValueError, match="has no split 'train', it has val"):
        load_hub(str(tmp_path / "saved"))


@pytest.mark.parametrize("streaming", [False, True])
def test_names_on_the_hub_are_asked_for_without_their_code(monkeypatch, streaming):
    rows = datasets.Dataset.from_dict({"image": [b"x"], "caption": ["y"]})
    asked = []

    def load_dataset(*arguments, **options):
        asked.append((arguments, options))
        return rows.to_iterable_dataset() if options["streaming"] else rows

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    size = 1 if streaming else None
    source = open_source("hf:owner/set-1.5", config="small", split="val[:5]", streaming=streaming, size=size)
    assert asked == [(("owner/set-1.5", "small"), {"split": "val[:5]", "streaming": streaming})]
    assert source.name == "set-1.5" and spoken(source[0])[1] == ("assistant", "y")
    with pytest.raises(ValueError, match="size must be at least 1"):
        open_source("hf:owner/set", streaming=streaming, size=0)


# What files say of their own columns.

IN_BYTES = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])
TEXT = {"_type": "Value", "dtype": "string"}
NESTED = {
    "alone": lambda value, kind, feature: (value, kind, feature),
    "List": lambda value, kind, feature: ([value], pyarrow.list_(kind), {"_type": "List", "feature": feature}),
    "Sequence": lambda value, kind, feature: ([value], pyarrow.list_(kind), {"_type": "Sequence", "feature": feature}),
    "LargeList": lambda value, kind, feature: (
        [value],
        pyarrow.large_list(kind),
        {"_type": "LargeList", "feature": feature},
    ),
    "[ ]": lambda value, kind, feature: ([value], pyarrow.list_(kind), [feature]),
    "{ }": lambda value, kind, feature: ({"a": value}, pyarrow.struct([("a", kind)]), {"a": feature}),
    "turns": lambda value, kind, feature: (
        [{"from": "human", "value": value}],
        pyarrow.list_(pyarrow.struct([("from", pyarrow.string()), ("value", kind)])),
        {"_type": "List", "feature": {"from": TEXT, "value": feature}},
    ),
    "lists of turns": lambda value, kind, feature: (
        {"from": ["human"], "value": [value]},
        pyarrow.struct([("from", pyarrow.list_(pyarrow.string())), ("value", pyarrow.list_(kind))]),
        {"_type": "Sequence", "feature": {"from": TEXT, "value": feature}},
    ),
}
KINDS = [
    kind for kind in ("Image", "Audio", "Video", "Pdf", "Nifti") if hasattr(datasets, kind)
]  # of old datasets fewer
CLAIMS = [
    *((kind, "alone", decode) for kind in KINDS for decode in (None, 1)),
    *(("Image", "alone", decode) for decode in (True, "yes", [1])),
    *(("Image", nesting, decode) for nesting in NESTED if nesting != "alone" for decode in (None, 1)),
]


def write_rows(path, columns, said):
    """One row whose schema has ``said`` as what datasets wrote of it."""
    table = pyarrow.table(columns).replace_schema_metadata({"huggingface": said})
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(table, path)
    else:
        with pyarrow.OSFile(str(path), "wb") as file, pyarrow.ipc.new_stream(file, table.schema) as stream:
            stream.write_table(table)
    return path


def features(**columns):
    return json.dumps({"info": {"features": columns}})


@pytest.fixture
def reached(tmp_path, monkeypatch):
    """Files that Python opens and addresses that it looks for, while sets are read."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    found, real = [], open

    def look(name, *rest, **options):
        found.append(str(name))
        return real(name, *rest, **options)

    def connect(host, *rest, **options):
        found.append(str(host))
        raise OSError("no net")

    monkeypatch.setattr("builtins.open", look)
    monkeypatch.setattr("socket.getaddrinfo", connect)
    monkeypatch.setattr("socket.socket.connect", lambda self, address: connect(address))
    return found


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(("kind", "nesting", "decode"), CLAIMS)
def test_what_a_column_claims_to_be_is_not_opened(tmp_path, reached, kind, nesting, decode, streaming):
    secret = tmp_path / "secret.png"
    secret.write_bytes(encoded("PNG"))
    for number, place in enumerate((str(secret), "http://images.example/x.png")):
        feature = {"_type": kind} | ({} if decode is None else {"decode": decode})
        value, stored, feature = NESTED[nesting]({"bytes": None, "path": place}, IN_BYTES, feature)
        columns = {"question": pyarrow.array([value], stored), "answer": pyarrow.array(["a"])}
        name = f"{number}.{'arrow' if streaming else 'parquet'}"
        path = write_rows(tmp_path / name, columns, features(question=feature, answer=TEXT))
        source = HubDataset(load_hub(str(path), streaming=streaming), size=1, name="rows")
        assert reason(source, 0) in ("not a record", "unknown role")
        assert source.unread().records == 1 and source.record(0)["answer"] == "a"
        source.sizes()
    assert not [each for each in reached if each == str(secret) or "example" in each or "amazonaws" in each]


@pytest.mark.parametrize(
    "said",
    [
        *("{", "5", "[" * 100_000, b"\xff", features()[:-1], json.dumps({"info": {"features": "x"}})),
        *(json.dumps({"info": {"features": [1]}}), features(question=None, answer=TEXT)),
        *(features(question={"_type": kind}, answer=TEXT) for kind in ("Nope", "Features", "DatasetInfo", 5)),
        features(question={"_type": "Value", "dtype": "boom"}, answer=TEXT),
        features(question={"_type": "ClassLabel", "names_file": "/etc/passwd"}, answer=TEXT),
    ],
)
def test_what_a_file_says_of_its_columns_and_cannot_be_is_one_line(tmp_path, reached, said):
    path = write_rows(tmp_path / "rows.arrow", {"question": ["q"], "answer": ["a"]}, said)
    with pytest.raises(ValueError, match=r"rows\.arrow cannot be read: [^\n]+$"):
        load_hub(str(path))
    assert "/etc/passwd" not in reached


STATE = {"_fingerprint": "x", "_format_columns": None, "_format_kwargs": {}, "_format_type": None, "_split": "train"}


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        *(("state.json", text, "cannot be read") for text in ("{", "[]", "{}", '{"_data_files": 5}')),
        *(
            ("state.json", json.dumps(STATE | {"_data_files": [{"filename": name}]}), "lies out of its folder")
            for name in ("/etc/hosts", "../rows.arrow", "a/../../rows.arrow")
        ),
        *(("dataset_info.json", text, "cannot be read") for text in ("{", "[]", '{"features": 5}')),
        ("dataset_dict.json", '{"splits": ["../other"]}', "lies out of its folder"),
    ],
)
def test_saved_sets_whose_lists_are_odd_are_one_line(tmp_path, reached, name, content, words):
    write_rows(tmp_path / "rows.arrow", {"question": ["q"], "answer": ["a"]}, "{}")
    folder = tmp_path / "saved"
    datasets.Dataset.from_list([{"question": "q", "answer": "a"}]).save_to_disk(folder)
    (folder / name).write_text(content)
    with pytest.raises(ValueError, match=rf"^[^\n]*{words}[^\n]*$"):
        load_hub(str(folder))


def test_code_beside_a_set_is_not_run(tmp_path, reached):
    folder = tmp_path / "rows"
    folder.mkdir()
    write_rows(folder / "rows.parquet", {"question": ["q"], "answer": ["a"]}, "{}")
    (folder / "rows.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    (folder / "README.md").write_text("---\nconfigs:\n- data_files: http://images.example/x.parquet\n---\n")
    assert HubDataset(load_hub(str(folder)), name="rows").record(0)["question"] == "q"
    assert not (tmp_path / "ran").exists() and not [each for each in reached if "example" in each]
