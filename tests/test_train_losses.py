"""The losses of every objective and their gradients, against full logits and full attention matrices in float64."""

import copy

import pytest
import torch
import torch.nn.functional as F
from builtin_models import make_recipe
from torch import Tensor

from cdistill.builtin.dataset import BuiltinDataset, Collator, build_tokenizer
from cdistill.builtin.task import BuiltinTask
from cdistill.models.load import load_model
from cdistill.train.build import build_models
from cdistill.train.model import DistillationModel
from cdistill.train.objectives import OBJECTIVES
from cdistill.vat import VAT, VATConfig


def eager(model, dtype):
    clone = copy.deepcopy(model).to(dtype)
    clone.set_attn_implementation("eager")
    return clone


def batch_of_three(seed):
    """Samples of different lengths, one of them text only."""
    tokenizer = build_tokenizer()
    image = BuiltinDataset(BuiltinTask(turns=2), size=2, seed=seed)
    text = BuiltinDataset(BuiltinTask(modality="text", turns=3), size=1, seed=seed)
    return Collator(tokenizer.pad_token_id)([image[0], text[0], image[1]])


def oracle(student, teacher, batch, dtype, windows=((0, 1, 2), (1, 2, 3))):
    """Sums of the three losses from full logits and full attention matrices, layer by layer and token by token."""
    inputs = {k: v.to(dtype) if v.is_floating_point() else v for k, v in batch.items() if k != "labels"}
    results = [m(**inputs, output_attentions=True) for m in (student, teacher)]
    ours, theirs = results
    labels, zero = batch["labels"], torch.zeros((), dtype=dtype)
    ar = F.cross_entropy(ours.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100, reduction="sum")
    kd, vat = zero.clone(), [zero.clone(), zero.clone()]
    for b in range(len(labels)):
        for t in range(1, labels.shape[1]):
            if labels[b, t] != -100:
                q, p = (r.logits[b, t - 1].log_softmax(-1) for r in (theirs, ours))
                kd += (q.exp() * (q - p)).sum()
        rows = [t for t in range(labels.shape[1]) if labels[b, t] != -100]
        cols = (batch["input_ids"][b] == student.config.image_token_id).nonzero()[:, 0]
        if len(cols) == 0:
            continue
        for i, window in enumerate(windows):
            a = ours.attentions[i][b].mean(0)[rows][:, cols]
            target = torch.stack([theirs.attentions[j][b].mean(0)[rows][:, cols] for j in window]).mean(0)
            vat[i] = vat[i] + (1 - F.cosine_similarity(a, target, dim=1)).mean()
    return {"ar": ar, "kd": kd, "vat": torch.stack(vat).mean(), "vat_layers": torch.stack(vat)}


@pytest.mark.parametrize("taf", [True, False])
def test_losses_are_those_of_full_logits_and_full_attention_matrices(models, tmp_path, taf):
    built = build_models(make_recipe(tmp_path / "run", models, student__taf=taf))
    student, teacher = built.student, built.teacher
    vat = VAT(VATConfig(layers="all", rows="answer"), 2, 4)
    model = DistillationModel(student, OBJECTIVES["dft"].terms(vat=vat), teacher=teacher)
    batch = batch_of_three(seed=11)
    ours = model(**batch)
    exact, rough = (
        oracle(eager(student, dtype), eager(teacher, dtype), batch, dtype) for dtype in (torch.float64, torch.float32)
    )
    assert set(ours) == {"ar", "kd", "vat", "vat_layers", "samples"}
    for name in exact:
        value = ours[name]
        scale = exact[name].abs().max()
        allowed = 2 * (rough[name].double() - exact[name]).abs().max() + 1e-5 * scale
        assert (value.double() - exact[name]).abs().max() <= allowed, name
        assert scale > 1e-4, f"{name} is too small to test anything"
    ar = DistillationModel(student, OBJECTIVES["sft"].terms())(**batch)["ar"]
    torch.testing.assert_close(ar, ours["ar"], rtol=1e-5, atol=1e-4)


def test_gradients_of_the_whole_objective_are_those_of_full_matrices(models, tmp_path):
    built = build_models(make_recipe(tmp_path / "run", models))
    student, teacher = built.student, built.teacher
    batch = batch_of_three(seed=12)
    name = "model.multi_modal_projector.map.weight"
    vat = VAT(VATConfig(layers="all", rows="answer"), 2, 4)
    model = DistillationModel(student, OBJECTIVES["dft"].terms(vat=vat), teacher=teacher)
    ours = model(**batch)
    exact_student = eager(student, torch.float64)
    exact = oracle(exact_student, eager(teacher, torch.float64), batch, torch.float64)
    for loss in ("ar", "kd", "vat"):
        (gradient,) = torch.autograd.grad(ours[loss], student.get_parameter(name), retain_graph=True)
        (expected,) = torch.autograd.grad(exact[loss], exact_student.get_parameter(name), retain_graph=True)
        scale = expected.abs().max()
        assert scale > 1e-4 and (gradient - expected).abs().max() <= 1e-4 * scale, loss


def test_grounding_is_the_distance_between_full_attention_and_what_words_speak_of(models):
    student = load_model(models / "teacher")
    tokenizer = build_tokenizer()
    data = BuiltinDataset(BuiltinTask(caption=0.5, turns=2), size=3, seed=13, grounding=True)
    batch = Collator(tokenizer.pad_token_id)([data[0], data[1], data[2]])
    name = "model.language_model.layers.1.self_attn.q_proj.weight"
    ours = DistillationModel(student, OBJECTIVES["ground"].terms())(**batch)["ground"]
    (gradient,) = torch.autograd.grad(ours, student.get_parameter(name))
    truth = eager(student, torch.float64)
    attentions = truth(
        batch["input_ids"],
        attention_mask=batch["attention_mask"],
        pixel_values=batch["pixel_values"].double(),
        output_attentions=True,
    ).attentions
    exact = torch.zeros((), dtype=torch.float64)
    for b, ids in enumerate(batch["input_ids"]):
        cols = (ids == student.config.image_token_id).nonzero()[:, 0]
        rows = [t for t in range(len(ids)) if batch["grounding"][b, t].any()]
        for layer in (1, 2):  # the middle of four layers
            a, target = attentions[layer][b].mean(0)[rows][:, cols], batch["grounding"][b, rows].double()
            exact = exact + (1 - F.cosine_similarity(a, target, dim=1)).mean() / 2
    (expected,) = torch.autograd.grad(exact, truth.get_parameter(name))
    assert ours.item() == pytest.approx(exact.item(), rel=1e-5) and exact > 0.1
    assert expected.abs().max() > 1e-4 and (gradient - expected).abs().max() <= 1e-4 * expected.abs().max()


def test_idle_adapters_stay_in_the_graph(models, tmp_path):
    built = build_models(make_recipe(tmp_path / "run", models))
    built.student.model.vision_tower.requires_grad_(False)
    model = DistillationModel(built.student, OBJECTIVES["sft"].terms())
    batch = batch_of_three(seed=3)
    text = {name: batch[name][1:2] for name in ("input_ids", "labels", "attention_mask")}
    losses: dict[str, Tensor] = model(**text)
    assert losses["idle"].item() == 0
    sum(losses.values()).backward()
    assert torch.count_nonzero(built.student.model.multi_modal_projector.map.weight.grad) == 0
