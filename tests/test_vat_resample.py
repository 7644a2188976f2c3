"""Attention resampled from one grid of visual tokens to another: against counted pixels, and whole losses in float64."""

import copy
from functools import cache

import numpy as np
import pytest
import torch
from family_models import build, processor
from family_table import FAMILIES, ID, WORDS
from PIL import Image

import cdistill
from cdistill.choices import VATConfig
from cdistill.data.batches import PaddingCollator
from cdistill.data.conversations import Encoder
from cdistill.data.pairs import PairCollator, split_sides
from cdistill.data.samples import BadSampleError, Mark, Message
from cdistill.ops.reference import slice_distance
from cdistill.train.resampling import ResamplingEncoder
from cdistill.vat import Resampling, attention_layers, head_counts, match_layers, resampling, visual_token_ids
from cdistill.vat.config import VAT
from cdistill.vat.layout import TILES, WHOLE, Piece, Shown, layout

RASTER = 24  # pixels a side of a picture, which all cells below are made of
WORDS_ONLY = (Message("user", ("w1",)), Message("assistant", ("w3 w4",)))
FAMILY_NAMES = [name for name in FAMILIES if name not in ("llava_llama", "llava_qwen3", "llava_lfm2", "qwen3_5")]


def pixels(piece):
    """(RASTER, RASTER) which token each pixel of the picture belongs to, -1 for none."""
    left, top, right, bottom = piece.box
    rows, columns = piece.places.shape
    found = np.full((RASTER, RASTER), -1)
    for y in range(RASTER):
        for x in range(RASTER):
            row = int(np.floor(((y + 0.5) / RASTER - top) / (bottom - top) * rows))
            column = int(np.floor(((x + 0.5) / RASTER - left) / (right - left) * columns))
            if 0 <= row < rows and 0 <= column < columns:
                found[y, x] = piece.places[row, column]
    return found


def counted(teacher, student, shape):
    """(V_s, V_t) float64 shares of each teacher token, by counting the pixels that two tokens have in common."""
    areas = np.zeros(shape)
    for a in student:
        for b in teacher:
            levels = [{p.level for p in pieces if p.picture == a.picture} for pieces in (student, teacher)]
            alike = a.level == b.level or b.level not in levels[0] or a.level not in levels[1]
            if a.picture != b.picture or not alike:
                continue
            for i, j in zip(pixels(a).ravel(), pixels(b).ravel(), strict=True):
                if i >= 0 and j >= 0:
                    areas[i, j] += 1
            for i, end in enumerate(a.ends):
                for j, other in enumerate(b.ends):
                    begin, stop = (
                        max(i / len(a.ends), j / len(b.ends)),
                        min((i + 1) / len(a.ends), (j + 1) / len(b.ends)),
                    )
                    areas[end, other] += max(0.0, stop - begin) if stop - begin > 1e-9 else 0.0
    total = areas.sum(0)
    return areas / np.where(total > 0, total, 1)


def dense(places, shares, columns):
    w = torch.zeros(len(places), columns, dtype=torch.float64)
    for i in range(len(places)):
        for place, share in zip(places[i].tolist(), shares[i].tolist(), strict=True):
            if place >= 0:
                w[i, place] += share
    return w


def random_pieces(rng):
    """A picture as one grid, or cut into tiles with a thumbnail, and how many tokens it has."""
    sides = [1, 2, 3, 4, 6, 8, 12]
    rows, columns = rng.choice(sides, 2)
    grid = np.arange(rows * columns).reshape(rows, columns)
    if rng.random() < 0.4:
        left, top = rng.integers(-3, 12, 2) / RASTER
        return [Piece(0, WHOLE, (left, top, left + 2 * columns / RASTER, top + rows / RASTER), grid)], grid.size
    pieces, start = [Piece(0, WHOLE, (0.0, 0.0, 1.0, 1.0), grid)], grid.size
    if rng.random() < 0.6:
        down, across = rng.choice([1, 2], 2)
        for i in range(down):
            for j in range(across):
                tile = start + np.arange(9).reshape(3, 3)
                box = (j / across, i / down, (j + 1) / across, (i + 1) / down)
                pieces.append(Piece(0, TILES, box, tile))
                start += 9
    return pieces, start


@pytest.mark.parametrize("seed", range(12))
def test_shares_are_those_of_counted_pixels(seed):
    rng = np.random.default_rng(seed)
    (teacher, columns), (student, rows) = random_pieces(rng), random_pieces(rng)
    places, shares = resampling(teacher, student, rows)
    expected = counted(teacher, student, (rows, columns))
    np.testing.assert_allclose(dense(places, shares, columns).numpy(), expected, atol=1e-6)
    seen = Resampling(places[None], shares[None]).compared[0].numpy()
    assert (seen == (expected.sum(1) > 0)).all()


