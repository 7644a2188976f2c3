"""`cdistill data show`: samples as people see them, with what is learned marked."""

import base64
import io
import json
import random
import re
import sys
from html import unescape
from html.parser import HTMLParser

import pytest
from PIL import Image

from cdistill.builtin import scenes
from cdistill.cli import main
from cdistill.data.show import choose

WORDS = (*scenes.COLOURS, *scenes.SHAPES)


@pytest.fixture
def made_up(tmp_path):
    """A file of records in the built-in task's words, and the records; the second has no image, the fourth is bad."""
    rng = random.Random(7)
    records = []
    for i in range(6):
        turns = []
        for _ in range(rng.randint(1, 3)):
            turns.append({"from": "human", "value": " ".join(rng.choices(WORDS, k=4))})
            turns.append({"from": "gpt", "value": " ".join(rng.choices(WORDS, k=rng.randint(1, 5)))})
        record = {"id": f"number{i}", "conversations": turns}
        if i != 1:
            Image.new("L", (40 + i, 30), i).save(tmp_path / f"{i}.png")
            record["image"] = f"{i}.png"
            turns[0]["value"] = "<image>\n" + turns[0]["value"]
        records.append(record)
    records[3]["image"] = "none.png"
    path = tmp_path / "set.json"
    path.write_text(json.dumps(records))
    return path, records


def answers(record):
    return [turn["value"] for turn in record["conversations"] if turn["from"] == "gpt"]


def learned(out):
    return re.findall(r"⟦(.*?)⟧", out, re.DOTALL)


def blocks(out, records):
    """What is printed about each record, by its id."""
    starts = sorted((out.index(record["id"]), record["id"]) for record in records if record["id"] in out)
    ends = [start for start, _ in starts[1:]] + [len(out)]
    return {id: out[start:end] for (start, id), end in zip(starts, ends, strict=True)}


def test_messages_as_they_are(made_up, capsys):
    path, records = made_up
    assert main(["data", "show", str(path), "-n", "6"]) == 0
    shown = blocks(capsys.readouterr().out, records)
    assert list(shown) == [record["id"] for record in records]
    for i, record in enumerate(records):
        text = shown[record["id"]]
        assert learned(text) == answers(record)
        assert all(turn["value"].split("\n")[-1] in text for turn in record["conversations"])
        assert (f"PNG, {40 + i} x 30, L" in text) == (i not in (1, 3))
        assert ("bad: missing image" in text) == (i == 3)
        assert str(path) in text


@pytest.mark.parametrize(
    ("template", "start", "end"),
    [("vicuna_v1", " ", "</s>"), ("chatml", "", "<|im_end|>"), ("plain", "", "\n")],
)
def test_a_template_without_a_processor(made_up, capsys, template, start, end):
    path, records = made_up
    assert main(["data", "show", str(path), "-n", "3", "--template", template]) == 0
    shown = blocks(capsys.readouterr().out, records)
    assert len(shown) == 3
    for record in records[:3]:
        found = [re.sub(r"\n    ", "\n", text) for text in learned(shown[record["id"]])]
        assert found == [start + answer + end for answer in answers(record)]


def test_tokens_of_a_processor(made_up, capsys):
    path, records = made_up
    assert main(["data", "show", str(path), "-n", "6", "--processor", "builtin:teacher"]) == 0
    shown = blocks(capsys.readouterr().out, records)
    visual = scenes.GRID**2
    for i, record in enumerate(records):
        if i == 3:
            assert "learned" not in shown[record["id"]]
            continue
        text = shown[record["id"]]
        total, images, marked = map(int, re.search(r"(\d+) tokens, (\d+) visual, (\d+) learned", text).groups())
        said = sum(len(turn["value"].replace("<image>", "").split()) for turn in record["conversations"])
        turns = len(record["conversations"])
        assert images == (0 if i == 1 else visual)
        assert marked == sum(len(answer.split()) + 1 for answer in answers(record))  # each is closed by </s>
        assert total == images + said + turns + turns // 2  # a word for who speaks before each turn
        assert [part.split() for part in learned(text)] == [[*answer.split(), "</s>"] for answer in answers(record)]
        assert (f"<image>({visual}) " in text) == (i != 1) == text.count("<image>")


