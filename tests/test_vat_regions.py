"""Rows and columns read off batches of tokens, against loops over the tokens."""

import pytest
import torch

from cdistill.vat import check_same_visual_tokens, grounded_regions, packed_regions, token_regions
from cdistill.vat.regions import ROWS

IMAGE, VIDEO = 60, 61


def draw_batch(seed, batch=6, tokens=17):
    """Random ids with 0 to many visual tokens, labels, and padding on both sides whose tokens look like real ones."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(55, 64, (batch, tokens), generator=generator)
    ids[0] = ids[0].clamp(max=IMAGE - 1)  # a sample without visual tokens
    labels = torch.where(torch.rand(batch, tokens, generator=generator) < 0.5, ids, -100)
    mask = torch.ones(batch, tokens, dtype=torch.long)
    mask[1, :4], mask[2, -5:] = 0, 0
    return ids, labels, mask


def expected_regions(ids, labels, mask, rows):
    """Lists of row and column positions per sample, by definition."""
    chosen, columns = [], []
    for b in range(len(ids)):
        real = [t for t in range(ids.shape[1]) if mask[b, t]]
        visual = [t for t in real if ids[b, t] in (IMAGE, VIDEO)]
        after = [t for t in real if visual and t >= visual[0]]
        columns.append(visual)
        chosen.append(
            {
                "answer": [t for t in after if labels[b, t] != -100],
                "predicting": [t for t in after if t + 1 in real and labels[b, t + 1] != -100],
                "text": [t for t in after if t not in visual],
                "visual": visual,
                "all": after,
            }[rows]
        )
    return chosen, columns


def unpad(positions):
    """The positions of every sample; checks that padding stands at the end and that no column is padding alone."""
    assert positions.dtype == torch.int32
    lists = []
    for row in positions.tolist():
        real = [p for p in row if p >= 0]
        assert row == real + [-1] * (len(row) - len(real))
        lists.append(real)
    assert positions.shape[1] == max(map(len, lists), default=0)
    return lists


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("seed", range(4))
def test_regions_follow_their_definition(rows, seed):
    ids, labels, mask = draw_batch(seed)
    regions = token_regions(ids, labels, mask, visual_token_ids=[IMAGE, VIDEO], rows=rows)
    chosen, columns = expected_regions(ids, labels, mask, rows)
    assert unpad(regions.rows) == chosen
    assert unpad(regions.cols) == columns
    assert not regions.rows[0].ge(0).any()


@pytest.mark.parametrize("rows", ROWS)
def test_packed_samples_have_the_rows_they_have_by_themselves(rows):
    """Whatever stands behind them in their row of tokens: a sample whose first token is labelled, or padding."""
    ids, labels, mask = draw_batch(9)
    labels[:, 0] = ids[:, 0]
    samples = [(b, *mask[b].nonzero()[[0, -1], 0].tolist()) for b in range(len(ids))]
    places = [[(b, t) for b, start, end in samples[i : i + 2] for t in range(start, end + 1)] for i in (0, 2, 4)]
    width = max(map(len, places)) + 2
    packed = torch.zeros(3, 3, width, dtype=torch.long)  # ids, labels, positions
    packed[1] = -100
    real = torch.zeros(3, width, dtype=torch.long)
    for row, those in enumerate(places):
        where = tuple(torch.tensor(those).T)
        first = torch.tensor([samples[b][1] for b, _ in those])
        packed[:, row, : len(those)] = torch.stack((ids[where], labels[where], where[1] - first))
        real[row, : len(those)] = 1
    options = {"visual_token_ids": [IMAGE, VIDEO], "rows": rows}
    found = packed_regions(packed[0], packed[1], packed[2], attention_mask=real, **options)
    chosen, columns = expected_regions(ids, labels, mask, rows)
    starts = [start for _, start, _ in samples]
    assert unpad(found.rows) == [[t - start for t in those] for those, start in zip(chosen, starts, strict=True)]
    assert unpad(found.cols) == [[t - start for t in those] for those, start in zip(columns, starts, strict=True)]


def test_predicting_rows_decide_a_single_token():
    """The prompt's last row is all there is to align; none is there where the image comes after it."""
    ids = torch.tensor([[1, IMAGE, 2, 3, 4], [1, 2, 3, 4, IMAGE], [0, 0, IMAGE, 3, 4]])
    labels = torch.full_like(ids, -100)
    labels[0, 4], labels[1, 3], labels[2, 2] = 4, 4, IMAGE
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 1, 1], [0, 0, 1, 1, 1]])
    regions = token_regions(ids, labels, mask, visual_token_ids=IMAGE, rows="predicting")
    assert regions.rows.tolist() == [[3], [-1], [-1]]


