"""Baselines from the same teacher: values and gradients by float64 from eager models, stages of them, and what is refused."""

import copy
import re

import pytest
import torch
import torch.nn.functional as F
import transformers
from builtin_models import make_recipe
from family_models import build_pair, draw, draw_samples, draw_with_layout, pack
from test_terms import answers, gradients
from test_train_stages import metrics
from transformers.masking_utils import eager_mask
from transformers.models.qwen2_vl.modeling_qwen2_vl import eager_attention_forward
from vat_oracle import KeepFloat64

import cdistill
from cdistill.choices import KDConfig
from cdistill.models.load import load_model
from cdistill.train import run
from cdistill.train.objectives import OBJECTIVES
from cdistill.train.teacher_source import Cached

NAME = "qwen2_vl"


def alike(term, batch, student, teacher, oracle, kd=None):
    """The term of a batch and its gradients are those of ``oracle`` (student, teacher) in float64."""
    kd = kd or KDConfig(weight=0.0)
    found = cdistill.distill(teacher, student, kd=kd, vat_weight=0.0, terms=[term])(batch)
    exact, theirs = (copy.deepcopy(model).double() for model in (student, teacher))
    for model in (exact, theirs):
        model.set_attn_implementation("eager")
    with KeepFloat64():
        value = oracle(exact, theirs)
    assert value.dtype == torch.float64 and value > 1e-3
    torch.testing.assert_close(found[term].double(), value.detach(), rtol=1e-5, atol=1e-6)
    expected, made = gradients(value, exact), gradients(found[term], student)
    whole = max(g.abs().max() for g in expected.values())
    trained = {name for name, parameter in student.named_parameters() if parameter.requires_grad}
    assert expected.keys() & trained == {name for name, gradient in made.items() if gradient.any()}
    for name in made:
        assert (made[name].double() - expected.get(name, 0.0)).abs().max() <= 1e-4 * whole, name


def widened(batch):
    return {name: x.double() if x.is_floating_point() else x for name, x in batch.items() if name != "labels"}


def at_visual_tokens(states, visual):
    """Of each sample with images the states (V, d) at its visual tokens."""
    return [sample[tokens] for sample, tokens in zip(states, visual, strict=True) if tokens.any()]


def logits_of(student, teacher, batch, visual):
    """Logits of both at the visual tokens of each sample that has some."""
    with torch.no_grad():
        theirs = teacher(**widened(batch), use_cache=False).logits
    ours = student(**widened(batch), use_cache=False).logits
    return at_visual_tokens(ours, visual), at_visual_tokens(theirs, visual)


def divergences(ours, theirs):
    """KL(teacher || student) of every token."""
    return F.kl_div(ours.log_softmax(-1), theirs.log_softmax(-1), reduction="none", log_target=True).sum(-1)


def test_hidden_states():
    student = build_pair(NAME)[0]
    teacher = copy.deepcopy(student)
    with torch.no_grad():
        for parameter in teacher.parameters():
            parameter.add_(0.3 * parameter.std() * torch.randn_like(parameter) if parameter.numel() > 1 else 0.0)
    batch = draw(NAME, 31)

    def oracle(exact, theirs):
        wide = widened(batch) | {"labels": batch["labels"]}
        with torch.no_grad():
            target = answers(theirs, wide)
        return (1 - F.cosine_similarity(answers(exact, wide), target)).mean()

    alike("hidden", batch, student, teacher, oracle)


def test_mdist():
    batch, visual = draw_with_layout(NAME, 31)

    def oracle(student, teacher):
        pairs = zip(*logits_of(student, teacher, batch, visual), strict=True)
        return torch.stack([divergences(ours, theirs).mean() for ours, theirs in pairs]).sum() / len(visual)

    alike("mdist", batch, *build_pair(NAME), oracle)


def test_mdist_by_the_divergence_and_temperature_of_kd():
    batch, visual = draw_with_layout(NAME, 31)

    def oracle(student, teacher):
        pairs = zip(*logits_of(student, teacher, batch, visual), strict=True)
        return torch.stack([divergences(theirs / 2, ours / 2).mean() for ours, theirs in pairs]).sum() / len(visual)

    alike("mdist", batch, *build_pair(NAME), oracle, KDConfig("reverse_kl", temperature=2.0, weight=0.0))