@cache
def shown(name, size, several=False):
    """Pieces of a family's layout of an image of this size, and how many visual tokens there are."""
    family, config = FAMILIES[name], build(name, 0, 2).config
    pictures = [Image.new("RGB", size[::-1])] * (2 if several else 1)
    made = processor(name)(text=[family.placeholder * len(pictures)], images=[pictures], return_tensors="pt")
    ids = torch.as_tensor(made.pop("input_ids"))[0]
    visual = torch.isin(ids, torch.tensor(visual_token_ids(config))).numpy()
    tensors = {key: torch.as_tensor(value) for key, value in made.items()}
    sizes = [size[::-1]] * len(pictures)
    return layout(Shown(config, processor(name), ids.tolist(), visual, tensors, sizes)), int(visual.sum())


@pytest.mark.parametrize("name", FAMILY_NAMES)
def test_equal_tokens_keep_every_bit(name):
    for several in (False, True):
        pieces, count = shown(name, (16, 16), several)
        places, shares = resampling(pieces, pieces, count)
        attention = torch.rand(2, 3, 5, count)
        both = Resampling(*(x.expand(2, *x.shape) for x in (places, shares)))
        assert torch.equal(both(attention), attention)
        assert both.compared.all()


def test_every_pair_of_families_conserves_mass():
    checked = 0
    for size in ((8, 16), (16, 16)):
        for name in FAMILY_NAMES:
            for other in FAMILY_NAMES:
                (teacher, columns), (student, rows) = shown(name, size), shown(other, size)
                places, shares = resampling(teacher, student, rows)
                kept = torch.ones(columns)
                if not any(piece.ends for piece in student):
                    kept[[end for piece in teacher for end in piece.ends]] = 0  # newlines, which lie nowhere
                attention = torch.rand(1, 4, columns)
                found = Resampling(places[None], shares[None])(attention)
                torch.testing.assert_close(found.sum(-1), (attention * kept).sum(-1))
                if checked % 7 == 0:
                    expected = counted(teacher, student, (rows, columns))
                    np.testing.assert_allclose(dense(places, shares, columns).numpy(), expected, atol=1e-6)
                checked += 1
    assert checked == 2 * len(FAMILY_NAMES) ** 2


def test_what_the_teacher_does_not_see_is_not_compared():
    grid = np.arange(4).reshape(2, 2)
    half, whole = Piece(0, WHOLE, (0.0, 0.0, 1.0, 0.5), grid), Piece(0, WHOLE, (0.0, 0.0, 1.0, 1.0), grid, (4,))
    places, shares = resampling([half], [whole], 5)
    assert Resampling(places[None], shares[None]).compared.tolist() == [[True, True, False, False, False]]
    assert dense(places, shares, 4).sum(0).tolist() == [1.0] * 4
    places, shares = resampling([whole], [half], 4)
    assert dense(places, shares, 5).sum(0).tolist() == [1.0, 1.0, 0.0, 0.0, 0.0]
    with pytest.raises(ValueError, match="the student sees 2 pictures or frames, the teacher 1"):
        resampling([half], [half, Piece(1, WHOLE, half.box, grid)], 8)


# Whole losses, beside eager attention, dense shares and autograd in float64.


def encoder_of(student, teacher, rows, models, length=None):
    sides = [Encoder(processor(name), "vicuna_v1", length) for name in (student, teacher)]
    return ResamplingEncoder(*sides, configs=tuple(of.config for of in models), rows=rows)


def batch_of(encoder):
    """Two samples with images of two sizes, and one without."""
    noise = [Image.effect_noise(size, 60).convert("RGB") for size in ((16, 8), (16, 16))]
    asked = (Message("user", ("w1 w2", Mark.IMAGE, "w3")), Message("assistant", ("w4 w5 w6",)))
    again = (*asked, Message("user", ("w7",)), Message("assistant", ("w8 w9",)))
    pairs = [encoder(asked, noise[:1]), encoder(WORDS_ONLY, []), encoder(again, noise[1:])]
    return PairCollator(*[PaddingCollator(0)] * 2)(pairs)


def eager(model, given):
    clone = copy.deepcopy(model).double()
    clone.set_attn_implementation("eager")
    given = {k: v.double() if v.is_floating_point() else v for k, v in given.items() if k != "labels"}
    return clone, dict(zip(attention_layers(clone), clone(**given, output_attentions=True).attentions, strict=True))


