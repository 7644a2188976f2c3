"""Questions about held-out scenes in the files of published benchmarks, and training samples in LLaVA's, with PNG images.

So that readers, the runner and harnesses can be tried without a network. Names of images are relative to the folder that is
written. ``prompt.txt`` beside the files has the question in the words that the built-in models know, or those that
`cdistill.builtin.english` trains other models in.
"""

from __future__ import annotations

import io
import json
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from cdistill.builtin import english, questions, render, scenes
from cdistill.builtin.dataset import BuiltinDataset
from cdistill.builtin.scenes import COLOURS, GRID, RELATIONS, SHAPES, Scene, Thing
from cdistill.builtin.task import BuiltinTask
from cdistill.choices import MOST_DRAWN, require_count
from cdistill.data.samples import IMAGE_TOKEN
from cdistill.errors import InputError
from cdistill.files import building

LISTS, PEOPLE = 5, 10  # R-Bench's lists of question ids, and the people who answer a question of VQAv2
_ANSWER_TYPES = {"colour": "other", "location": "other", "existence": "yes/no", "count": "number"}


@dataclass(frozen=True)
class _Words:
    """How texts of the built-in task are written: as they are, or in plain English."""

    english: bool

    def question(self, text: str) -> str:
        return english.question(text) if self.english else text

    def answer(self, text: str) -> str:
        return english.answer(text) if self.english else text

    def captions(self, right: str, wrong: str) -> tuple[str, str]:
        return (english.caption(right), english.caption(wrong)) if self.english else (right, wrong)


def write(task: str, folder: Path, *, n: int = 100, seed: int = 0, plain_english: bool = False) -> int:
    """Write the files of a task into a folder, which appears when it is whole.

    Args:
        task: ``sugarcrepe``, ``winoground``, ``bivlc``, ``rbench``, ``vqa`` (VQAv2's two files), or one of training samples in
            LLaVA's form, ``samples.json``: ``captions`` or ``conversations``.
        folder: where to, new or empty.
        n: entries per sub-type, or samples.
        seed: of scenes, questions and pixel noise.
        plain_english: write English sentences, not the words of the built-in models.

    Returns:
        How many entries the files hold.

    Raises:
        ValueError: the folder is not empty, or n is not positive.
    """
    require_count("--n", n, MOST_DRAWN)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"{folder}: is there already; name a folder that is new or empty")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with building(folder) as part:
            (part / "images").mkdir()
            entries = _WRITERS[task](part, random.Random(f"{task}/{seed}"), n, _Words(plain_english))
            if not any((part / "images").iterdir()):
                (part / "images").rmdir()
    except OSError as error:
        raise InputError(f"{folder}: cannot be written ({error.strerror})") from None
    return entries


def _sugarcrepe(folder: Path, rng: random.Random, n: int, words: _Words) -> int:
    for subtype in questions.COMPOSITIONAL:
        entries = {}
        for i in range(n):
            scene, *captions = _captions(subtype, rng)
            right, wrong = words.captions(*captions)
            entries[str(i)] = {
                "filename": _picture(folder, f"{subtype}_{i}", scene, rng),
                "caption": right,
                "negative_caption": wrong,
            }
        _write_json(folder / f"{subtype}.json", entries)
    _write_prompt(folder, english.CHOICE if words.english else "which caption fits ? A {} B {}")
    return n * len(questions.COMPOSITIONAL)


def _winoground(folder: Path, rng: random.Random, n: int, words: _Words) -> int:
    lines: list[dict[str, Any]] = []
    for subtype, tag in (("swap_obj", "Object"), ("swap_att", "Relation")):
        for _ in range(n):
            first, second, captions = _two_scenes(subtype, rng)
            captions = words.captions(*captions)
            entry: dict[str, Any] = {"id": len(lines)}
            for k, scene in enumerate((first, second)):
                entry[f"caption_{k}"] = captions[k]
                entry[f"image_{k}"] = _picture(folder, f"ex_{len(lines)}_img_{k}", scene, rng).removesuffix(".png")
            lines.append(entry | {"tag": subtype, "secondary_tag": "", "num_main_preds": 1, "collapsed_tag": tag})
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "examples.jsonl").write_text(text, encoding="utf-8")
    if not words.english:  # else the benchmark's own words are as good
        _write_prompt(folder, "is there a {} ?")
    return len(lines)


