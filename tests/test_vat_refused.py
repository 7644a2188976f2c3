"""What the hook and its recorders refuse: attention that cannot be aligned, masks that differ, layers that are missing."""

import pytest
import torch
import transformers
from family_models import PAD, VOCABULARY
from transformers import AttentionInterface
from vat_models import (
    IMAGE,
    STUDENT_LAYERS,
    draw_batch,
    inputs,
    record_everything,
    regions_of,
    student_and_teacher,
    tiny_llava,
)

import cdistill
from cdistill.vat import LayerMatch, SliceRecorder, StudentAlignment, TeacherTargets, install, installed, token_regions


@pytest.mark.parametrize(("side", "place"), [("teacher", 0), ("student", 1)])
def test_heads_that_the_ops_do_not_take_are_told_with_their_model(side, place):
    pair = [tiny_llava(0, "qwen2", 2, 64, 4, 2), tiny_llava(1, "qwen2", 2, 64, 4, 2)]
    pair[place] = narrow = tiny_llava(2, "qwen2", 2, 48, 4, 2)
    with pytest.raises(ValueError, match=f"^{side}: .* the qwen2's is 12, hidden_size 48 by num_attention_heads 4$"):
        cdistill.distill(*pair)
    install(narrow)
    with pytest.raises(ValueError, match=r"^layer 1 \(Qwen2Attention\): q must have a head dim .*, got 12$"):
        record_everything(narrow, draw_batch(0))


def test_missing_layers_are_named():
    student, teacher = student_and_teacher()
    batch = draw_batch(15)
    regions, mask = regions_of(batch), batch["attention_mask"]
    install(teacher)
    targets = TeacherTargets([LayerMatch(0, (5, 6, 7))], regions, key_mask=mask, impl="torch")
    with torch.no_grad():
        teacher(**inputs(batch), cdistill_vat=targets)
        student(**inputs(batch))
    with pytest.raises(ValueError, match=r"layers \[7\] were not recorded"):
        _ = targets.targets
    alignment = StudentAlignment([LayerMatch(0, (1,))], regions, [torch.zeros(4, 5, 8)], key_mask=mask)
    for result in (alignment.loss, alignment.losses, alignment.per_layer):
        with pytest.raises(ValueError, match=r"layers \[0\] were not recorded"):
            result()
    with pytest.raises(ValueError, match="one tensor for each of the 1 matches, got 0"):
        StudentAlignment([LayerMatch(0, (1,))], regions, [], key_mask=mask)


def test_padding_of_recorder_and_model_must_agree():
    student, _ = student_and_teacher()
    install(student)
    batch = draw_batch(16)
    for given in (None, torch.ones_like(batch["attention_mask"])):
        with pytest.raises(ValueError, match="key_mask of the recorder must be the attention_mask"):
            record_everything(student, batch, attention_mask=given)
    with pytest.raises(ValueError, match="must be a recorder"):
        student(**inputs(batch), cdistill_vat="all")


@pytest.mark.parametrize("window", [3, 64])
def test_sliding_window(window):
    """A window narrower than the sequence is refused; a wider one hides nothing and is plain causal attention."""
    options = {"use_sliding_window": True, "sliding_window": window, "max_window_layers": 1}
    student, _ = student_and_teacher(**options)
    assert student.config.text_config.layer_types[1] == "sliding_attention"
    install(student)
    batch = draw_batch(17, "left")
    if window == 3:
        with pytest.raises(ValueError, match="layer 1 uses a sliding window of 3"):
            record_everything(student, batch)
        recorder = SliceRecorder([0], regions_of(batch), key_mask=batch["attention_mask"], impl="torch")
        student(**inputs(batch), cdistill_vat=recorder)  # layer 0 has no window; the others are not touched
        assert recorder.slices[0].any()
    else:
        plain = tiny_llava(0, "qwen2", STUDENT_LAYERS, 32, 2, 1)
        install(plain)
        assert torch.equal(record_everything(student, batch).slices[1], record_everything(plain, batch).slices[1])


def test_masks_other_than_causality_and_padding_are_refused():
    student, _ = student_and_teacher()
    install(student)
    batch = draw_batch(18)
    length = batch["input_ids"].shape[1]
    causal = torch.ones(length, length, dtype=torch.bool).tril().expand(4, 1, -1, -1)
    with pytest.raises(ValueError, match="layer 1 uses a mask other than causality and padding"):
        record_everything(student, batch, attention_mask=causal)
    packed = torch.cat((torch.arange(5), torch.arange(length - 5))).expand(4, -1)
    with pytest.raises(ValueError, match="layer 1 uses a mask other than causality and padding"):
        record_everything(student, batch, attention_mask=None, position_ids=packed, use_cache=False)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"softcap": 50.0}, "soft-capping"),
        ({"s_aux": torch.zeros(2)}, "sinks"),
        ({"position_bias": torch.zeros(1, 2, 4, 4)}, "position bias"),
        ({"is_causal": False}, "bidirectional"),
        ({"sliding_window": 3}, "sliding window of 3 of 4"),
        ({"keys": 6}, r"4 queries on 6 keys \(a key-value cache"),
    ],
)
def test_attention_that_is_not_plain_is_refused_in_recorded_layers_only(options, message):
    model = tiny_llava(0, "qwen2", 4, 32, 2, 1)
    install(model)
    attention = AttentionInterface()["sdpa"]
    q, k = torch.randn(1, 2, 4, 16), torch.randn(1, 2, options.pop("keys", 4), 16)
    recorder = SliceRecorder(
        [3], token_regions(torch.full((1, 4), IMAGE), None, None, visual_token_ids=IMAGE, rows="all"), key_mask=None
    )
    with pytest.raises(ValueError, match=f"layer 3 uses .*{message}"):
        attention(model.model.language_model.layers[3].self_attn, q, k, k, None, cdistill_vat=recorder, **options)
    if "softcap" not in options:  # which SDPA itself refuses
        attention(model.model.language_model.layers[2].self_attn, q, k, k, None, cdistill_vat=recorder, **options)


