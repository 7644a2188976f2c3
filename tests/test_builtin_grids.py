"""The built-in task for models that see a scene through more visual tokens than it has cells."""

import numpy as np
import pytest
import torch

from cdistill.builtin import scenes
from cdistill.builtin.dataset import NUM_VISUAL_TOKENS, BuiltinDataset, PatchDataset, build_tokenizer
from cdistill.builtin.task import BuiltinTask
from cdistill.data.samples import IMAGE_TOKEN

TOKENIZER = build_tokenizer()


def test_finer_patches_have_the_labels_and_shares_of_their_cell():
    side = 2 * scenes.GRID
    above = np.arange(side * side) // side // 2 * scenes.GRID + np.arange(side * side) % side // 2
    one, fine = (PatchDataset(size=3, seed=4, visual_tokens=count)[2] for count in (NUM_VISUAL_TOKENS, side * side))
    assert torch.equal(fine["pixel_values"], one["pixel_values"])
    assert torch.equal(fine["labels"], one["labels"][above])
    task = BuiltinTask(caption=0.5, turns=4, text=0.5)
    coarse, finer = (
        BuiltinDataset(task, size=9, seed=16, tokenizer=TOKENIZER, grounding=True, visual_tokens=count)
        for count in (NUM_VISUAL_TOKENS, side * side)
    )
    for a, b in zip((coarse[i] for i in range(9)), (finer[i] for i in range(9)), strict=True):
        if "pixel_values" not in a:
            assert torch.equal(a["grounding"], b["grounding"])
            continue
        skipped = side * side - NUM_VISUAL_TOKENS  # more image tokens, of which no word speaks
        torch.testing.assert_close(b["grounding"][skipped:], a["grounding"][:, above] / 4)
        assert not b["grounding"][:skipped].any()
        assert (b["input_ids"][b["places"]] == TOKENIZER.convert_tokens_to_ids(IMAGE_TOKEN)).all()
        assert len(b["places"]) == side * side
    with pytest.raises(ValueError, match=r"labels of patches for 36, 144, 324 \.\.\. visual tokens, got 81"):
        PatchDataset(size=1, seed=0, visual_tokens=81)
