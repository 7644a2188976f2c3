"""Pictures of what teacher and students look at: for chosen words, or while they answer (paper figures 1b, 6 and 7)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from cdistill.attention.data import Set
from cdistill.attention.exchange import AsStudent, columns
from cdistill.attention.models import Models, Reading
from cdistill.data.images import open_image
from cdistill.data.samples import BadSampleError, ImageFile
from cdistill.errors import InputError
from cdistill.eval.contract import Question
from cdistill.eval.inference import Inference
from cdistill.vat import Regions, SliceRecorder, attention_layers, installed, layer_range
from cdistill.vat.hook import KEYWORD
from cdistill.vat.layout import Piece, Shown, layout

SPANS = ("early", "intermediate", "later")
LONGEST = 448  # pixels of a picture
GLOW = np.array([34, 211, 238])  # over a greyed picture; cyan, which no object of the built-in task has
FOLDER = "maps"


@dataclass(frozen=True)
class Case:
    """A question to draw for.

    Attributes:
        question: with the answer as continuation; of kind ``generate`` where each model says its own.
        images: it is about.
    """

    question: Question
    images: Sequence[Image.Image]


def own_case(images: Sequence[Path], question: str, answer: str | None) -> Case:
    """The user's question about images in files; ValueError for a file that is none."""
    opened = []
    for path in images:
        try:
            opened.append(open_image(ImageFile(path)))
        except BadSampleError as error:
            raise InputError(f"--image {path}: {error}") from None
    names = tuple(map(str, images))
    kind = "generate" if answer is None else "log_likelihood"
    return Case(Question("question", question, names, kind, answer or "", 32), opened)


def cases_of(sets: Sequence[Set]) -> list[Case]:
    """The questions of sets, with their right answers."""
    return [
        Case(question, [of.pictures.open(name) for name in question.images])
        for of in sets
        if of.pictures is not None
        for question in of.questions
    ]


def maps(
    models: Models, cases: Sequence[Case], *, spans: Sequence[str], words: str | None, folder: Path
) -> dict[str, Any]:
    """Draw every case, and say what the file holds; pictures go to ``folder / "maps"`` at the end.

    Args:
        spans: ranges of layers, as `layer_range` has them of each model; their mean is drawn.
        words: of the question or the answer, whose rows are drawn; None for the rows that predict the answer.

    Raises:
        ValueError: layers out of range, words that are not there, or an unknown layout, before anything is written.
    """
    everyone = [models.teacher, *(AsStudent(models, i) for i in range(len(models.students)))]
    chosen = [_layers(each, name, spans) for each, name in zip(everyone, _names(models), strict=True)]
    found, files = [], dict[str, Image.Image]()
    for number, case in enumerate(cases):
        entry, drawn = _draw(models, everyone, chosen, case, words, f"{number}")
        found.append(entry)
        files |= drawn
    target = folder / FOLDER
    target.mkdir(parents=True, exist_ok=True)
    for name, picture in files.items():
        picture.save(target / name)
    return {"spans": list(spans), "words": words, "cases": found}


def _names(models: Models) -> list[str]:
    return [loaded.name for loaded in models.loaded]


def _layers(inference: Inference, name: str, spans: Sequence[str]) -> dict[str, tuple[int, ...]]:
    result = {}
    for span in spans:
        try:
            result[span] = layer_range(attention_layers(inference.model), span)
        except ValueError as error:
            raise InputError(f"--layers {span}: {name}: {error}") from None
    return result


