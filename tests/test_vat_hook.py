"""The transformers hook and its recorders on tiny Llava models, against transformers' eager attention matrices."""

import copy

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from transformers import AttentionInterface, LlavaForConditionalGeneration, Qwen2ForCausalLM
from vat_models import (
    IMAGE,
    STUDENT_LAYERS,
    TEACHER_LAYERS,
    draw_batch,
    gradients,
    inputs,
    record_everything,
    regions_of,
    student_and_teacher,
    tiny_llava,
    vat_loss,
)
from vat_oracle import assert_gradients_like_eager, assert_like_eager, eager_attentions, eager_loss, places_of

from cdistill import choices
from cdistill.ops import attention_slice
from cdistill.vat import (
    VAT,
    LayerMatch,
    SliceRecorder,
    TeacherTargets,
    VATConfig,
    install,
    installed,
    layer_distances,
    packed_regions,
    token_regions,
    uninstall,
)
from cdistill.vat import recorders as recorders_module
from cdistill.vat.hook import is_installed


def check_against_eager(student, teacher, batch, config):
    distances = None
    if config.matching == "adaptive":
        distances = torch.rand(2, 3, generator=torch.Generator().manual_seed(3))
    vat = VAT(config, STUDENT_LAYERS, TEACHER_LAYERS, distances=distances, impl="torch")
    places = places_of(regions_of(batch, config.rows))
    truth, true_grads = eager_loss(student, teacher, batch, vat, places, torch.float64)
    eager, eager_grads = eager_loss(student, teacher, batch, vat, places, torch.float32)
    install(student)
    install(teacher)
    alignment = vat_loss(student, teacher, batch, vat)
    loss = alignment.loss()
    loss.backward()
    assert loss.dtype == torch.float32
    assert loss.ndim == 0
    assert_like_eager(loss.detach(), eager, truth)
    grads = gradients(student)
    last_aligned = max(match.student for match in vat.matches)
    assert f"model.language_model.layers.{last_aligned}.self_attn.k_proj.weight" in grads
    assert any("vision_tower" in name for name in grads)
    assert_gradients_like_eager(grads, eager_grads, true_grads)
    return alignment


@pytest.mark.parametrize("matching", ["group", "simple", "adaptive"])
@pytest.mark.parametrize("loss", choices.ALIGNMENT_LOSSES)
def test_losses_and_gradients_equal_eager(loss, matching):
    check_against_eager(*student_and_teacher(), draw_batch(0), VATConfig(loss=loss, matching=matching))


@pytest.mark.parametrize("rows", ["answer", "text", "visual", "all"])
@pytest.mark.parametrize(("family", "padding"), [("qwen2", "left"), ("llama", "left"), ("llama", "right")])
def test_families_rows_and_padding_equal_eager(family, padding, rows):
    check_against_eager(*student_and_teacher(family), draw_batch(1, padding), VATConfig(rows=rows))


@pytest.mark.parametrize(
    "config",
    [
        VATConfig(reduction="matrix"),
        VATConfig(reduction="column", loss="kl"),
        VATConfig(reduction="column", sink_filter=True, rows="visual", layer_sum=True),
        VATConfig(layers="all"),
        VATConfig(heads="each"),
        VATConfig(engine="torch_flash", layers="all"),
        VATConfig(engine="triton"),
    ],
    ids=["matrix", "column", "official", "all", "each", "torch_flash", "triton"],
)
def test_variants_equal_eager(config):
    pair = student_and_teacher(teacher_heads=2 if config.heads == "each" else 4)
    alignment = check_against_eager(*pair, draw_batch(2), config)
    per_layer = alignment.per_layer()
    assert not any(loss.requires_grad for loss in per_layer.values())
    total = torch.stack(list(per_layer.values()))
    torch.testing.assert_close(total.sum() if config.layer_sum else total.mean(), alignment.loss().detach())


def test_samples_without_visual_tokens_count_zero():
    student, teacher = student_and_teacher()
    with installed(student), installed(teacher):
        alignment = vat_loss(student, teacher, draw_batch(3), VAT(VATConfig(), 4, 7, impl="torch"))
    for losses in alignment.losses().values():
        assert losses.shape == (4,)
        assert losses[1] == 0
        assert (losses[[0, 2, 3]] > 0).all()


def test_batch_without_visual_tokens_trains_on():
    student, teacher = student_and_teacher()
    batch = {name: value[1:2] for name, value in draw_batch(4).items() if name != "pixel_values"}
    install(student)
    install(teacher)
    loss = vat_loss(student, teacher, batch, VAT(VATConfig(), 4, 7, impl="torch")).loss()
    loss.backward()
    assert loss == 0
    assert gradients(student) == {}