def rows_of(kind, side, b, visual):
    """Rows by reading the tokens: those before labels, or the words after the first image."""
    if kind == "predicting":
        return (side["labels"][b, 1:] != -100).nonzero()[:, 0]
    first = int(visual[b].nonzero()[0])
    words = [0, 1, 2, 3, *(ID[f"w{i}"] for i in range(WORDS))]  # <pad>, <s>, </s>, <unk>
    real = side["attention_mask"][b].bool()
    text = torch.isin(side["input_ids"][b], torch.tensor(words)) & real
    text[:first] = False
    return text.nonzero()[:, 0]


def expected_alignment(config, models, batch):
    """vat of a batch, and the student in float64 that it can be differentiated by."""
    sides = [dict(side) for side in split_sides(batch)]
    w = [batch["pair_places"], batch["pair_shares"]]
    for side in sides:
        for name in [name for name in side if name.startswith("pair_")]:
            del side[name]
    (student, ours), (_, theirs) = (eager(of, side) for of, side in zip(models, sides, strict=True))
    heads = head_counts(*models) if config.heads == "match" else None
    matches = VAT(config, attention_layers(models[0]), attention_layers(models[1]), heads=heads).matches
    cols = [
        torch.isin(side["input_ids"], torch.tensor(visual_token_ids(of)))
        for of, side in zip(models, sides, strict=True)
    ]
    total = []
    for match in matches:
        for b in range(len(cols[0])):
            places = [of[b].nonzero()[:, 0] for of in cols]
            if not len(places[0]):
                total.append(torch.zeros((), dtype=torch.float64))
                continue
            rows = [rows_of(config.rows, side, b, of) for side, of in zip(sides, cols, strict=True)]
            shares = dense(w[0][b, : len(places[0])], w[1][b, : len(places[0])].double(), len(places[1]))
            a = ours[match.student][b][:, rows[0]][:, :, places[0]]
            t = (
                torch.stack([theirs[j][b][:, rows[1]][:, :, places[1]] for j in match.teachers]).mean(0).detach()
                @ shares.T
            )
            seen = shares.sum(1) > 0
            if config.heads == "match":  # two of the teacher's four heads for each of two
                t = t.unflatten(0, (2, 2)).mean(1)
            if config.heads == "mean":
                a, t = a.mean(0, keepdim=True), t.mean(0, keepdim=True)
            options = config.loss, config.reduction, config.sink_filter
            each = [slice_distance(x[:, seen], y[:, seen], *options) for x, y in zip(a, t, strict=True)]
            total.append(torch.stack(each).mean())
    return student, torch.stack(total).mean()


def test_an_image_that_no_longer_fits_is_left_out_of_both():
    models = build("llava_qwen2", 0), build("internvl", 1)
    turns = [("user", Mark.IMAGE), ("assistant", "w1 w2"), ("user", Mark.IMAGE), ("assistant", "w3 w4")]
    said = [Message(role, (part, "w5") if part is Mark.IMAGE else (part,)) for role, part in turns]
    images = [Image.effect_noise(size, 60).convert("RGB") for size in ((8, 8), (16, 8))]
    whole = encoder_of("llava_qwen2", "internvl", "text", models)(said, images)
    cut = encoder_of("llava_qwen2", "internvl", "text", models, len(whole.teacher.input_ids) - 8)(said, images)
    assert (
        [len(made.teacher.spans) for made in (whole, cut)]
        == [len(made.student.spans) for made in (whole, cut)]
        == [2, 1]
    )
    assert [made.relation["places"].shape[0] for made in (whole, cut)] == [8, 4]
    for made in (whole, cut):
        rows, others = (made.relation[name] for name in ("rows", "teacher_rows"))
        assert torch.equal(made.student.input_ids[rows], made.teacher.input_ids[others])
        assert not torch.isin(made.student.input_ids[rows], torch.tensor(visual_token_ids(models[0]))).any()
    # of the second image, which both see as a picture of its own
    assert whole.relation["places"][4:].max() == 15 and whole.relation["places"][:4].max() == 3