def _bivlc(folder: Path, rng: random.Random, n: int, words: _Words) -> int:
    import pyarrow
    from pyarrow import parquet

    rows = []
    for subtype in questions.COMPOSITIONAL:
        for _ in range(n):
            first, second, captions = _two_scenes(subtype, rng)
            captions = words.captions(*captions)
            row: dict[str, Any] = {"image": _embedded(first, rng), "caption": captions[0]}
            row |= {"negative_caption": captions[1], "negative_image": _embedded(second, rng)}
            rows.append(row | dict(zip(("type", "subtype"), subtype.split("_"), strict=True)))
    parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "test-00000-of-00001.parquet")
    if not words.english:  # else the benchmark's own words are as good
        _write_prompt(folder, "is there a {} ?")
    return len(rows)


def _rbench(folder: Path, rng: random.Random, n: int, words: _Words) -> int:
    entries = []
    for i in range(n):
        scene, question = _question("existence", rng)
        image = _picture(folder, str(i), scene, rng)
        entries.append(
            {"question_id": i, "image": image, "text": words.question(question.text), "label": question.answer}
        )
    _write_json(folder / "image-level_filterd.json", entries)
    for number in range(1, LISTS + 1):
        ids = rng.sample(range(n), max(1, n // 2))
        _write_json(folder / f"nocaps_image-level_rel_ids_{number}.json", ids)
    return n


def _vqa(folder: Path, rng: random.Random, n: int, words: _Words) -> int:
    asked: list[dict[str, Any]] = []
    answered: list[dict[str, Any]] = []
    for subtype, kind in _ANSWER_TYPES.items():
        for _ in range(n):
            i = len(asked)
            scene, question = _question(subtype, rng)
            image = _picture(folder, str(i), scene, rng)
            text, answer = words.question(question.text), words.answer(question.answer)
            asked.append({"image_id": i, "image": image, "question": text, "question_id": i})
            said = [{"answer": answer, "answer_confidence": "yes", "answer_id": k} for k in range(1, PEOPLE + 1)]
            entry = {"question_type": subtype, "multiple_choice_answer": answer, "answers": said}
            answered.append({**entry, "image_id": i, "answer_type": kind, "question_id": i})
    _write_json(folder / "v2_OpenEnded_mscoco_val2014_questions.json", {"questions": asked})
    _write_json(folder / "v2_mscoco_val2014_annotations.json", {"annotations": answered})
    _write_prompt(folder, "{}")
    return len(asked)


def _samples(task: BuiltinTask, folder: Path, rng: random.Random, n: int, words: _Words) -> int:
    """Samples of the training split, an image and what is said about it."""
    data, records = BuiltinDataset(task, size=n, seed=rng.getrandbits(32)), []
    for i in range(n):
        messages = data.messages(i)
        image = messages[0]["content"].pop(0)["image"]
        image.save(folder / "images" / f"{i}.png")
        turns = []
        for message in messages:
            (part,), asked = message["content"], message["role"] == "user"
            text = words.question(part["text"]) if asked else words.answer(part["text"])
            turns.append({"from": "human" if asked else "gpt", "value": text})
        turns[0]["value"] = f"{IMAGE_TOKEN}\n{turns[0]['value']}"
        records.append({"id": str(i), "image": f"images/{i}.png", "conversations": turns})
    _write_json(folder / "samples.json", records)
    return n


_WRITERS: dict[str, Callable[[Path, random.Random, int, _Words], int]] = {
    "sugarcrepe": _sugarcrepe,
    "winoground": _winoground,
    "bivlc": _bivlc,
    "rbench": _rbench,
    "vqa": _vqa,
    "captions": partial(_samples, BuiltinTask(caption=1.0, sentences=2, turns=0)),
    "conversations": partial(_samples, BuiltinTask()),
}


def _question(subtype: str, rng: random.Random) -> tuple[Scene, questions.Question]:
    """A held-out scene and a question of a sub-type about it."""
    while True:
        scene = scenes.sample_scene(rng, held_out=True)
        question = questions.ask(scene, subtype, rng)
        if question is not None:
            return scene, question


def _captions(subtype: str, rng: random.Random) -> tuple[Scene, str, str]:
    """A held-out scene, a caption that is true of it and one that is not."""
    while True:
        scene = scenes.sample_scene(rng, held_out=True)
        pair = questions.caption_pair(scene, subtype, rng)
        if pair is not None:
            return scene, *pair


def _two_scenes(subtype: str, rng: random.Random) -> tuple[Scene, Scene, tuple[str, str]]:
    """Two held-out scenes that one or two changes lead between, and two captions of which each is true of one of them."""
    while True:
        scene, right, wrong = _captions(subtype, rng)
        changed = [other for other in _edited(scene) if holds(other, wrong) and not holds(other, right)]
        if not changed:
            continue
        twice = (other for other in _edited(rng.choice(changed)) if holds(other, wrong) and not holds(other, right))
        others = list(filter(scenes.is_held_out, changed)) or list(filter(scenes.is_held_out, twice))
        if others:
            return scene, rng.choice(others), (right, wrong)


def _edited(scene: Scene) -> Iterator[Scene]:
    """Scenes with one object moved or changed, or with two that swap places, colours or shapes."""
    for i, thing in enumerate(scene):
        changed = [replace(thing, colour=colour) for colour in COLOURS] + [replace(thing, shape=s) for s in SHAPES]
        changed += [replace(thing, row=cell // GRID, column=cell % GRID) for cell in range(GRID * GRID)]
        for new in changed:
            yield from _valid([*scene[:i], new, *scene[i + 1 :]])
        for j, other in enumerate(scene[:i]):
            rest = [each for k, each in enumerate(scene) if k not in (i, j)]
            for names in (("row", "column"), ("colour",), ("shape",)):
                one = replace(thing, **{name: getattr(other, name) for name in names})
                two = replace(other, **{name: getattr(thing, name) for name in names})
                yield from _valid([*rest, one, two])


def _valid(things: list[Thing]) -> Iterator[Scene]:
    """The scene of these objects, if no two look alike or share a cell."""
    if len({thing.name for thing in things}) == len({thing.place for thing in things}) == len(things):
        yield tuple(sorted(things))


def holds(scene: Scene, caption: str) -> bool:
    """Whether a caption of the kinds in `cdistill.builtin.questions` is true of a scene."""

    def named(name: str) -> list[Thing]:
        return [thing for thing in scene if name in (thing.name, thing.shape)]

    for relation in RELATIONS:
        first, found, second = caption.partition(f" {relation} ")
        if found:
            return any(a.relates(relation, b) for a in named(first) for b in named(second))
    return all(named(name) for name in caption.split(" and "))


def _png(scene: Scene, rng: random.Random) -> bytes:
    stream = io.BytesIO()
    pixels = render.render(scene, np.random.default_rng(rng.getrandbits(64)))
    render.to_image(pixels).save(stream, format="PNG")
    return stream.getvalue()


def _picture(folder: Path, name: str, scene: Scene, rng: random.Random) -> str:
    """Write a scene's picture; returns its name relative to the folder."""
    (folder / "images" / f"{name}.png").write_bytes(_png(scene, rng))
    return f"images/{name}.png"


def _embedded(scene: Scene, rng: random.Random) -> dict[str, Any]:
    return {"bytes": _png(scene, rng), "path": None}


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")


def _write_prompt(folder: Path, text: str) -> None:
    (folder / "prompt.txt").write_text(text + "\n", encoding="utf-8")