def attend_twice(layers):
    """As differential attention does, with two calls of the attention function in one layer."""
    attend = layers[1].self_attn.forward
    layers[1].self_attn.forward = lambda *args, **kwargs: [attend(*args, **kwargs) for _ in range(2)][1]


def share(layers):
    layers[2] = layers[1]


@pytest.mark.parametrize("change", [attend_twice, share])
@pytest.mark.parametrize("called", ["whole", "body", "language model"])
def test_a_layer_that_attends_twice_in_one_pass(change, called):
    """Whichever of the models within each other is called; a pass of its own is another matter."""
    model, _ = student_and_teacher()
    install(model)
    layers = model.model.language_model.layers
    batch, recorder = draw_batch(19), record_everything(model, draw_batch(19))
    given = inputs(batch) | {"use_cache": False}  # which each attention would lengthen
    if called == "language model":
        given["inputs_embeds"] = model.get_input_embeddings()(given.pop("input_ids"))
        del given["pixel_values"]
    part = {"whole": model, "body": model.model, "language model": model.model.language_model}[called]
    part(**given, cdistill_vat=recorder)  # a second pass
    change(layers)
    others = SliceRecorder([0, 3], regions_of(batch), key_mask=batch["attention_mask"], impl="torch")
    part(**given, cdistill_vat=others)
    assert set(others.slices) == {0, 3}
    with pytest.raises(ValueError, match="layer 1 attends more than once in one forward pass") as refused:
        part(**given, cdistill_vat=recorder)
    assert "\n" not in str(refused.value)


def refuse(model, message, layer=0, **forward):
    """The recorder of this layer is refused, with the reason, while another one's forward pass goes on."""
    install(model)
    ids = torch.tensor([[5, 6, 7, 8, 9, 10]])
    regions = token_regions(ids, ids, None, visual_token_ids=6)
    recorder = SliceRecorder([layer], regions, key_mask=None)
    with pytest.raises(ValueError, match=message) as refused, torch.no_grad():
        model(input_ids=ids, **forward, cdistill_vat=recorder)
    assert "\n" not in str(refused.value)


TINY = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "pad_token_id": PAD,
}


def siglip():
    return transformers.SiglipVisionConfig(
        image_size=8, patch_size=4, num_hidden_layers=1, hidden_size=32, intermediate_size=32, num_attention_heads=2
    )


def test_bidirectional_images_are_refused():
    text = transformers.Gemma3TextConfig(**TINY, layer_types=["full_attention"] * 2)
    config = transformers.Gemma3Config(
        text_config=text, vision_config=siglip(), mm_tokens_per_image=4, image_token_index=6
    )
    types = torch.tensor([[0, 1, 1, 0, 0, 0]])
    message = "layer 0 uses a mask other than causality and padding .bidirectional images"
    refuse(transformers.Gemma3ForConditionalGeneration(config).eval(), message, token_type_ids=types)
    text = transformers.GemmaConfig(**TINY)
    config = transformers.PaliGemmaConfig(vision_config=siglip(), text_config=text, image_token_index=6)
    paligemma = transformers.PaliGemmaForConditionalGeneration(config).eval()
    refuse(paligemma, "layer 0 uses bidirectional attention", token_type_ids=1 - types)


def test_scores_that_are_not_softmax_of_products_are_refused():
    gemma = transformers.Gemma2ForCausalLM(transformers.Gemma2Config(**TINY))
    experts = TINY | {"num_local_experts": 2, "num_experts_per_tok": 1}
    for model in (gemma, transformers.GptOssForCausalLM(transformers.GptOssConfig(**experts))):
        with pytest.raises(ValueError, match=r"no plain softmax of .*soft-capping or attention sinks") as refused:
            install(model)
        assert "\n" not in str(refused.value)
        before = model.config._attn_implementation
        with pytest.raises(ValueError, match="no plain softmax"), installed(model):
            pass
        assert model.config._attn_implementation == before


def test_sliding_windows_are_refused():
    model = transformers.MistralForCausalLM(transformers.MistralConfig(**TINY, sliding_window=3)).eval()
    refuse(model, "layer 1 uses a sliding window of 3 of 6 tokens", layer=1)
    text = transformers.Gemma3TextConfig(**TINY, layer_types=["sliding_attention", "full_attention"], sliding_window=3)
    refuse(transformers.Gemma3ForCausalLM(text).eval(), "layer 0 uses a sliding window of 3")