def test_token_types_replace_token_ids():
    ids, labels, mask = draw_batch(5)
    types = torch.where(ids == IMAGE, 1, torch.where(ids == VIDEO, 2, 0))
    types[3, 0] = 3  # audio is not visual
    ids[3, 0] = 0
    by_type = token_regions(None, labels, mask, mm_token_type_ids=types)
    by_id = token_regions(ids, labels, mask, visual_token_ids=[IMAGE, VIDEO])
    assert torch.equal(by_type.rows, by_id.rows)
    assert torch.equal(by_type.cols, by_id.cols)


def test_one_token_id_and_no_mask():
    ids = torch.tensor([[5, IMAGE, IMAGE, 6, 7]])
    regions = token_regions(ids, None, None, visual_token_ids=IMAGE, rows="text")
    assert regions.rows.tolist() == [[3, 4]]
    assert regions.cols.tolist() == [[1, 2]]


@pytest.mark.parametrize("rows", ROWS)
def test_batch_without_visual_tokens(rows):
    ids = torch.arange(10).view(2, 5)
    regions = token_regions(ids, ids, None, visual_token_ids=IMAGE, rows=rows)
    assert regions.rows.shape == regions.cols.shape == (2, 0)


def test_answers_before_the_image_are_left_out():
    ids = torch.tensor([[1, 2, IMAGE, 3, 4]])
    regions = token_regions(ids, ids, None, visual_token_ids=IMAGE)
    assert regions.rows.tolist() == [[2, 3, 4]]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rows": "question"}, "answer, predicting, text, visual, all"),
        ({"labels": None}, "labels are needed"),
        ({"visual_token_ids": None}, "visual_token_ids must name"),
        ({"visual_token_ids": []}, "visual_token_ids must name"),
        ({"input_ids": None}, "input_ids are needed"),
        ({"input_ids": torch.zeros(5)}, r"must be \(B, T\)"),
        ({"attention_mask": torch.ones(1, 4)}, r"attention_mask must be \(1, 5\)"),
        ({"labels": torch.ones(2, 5)}, r"labels must be \(1, 5\)"),
    ],
)
def test_bad_arguments(options, message):
    ids = torch.tensor([[1, 2, IMAGE, 3, 4]])
    arguments = {"input_ids": ids, "labels": ids, "attention_mask": None, "visual_token_ids": IMAGE} | options
    with pytest.raises(ValueError, match=message):
        token_regions(**arguments)


def test_same_visual_tokens():
    teacher = torch.tensor([[0, 1, 2], [4, -1, -1]], dtype=torch.int32)
    check_same_visual_tokens(teacher, torch.tensor([[5, 6, 7, -1], [1, -1, -1, -1]], dtype=torch.int32))
    with pytest.raises(ValueError, match="sample 1 has 1 visual tokens for the teacher and 2 for the student"):
        check_same_visual_tokens(teacher, torch.tensor([[5, 6, 7], [1, 2, -1]], dtype=torch.int32))
    with pytest.raises(ValueError, match="2 and 1 samples"):
        check_same_visual_tokens(teacher, torch.tensor([[5, 6, 7]], dtype=torch.int32))


@pytest.mark.parametrize("seed", [31, 32])
def test_grounded_regions_hold_the_tokens_that_ask_for_something(seed):
    generator = torch.Generator().manual_seed(seed)
    places = torch.arange(1, 5).repeat(5, 1)
    places[4] = -1
    grounding = torch.rand(5, 19, 4, generator=generator)
    grounding[torch.rand(5, 19, generator=generator) < 0.6] = 0
    grounding[3:] = 0
    regions, targets = grounded_regions(grounding, places)
    asking = [[t for t in range(19) if grounding[b, t].any()] for b in range(5)]
    assert unpad(regions.rows) == asking
    assert unpad(regions.cols) == [[1, 2, 3, 4]] * 4 + [[]]
    for b, rows in enumerate(asking):
        assert torch.equal(targets[b, : len(rows)], grounding[b, rows])
        assert not targets[b, len(rows) :].any()
