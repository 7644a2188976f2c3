"""Records of every usual layout mean the same in every form of file, and what no sample is made of is named."""

import base64
import itertools
import json
import math

import datasets
import numpy as np
import pyarrow as arrow
import pytest
from data_files import characters, encoded, reason, spoken, turns, write_tar
from hypothesis import given, settings
from hypothesis import strategies as st

from cdistill.data import records as reading
from cdistill.data.fields import is_blank
from cdistill.data.hub import HubDataset
from cdistill.data.llava import LlavaJson
from cdistill.data.mix import open_source
from cdistill.data.records import measure
from cdistill.data.samples import BadSampleError, ImageFile

BLANK = [None, "", "  ", "\n", [], [None], [""], [None, " "], math.nan, {"bytes": None, "path": None}, [math.nan]]
words = st.text(st.sampled_from("ab é漢"), min_size=1, max_size=6).map(lambda text: "w" + text)
pairs = st.tuples(words, words)


@st.composite
def said(draw):
    """What a record says, however it is laid out: system, earlier pairs, question, answer, number of images."""
    return {
        "system": draw(st.none() | words),
        "history": draw(st.lists(pairs, max_size=2)),
        "pair": draw(pairs),
        "images": draw(st.integers(0, 2)),
    }


def expected(of):
    marks = "<image>\n" * of["images"]
    found = [("system", of["system"])] if of["system"] else []
    for i, (question, answer) in enumerate([*of["history"], of["pair"]]):
        found += [("user", (marks if not i else "") + question), ("assistant", answer)]
    return found


def llava(of):
    """LLaVA's, with every mark in the text."""
    texts = [text for pair in [*of["history"], of["pair"]] for text in pair]
    texts[0] = "<image>\n" * of["images"] + texts[0]
    return {"conversations": turns(*texts)} | ({"system": of["system"]} if of["system"] else {})


def sharegpt(of):
    made = llava(of)
    system = [{"from": "system", "value": made.pop("system")}] if of["system"] else []
    return made | {"conversations": system + made["conversations"]}


def chat(of):
    """Messages of plain text, whose images are marked nowhere."""
    roles = {"human": "user", "gpt": "assistant"}
    without = sharegpt(of | {"images": 0})["conversations"]
    return {"messages": [{"role": roles.get(t["from"], t["from"]), "content": t["value"]} for t in without]}


def parts(of):
    made = chat(of)["messages"]
    for message in made:
        message["content"] = [{"type": "text", "text": message["content"]}]
    first = next(m for m in made if m["role"] == "user")
    marks = [[{"type": "image"}, {"type": "text", "text": "\n"}] for _ in range(of["images"])]
    first["content"] = [*itertools.chain(*marks), *first["content"]]
    return {"messages": made}


def swift(of):
    question, answer = of["pair"]
    return {"query": question, "response": answer, "history": [list(pair) for pair in of["history"]]} | (
        {"system": of["system"]} if of["system"] else {}
    )


def alpaca(of):
    made = swift(of)
    return made | {"instruction": made.pop("query"), "output": made.pop("response"), "input": ""}


def completion(of):
    """TRL's, of which only the completion is learned."""
    made = chat(of)["messages"]
    return {"prompt": made[:-1], "completion": made[-1:]}


LAYOUTS = [llava, sharegpt, chat, parts, swift, alpaca, completion]


def with_images(record, of, key):
    names = [f"{n}.png" for n in range(of["images"])]
    if key == "image_0":
        return record | {f"image_{n}": name for n, name in enumerate(names)}
    return record | ({key: names if key == "images" or len(names) > 1 else names[0]} if names else {})


@settings(max_examples=150, deadline=None, derandomize=True)
@given(said(), st.sampled_from(LAYOUTS), st.sampled_from(["image", "images", "image_0"]))
def test_every_layout_is_read_as_the_same_conversation(of, layout, key):
    record = with_images(layout(of), of, key)
    sample = reading.read_record(record, ImageFile, id="7", place="here")
    assert spoken(sample) == expected(of)
    assert sample.images == tuple(ImageFile(f"{n}.png") for n in range(of["images"]))
    learned = [message.learned for message in sample.messages if message.role == "assistant"]
    assert learned == [layout is not completion] * (len(learned) - 1) + [True]
    assert measure(record) == (characters(sample), of["images"], [])


