"""Visual attention alignment on every supported model family, against transformers' eager attention matrices."""

from functools import cache

import pytest
import torch
import transformers
from family_models import (
    FAMILIES,
    STUDENT_LAYERS,
    TEACHER_LAYERS,
    build,
    build_pair,
    collate,
    draw,
    draw_samples,
    draw_with_layout,
    pack,
    processor,
    without_visual,
)
from vat_models import gradients, inputs
from vat_oracle import assert_gradients_like_eager, assert_like_eager, eager_loss, per_sample_eager_losses

from cdistill.vat import (
    VAT,
    SliceRecorder,
    VATConfig,
    attention_layers,
    installed,
    layer_range,
    packed_regions,
    token_regions,
    visual_token_ids,
)

HYBRID = [name for name, family in FAMILIES.items() if family.layer_types]
ALL = VATConfig(layers="all", rows="answer")


@cache
def pair(name):
    return build_pair(name)


def places(batch, visual, spans=None):
    """(row, answer positions after the first visual token, visual positions) of every sample, by the documented layout."""
    found = []
    for b, start, stop in spans or [(b, 0, visual.shape[1]) for b in range(len(visual))]:
        cols = [i for i in range(start, stop) if visual[b, i]]
        rows = [i for i in range(start, stop) if batch["labels"][b, i] != -100 and cols and i > cols[0]]
        found.append((b, torch.tensor(rows, dtype=torch.long), torch.tensor(cols, dtype=torch.long)))
    return found


def matched(name, config=ALL):
    """VAT for the pair, and the layers that its eager attention matrices belong to."""
    layers = [FAMILIES[name].attention_layers(depth) for depth in (STUDENT_LAYERS, TEACHER_LAYERS)]
    return VAT(config, *(attention_layers(model) for model in pair(name))), layers


def aligned(models, batch, vat, regions, key_mask):
    """The student's recorder after both models' passes, with its gradients in the student."""
    student, teacher = models
    student.zero_grad()
    targets = vat.teacher(regions, key_mask)
    with installed(student), installed(teacher):
        with torch.no_grad():
            teacher(**inputs(batch), cdistill_vat=targets, use_cache=False)
        alignment = vat.student(regions, targets, key_mask)
        student(**inputs(batch), cdistill_vat=alignment, use_cache=False)
        alignment.loss().backward()
    return alignment


def check(name, alignment, oracle):
    """The recorder's loss and the student's gradients are those of the oracle, which takes a dtype."""
    truth, true_grads = oracle(torch.float64)
    eager, eager_grads = oracle(torch.float32)
    assert_like_eager(alignment.loss().detach(), eager, truth)
    grads = gradients(pair(name)[0])
    last = FAMILIES[name].attention_layers(STUDENT_LAYERS)[-1]
    assert any(f"layers.{last}.self_attn.k_proj.weight" in key for key in grads)
    assert any("vision" in key or "visual" in key for key in grads)
    assert_gradients_like_eager(grads, eager_grads, true_grads)


@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("name", FAMILIES)
def test_loss_and_gradients_equal_eager(name, padding):
    batch, visual = draw_with_layout(name, 1, padding)
    vat, layers = matched(name)
    mask = batch["attention_mask"]
    regions = vat.regions(batch["input_ids"], batch["labels"], mask, visual_token_ids=visual_token_ids(pair(name)[0]))
    alignment = aligned(pair(name), batch, vat, regions, mask)
    for losses in alignment.losses().values():
        assert losses[1] == 0
        assert (losses[[0, 2, 3]] > 0).all()
    check(
        name,
        alignment,
        lambda dtype: eager_loss(*pair(name), batch, vat, places(batch, visual), dtype, layers),
    )


@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("name", FAMILIES)
def test_visual_positions_are_the_documented_ones(name, padding):
    batch, visual = draw_with_layout(name, 2, padding)
    ids = visual_token_ids(pair(name)[0])
    assert ids == visual_token_ids(pair(name)[1].config)
    expected = places(batch, visual)
    regions = token_regions(batch["input_ids"], batch["labels"], batch["attention_mask"], visual_token_ids=ids)
    for sample, (_, rows, cols) in enumerate(expected):
        for found, wanted in zip(regions, (rows, cols), strict=True):
            assert found[sample, : len(wanted)].tolist() == wanted.tolist()
            assert (found[sample, len(wanted) :] == -1).all()
    assert [len(cols) > 0 for _, _, cols in expected] == [True, False, True, True]