@pytest.mark.parametrize(
    ("names", "options"),
    [
        (("internvl", "llava_qwen2"), {"rows": "predicting"}),
        (("idefics3", "llava_qwen2"), {}),
        (("llava_qwen2", "llava_next"), {"loss": "kl", "heads": "each"}),
        (("llava_next", "internvl"), {"loss": "mse", "reduction": "matrix", "rows": "predicting"}),
        (("qwen2_vl", "llava_qwen2"), {"loss": "jsd", "engine": "auto"}),
        (("llava_qwen2", "llava_onevision"), {"heads": "match"}),
        (("llava_qwen2", "qwen2_vl"), {"reduction": "column", "sink_filter": True, "matching": "simple"}),
    ],
)
def test_losses_and_gradients_are_those_of_dense_shares(names, options):
    config = VATConfig(visual="resample", layers="all", **options)
    heads = {"heads": 4, "width": 64} if config.heads == "each" else {}
    models = build(names[0], 0, **heads), build(names[1], 1, 5, 64, 4, 2)
    batch = batch_of(encoder_of(*names, config.rows, models))
    student, expected = expected_alignment(config, models, batch)
    distillation = cdistill.distill(models[1], models[0], vat=config, train_vision=True)
    losses = distillation(batch)
    assert losses["vat"].item() == pytest.approx(expected.item(), rel=2e-4, abs=1e-6)
    losses["vat"].backward()
    expected.backward()
    exact, compared = dict(student.named_parameters()), 0
    scale = max(p.grad.abs().max() for p in exact.values() if p.grad is not None)
    for name, p in models[0].named_parameters():
        if p.grad is not None and exact[name].grad is not None:
            torch.testing.assert_close(p.grad.double(), exact[name].grad, rtol=1e-2, atol=float(1e-4 * scale))
            compared += 1
    assert compared > 10


def test_layers_are_matched_by_resampled_attention():
    """Adaptive matching across grids measures what dense shares give."""
    rng = torch.Generator().manual_seed(0)
    distances = VAT.measure(VATConfig(visual="resample", matching="adaptive", layers="all"), 2, 3)
    (teacher, count), (student, _) = (shown(name, (16, 16)) for name in ("llava_next", "llava_qwen2"))
    places, shares = resampling(teacher, student, 4)
    slices = [{i: torch.rand(1, 3, v, generator=rng) for i in range(n)} for n, v in ((2, 4), (3, count))]
    w = dense(places, shares, count)

    class Of:
        def __init__(self, slices):
            self.slices = slices

    distances.update(Of(slices[0]), Of(slices[1]), Resampling(places[None], shares[None]))
    for i, a in slices[0].items():
        for j, t in slices[1].items():
            q, p = t[0].double() @ w.T, a[0].double()
            q, p = q / q.sum(1, keepdim=True), p / p.sum(1, keepdim=True)
            assert distances.matrix()[i, j].item() == pytest.approx((q * (q / p).log()).sum(1).mean().item(), rel=1e-5)
    assert match_layers((0, 1), (0, 1, 2), matching="adaptive", distances=distances.matrix())


# Bad input.


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target": "recomputed"}, r"^vat\.visual resample needs vat\.target stored, got 'recomputed'"),
        ({"rows": "visual"}, r"^vat\.visual resample needs vat\.rows answer, predicting or text, got 'visual'"),
        ({"rows": "all"}, "got 'all'"),
    ],
)
def test_options_that_do_not_go_together(options, message):
    with pytest.raises(ValueError, match=message):
        VATConfig(visual="resample", **options)


def test_models_and_samples_that_cannot_be_laid_out():
    models = build("llava_qwen2", 0), build("llava_qwen2", 1)
    models[1].config.model_type = "blip-2"
    with pytest.raises(ValueError, match="where the visual tokens of blip-2 lie is not known"):
        encoder_of("llava_qwen2", "llava_qwen2", "text", models)
    models = build("idefics3", 0), build("llava_qwen2", 1)
    encoder = encoder_of("idefics3", "llava_qwen2", "predicting", models)
    models[1].config.vision_config.patch_size = 2
    with pytest.raises(BadSampleError, match="visual tokens: llava has 4 visual tokens here"):
        batch_of(encoder)


def test_batches_without_shares_or_with_other_tokens():
    models = build("internvl", 0), build("llava_qwen2", 1, 5, 64, 4, 2)
    batch = batch_of(encoder_of("internvl", "llava_qwen2", "text", models))
    distillation = cdistill.distill(models[1], models[0], vat=VATConfig(visual="resample"))
    lacking = {key: value for key, value in batch.items() if key != "pair_shares"}
    with pytest.raises(ValueError, match="pair_shares must be in the batch"):
        distillation(lacking)
    with pytest.raises(ValueError, match="must be of the same tokens, in every sample"):
        distillation(batch | {"pair_rows": batch["pair_rows"].flip(1)})
    with pytest.raises(
        ValueError, match=r"pair_places must be of \(samples, visual tokens\) \(3, \d+\), got \(3, \d+\)"
    ):
        distillation(batch | {"pair_places": batch["pair_places"][:, :-1]})
    with pytest.raises(ValueError, match=r"vat\.visual must be resample|differs"):
        cdistill.distill(models[1], models[0])