@settings(max_examples=100, deadline=None, derandomize=True)
@given(said(), st.sampled_from(LAYOUTS), st.sampled_from(["image", "images", "image_1"]), st.sampled_from(BLANK))
def test_all_forms_of_no_image_mean_none(of, layout, key, blank):
    of = of | {"images": 0}
    sample = reading.read_record(layout(of) | {key: blank}, ImageFile, id="7", place="here")
    assert spoken(sample) == expected(of) and not sample.images
    assert measure(layout(of) | {key: blank}).images == 0


COLUMNS = {
    "string": (arrow.string(), "a.png", [None, "", "  "]),
    "large_string": (arrow.large_string(), "a.png", [None, "", "  "]),
    "list": (arrow.list_(arrow.string()), ["a.png"], [None, [], [None], ["", None]]),
    "binary": (arrow.binary(), encoded("PNG"), [None]),
    "struct": (
        arrow.struct({"bytes": arrow.binary(), "path": arrow.string()}),
        {"bytes": encoded("PNG"), "path": None},
        [None, {"bytes": None, "path": None}, {"bytes": None, "path": ""}],
    ),
    "null": (arrow.null(), None, [None]),
    "nan": (arrow.float64(), None, [None, math.nan]),
}


@pytest.mark.parametrize("kind", COLUMNS)
def test_rows_without_an_image_count_as_such_before_they_are_read(tmp_path, kind):
    of, image, blanks = COLUMNS[kind]
    values = [value for blank in blanks for value in ((image, blank) if image else (blank,))]
    rows = {"question": [f"q{i}" for i in range(len(values))], "answer": ["a"] * len(values)}
    table = arrow.table({**rows, "image": arrow.chunked_array([arrow.array([v], of) for v in values], of)})
    source = HubDataset(datasets.Dataset(table), images=tmp_path, name="rows")
    there = [int(not is_blank(value)) for value in values]
    assert source.sizes().images.tolist() == there == [len(source[i].images) for i in range(len(values))]


@pytest.mark.parametrize("form", ["json", "jsonl", "csv", "parquet", "arrow"])
def test_blank_names_are_no_images_in_every_file(tmp_path, monkeypatch, form):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    rows = [{"image": "ok.png" if i % 2 else "", "question": f"q{i}", "answer": f"{i}"} for i in range(6)]
    path = tmp_path / f"set.{form}"
    if form in ("json", "jsonl"):
        path.write_text(json.dumps(rows) if form == "json" else "".join(json.dumps(row) + "\n" for row in rows))
    elif form == "arrow":
        datasets.Dataset.from_list(rows).save_to_disk(tmp_path / "made")
        path = next((tmp_path / "made").glob("*.arrow"))
    else:
        getattr(datasets.Dataset.from_list(rows), f"to_{form}")(path)
    source = open_source(str(path), images=str(tmp_path))
    assert source.sizes().images.tolist() == [0, 1] * 3
    assert [spoken(source[i]) for i in (0, 1)] == [
        [("user", "q0"), ("assistant", "0")],
        [("user", "<image>\nq1"), ("assistant", "1")],
    ]
    assert not source.unread().keys


def test_alpacas_input_is_read_after_the_instruction():
    made = {"instruction": "Add.", "input": "4 and 8", "output": 12}
    sample = reading.read_record(made, ImageFile, id="", place="here")
    assert spoken(sample) == [("user", "Add.\n4 and 8"), ("assistant", "12")]
    alone = reading.read_record({"input": "2 + 2", "output": "4"}, ImageFile, id="", place="here")
    assert spoken(alone) == [("user", "2 + 2"), ("assistant", "4")]