def _draw(
    models: Models,
    everyone: Sequence[Inference],
    chosen: Sequence[Mapping[str, tuple[int, ...]]],
    case: Case,
    words: str | None,
    prefix: str,
) -> tuple[dict[str, Any], dict[str, Image.Image]]:
    said, entries, files = [], [], dict[str, Image.Image]()
    (asked,) = models.read([case.question], case.images)
    pieces = _pieces(models, asked, case)
    for model, (inference, layers) in enumerate(zip(everyone, chosen, strict=True)):
        reading, answer = asked, case.question.continuation
        if case.question.kind == "generate":
            answer = inference.generate([asked])[0].text.strip()
            reading = _answered(models, case, answer) if answer else asked
        said.append(answer)
        rows = _rows(models, reading, words)
        seen = attention(models, inference, reading, rows, sorted({i for of in layers.values() for i in of}))
        for place, (span, numbers) in enumerate(layers.items()):
            weights = np.mean([seen[i] for i in numbers], 0)
            pictures: list[dict[str, Any]] = []
            entry: dict[str, Any] = {"model": _names(models)[model], "span": span, "layers": list(numbers)}
            entry |= {"share": float(weights.sum()), "weights": weights, "pictures": pictures}
            for picture, level, image in draw(case.images, pieces, weights):
                name = f"{prefix}-{'teacher' if not model else f'student{model}'}-{place}-{picture}-{level}.png"
                files[name] = image
                pictures.append({"file": f"{FOLDER}/{name}", "picture": picture, "level": level})
            entries.append(entry)
    for picture, image in enumerate(case.images):
        files[f"{prefix}-image-{picture}.png"] = shrunk(image)
    plain = [f"{FOLDER}/{prefix}-image-{i}.png" for i in range(len(case.images))]
    question = {"id": case.question.id, "question": case.question.prompt, "answers": said, "images": plain}
    return question | {"maps": entries}, files


def _answered(models: Models, case: Case, answer: str) -> Reading:
    question = replace(case.question, kind="log_likelihood", continuation=answer)
    return models.read([question], case.images)[0]


def _pieces(models: Models, reading: Reading, case: Case) -> list[Piece]:
    teacher = models.loaded[0]
    visual = np.isin(reading.tokens, models.visual_ids.numpy())
    sizes = [image.size for image in case.images]
    shown = Shown(teacher.model.config, teacher.processor, reading.tokens, visual, reading.images, sizes)
    try:
        return layout(shown)
    except ValueError as error:
        raise InputError(f"maps: {error}; nothing can be drawn") from None


def _rows(models: Models, reading: Reading, words: str | None) -> list[int]:
    """Positions whose attention is drawn: of the words, or those that predict the answer (the prompt's last without one)."""
    if words is None:
        return [place - 1 for place in reading.answers] or [len(reading.ids) - 1]
    visual = torch.isin(torch.tensor(reading.tokens), models.visual_ids).nonzero()
    first = int(visual[-1]) + 1
    rows = [first + i for i in places_of(words, reading.tokens[first:], models.teacher.prompts.tokenizer)]
    if not rows:
        text = models.teacher.prompts.tokenizer.decode(reading.tokens[first:], skip_special_tokens=True)
        raise InputError(f"--words {words!r} are not in the text after the image: {' '.join(text.split())!r:.200}")
    return rows


def places_of(words: str, tokens: Sequence[int], tokenizer: Any) -> list[int]:
    """Which tokens hold a part of some words wherever these stand in a text, whatever their case; whole words only."""
    how = {"skip_special_tokens": False, "clean_up_tokenization_spaces": False}
    ends = [len(tokenizer.decode(list(tokens[: i + 1]), **how)) for i in range(len(tokens))]
    text, wanted = tokenizer.decode(list(tokens), **how).casefold(), words.strip().casefold()
    found, begin = set[int](), text.find(wanted) if wanted else -1
    while begin >= 0:
        end = begin + len(wanted)
        edges = text[max(0, begin - 1) : begin], text[end : end + 1]
        if not any(edge.isalnum() for edge in edges):
            starts = [0, *ends[:-1]]
            found |= {i for i, (a, b) in enumerate(zip(starts, ends, strict=True)) if a < end and b > begin}
        begin = text.find(wanted, begin + 1)
    return sorted(i for i in found if tokenizer.decode([tokens[i]], **how).strip())