def test_types_of_tokens_where_they_mark_visual_tokens_alone():
    """Qwen's processors mark visual tokens; InternVL's and Idefics3's mark start, end and tile numbers, too."""
    for name in ("qwen2_vl", "qwen2_5_vl", "qwen3_vl"):
        batch, visual = draw_with_layout(name, 2, "left")
        regions = token_regions(
            None, batch["labels"], batch["attention_mask"], mm_token_type_ids=batch["mm_token_type_ids"]
        )
        assert [(cols >= 0).sum() for cols in regions.cols] == visual.sum(1).tolist()
    image = transformers.image_utils.PIL.Image.new("RGB", (8, 4))
    for name in ("internvl", "idefics3"):
        prompt = f"w1 {FAMILIES[name].placeholder} w2"
        encoded = processor(name)(text=[prompt], images=[[image]], return_tensors="pt", return_mm_token_type_ids=True)
        marked = torch.as_tensor(encoded["mm_token_type_ids"])[0].bool()
        visual = encoded["input_ids"][0] == visual_token_ids(pair(name)[0])[0]
        assert (marked & visual).sum() == visual.sum() < marked.sum()


@pytest.mark.parametrize("name", FAMILIES)
def test_outputs_and_generation_are_those_of_sdpa(name):
    student, _ = pair(name)
    batch = draw(name, 3, "left")
    options = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False}
    with torch.no_grad():
        plain = student(**batch)
        written = student.generate(**inputs(batch), **options)
        with installed(student):
            mask = batch["attention_mask"]
            regions = token_regions(
                batch["input_ids"], batch["labels"], mask, visual_token_ids=visual_token_ids(student)
            )
            recorder = SliceRecorder(attention_layers(student), regions, key_mask=mask)
            for extra in ({}, {"cdistill_vat": recorder}):
                hooked = student(**batch, **extra)
                assert torch.equal(hooked.logits, plain.logits)
                assert torch.equal(hooked.loss, plain.loss)
            assert torch.equal(student.generate(**inputs(batch), **options), written)
    assert all(a.any() for a in recorder.slices.values())


@pytest.mark.parametrize("name", FAMILIES)
def test_batches_of_text_alone(name):
    batch = without_visual(draw(name, 4))
    vat, _ = matched(name)
    mask = batch["attention_mask"]
    regions = vat.regions(batch["input_ids"], batch["labels"], mask, visual_token_ids=visual_token_ids(pair(name)[0]))
    assert regions.rows.shape == regions.cols.shape == (1, 0)
    alignment = aligned(pair(name), batch, vat, regions, mask)
    assert alignment.loss() == 0
    assert gradients(pair(name)[0]) == {}


ROWS = [[0, 1, 2], [3, 0]]


def packed(name, seed, config=ALL):
    """Samples, their packed batch, its regions and the alignment of the pair on it."""
    samples = draw_samples(name, seed)
    student, _ = pair(name)
    batch = pack(name, samples, ROWS, student)
    vat, _ = matched(name, config)
    regions = vat.packed_regions(
        batch.batch["input_ids"],
        batch.batch["labels"],
        batch.batch["position_ids"],
        attention_mask=batch.real,
        visual_token_ids=visual_token_ids(student),
    )
    return samples, batch, vat, regions


@pytest.mark.parametrize("name", FAMILIES)
def test_packed_samples_equal_eager(name):
    _, batch, vat, regions = packed(name, 5)
    assert [tuple(sample) for sample in regions.samples] == batch.spans
    assert not batch.real.all()
    alignment = aligned(pair(name), batch.batch, vat, regions, None)
    _, layers = matched(name)
    expected = places(batch.batch, batch.visual, batch.spans)
    for losses in alignment.losses().values():
        assert losses.shape == (5,)
        assert losses[1] == 0
    check(name, alignment, lambda dtype: eager_loss(*pair(name), batch.batch, vat, expected, dtype, layers))


@pytest.mark.parametrize("name", ["llava_qwen2", "qwen2_5_vl"])
def test_an_engine_makes_the_attention_of_packed_samples(name):
    """Losses, their gradients and logits are those of the model's own attention; what is padding alone gets zeros."""
    _, batch, vat, regions = packed(name, 5, VATConfig(layers="all", rows="answer", engine="torch_flash"))
    _, layers = matched(name)
    expected = places(batch.batch, batch.visual, batch.spans)
    alignment = aligned(pair(name), batch.batch, vat, regions, None)
    check(name, alignment, lambda dtype: eager_loss(*pair(name), batch.batch, vat, expected, dtype, layers))
    student, _ = pair(name)
    targets = [torch.rand(5, regions.rows.shape[1], regions.cols.shape[1])] * len(vat.matches)
    results = []
    for recorder in (None, vat.student(regions, targets, None)):
        with installed(student):
            logits = student(**inputs(batch.batch), cdistill_vat=recorder, use_cache=False).logits[batch.real]
        weight = student.get_input_embeddings().weight
        results.append([logits.detach(), *torch.autograd.grad(logits.square().mean(), weight)])
    for theirs, ours in zip(*results, strict=True):
        assert (ours - theirs).abs().max() <= 2e-5 * theirs.abs().max()


