"""`cdistill.distill` on every family: losses and gradients against full logits and eager attention matrices."""

import copy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from family_models import (
    FAMILIES,
    ID,
    PAD,
    VOCABULARY,
    build,
    build_pair,
    collate,
    draw,
    draw_samples,
    draw_with_layout,
    pack,
    without_visual,
)
from peft import LoraConfig, get_peft_model
from transformers import (
    CLIPVisionConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlavaConfig,
    LlavaForConditionalGeneration,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen2Config,
)

import cdistill
from cdistill.choices import KDConfig
from cdistill.models.logits import after_head
from cdistill.models.parts import named_parts
from cdistill.vat import VAT, VATConfig, attention_layers

KD_WEIGHT, VAT_WEIGHT = 0.7, 3.0


def eager(model, dtype):
    clone = copy.deepcopy(model).to(dtype)
    clone.set_attn_implementation("eager")
    return clone


def oracle(student, teacher, batch, visual, matches):
    """Means of the three losses from full logits and full attention matrices, token by token."""
    dtype = student.dtype
    inputs = {k: v.to(dtype) if v.is_floating_point() else v for k, v in batch.items() if k != "labels"}
    ours, theirs = (model(**inputs, output_attentions=True) for model in (student, teacher))
    looks = [dict(zip(attention_layers(m), r.attentions, strict=True)) for m, r in ((student, ours), (teacher, theirs))]
    labels = batch["labels"]
    ar = F.cross_entropy(ours.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
    divergences, alignment = [], []
    for b, sample in enumerate(labels):
        rows = [t for t in range(1, len(sample)) if sample[t] != -100]
        for t in rows:
            q, p = (r.logits[b, t - 1].log_softmax(-1) for r in (theirs, ours))
            divergences.append((q.exp() * (q - p)).sum())
        cols = visual[b].nonzero()[:, 0]
        for match in matches:
            if not len(cols):
                alignment.append(torch.zeros((), dtype=dtype))
                continue
            a = looks[0][match.student][b].mean(0)[rows][:, cols]
            t = torch.stack([looks[1][j][b].mean(0)[rows][:, cols] for j in match.teachers]).mean(0)
            alignment.append((1 - F.cosine_similarity(a, t, dim=1)).mean())
    return {"ar": ar, "kd": torch.stack(divergences).mean(), "vat": torch.stack(alignment).mean()}


def total(losses):
    return losses["ar"] + KD_WEIGHT * losses["kd"] + VAT_WEIGHT * losses["vat"]


def gradients(loss, model):
    parameters = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    found = torch.autograd.grad(loss, [p for _, p in parameters], allow_unused=True)
    return {name: g for (name, _), g in zip(parameters, found, strict=True) if g is not None}


# Not those with linear attention, whose gradients in fp32 are noise of 1e-3 with any attention.
@pytest.mark.parametrize("name", [name for name, family in FAMILIES.items() if not family.layer_types])
def test_losses_and_gradients_are_those_of_full_matrices(name):
    compare_with_full_matrices(name, *build_pair(name))


class Capped(LlavaForConditionalGeneration):
    """Caps its logits as Gemma does, by a field that LLaVA does not heed, after dividing them as Granite does."""

    def forward(self, *arguments, **options):
        found = super().forward(*arguments, **options)
        text = self.config.text_config
        cap = text.final_logit_softcapping
        found.logits = cap * torch.tanh(found.logits / text.logits_scaling / cap)
        return found


class Squared(LlavaForConditionalGeneration):
    def forward(self, *arguments, **options):
        found = super().forward(*arguments, **options)
        found.logits = found.logits**2
        return found


def heeding(pair, *classes):
    for model, kind, divisor in zip(pair, classes, (0.7, 1.4), strict=True):
        model.__class__ = kind
        model.config.text_config.logits_scaling = divisor
        model.config.text_config.final_logit_softcapping = 3.0
    return pair


@pytest.mark.parametrize("classes", [(Capped, Capped), (Capped, LlavaForConditionalGeneration)])
def test_what_models_do_to_their_logits_is_in_the_losses(classes):
    compare_with_full_matrices("llava_llama", *heeding(build_pair("llava_llama"), *classes))


def test_it_is_in_the_losses_without_a_teachers_too():
    student, teacher = heeding(build_pair("llava_llama"), Capped, Capped)
    batch = draw("llava_llama", seed=3)
    losses = cdistill.distill(teacher, student, kd=None)(batch)
    expected = student(**batch).logits[:, :-1].flatten(0, 1)
    expected = F.cross_entropy(expected, batch["labels"][:, 1:].flatten(), ignore_index=-100)
    torch.testing.assert_close(losses["ar"], expected)


def test_a_model_that_is_tried_keeps_the_modes_of_its_modules():
    student, _ = heeding(build_pair("llava_llama"), Capped, Capped)
    student.train()
    student.model.vision_tower.eval()
    modes = [module.training for module in student.modules()]
    assert after_head(student).softcap == 3.0
    assert [module.training for module in student.modules()] == modes and len(set(modes)) == 2


def test_what_a_model_does_to_its_logits_is_refused_where_no_field_says_it():
    for side, classes in (("student", (Squared, Capped)), ("teacher", (Capped, Squared))):
        student, teacher = heeding(build_pair("llava_llama"), *classes)
        with pytest.raises(
            ValueError, match=rf"the {side} changes its logits after the head by another formula"
        ) as error:
            cdistill.distill(teacher, student)
        assert "\n" not in str(error.value)


def compare_with_full_matrices(name, student, teacher):
    batch, visual = draw_with_layout(name, seed=31)
    matches = VAT(VATConfig(layers="all", rows="answer"), attention_layers(student), attention_layers(teacher)).matches
    expected, roughly = {}, {}
    for dtype, found in ((torch.float64, expected), (torch.float32, roughly)):
        clone = eager(student, dtype)
        found["losses"] = oracle(clone, eager(teacher, dtype), batch, visual, matches)
        found["gradients"] = gradients(total(found["losses"]), clone)
    distillation = cdistill.distill(
        teacher,
        student,
        vat=VATConfig(layers="all", rows="answer"),
        kd=KDConfig(weight=KD_WEIGHT),
        vat_weight=VAT_WEIGHT,
        train_vision=True,
    )
    losses = distillation(batch)
    for key in ("ar", "kd", "vat"):
        exact = expected["losses"][key]
        allowed = 2 * (roughly["losses"][key] - exact).abs() + 1e-5 * exact.abs()
        assert exact > 1e-3 and (losses[key] - exact).abs() <= allowed, key
    torch.testing.assert_close(losses["loss"], total(losses))
    assert losses["vat_layers"].shape == (len(matches),) and not losses["vat_layers"].requires_grad
    found = gradients(losses["loss"], student)
    assert found.keys() == expected["gradients"].keys()
    for parameter, exact in expected["gradients"].items():
        # the gradient of a key's bias is 0 but for rounding: it is judged beside its weight's
        scale = expected["gradients"][parameter.replace("k_proj.bias", "k_proj.weight")].abs().max()
        allowed = 2 * (roughly["gradients"][parameter] - exact).abs().max() + 1e-5 * scale
        assert (found[parameter] - exact).abs().max() <= allowed, parameter


def test_two_llavas_with_one_encoder_look_once_and_lose_the_same():
    """A CLIP encoder, whose class token is no visual token, two of its layers side by side, and padding on the left."""
    text = {"vocab_size": VOCABULARY, "pad_token_id": PAD, "initializer_range": 0.25, "num_hidden_layers": 3}
    text |= {"hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 2, "num_key_value_heads": 1}
    pair = []
    for seed, changes in enumerate(({}, {"hidden_size": 48, "num_hidden_layers": 4})):
        sizes = {"image_size": 8, "patch_size": 4, "hidden_size": 32, "intermediate_size": 32}
        vision = CLIPVisionConfig(**sizes, num_hidden_layers=2, num_attention_heads=2)
        config = LlavaConfig(
            vision_config=vision,
            text_config=Qwen2Config(**(text | changes)),
            image_token_id=ID["<image>"],
            vision_feature_select_strategy="default",
            vision_feature_layer=[-2, -1],
        )
        torch.manual_seed(seed)
        pair.append(LlavaForConditionalGeneration(config).eval())
    student, teacher = pair
    batch = draw("llava_qwen2", 5, "left")
    apart = cdistill.distill(teacher, student, train_vision=True)(batch)["loss"]
    found = gradients(apart, student)
    assert any("vision_tower" in name for name in found)
    looks = []
    for model in pair:
        model.model.vision_tower.register_forward_hook(lambda *_: looks.append(1))
    teacher.model.vision_tower.load_state_dict(student.model.vision_tower.state_dict())
    expected = cdistill.distill(copy.deepcopy(teacher), student, train_vision=True)(batch)
    whole = gradients(expected["loss"], student)
    assert len(looks) == 2, "an encoder that is trained is the student's own"
    together = cdistill.distill(teacher, student)(batch)
    assert len(looks) == 3
    for name in ("loss", "ar", "kd", "vat"):
        torch.testing.assert_close(together[name], expected[name])
    shared = gradients(together["loss"], student)
    assert shared and not any("vision_tower" in name for name in shared)
    for name, gradient in shared.items():
        scale = shared[name.replace("k_proj.bias", "k_proj.weight")].abs().max()
        assert (whole[name] - gradient).abs().max() <= 1e-5 * scale, name
    teacher.bfloat16()
    cdistill.distill(teacher, student)(batch)
    assert len(looks) == 4, "the same encoder in another dtype is the same"


@pytest.mark.parametrize("name", ["llava_llama", "llava_next", "llava_onevision", "internvl", "idefics3", "qwen3_vl"])
def test_a_batch_of_words_only_keeps_every_parameter_in_the_graph(name):
    student, teacher = build_pair(name)
    batch = without_visual(draw(name, 6))
    losses = cdistill.distill(teacher, student)(batch)
    assert losses["vat"] == 0 and losses["ar"] > 0 and losses["kd"] > 0
    found = gradients(losses["loss"], student)
    adapters = {name for name, _, part in named_parts(student) if part == "adapter"}
    assert adapters and adapters <= found.keys()
    assert not any(found[n].any() for n in adapters)


def test_a_batch_of_words_only_and_nothing_of_the_adapter_to_train():
    student, teacher = build_pair("qwen2_5_vl")
    student = get_peft_model(student, LoraConfig(r=2, target_modules=["q_proj"]))
    losses = cdistill.distill(teacher, student)(without_visual(draw("qwen2_5_vl", 6)))
    losses["loss"].backward()
    assert any(p.grad is not None and p.grad.any() for p in student.parameters())


@pytest.mark.parametrize("name", ["llava_qwen2", "qwen2_vl"])
@pytest.mark.parametrize(
    ("rows", "compared"),
    [([[0, 1, 2, 3]], "answer"), ([[0, 1, 2], [3]], "answer"), ([[0, 1, 2], [3]], "predicting")],
    ids=["one row", "a row filled up", "a row filled up, predicting rows"],
)
def test_packed_samples_lose_what_they_lose_by_themselves(name, rows, compared):
    """However a row is filled up behind them; KD and AR are means over labels, VAT over samples."""
    student, teacher = build_pair(name)
    config = VATConfig(layers="all", rows=compared)
    distillation = cdistill.distill(teacher, student, vat=config)
    samples = draw_samples(name, 12)
    packed = pack(name, samples, rows, student).batch
    found = distillation(packed)
    recomputed = cdistill.distill(teacher, student, vat=replace(config, target="recomputed"))(packed)
    torch.testing.assert_close(recomputed["vat_layers"], found["vat_layers"], rtol=1e-5, atol=1e-7)
    single = [distillation(collate(name, [sample])[0]) for sample in samples]
    labels = torch.tensor([sum(label != -100 for label in sample.labels) for sample in samples])
    for key in ("ar", "kd"):
        whole = (torch.stack([losses[key] for losses in single]) * labels).sum() / labels.sum()
        torch.testing.assert_close(found[key], whole, rtol=2e-5, atol=1e-6)
    vat = torch.stack([losses["vat"] for losses in single]).mean()
    torch.testing.assert_close(found["vat"], vat, rtol=2e-5, atol=1e-6)


def test_losses_that_are_left_out():
    student, teacher = build_pair("qwen2_vl")
    batch = draw("qwen2_vl", 7)
    whole = cdistill.distill(teacher, student)(batch)
    alone = cdistill.distill(teacher, student, kd=KDConfig(weight=0.0))(batch)
    assert set(alone) == {"loss", "ar", "vat", "vat_layers"}
    torch.testing.assert_close(alone["loss"], whole["ar"] + whole["vat"])
    alone = cdistill.distill(teacher, student, vat_weight=0.0)(**batch)
    assert set(alone) == {"loss", "ar", "kd"}
    torch.testing.assert_close(alone["loss"], whole["ar"] + whole["kd"])
    changed = cdistill.distill(teacher, student)
    changed.vat_weight = 3.0
    torch.testing.assert_close(changed(batch)["loss"], whole["ar"] + whole["kd"] + 3 * whole["vat"])
    with pytest.raises(ValueError, match=r"^vat_weight needs a finite number of at least 0, got -1$"):
        changed.vat_weight = -1
    with pytest.raises(ValueError, match=r"^vat_weight needs an alignment"):
        cdistill.distill(teacher, student, vat_weight=0.0).vat_weight = 1.0


def test_a_few_lines_train_a_student():
    """LoRA, gradient checkpointing and AdamW in a loop of the user's own: all three losses fall, the teacher stays."""
    student, teacher = build_pair("qwen2_5_vl")
    before = {name: p.clone() for name, p in teacher.named_parameters()}
    config = LoraConfig(r=8, target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj"])
    student = get_peft_model(student, config)
    student.enable_input_require_grads()
    student.gradient_checkpointing_enable({"use_reentrant": False})
    distillation = cdistill.distill(teacher, student).train()
    assert not teacher.training
    trained = [p for p in distillation.parameters() if p.requires_grad]
    assert {id(p) for p in trained} == {id(p) for p in student.parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    batch, history = draw("qwen2_5_vl", 8), []
    for _ in range(30):
        losses = distillation(batch)
        losses["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
        history.append(losses)
    for name in ("ar", "kd", "vat"):
        assert history[-1][name] < 0.7 * history[0][name], name
    assert all(torch.equal(p, before[name]) for name, p in teacher.named_parameters())


def test_peft_models_on_both_sides_and_what_is_given_back():
    student, teacher = build_pair("llava_qwen2")
    batch = draw("llava_qwen2", 8)
    plain = cdistill.distill(teacher, student)(batch)["loss"]
    wrapped = [get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"])) for model in (student, teacher)]
    distillation = cdistill.distill(wrapped[1], wrapped[0])
    assert distillation.student is wrapped[0]
    torch.testing.assert_close(distillation(batch)["loss"], plain)  # new LoRA adds nothing yet


def other_image_token(name):
    student, teacher = build_pair(name)
    teacher.config.image_token_id = 5
    return student, teacher


@pytest.mark.parametrize(
    ("pair", "message"),
    [
        (lambda: (build("qwen2_vl", 0), build("llava_llama", 1)), r"image_token_id differs: student \d+, teacher \d+"),
        (
            lambda: (build("llava_llama", 0), build("llava_llama", 1, vocab_size=900)),
            r"vocab_size differs: student \d+, teacher 900",
        ),
        (
            lambda: (build("llava_llama", 0), build("llava_llama", 1, eos_token_id=7)),
            r"eos_token_id differs: student 2, teacher 7",
        ),
        (lambda: other_image_token("internvl"), r"image_token_id differs: student \d+, teacher 5"),
        (
            lambda: (build("llava_qwen2", 0).model.language_model, build("llava_llama", 1)),
            "only the teacher has a vision",
        ),
        (
            lambda: (build("llava_llama", 0, layers=6), build("llava_llama", 1)),
            "group matching needs at least as many teacher as student layers",
        ),
    ],
)
def test_pairs_that_cannot_be_distilled(pair, message):
    student, teacher = pair()
    with pytest.raises(ValueError, match=message) as error:
        cdistill.distill(teacher, student)
    assert "\n" not in str(error.value)


def test_other_visual_tokens_are_refused():
    student, teacher = build_pair("qwen2_vl")
    teacher.config.vision_config.spatial_merge_size = 1
    with pytest.raises(ValueError, match=r"vision_config\.spatial_merge_size differs: student 2, teacher 1"):
        cdistill.distill(teacher, student)


def test_arguments_and_batches_that_do_not_fit():
    student, teacher = build_pair("llava_llama")
    for arguments in ({"vat_weight": -1.0}, {"vat_weight": float("nan")}):
        with pytest.raises(ValueError, match="vat_weight must be at least 0"):
            cdistill.distill(teacher, student, **arguments)
    batch = draw("llava_llama", 9)
    del batch["labels"]
    with pytest.raises(ValueError, match="labels must be in the batch"):
        cdistill.distill(teacher, student)(batch)
    with pytest.raises(ValueError, match="needs them"):
        cdistill.distill(teacher, student, vat=VATConfig(matching="adaptive"))


def test_visual_tokens_may_be_given():
    student, teacher = build_pair("llava_qwen2")
    batch = draw("llava_qwen2", 41)
    expected = cdistill.distill(teacher, student)(batch)
    for given in (ID["<image>"], [ID["<image>"]]):
        found = cdistill.distill(teacher, student, visual_token_ids=given)(batch)
        assert torch.equal(found["vat"], expected["vat"])
    others = cdistill.distill(teacher, student, visual_token_ids=[ID["<image>"], ID["w1"]])(batch)
    assert not torch.equal(others["vat"], expected["vat"])
    assert torch.equal(others["ar"], expected["ar"])


def small_experts(cls, config, **options):
    shape = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "head_dim": 16,
    }
    experts = {"num_local_experts": 2, "num_experts_per_tok": 1, "num_key_value_heads": 1, "intermediate_size": 32}
    return cls(config(**shape, **experts, pad_token_id=PAD, **options))


def test_a_router_loss_that_is_asked_for_is_not_left_out_silently():
    def model(**options):
        return small_experts(MixtralForCausalLM, MixtralConfig, **options)

    def distil(student):
        return cdistill.distill(model(output_router_logits=True), student, visual_token_ids=5)

    with pytest.raises(ValueError, match="output_router_logits asks for its experts' router loss") as refused:
        distil(model(output_router_logits=True))
    assert "\n" not in str(refused.value)
    ids = torch.tensor([[5, 6, 7, 8]])
    for student in (model(), model(output_router_logits=True, router_aux_loss_coef=0.0)):
        losses = distil(student)({"input_ids": ids, "labels": ids})
        torch.testing.assert_close(losses["ar"], student(input_ids=ids, labels=ids).loss)


def test_models_whose_hidden_states_cannot_be_read_are_refused():
    config = GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=3, n_head=2)
    with pytest.raises(ValueError, match="the student's class GPT2LMHeadModel has no submodule `model`"):
        cdistill.distill(GPT2LMHeadModel(config), GPT2LMHeadModel(config), visual_token_ids=5)