@torch.no_grad()
def attention(
    models: Models, inference: Inference, reading: Reading, rows: Sequence[int], layers: Sequence[int]
) -> dict[int, np.ndarray]:
    """By layer (V,): attention to each visual token, mean over heads and rows."""
    inputs = inference.inputs([reading], [reading.tokens])
    mask = inputs["attention_mask"]
    cols = columns(torch.isin(torch.tensor([reading.tokens]), models.visual_ids)).to(mask.device)
    regions = Regions(torch.tensor([list(rows)], dtype=torch.int32, device=mask.device), cols)
    recorder = SliceRecorder(layers, regions, key_mask=mask)
    with installed(inference.model):
        inference.logits(inputs | {"use_cache": False, KEYWORD: recorder}, torch.tensor([mask.shape[1] - 1]))
    return {layer: made[0].mean(0).double().cpu().numpy() for layer, made in recorder.slices.items()}


def shrunk(image: Image.Image) -> Image.Image:
    """A picture whose longer side has `LONGEST` pixels; one of few pixels is enlarged, pixel by pixel."""
    times = LONGEST / max(image.size)
    size = (max(1, round(image.width * times)), max(1, round(image.height * times)))
    how = Image.Resampling.NEAREST if times > 2 else Image.Resampling.LANCZOS
    return image.convert("RGB").resize(size, how)


def draw(
    images: Sequence[Image.Image], pieces: Sequence[Piece], weights: np.ndarray
) -> list[tuple[int, str, Image.Image]]:
    """Pictures that glow where the attention is, the whole image apart from its tiles: (number, level, picture).

    ``weights`` are (V,). A token glows by its weight over its area; the strongest of a picture glows fully.
    """
    result = []
    for picture, level in dict.fromkeys((piece.picture, piece.level) for piece in pieces):
        there = [piece for piece in pieces if (piece.picture, piece.level) == (picture, level)]
        back = shrunk(images[picture]) if picture < len(images) else Image.new("RGB", (LONGEST, LONGEST), "white")
        heat = np.zeros((back.height, back.width))
        for piece in there:
            _paint(heat, piece, weights)
        peak = heat.max()
        glow = (heat / peak if peak > 0 else heat)[..., None]
        grey = np.asarray(back.convert("L"), np.float64)[..., None]
        dim = 0.25 * np.asarray(back, np.float64) + 0.35 * grey
        mixed = dim * (1 - 0.85 * glow) + GLOW * 0.85 * glow
        result.append((picture, level, Image.fromarray(mixed.round().clip(0, 255).astype(np.uint8))))
    return result


def _paint(heat: np.ndarray, piece: Piece, weights: np.ndarray) -> None:
    """Set the pixels under each cell to its weight over its area; cells beyond the picture are cut."""
    height, width = heat.shape
    rows, columns_ = piece.places.shape
    left, top, right, bottom = piece.box
    y = ((np.arange(height) + 0.5) / height - top) / (bottom - top) * rows
    x = ((np.arange(width) + 0.5) / width - left) / (right - left) * columns_
    inside_y, inside_x = (y >= 0) & (y < rows), (x >= 0) & (x < columns_)
    cells = np.where(piece.places >= 0, weights[piece.places], 0.0)
    area = (right - left) * (bottom - top) / (rows * columns_)
    where = np.ix_(inside_y, inside_x)
    heat[where] = cells[np.ix_(y[inside_y].astype(int), x[inside_x].astype(int))] / area


def table(result: Mapping[str, Any]) -> list[str]:
    """What was drawn, as lines of text."""
    lines = []
    for case in result["cases"]:
        what = f"words {result['words']!r}" if result["words"] else "the rows that predict the answer"
        lines.append(f"{case['id']}: {case['question']} ({what})")
        for entry in case["maps"]:
            files = ", ".join(of["file"] for of in entry["pictures"])
            lines.append(f"  {100 * entry['share']:5.1f} % on the image, {entry['span']:<13} {entry['model']}: {files}")
    return lines