@pytest.mark.parametrize("bias", [False, True])
def test_rdist(bias):
    batch, visual = draw_with_layout(NAME, 31)

    def oracle(student, teacher):
        losses = []
        for ours, theirs in zip(*logits_of(student, teacher, batch, visual), strict=True):
            losses.append(1 - F.cosine_similarity((ours @ ours.T).flatten(), (theirs @ theirs.T).flatten(), dim=0))
        return torch.stack(losses).sum() / len(visual)

    pair = build_pair(NAME)
    if bias:
        for model in pair:
            model.lm_head.bias = torch.nn.Parameter(torch.randn(len(model.lm_head.weight)))
    alike("rdist", batch, *pair, oracle)


def capture(model):
    """Queries, keys and values (B,H,T,D) by layer of the forward passes to come, from an attention of transformers."""
    found = {}

    def attention(module, query, key, value, attention_mask, **kwargs):
        if hasattr(module, "layer_idx"):
            found[module.layer_idx] = query, key, value
        return eager_attention_forward(module, query, key, value, attention_mask, **kwargs)

    name = f"captured_{id(model)}"
    transformers.AttentionInterface.register(name, attention)
    transformers.AttentionMaskInterface.register(name, eager_mask)
    model.set_attn_implementation(name)
    return found


def causal_log_softmax(x, heads):
    """(heads, T, T) of vectors (H, T, D): their heads side by side, split anew, related to those before them."""
    x = x.transpose(0, 1).flatten(1).unflatten(1, (heads, -1)).transpose(0, 1)
    scores = x @ x.mT / x.shape[-1] ** 0.5
    return scores.masked_fill(torch.ones_like(scores[0]).triu(1).bool(), -torch.inf).log_softmax(-1)


def test_relations():
    batch, _ = draw_with_layout(NAME, 31)

    def oracle(student, teacher):
        (ours, theirs), losses = (capture(model) for model in (student, teacher)), []
        with torch.no_grad():
            teacher(**widened(batch), use_cache=False)
        taught = theirs[4]
        student(**widened(batch), use_cache=False)
        for x, y, heads in zip(ours[2], taught, (2, 1, 1), strict=True):
            for a, b, real in zip(x, y, batch["attention_mask"].bool(), strict=True):
                a, b = (causal_log_softmax(z[:, real], heads) for z in (a, b))
                losses.append((b.exp() * (b - a)).nan_to_num().sum(-1).mean())
        return torch.stack(losses).sum() / len(batch["labels"])

    alike("relation", batch, *build_pair(NAME), oracle)


def test_salient_tokens():
    batch, visual = draw_with_layout(NAME, 31)

    def oracle(student, teacher):
        with torch.no_grad():
            attention = teacher(**widened(batch), use_cache=False, output_attentions=True).attentions[2].mean(1)
        asks = (visual.cumsum(1) > 0) & ~visual & batch["attention_mask"].bool() & (batch["labels"] == -100)
        shares = [a[i][:, v].sum(0) for a, i, v in zip(attention, asks, visual, strict=True) if v.any()]
        assert all(x.any() for x in shares) and max(x.max() / x.min() for x in shares) > 2
        pairs = zip(shares, *logits_of(student, teacher, batch, visual), strict=True)
        return torch.stack([(divergences(a, b) * x / x.sum()).sum() for x, a, b in pairs]).sum() / len(visual)

    alike("iva", batch, *build_pair(NAME), oracle)


def test_salient_tokens_are_all_alike_where_no_instruction_follows_them():
    student, teacher = build_pair(NAME)
    batch = draw(NAME, 31)
    batch["labels"] = batch["input_ids"].clone()
    distillation = cdistill.distill(teacher, student, kd=KDConfig(weight=0.0), vat_weight=0.0, terms=["mdist", "iva"])
    with torch.no_grad():
        losses = distillation(batch)
    assert losses["mdist"] > 0
    torch.testing.assert_close(losses["iva"], losses["mdist"])