@pytest.mark.parametrize("padding", ["left", "right", None])
def test_outputs_are_those_of_sdpa(padding):
    student, _ = student_and_teacher()
    batch = draw_batch(5, padding or "right")
    if padding is None:
        batch = {name: value[:1, :13] if name != "pixel_values" else value[:1] for name, value in batch.items()}
        assert batch["attention_mask"].all()
    regions = regions_of(batch)
    plain = student(**batch)
    install(student)
    recorder = SliceRecorder(range(STUDENT_LAYERS), regions, key_mask=batch["attention_mask"], impl="torch")
    for hooked in (student(**batch), student(**batch, cdistill_vat=recorder)):
        assert torch.equal(hooked.logits, plain.logits)
        assert torch.equal(hooked.loss, plain.loss)
    uninstall(student)
    assert torch.equal(student(**batch).logits, plain.logits)
    if padding is not None:
        without_mask = student(**(inputs(batch) | {"attention_mask": None}))
        assert not torch.equal(without_mask.logits, plain.logits)


def test_slices_are_eager_attention():
    student, _ = student_and_teacher()
    batch = draw_batch(6, "left")
    regions = regions_of(batch, "all")
    expected = eager_attentions(copy.deepcopy(student), batch, torch.float64)
    install(student)
    for heads in ("mean", "each"):
        recorder = SliceRecorder([3, 1], regions, key_mask=batch["attention_mask"], heads=heads, impl="torch")
        student(**inputs(batch), cdistill_vat=recorder)
        assert list(recorder.slices) == [1, 3]
        for layer, a in recorder.slices.items():
            assert not a.requires_grad
            for b in range(4):
                r, c = (positions[b][positions[b] >= 0].long() for positions in regions)
                full = expected[layer][b][:, r[:, None], c]
                part = a[b][..., : len(r), : len(c)].double()
                torch.testing.assert_close(part, full.mean(0) if heads == "mean" else full, rtol=1e-4, atol=1e-6)


def test_autocast_does_not_round_the_recorded_queries():
    student, _ = student_and_teacher()
    install(student)
    batch = draw_batch(19)
    regions, mask = regions_of(batch), batch["attention_mask"].bool()
    seen = []

    class Watcher(SliceRecorder):
        def record(self, layer, q, k, v, *, scale, causal):
            seen.append((q, k))
            super().record(layer, q, k, v, scale=scale, causal=causal)

    recorder = Watcher([2], regions, key_mask=mask, impl="torch")
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        student(**inputs(batch), cdistill_vat=recorder)
    (q, k), *others = seen
    assert not others
    assert q.dtype == k.dtype == torch.float32
    assert torch.equal(recorder.slices[2], attention_slice(q, k, *regions, key_mask=mask, impl="torch"))


def test_adaptive_distances_over_batches():
    student, teacher = student_and_teacher()
    install(student)
    install(teacher)
    config = VATConfig(matching="adaptive")
    with pytest.raises(ValueError, match="needs them"):
        VAT(config, STUDENT_LAYERS, TEACHER_LAYERS)
    distances = VAT.measure(config, STUDENT_LAYERS, TEACHER_LAYERS, impl="torch")
    with pytest.raises(ValueError, match="at least one row"):
        distances.matrix()
    single = []
    for seed in (0, 1):
        batch = draw_batch(seed)
        pair = []
        for model, make in ((student, distances.student), (teacher, distances.teacher)):
            recorder = make(regions_of(batch), batch["attention_mask"])
            with torch.no_grad():
                model(**inputs(batch), cdistill_vat=recorder)
            pair.append(recorder)
        distances.update(*pair)
        single.append(layer_distances(*(list(recorder.slices.values()) for recorder in pair)))
    torch.testing.assert_close(distances.matrix(), (single[0] + single[1]) / 2)  # both batches have equally many rows
    matches = VAT(config, STUDENT_LAYERS, TEACHER_LAYERS, distances=distances.matrix()).matches
    assert [match.student for match in matches] == [1, 2]