@pytest.mark.parametrize(
    "part",
    [
        {"type": "image_url", "image_url": {"url": "URI"}},
        {"type": "image_url", "image_url": "URI"},
        {"type": "image", "image": "URI"},
        {"type": "image", "url": "URI"},
        {"image": "URI"},
        {"type": "image", "base64": "DATA"},
        {"type": "image", "text": None, "image": {"bytes": b"BYTES", "path": None}},
    ],
)
def test_images_in_the_parts_of_messages(tmp_path, part):
    data = encoded("PNG")
    text = base64.b64encode(data).decode()
    filled = json.loads(
        json.dumps(part, default=lambda b: "BYTES")
        .replace("URI", f"data:image/png;base64,{text}")
        .replace("DATA", text)
    )
    if filled.get("image") == {"bytes": "BYTES", "path": None}:
        filled["image"]["bytes"] = data
    said = [{"role": "user", "content": [filled, {"type": "text", "text": "what?"}]}]
    said.append({"role": "assistant", "content": [{"type": "text", "text": "x"}]})
    if part.get("image") != {"bytes": b"BYTES", "path": None}:
        (tmp_path / "set.json").write_text(json.dumps([{"messages": said}]))
        sample = LlavaJson(tmp_path / "set.json")[0]
    else:
        sample = HubDataset(datasets.Dataset.from_list([{"messages": said}]), name="rows")[0]
    assert spoken(sample) == [("user", "<image>what?"), ("assistant", "x")]
    assert [image.data for image in sample.images] == [data]


@pytest.mark.parametrize("uri", ["data:image/png;base64,####", "data:image/png,abc", "data:"])
def test_data_uris_that_hold_no_base64_are_bad_samples(tmp_path, uri):
    (tmp_path / "set.json").write_text(json.dumps([{"image": uri, "conversations": turns("<image>q", "a")}]))
    assert reason(LlavaJson(tmp_path / "set.json"), 0) == "unreadable image"


@pytest.mark.parametrize("key", ["video", "videos", "audio", "audios"])
@pytest.mark.parametrize("blank", [False, True])
def test_a_sample_about_a_video_or_a_sound_is_bad(key, blank):
    record = {key: [None] if blank else ["clip"], "conversations": turns("What?", "that")}
    if blank:
        assert spoken(reading.read_record(record, ImageFile, id="", place="x"))[1] == ("assistant", "that")
        return
    with pytest.raises(BadSampleError, match="x: video or audio"):
        reading.read_record(record, ImageFile, id="", place="x")


@pytest.mark.parametrize(
    ("turn", "learned"),
    [({}, True), ({"weight": 1}, True), ({"weight": 0}, False), ({"loss": False}, False), ({"train": True}, True)],
)
def test_turns_of_weight_0_are_not_learned(turn, learned):
    made = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", **turn}]
    said = [*made, {"role": "user", "content": "q"}, {"role": "assistant", "content": "b"}]
    sample = reading.read_record({"messages": said}, ImageFile, id="", place="x")
    assert [m.learned for m in sample.messages if m.role == "assistant"] == [learned, True]
    if not learned:
        with pytest.raises(BadSampleError, match="nothing to learn"):
            reading.read_record({"messages": made}, ImageFile, id="", place="x")
    with pytest.raises(BadSampleError, match="weight of a turn"):
        made[1]["weight"] = 0.5
        reading.read_record({"messages": made}, ImageFile, id="", place="x")


def test_names_of_classes_are_learned_and_not_their_numbers():
    features = datasets.Features(
        {"question": datasets.Value("string"), "answer": datasets.ClassLabel(names=["cat", "dog"])}
    )
    data = datasets.Dataset.from_dict({"question": ["which?"] * 2, "answer": [1, 0]}, features=features)
    assert [spoken(HubDataset(data, name="rows")[i])[1] for i in (0, 1)] == [("assistant", "dog"), ("assistant", "cat")]
    stream = HubDataset(data.to_iterable_dataset(), size=2, name="rows")
    assert spoken(stream[0])[1] == ("assistant", "dog")