def stage_of(objective, **changes):
    section = {"samples": 96, "global_batch_size": 8, "learning_rate": 1e-2, "data": {"turns": 1}}
    return section | {"objective": objective} | changes


def test_a_stage_trains_a_map_between_widths_and_throws_it_away(models, tmp_path):
    final = run(make_recipe(tmp_path / "run", models, stages=["near"], stage__near=stage_of("hidden")))
    values = [line["hidden"] for line in metrics(tmp_path / "run")]
    assert values[-1] < 0.8 * values[0]
    assert not any("hidden_map" in name for name in load_model(final).state_dict())


@pytest.mark.parametrize(("objective", "term"), [("llava_kd", "mdist"), ("relation", "relation"), ("iva", "iva")])
def test_a_stage_of_a_baseline_learns_what_it_compares(models, tmp_path, capsys, objective, term):
    weights = dict.fromkeys(OBJECTIVES[objective].losses, 1.0)
    changes = {"baseline_weight": "auto"} if objective == "llava_kd" else {"baseline_weight": 3.0}
    run(make_recipe(tmp_path / "run", models, stages=["near"], stage__near=stage_of(objective), **changes))
    found = re.findall(r"baseline_weight auto is (\S+) of (\w+), measured on 96 samples", capsys.readouterr().out)
    weights |= {name: float(weight) for weight, name in found} if objective == "llava_kd" else {term: 3.0}
    assert (len(found) == 2 and weights["rdist"] > 5 * weights["mdist"]) == (objective == "llava_kd")
    lines = metrics(tmp_path / "run")
    assert lines[-1][term] < 0.8 * lines[0][term]
    for line in lines:
        assert line["loss"] == pytest.approx(sum(weight * line[name] for name, weight in weights.items()), rel=1e-3)


@pytest.mark.parametrize("term", ["mdist", "rdist", "relation", "iva"])
def test_packed_samples_count_as_padded_ones_do(term):
    student, teacher = build_pair(NAME)
    for model in (student, teacher):
        torch.nn.init.normal_(model.get_input_embeddings().weight)  # that of padding, too
    samples = draw_samples(NAME, 31)
    packed = pack(NAME, samples, [[0, 1], [2, 3]], student).batch
    distillation = cdistill.distill(teacher, student, kd=KDConfig(weight=0.0), vat_weight=0.0, terms=[term])
    with torch.no_grad():
        torch.testing.assert_close(distillation(packed)[term], distillation(draw(NAME, 31))[term], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("term", ["mdist", "rdist", "iva"])
def test_a_batch_without_images_costs_nothing(term):
    student, teacher = build_pair(NAME)
    batch = draw(NAME, 31)
    words = {name: batch[name][1:2] for name in ("input_ids", "labels", "attention_mask", "mm_token_type_ids")}
    distillation = cdistill.distill(teacher, student, vat_weight=0.0, terms=[term])
    losses = distillation(words)
    assert losses[term] == 0 and losses["ar"] > 0
    losses["loss"].backward()


@pytest.mark.parametrize("term", ["mdist", "rdist", "relation", "iva"])
def test_no_cache_has_what_baselines_compare(term):
    with pytest.raises(
        ValueError, match=f"term '{term}' needs the teacher's .*teacher_memory.cache.*leave one of them out"
    ):
        Cached.check([cdistill.train.terms.TERMS[term]])


def test_nothing_is_read_at_visual_tokens_where_no_term_asks():
    student, teacher = build_pair(NAME)
    model = cdistill.distill(teacher, student, vat_weight=0.0).losses
    batch = draw(NAME, 31)
    step = model.step(batch.pop("labels"), batch)
    with torch.no_grad():
        model._run(step)
    assert step.visual is None and step.teacher.visual is None and "visual_places" not in vars(step)


def test_distill_refuses_a_map_that_it_could_not_train():
    student, teacher = build_pair(NAME)
    with pytest.raises(ValueError, match="hidden"):
        cdistill.distill(teacher, student, terms=["hidden"])
