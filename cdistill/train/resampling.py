"""Samples that teacher and student see through other visual tokens: two encodings, and how these share the image."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from cdistill.choices import Rows, VATConfig
from cdistill.data.conversations import Encoded, Encoder
from cdistill.data.pairs import PairEncoder
from cdistill.data.samples import IGNORE_INDEX, BadSampleError
from cdistill.errors import InputError
from cdistill.vat import resampling, visual_token_ids
from cdistill.vat.layout import Piece, Shown, layout, require_known_layout


def pair_encoder(student: Encoder, teacher: Encoder, *, configs: tuple[Any, Any], vat: VATConfig | None) -> PairEncoder:
    """What encodes samples for a student and a teacher that see images through other visual tokens.

    Args:
        student, teacher: encoders of one template, each with its own processor.
        configs: of the student's and the teacher's model.
        vat: the alignment of their attention, None where it is not compared.

    Raises:
        ValueError: as `PairEncoder` and `ResamplingEncoder`.
    """
    if vat is None:
        return PairEncoder(student, teacher)
    return ResamplingEncoder(student, teacher, configs=configs, rows=vat.rows)


class ResamplingEncoder(PairEncoder):
    """A `PairEncoder` whose samples say how the teacher's attention to the image is resampled to the student's visual tokens.

    Batches have ``pair_places`` and ``pair_shares`` (B, V_s, K), see `cdistill.vat.Resampling`, and for rows ``text`` those of
    both models, ``pair_rows`` and ``pair_teacher_rows`` (B, R), -1 = padding.

    Args:
        student, teacher: encoders of one template, each with its own processor.
        configs: of the student's and the teacher's model.
        rows: whose attention is compared. Of ``text``, marks that processors or templates put around images are none: what a
            processor makes of an image, and special tokens beside it that are not learned.
        spans: the two have different tokenizers, so that rows are told by spans (`cdistill.data.span_pairs`).

    Raises:
        ValueError: a model of which it is not known where its visual tokens lie; as `PairEncoder`.
    """

    def __init__(
        self, student: Encoder, teacher: Encoder, *, configs: tuple[Any, Any], rows: Rows, spans: bool = False
    ) -> None:
        for config in configs:
            require_known_layout(config)
        self._configs, self._rows, self._spans = configs, rows, spans
        self._ids = [list(visual_token_ids(config)) for config in configs]
        super().__init__(student, teacher)

    def relate(self, student: Encoded, teacher: Encoded, images: Sequence[Image.Image]) -> dict[str, Tensor]:
        """``places`` and ``shares`` (V_s, K); of rows text ``rows`` and ``teacher_rows`` (R,), too."""
        sides = (student, teacher)
        visual = [np.isin(side.input_ids.numpy(), ids) for side, ids in zip(sides, self._ids, strict=True)]
        try:
            pieces = [self._pieces(i, side, visual[i], images) for i, side in enumerate(sides)]
            places, shares = resampling(pieces[1], pieces[0], int(visual[0].sum()))
        except InputError as error:
            raise BadSampleError("visual tokens", str(error)) from None
        found = {"places": places, "shares": shares}
        return found | self._text_rows(*sides) if self._rows == "text" and not self._spans else found

    def _check(self) -> None:
        """As `PairEncoder`, of one tokenizer."""
        if not self._spans:
            super()._check()

    def _pieces(self, i: int, encoded: Encoded, visual: np.ndarray, images: Sequence[Image.Image]) -> list[Piece]:
        if not visual.any():
            return []
        processor = (self.student, self.teacher)[i].processor
        sizes = [image.size for image in images[: len(encoded.spans)]]
        return layout(Shown(self._configs[i], processor, encoded.input_ids.tolist(), visual, encoded.images, sizes))

    def _text_rows(self, student: Encoded, teacher: Encoded) -> dict[str, Tensor]:
        """Places of the text behind the first image for both models."""
        tokenizers, found = (self.student.tokenizer, self.teacher.tokenizer), []
        special = torch.tensor([token for tokenizer in tokenizers for token in tokenizer.all_special_ids])
        for side in (student, teacher):
            text = torch.ones(len(side.input_ids), dtype=torch.bool)
            mark = torch.isin(side.input_ids, special) & (side.labels == IGNORE_INDEX)
            text[: side.spans[0][0] if side.spans else len(text)] = False
            for begin, stop in side.spans:
                while begin > 0 and mark[begin - 1]:
                    begin -= 1
                while stop < len(mark) and mark[stop]:
                    stop += 1
                text[begin:stop] = False
            found.append(text.nonzero()[:, 0])
        if not torch.equal(*(side.input_ids[rows] for side, rows in zip((student, teacher), found, strict=True))):
            raise BadSampleError(
                "text", "the student and the teacher make different tokens of its text: set vat.rows predicting"
            )
        return {"rows": found[0], "teacher_rows": found[1]}