ODD_KEYS = st.dictionaries(
    st.sampled_from(["source", "model", "tools", "chosen", "rejected", "video_id", "überfluss", "score"]),
    st.sampled_from(["x", 0, False, ["y"], {"z": 1}, *BLANK]),
    max_size=4,
)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.lists(st.tuples(said(), st.sampled_from(LAYOUTS), ODD_KEYS), min_size=1, max_size=5))
def test_what_is_not_read_is_named_with_its_count(tmp_path_factory, made):
    folder = tmp_path_factory.mktemp("unread")
    (folder / "set.jsonl").write_text(
        "".join(json.dumps(more | with_images(layout(of), of, "image")) + "\n" for of, layout, more in made)
    )
    found = LlavaJson(folder / "set.jsonl").unread()
    wanted: dict[str, int] = {}
    for _, _, more in made:
        for key, value in more.items():
            if not is_blank(value):
                wanted[key] = wanted.get(key, 0) + 1
    assert dict(found.keys) == wanted and found.records == len(made)
    assert all(f"{key} ({count})" in str(found) for key, count in wanted.items())


def test_what_turns_and_parts_say_besides_is_named_too(tmp_path):
    said = [
        {"role": "user", "content": [{"type": "text", "text": "q", "cache": 1}], "name": "Bo"},
        {"role": "assistant", "content": "a", "tool_calls": [{"id": 1}]},
    ]
    first = turns("no", "q", "a", says=("gpt", "human", "gpt"))[0:1] + turns("q", "a")
    records = [{"messages": said, "conversations": None}, {"conversations": first, "messages": said}]
    (tmp_path / "set.json").write_text(json.dumps(records))
    assert dict(LlavaJson(tmp_path / "set.json").unread().keys) == {
        "messages[].content[].cache": 1,
        "messages[].name": 1,
        "messages[].tool_calls": 1,
        "conversations: an answer before the first question": 1,
        "messages": 1,
    }


def test_columns_and_members_that_are_not_read_are_named(tmp_path):
    rows = {"question": ["q"] * 4, "answer": ["a"] * 4, "text": ["t", None, "", "t"], "source": ["s", " ", None, "s"]}
    data = datasets.Dataset.from_dict(rows)
    found = HubDataset(data, name="rows").unread()
    assert dict(found.keys) == {"text": 2, "source": 2} and found.records == 4
    stream = HubDataset(data.to_iterable_dataset(), size=4, name="rows").unread()
    assert dict(stream.keys) == {"text": 1, "source": 1} and stream.records == 1
    given_columns = HubDataset(data, columns={"question": "source", "answer": "answer"}, name="rows").unread()
    assert dict(given_columns.keys) == {"question": 4, "text": 2}
    members = [("a.json", json.dumps({"caption": "c", "url": "u"}).encode()), ("a.jpg", b"1"), ("a.cls", b"5")]
    write_tar(tmp_path / "x.tar", [*members, ("b.txt", b"c"), ("b.png", b"2")])
    source = open_source(str(tmp_path / "x.tar"))
    assert dict(source.unread().keys) == {"url": 1, "*.cls": 1} and source.unread(1).records == 1


def test_a_wide_struct_of_turns_and_images_deep_inside_stay_as_they_are():
    data = encoded("PNG")
    content = [{"type": "image", "image": {"bytes": data, "path": None}, "text": None}, {"type": "text", "text": "q"}]
    features = datasets.Features(
        {
            "messages": datasets.List(
                {
                    "role": datasets.Value("string"),
                    "content": datasets.List(
                        {"type": datasets.Value("string"), "image": datasets.Image(), "text": datasets.Value("string")}
                    ),
                }
            )
        }
    )
    answer = [{"type": "text", "text": "a", "image": None}]
    messages = [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]
    rows = datasets.Dataset.from_list([{"messages": messages}], features=features)
    source = HubDataset(rows, name="rows")
    assert [image.data for image in source[0].images] == [data]
    assert source.sizes().images.tolist() == [1] and not source.unread().keys
    assert np.array_equal(source.sizes().characters, [2])