# recurrent layers and convolutions carry one packed sample's state into the next
@pytest.mark.parametrize("name", [name for name in FAMILIES if name not in HYBRID])
def test_packed_samples_equal_samples_by_themselves(name):
    samples, batch, vat, regions = packed(name, 6)
    student, teacher = pair(name)
    together = aligned(pair(name), batch.batch, vat, regions, None)
    together_losses, together_grads = torch.stack(list(together.losses().values())), gradients(student)
    alone_losses, alone_grads, truth_losses, truth_grads = [], [], [], []
    for i in [i for row in ROWS for i in row]:
        single, visual = collate(name, [samples[i]])
        mask = single["attention_mask"]
        found = vat.regions(single["input_ids"], single["labels"], mask, visual_token_ids=visual_token_ids(student))
        alignment = aligned(pair(name), single, vat, found, mask)
        alone_losses.append(torch.cat(list(alignment.losses().values())))
        alone_grads.append(gradients(student))
        losses, copied = per_sample_eager_losses(student, teacher, single, vat, places(single, visual), torch.float64)
        losses.mean().backward()
        truth_losses.append(losses.detach()[:, 0])
        truth_grads.append(gradients(copied))
    assert_like_eager(together_losses.detach(), torch.stack(alone_losses, 1).detach(), torch.stack(truth_losses, 1))

    def mean(parts):
        return {key: sum(part[key] for part in parts if key in part) / len(parts) for key in set().union(*parts)}

    assert_gradients_like_eager(together_grads, mean(alone_grads), mean(truth_grads))


@pytest.mark.parametrize("config", [VATConfig(heads="each"), VATConfig(rows="all", loss="kl"), VATConfig.official()])
def test_packed_variants_equal_padded_ones(config):
    config = VATConfig(**vars(config) | {"layers": "all"})
    name = "llava_qwen2"
    student, teacher = build(name, 0), build(name, 1, 5)
    samples = draw_samples(name, 7)
    batch = pack(name, samples, [[0, 1, 2, 3]], student)
    vat = VAT(config, 3, 5)
    ids = visual_token_ids(student)
    tokens = batch.batch
    regions = vat.packed_regions(tokens["input_ids"], tokens["labels"], tokens["position_ids"], visual_token_ids=ids)
    together = aligned((student, teacher), tokens, vat, regions, None).losses()
    padded, _ = collate(name, samples)
    mask = padded["attention_mask"]
    apart = vat.regions(padded["input_ids"], padded["labels"], mask, visual_token_ids=ids)
    expected = aligned((student, teacher), padded, vat, apart, mask).losses()
    assert together.keys() == expected.keys()
    for layer, losses in together.items():
        torch.testing.assert_close(losses, expected[layer], rtol=1e-4, atol=1e-6)
    slices = []
    for chosen, given, key_mask in ((regions, tokens, None), (apart, padded, mask)):
        recorder = SliceRecorder([1], chosen, key_mask=key_mask, heads=config.heads)
        with installed(student), torch.no_grad():
            student(**inputs(given), cdistill_vat=recorder, use_cache=False)
        slices.append(recorder.slices[1])
    torch.testing.assert_close(*slices, rtol=1e-4, atol=1e-6)


def test_packing_that_the_model_does_not_see_is_refused():
    name = "llava_qwen2"
    student, _ = pair(name)
    _, batch, _, regions = packed(name, 8)
    tokens = batch.batch
    recorder = SliceRecorder([1], regions, key_mask=None)
    rows = {key: tokens[key] for key in ("input_ids", "pixel_values")}
    shifted = tokens["position_ids"].roll(1, 1)
    with installed(student), torch.no_grad():
        for given in (
            {"use_cache": False},  # no positions: one sample as long as the row
            {"use_cache": False, "position_ids": shifted},
            {"use_cache": True, "position_ids": tokens["position_ids"]},  # transformers then does not look for samples
            {"use_cache": False, "position_ids": tokens["position_ids"], "attention_mask": batch.real.long()},
        ):
            with pytest.raises(ValueError, match="must keep the packed samples of the recorder apart"):
                student(**rows, **given, cdistill_vat=recorder)
        plain = token_regions(tokens["input_ids"], tokens["labels"], None, visual_token_ids=visual_token_ids(student))
        with pytest.raises(ValueError, match=r"packed samples without cdistill\.vat\.packed_regions"):
            student(**inputs(tokens), use_cache=False, cdistill_vat=SliceRecorder([1], plain, key_mask=None))
        with pytest.raises(ValueError, match=r"packed rows \(2, \d+\), not \(1, "):
            student(input_ids=tokens["input_ids"][1:, :5], use_cache=False, cdistill_vat=recorder)
        student(**inputs(tokens), use_cache=False, cdistill_vat=recorder)
    assert recorder.slices[1].any()
    with pytest.raises(ValueError, match="key_mask must be None for packed samples"):
        SliceRecorder([1], regions, key_mask=batch.real)