def test_each_teacher_layer_is_computed_once_and_kept_per_window(monkeypatch):
    _, teacher = student_and_teacher()
    install(teacher)
    batch = draw_batch(7)
    calls = []
    accumulate = recorders_module.attention_slice_accumulate

    def counting(*args, **kwargs):
        calls.append(kwargs["heads"])
        accumulate(*args, **kwargs)

    monkeypatch.setattr(recorders_module, "attention_slice_accumulate", counting)
    matches = [LayerMatch(i, tuple(range(i, i + 4))) for i in range(3)]
    targets = TeacherTargets(matches, regions_of(batch), key_mask=batch["attention_mask"], impl="torch")
    singles = SliceRecorder(range(6), regions_of(batch), key_mask=batch["attention_mask"], impl="torch")
    teacher(**inputs(batch), cdistill_vat=targets)
    assert len(calls) == 6
    teacher(**inputs(batch), cdistill_vat=singles)
    assert len({a.data_ptr() for a in targets.targets}) == len(targets.targets) == 3
    for match, target in zip(matches, targets.targets, strict=True):
        expected = torch.stack([singles.slices[t].double() for t in match.teachers]).mean(0)
        torch.testing.assert_close(target.double(), expected, rtol=1e-6, atol=1e-7)
    assert targets.targets[0] is targets.targets[0]  # asking twice does not divide twice


def test_windows_may_begin_together_and_a_second_pass_counts_once():
    _, teacher = student_and_teacher()
    install(teacher)
    batch = draw_batch(20)
    regions, mask = regions_of(batch), batch["attention_mask"]
    matches = [LayerMatch(0, (1, 2)), LayerMatch(1, (1, 3)), LayerMatch(2, (1,))]
    targets = TeacherTargets(matches, regions, key_mask=mask, impl="torch")
    singles = SliceRecorder([1, 2, 3], regions, key_mask=mask, impl="torch")
    with torch.no_grad():
        for recorder in (targets, singles, targets):
            teacher(**inputs(batch), cdistill_vat=recorder)
    a = singles.slices
    for target, expected in zip(targets.targets, [(a[1] + a[2]) / 2, (a[1] + a[3]) / 2, a[1]], strict=True):
        torch.testing.assert_close(target, expected, rtol=1e-6, atol=0)


def test_teacher_in_inference_mode():
    student, teacher = student_and_teacher()
    install(student)
    install(teacher)
    batch = draw_batch(8)
    vat = VAT(VATConfig(rows="answer"), STUDENT_LAYERS, TEACHER_LAYERS, impl="torch")
    expected = vat_loss(student, teacher, batch, vat).loss()
    targets = vat.teacher(regions_of(batch), batch["attention_mask"])
    with torch.inference_mode():
        teacher(**inputs(batch), cdistill_vat=targets)
    alignment = vat.student(regions_of(batch), targets.targets, batch["attention_mask"])
    student(**inputs(batch), cdistill_vat=alignment)
    assert torch.equal(alignment.loss(), expected)
    alignment.loss().backward()
    assert gradients(student)


def test_generation_still_works():
    student, _ = student_and_teacher()
    batch = inputs(draw_batch(12, "left"))
    options = {"max_new_tokens": 5, "do_sample": False, "min_new_tokens": 5}
    expected = student.generate(**batch, **options)
    install(student)
    assert torch.equal(student.generate(**batch, **options), expected)


def implementations(model):
    return [model.config.text_config._attn_implementation, model.config.vision_config._attn_implementation]


def test_install_switches_the_text_model_only_and_twice_is_once():
    student, _ = student_and_teacher()
    student.set_attn_implementation("eager")
    for _ in range(2):
        install(student)
        assert implementations(student) == ["sdpa", "eager"]
        assert is_installed(student)
    uninstall(student)
    assert implementations(student) == ["sdpa", "eager"]
    assert not is_installed(student)
    uninstall(student, "eager")
    for _ in range(2):
        with installed(student):
            assert implementations(student) == ["sdpa", "eager"]
            assert is_installed(student)
        assert implementations(student) == ["eager", "eager"]
        assert not is_installed(student)
    install(student)
    with installed(student):
        pass
    assert is_installed(student)


def test_nothing_of_the_hook_is_saved_and_copies_keep_it(tmp_path):
    student, teacher = student_and_teacher()
    install(student)
    batch = draw_batch(21)
    student.save_pretrained(tmp_path)
    assert "cdistill" not in "".join(path.read_text() for path in tmp_path.glob("*.json"))
    loaded = LlavaForConditionalGeneration.from_pretrained(tmp_path).eval()
    assert torch.equal(loaded(**batch).logits, student(**batch).logits)
    slices = record_everything(student, batch).slices[1]
    assert torch.equal(record_everything(copy.deepcopy(student), batch).slices[1], slices)
    for other in (loaded, teacher):  # of the same process, and not installed
        with pytest.raises(ValueError, match=r"layers \[1\] were not recorded"):
            _ = record_everything(other, batch).slices
    uninstall(student)
    with pytest.raises(ValueError, match=r"layers \[1\] were not recorded"):
        _ = record_everything(student, batch).slices


