"""Batches of rows as `cdistill.CompoDistillTrainer` finds them in data sets: conversations, and images of any form."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor

from cdistill.data.batches import PaddingCollator
from cdistill.data.conversations import Encoder
from cdistill.data.images import find_image, open_image, seen
from cdistill.data.pairs import PairCollator, PairEncoder
from cdistill.data.records import measure, read_record
from cdistill.data.samples import ImageBytes


class ConversationCollator:
    """Batches of rows with ``messages`` or ``conversations`` (or ``prompt`` and ``completion``, which alone is learned) and
    ``image`` or ``images``.

    Images are those of PIL, encoded bytes, or paths. Labels are -100 outside the answers. What rows say besides (``tools``, for
    one) is not read, and named once in a warning.

    Args:
        processor: of the student, or a tokenizer for text alone.
        template, max_length: as in `CompoDistillConfig`.
        teacher_processor: of a teacher that sees images through other visual tokens, and has an encoding of its own.
        pair: makes one encoder of the two.
    """

    def __init__(
        self,
        processor: Any,
        template: str = "auto",
        max_length: int | None = None,
        *,
        teacher_processor: Any = None,
        pair: Callable[[Encoder, Encoder], PairEncoder] = PairEncoder,
    ) -> None:
        self.encoder = Encoder(processor, template, max_length)
        self._encode: Callable[..., Any] = self.encoder
        self._unread: set[str] = set()
        self.collate: Callable[..., dict[str, Tensor]] = PaddingCollator(self.encoder.pad_token_id)
        if teacher_processor is not None:
            teacher = Encoder(teacher_processor, template, max_length)
            self._encode = pair(self.encoder, teacher)
            self.collate = PairCollator(
                PaddingCollator(self.encoder.pad_token_id), PaddingCollator(teacher.pad_token_id)
            )

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        encoded = []
        for number, given in enumerate(rows):
            row = {name: value for name, value in given.items() if value is not None}
            self._say_unread(row)
            sample = read_record(row, _Found, id=str(number), place=f"row {number} of a batch")  # type: ignore[arg-type]
            images: Any = sample.images
            encoded.append(self._encode(sample.messages, [_opened(image.value) for image in images]))
        return self.collate(encoded)

    def _say_unread(self, row: Mapping[str, Any]) -> None:
        """Name what of a row nobody reads, if it has not been named."""
        if found := [key for key in measure(row).unread if key not in self._unread]:
            self._unread.update(found)
            warnings.warn(f"rows hold what is not read: {', '.join(found)}", stacklevel=3)


@dataclass(frozen=True, slots=True)
class _Found:
    value: Any


def _opened(value: Any) -> Image.Image:
    if isinstance(value, Mapping):
        value = value["path"] if value.get("bytes") is None else value["bytes"]
    if isinstance(value, Image.Image):
        return seen(value)
    if isinstance(value, bytes):
        return open_image(ImageBytes("an image of the batch", value))
    if isinstance(value, str | Path) and "://" not in str(value):
        path = Path(value).absolute()
        return open_image(find_image(path.parent, path.name, allow_urls=False))
    return open_image(find_image(Path(), value, allow_urls=False))