def test_one_sample_per_row_needs_no_mask():
    name = "llava_qwen2"
    student, _ = pair(name)
    sample = draw_samples(name, 9)[0]
    batch = pack(name, [sample], [[0]], student).batch
    ids = visual_token_ids(student)
    regions = packed_regions(batch["input_ids"], batch["labels"], batch["position_ids"], visual_token_ids=ids)
    plain = token_regions(batch["input_ids"], batch["labels"], None, visual_token_ids=ids)
    recorders = [SliceRecorder([2], chosen, key_mask=None) for chosen in (regions, plain)]
    with installed(student), torch.no_grad():
        for recorder in recorders:
            student(**inputs(batch), cdistill_vat=recorder, use_cache=False)
    assert torch.equal(*(recorder.slices[2] for recorder in recorders))


def test_packed_regions():
    ids = torch.tensor([[9, 5, 9, 4, 9, 9, 4, 0], [4, 5, 6, 9, 5, 6, 7, 8]])
    labels = torch.where(ids > 4, ids, -100)
    positions = torch.tensor([[0, 1, 2, 0, 1, 2, 3, 0], [0, 1, 2, 3, 4, 0, 1, 2]])
    real = torch.tensor([[1, 1, 1, 1, 1, 1, 1, 0], [1] * 8])
    regions = packed_regions(ids, labels, positions, attention_mask=real, visual_token_ids=9)
    assert regions.samples == ((0, 0, 3), (0, 3, 7), (1, 0, 5), (1, 5, 8))
    assert regions.rows.tolist() == [[0, 1, 2], [1, 2, -1], [3, 4, -1], [-1, -1, -1]]
    assert regions.cols.tolist() == [[0, 2], [1, 2], [3, -1], [-1, -1]]
    assert regions.sequence.tolist() == [[0, 0, 0, 1, 1, 1, 1, 2], [0] * 5 + [1] * 3]
    types = (ids == 9).long()
    multimodal = packed_regions(None, labels, positions.expand(4, 2, 8), attention_mask=real, mm_token_type_ids=types)
    assert torch.equal(multimodal.cols, regions.cols)
    shared = packed_regions(ids, labels, positions[:1], visual_token_ids=9)
    assert len(shared.samples) == 6
    # a position that stays or jumps ahead begins a sample as well: so transformers reads it
    odd = packed_regions(ids, labels, torch.tensor([[3, 4, 4, 5, 9, 10, 0, 0]]), visual_token_ids=9)
    assert odd.sequence.tolist() == [[0, 0, 1, 1, 2, 2, 3, 4]] * 2
    found = transformers.masking_utils.find_packed_sequence_indices
    for chosen, given in ((regions, positions), (odd, torch.tensor([[3, 4, 4, 5, 9, 10, 0, 0]]).expand(2, -1))):
        assert torch.equal(chosen.sequence, found(given))
    for options, message in (
        ({"position_ids": positions.expand(3, 2, 8)}, "text positions first"),
        ({"position_ids": positions[:, :5]}, r"must be \(2, 8\)"),
        ({"attention_mask": real * 0}, "at least one real token"),
        ({"attention_mask": real[:1]}, r"attention_mask must be \(2, 8\)"),
        ({"labels": labels[:, 1:]}, r"labels must be \(2, 8\)"),
        ({"input_ids": None}, "need input_ids"),
        ({"visual_token_ids": None}, "visual_token_ids must name"),
    ):
        given = {"input_ids": ids, "labels": labels, "position_ids": positions, "visual_token_ids": 9} | options
        with pytest.raises(ValueError, match=message):
            packed_regions(**given)


