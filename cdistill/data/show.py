"""Samples of a data set to look at: what is in them, the text that a model reads, and which of it is learned."""

from __future__ import annotations

import base64
import io
import random
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape
from itertools import groupby

from PIL import Image

from cdistill.data.contract import learned_ranges
from cdistill.data.conversations import Encoder
from cdistill.data.images import open_image, true_format
from cdistill.data.samples import IMAGE_TOKEN, BadSampleError, ImageBytes, ImageFile, Mark, Sample, Source, printable
from cdistill.data.templates import Template

THUMBNAIL = 320  # pixels
LEARNED = ("⟦", "⟧")
COLOURED = ("\x1b[32m", "\x1b[0m")


@dataclass(frozen=True)
class Picture:
    """An image of a sample: a line of facts, and a small copy."""

    facts: str
    thumbnail: Image.Image


@dataclass(frozen=True)
class Shown:
    """A sample as it is shown.

    Attributes:
        title: its id and place.
        pictures: its images, as far as they could be read.
        pieces: its text in order, each piece with whether it is learned.
        tokens: number of tokens, of visual ones, of learned ones; None without a processor.
        fault: why it is bad, or None.
    """

    title: str
    pictures: list[Picture]
    pieces: list[tuple[str, bool]]
    tokens: tuple[int, int, int] | None
    fault: str | None


def choose(size: int, count: int, seed: int | None) -> list[int]:
    """Indices to show: the first ones, or with a seed random ones in order."""
    count = min(count, size)
    return list(range(count)) if seed is None else sorted(random.Random(seed).sample(range(size), count))


def show(source: Source, index: int, renderer: Encoder | Template | None) -> Shown:
    """A sample of a source.

    Args:
        renderer: an encoder shows the tokens that are learned; a template the text that it writes; without one the
            messages are shown as they are.
    """
    pictures: list[Picture] = []
    pieces: list[tuple[str, bool]] = []
    title, tokens, fault = source.place(index), None, None
    try:
        sample = source[index]
        title = f"{sample.id}  ({sample.place})"
        pieces = list(_said(sample))
        images = []
        for image in sample.images:
            images.append(open_image(image))
            pictures.append(_picture(image, images[-1]))
        if isinstance(renderer, Encoder):
            pieces, tokens = _encoded(renderer, sample, images)
        elif renderer is not None:
            pieces = list(_rendered(renderer, sample))
    except BadSampleError as error:
        fault = f"{error.reason}: {error.detail}"
    return Shown(title, pictures, pieces, tokens, fault)


def without_tokenizer(name: str) -> Template:
    """A named template that writes text for no tokenizer in particular."""
    return Template(_AnyTokenizer(), name)


class _AnyTokenizer:
    image_token = IMAGE_TOKEN
    chat_template = bos_token_id = None

    def __init__(self) -> None:
        self.special_tokens_map: dict[str, str] = {}

    def get_vocab(self) -> dict[str, int]:
        return dict.fromkeys(("<|endoftext|>", "</s>", "<|im_start|>", "<|im_end|>"), 0)

    def __call__(self, text: str, **options: object) -> dict[str, list[int]]:
        """Ids of a text that ends with one of these tokens."""
        return {"input_ids": [0]}


def _picture(image: ImageFile | ImageBytes, opened: Image.Image) -> Picture:
    name = str(image.path) if isinstance(image, ImageFile) else image.name
    stored = image.path if isinstance(image, ImageFile) else io.BytesIO(image.data)
    kind = true_format(image)
    with Image.open(stored, formats=[kind] if kind else None) as header:
        mode, (width, height) = header.mode, header.size
    small = opened.copy()
    small.thumbnail((THUMBNAIL, THUMBNAIL))
    return Picture(f"{name}: {kind}, {width} x {height}, {mode}", small)


def _said(sample: Sample) -> Iterator[tuple[str, bool]]:
    for message in sample.messages:
        text = "".join(IMAGE_TOKEN if isinstance(part, Mark) else part for part in message.parts)
        yield f"{message.role}: ", False
        yield text, message.role == "assistant" and message.learned
        yield "\n", False


def _rendered(template: Template, sample: Sample) -> Iterator[tuple[str, bool]]:
    text, answers = template(sample.messages)
    end = 0
    for start, stop in learned_ranges(sample.messages, answers):
        yield text[end:start], False
        yield text[start:stop], True
        end = stop
    yield text[end:], False