@pytest.mark.parametrize("packed", [False, True])
def test_masks_that_a_model_writes_into_are_refused(packed):
    """As sparse attention may do, beside making a mask anew."""
    student, _ = student_and_teacher()
    install(student)
    batch = draw_batch(22, "left")
    length = batch["input_ids"].shape[1]
    given, recorder = inputs(batch), None
    if packed:
        positions = torch.cat((torch.arange(5), torch.arange(length - 5))).expand(4, -1)
        given |= {"attention_mask": None, "position_ids": positions, "use_cache": False}
        regions = packed_regions(batch["input_ids"], batch["labels"], positions, visual_token_ids=IMAGE)
        recorder = SliceRecorder([1, 2], regions, key_mask=None, impl="torch")

    def hide_keys(module, args, kwargs):
        kwargs["attention_mask"].logical_and_(torch.arange(length) != 3)

    recorder = recorder or SliceRecorder([1, 2], regions_of(batch), key_mask=batch["attention_mask"], impl="torch")
    student(**given, cdistill_vat=recorder)
    handle = student.model.language_model.layers[2].self_attn.register_forward_pre_hook(hide_keys, with_kwargs=True)
    message = "must keep the packed samples" if packed else "layer 2 uses a mask other than causality and padding"
    with pytest.raises(ValueError, match=message):
        student(**given, cdistill_vat=recorder)
    handle.remove()


def test_functions_of_others_are_wrapped_and_called():
    """Another library may put its own function in SDPA's place after a model was installed."""
    student, _ = student_and_teacher()
    install(student)
    before = AttentionInterface()["sdpa"]
    calls = []

    def theirs(*args, **kwargs):
        calls.append(kwargs)
        return before.__wrapped__(*args, **kwargs)

    batch = draw_batch(23)
    expected = student(**batch).logits
    AttentionInterface.register("sdpa", theirs)
    try:
        install(student)
        assert torch.equal(student(**batch).logits, expected)
        assert record_everything(student, batch).slices
    finally:
        AttentionInterface.register("sdpa", before)
    assert calls
    assert not any("cdistill_vat" in kwargs for kwargs in calls)


def test_vision_layers_are_not_recorded():
    student, _ = student_and_teacher()
    install(student)
    assert implementations(student) == ["sdpa", "sdpa"]
    batch = draw_batch(13)
    seen = []

    class Watcher:
        layers = frozenset(range(STUDENT_LAYERS))
        key_mask = batch["attention_mask"].bool()

        def record(self, layer, q, k, v, *, scale, causal):
            seen.append((layer, q.shape, k.shape, scale, causal))

    student(**inputs(batch), cdistill_vat=Watcher())
    length = batch["input_ids"].shape[1]
    q, k = torch.Size([4, 2, length, 16]), torch.Size([4, 1, length, 16])
    assert seen == [(layer, q, k, 16**-0.5, True) for layer in range(STUDENT_LAYERS)]


def test_plain_language_model():
    config = tiny_llava(0, "qwen2", 2, 32, 2, 1).config.text_config
    model = Qwen2ForCausalLM(config)
    install(model)
    ids = torch.tensor([[3, IMAGE, IMAGE, 4, 5]])
    regions = token_regions(ids, ids, None, visual_token_ids=IMAGE)
    recorder = SliceRecorder([0, 1], regions, key_mask=None, impl="torch")
    model(input_ids=ids, cdistill_vat=recorder)
    assert recorder.slices[1].shape == (1, 4, 2)


class SquareMatrices(TorchDispatchMode):
    """Counts floating tensors (B,H,T,T) with more than one head that any operation returns."""

    def __init__(self, length):
        super().__init__()
        self.length, self.count = length, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for x in tree_iter(result):
            if isinstance(x, torch.Tensor) and x.is_floating_point() and x.ndim >= 3:
                square = x.shape[-2:] == (self.length, self.length)
                self.count += square and x.shape[-3] > 1
        return result


def test_no_attention_matrix_exists():
    student, teacher = student_and_teacher()
    install(student)
    install(teacher)
    batch = draw_batch(14)
    batch = {name: value[2:3] if name != "pixel_values" else value[1:3] for name, value in batch.items()}
    vat = VAT(VATConfig(layers="all"), STUDENT_LAYERS, TEACHER_LAYERS, impl="torch")
    with SquareMatrices(batch["input_ids"].shape[1]) as matrices:
        vat_loss(student, teacher, batch, vat).loss().backward()
    assert matrices.count == 0
    uninstall(student, "eager")
    with SquareMatrices(batch["input_ids"].shape[1]) as matrices:
        student(**inputs(batch))
    assert matrices.count > 0