@pytest.mark.parametrize("name", HYBRID)
def test_hybrid_models_count_attention_layers_only(name):
    student, teacher = pair(name)
    ours, theirs = (FAMILIES[name].attention_layers(depth) for depth in (STUDENT_LAYERS, TEACHER_LAYERS))
    assert attention_layers(student) == ours == attention_layers(student.config.text_config)
    assert attention_layers(teacher) == theirs
    assert len(ours) < STUDENT_LAYERS
    middle = VAT(VATConfig(rows="answer"), ours, theirs).matches
    assert {match.student for match in middle} == set(layer_range(ours, "intermediate")) < set(ours)
    assert {t for match in middle for t in match.teachers} <= set(theirs)
    with pytest.raises(ValueError, match=r"layers \[0\] were not recorded"):
        batch = without_visual(draw(name, 0))
        regions = token_regions(batch["input_ids"], batch["labels"], None, visual_token_ids=visual_token_ids(student))
        recorder = SliceRecorder([0, *ours], regions, key_mask=batch["attention_mask"])
        with installed(student), torch.no_grad():
            student(**inputs(batch), cdistill_vat=recorder)
        _ = recorder.slices


def test_layer_spans_of_hybrid_models():
    layers = (3, 7, 11, 15, 19, 23, 27, 31)
    assert layer_range(layers, "all") == layers
    assert [layer_range(layers, span) for span in ("early", "intermediate", "later")] == [
        (3, 7),
        (11, 15, 19),
        (23, 27, 31),
    ]
    assert layer_range(layers, "8-20") == (11, 15, 19)
    assert layer_range(layers, [7, 23]) == (7, 23)
    assert layer_range(tuple(range(24)), "official") == layer_range(24, "official")
    assert layer_range([2 * i + 1 for i in range(24)], "official") == tuple(range(17, 30, 2))
    for bad, message in (
        ([8], "among the attention layers"),
        ("4-6", "holds none of the attention layers"),
    ):
        with pytest.raises(ValueError, match=message):
            layer_range(layers, bad)
    for bad, message in (((), "no attention layers"), ((3, 3), "strictly increasing"), ((-1, 2), "increasing")):
        with pytest.raises(ValueError, match=message):
            layer_range(bad, "all")


def test_attention_layers_by_configuration():
    assert attention_layers(transformers.Qwen2Config(num_hidden_layers=3, layer_types=["full_attention"] * 3)) == (
        0,
        1,
        2,
    )
    assert attention_layers(transformers.GPT2Config(n_layer=2)) == (0, 1)  # names no layer types
    next_80b = transformers.Qwen3NextConfig(num_hidden_layers=8)
    assert attention_layers(next_80b) == (3, 7)
    config = transformers.Lfm2Config(num_hidden_layers=4, full_attn_idxs=[1, 2])
    assert attention_layers(config) == (1, 2)
    sliding = transformers.Qwen2Config(num_hidden_layers=2, layer_types=["sliding_attention", "full_attention"])
    assert attention_layers(sliding) == (0, 1)
    sliding.layer_types = ["full_attention", "telepathy"]
    with pytest.raises(ValueError, match="Qwen2Config has layers of unknown type telepathy"):
        attention_layers(sliding)


def test_models_without_visual_tokens_are_named():
    with pytest.raises(ValueError, match="Qwen2Config names no image_token_id or video_token_id"):
        visual_token_ids(transformers.Qwen2Config())


def test_teacher_and_student_must_see_equally_many_tokens():
    name = "llava_qwen2"
    vat, _ = matched(name)
    student, teacher = pair(name)
    batch = draw(name, 10)
    mask = batch["attention_mask"]
    ids = visual_token_ids(student)
    regions = vat.regions(batch["input_ids"], batch["labels"], mask, visual_token_ids=ids)
    targets = vat.teacher(regions, mask)
    with installed(teacher), torch.no_grad():
        teacher(**inputs(batch), cdistill_vat=targets)
    fewer = regions._replace(cols=regions.cols[:, :-1])
    other = regions._replace(cols=torch.where(regions.cols == regions.cols[0, 3], -1, regions.cols))
    with pytest.raises(
        ValueError, match=r"equally many visual tokens in every sample; they have .* \(4, 8\) and \(4, 7\)"
    ):
        vat.student(fewer, targets, mask)
    with pytest.raises(ValueError, match="equally many visual tokens in every sample"):
        vat.student(other, targets, mask)
    with pytest.raises(ValueError, match="equally many rows in every sample"):
        vat.student(regions._replace(rows=regions.rows.flip(0)), targets, mask)
    with pytest.raises(ValueError, match=r"targets must be \(samples, rows, visual tokens\) = \(4, 5, 7\)"):
        vat.student(fewer, targets.targets, mask)