def _encoded(
    encoder: Encoder, sample: Sample, images: Sequence[Image.Image]
) -> tuple[list[tuple[str, bool]], tuple[int, int, int]]:
    """Pieces of the decoded tokens, a run of visual ones written as one with their number; how many of all there are."""
    encoded = encoder(sample.messages, images)
    tokens, learned = encoded.input_ids.tolist(), (encoded.labels >= 0).tolist()
    mark = encoder.template.image_token
    visual = None if mark is None else encoder.tokenizer.convert_tokens_to_ids(mark)
    kinds = [(token == visual, flag) for token, flag in zip(tokens, learned, strict=True)]
    pieces, written, before = [], [], ""
    for (is_visual, flag), run in groupby(zip(kinds, tokens, strict=True), key=lambda pair: pair[0]):
        ids = [token for _, token in run]
        written += ids[:1] if is_visual else ids
        text = encoder.tokenizer.decode(written, clean_up_tokenization_spaces=False)
        # By itself a piece might lose the space that it begins with.
        piece = text[len(before) :] if text.startswith(before) else encoder.tokenizer.decode(ids)
        pieces.append((f"{piece}({len(ids)})" if is_visual else piece, flag))
        before = text
    return pieces, (len(tokens), tokens.count(visual), sum(learned))


def as_text(shown: Sequence[Shown], *, coloured: bool) -> str:
    """What a terminal shows, or with ``coloured`` False a file, where brackets mark what is learned."""
    opening, closing = COLOURED if coloured else LEARNED
    blocks = []
    for sample in shown:
        lines = [_printable(sample.title), *(f"  image {_printable(picture.facts)}" for picture in sample.pictures)]
        if sample.tokens is not None:
            lines.append("  " + _counts(sample.tokens))
        if sample.fault is not None:
            lines.append(f"  bad: {_printable(sample.fault)}")
        marked = (
            f"{opening}{_printable(text)}{closing}" if learned and text else _printable(text)
            for text, learned in sample.pieces
        )
        text = "".join(marked).rstrip("\n")
        if text:
            lines += ["", *("    " + line for line in text.split("\n"))]
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks) + "\n"


def _counts(tokens: tuple[int, int, int]) -> str:
    return "{} tokens, {} visual, {} learned".format(*tokens)


def _printable(text: str) -> str:
    """Lines of text, whole."""
    return "\n".join(printable(line, sys.maxsize) for line in text.split("\n"))


_STYLE = """
:root { color-scheme: light; }
* { box-sizing: border-box; }
body { margin: 0; background: #f4f6f8; color: #1b1f24;
  font: 16px/1.55 system-ui, "Segoe UI", Roboto, Helvetica, Arial, sans-serif; }
main { max-width: 1120px; margin: 0 auto; padding: 28px 20px 56px; }
h1 { font-size: 1.5rem; margin: 0 0 .4rem; overflow-wrap: anywhere; }
h2 { font-size: 1rem; margin: 0 0 .4rem; overflow-wrap: anywhere; }
section { background: #fff; border: 1px solid #d8dee4; border-radius: 12px; padding: 18px 22px; margin: 18px 0; }
.pictures { display: flex; flex-wrap: wrap; gap: 14px; }
figure { margin: 0; max-width: 320px; } img { max-width: 100%; display: block; border-radius: 6px; }
figcaption, .note { color: #424a53; font-size: .85rem; overflow-wrap: anywhere; margin: .3rem 0; }
.text { white-space: pre-wrap; overflow-wrap: anywhere; margin: .6rem 0 0; }
mark { background: #d2f4d3; color: inherit; border-radius: 3px; }
.bad { color: #b3161b; font-weight: 600; overflow-wrap: anywhere; }
"""


def as_html(shown: Sequence[Shown], title: str) -> str:
    """A page with everything inside, readable without network or scripts."""
    body = "".join(map(_section, shown))
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{_STYLE}</style></head><body><main><h1>{escape(title)}</h1>"
        f'<p class="note">What a model learns to write is <mark>marked</mark>.</p>{body}</main></body></html>\n'
    )


def _section(sample: Shown) -> str:
    figures = "".join(
        f'<figure><img src="{_encode(picture.thumbnail)}" alt="{escape(picture.facts)}">'
        f"<figcaption>{escape(picture.facts)}</figcaption></figure>"
        for picture in sample.pictures
    )
    fault = "" if sample.fault is None else f'<p class="bad">bad: {escape(sample.fault)}</p>'
    counts = "" if sample.tokens is None else f'<p class="note">{_counts(sample.tokens)}</p>'
    text = "".join(
        f"<mark>{escape(piece)}</mark>" if learned and piece else escape(piece) for piece, learned in sample.pieces
    )
    return (
        f'\n<section><h2>{escape(sample.title)}</h2>{fault}<div class="pictures">{figures}</div>{counts}'
        f'<p class="text">{text}</p></section>'
    )


def _encode(image: Image.Image) -> str:
    data = io.BytesIO()
    image.save(data, "JPEG", quality=85)
    return "data:image/jpeg;base64," + base64.b64encode(data.getvalue()).decode()