def test_a_terminal_gets_colours_and_no_commands(tmp_path, capsys, monkeypatch):
    turns = [{"from": "human", "value": "hm\x1b[2J?"}, {"from": "gpt", "value": "so\rit\x07 is"}]
    path = tmp_path / "set.jsonl"
    path.write_text(json.dumps({"id": "a\x1b]0;x", "conversations": turns}))
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert main(["data", "show", str(path)]) == 0
    out = capsys.readouterr().out
    assert re.findall(r"\x1b[^m]*m", out) == ["\x1b[32m", "\x1b[0m"]
    assert r"hm\x1b[2J?" in out and r"so\rit\x07 is" in out and "\r" not in out and "\x07" not in out


class Page(HTMLParser):
    """What of a page is marked, the images in it, and what it would fetch."""

    def __init__(self, text):
        super().__init__()
        self.marked, self.images, self.fetched, self._inside = [], [], [], False
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self._inside = tag == "mark"
        for name, value in attributes:
            if name in ("src", "href"):
                (self.images if value.startswith("data:image/jpeg;base64,") else self.fetched).append(value)
        assert tag not in ("script", "link", "iframe")

    def handle_endtag(self, tag):
        self._inside = False

    def handle_data(self, data):
        if self._inside:
            self.marked.append(data)


def test_a_page_holds_everything(made_up, tmp_path, capsys):
    path, records = made_up
    records[0]["conversations"][1]["value"] = "<script>alert('&')</script>"
    path.write_text(json.dumps(records))
    page = tmp_path / "page.html"
    assert main(["data", "show", str(path), "-n", "6", "--html", str(page)]) == 0
    text = page.read_text(encoding="utf-8")
    found = Page(text)
    assert found.marked == ["marked", *(answer for record in records for answer in answers(record))]
    assert not found.fetched
    sizes = [Image.open(io.BytesIO(base64.b64decode(image.partition(",")[2]))).size for image in found.images]
    assert sizes == [(40 + i, 30) for i in (0, 2, 4, 5)]
    assert "missing image" in unescape(text)


def test_which_are_shown():
    assert choose(10, 4, None) == [0, 1, 2, 3]
    assert choose(3, 4, None) == choose(3, 4, 1) == [0, 1, 2]
    drawn = {tuple(choose(1000, 5, seed)) for seed in range(20)}
    assert len(drawn) == 20 and all(list(some) == sorted(set(some)) and len(some) == 5 for some in drawn)
    assert choose(1000, 5, 3) == choose(1000, 5, 3)


def test_a_mix_shows_samples_of_all_its_sources(made_up, tmp_path, capsys):
    _, records = made_up
    (tmp_path / "other.jsonl").write_text("nonsense\n" + json.dumps(records[1] | {"id": "last"}))
    (tmp_path / "mix.yaml").write_text("sources: [{path: set.json, cap: 1}, {path: other.jsonl}]")
    assert main(["data", "show", str(tmp_path / "mix.yaml")]) == 0
    out = capsys.readouterr().out
    assert len([record for record in records if record["id"] in out]) == 1
    assert "bad: unreadable JSON" in out and "last" in out and "other.jsonl" in out


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["set.json", "-n", "0"], "n must"),
        (["none.json"], "none.json"),
        (["set.json", "--template", "auto"], "--processor"),
        (["set.json", "--template", "x"], "vicuna_v1"),
        (["set.json", "--processor", "builtin:none"], "builtin:teacher"),
        (["set.json", "--html", "no/page.html"], "html"),
    ],
)
def test_mistakes_are_told_in_one_line(made_up, monkeypatch, capsys, arguments, told):
    monkeypatch.chdir(made_up[0].parent)
    assert main(["data", "show", *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1 and told in captured.err and not captured.out
