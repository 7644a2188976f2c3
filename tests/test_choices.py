"""Every list of `cdistill.choices` is the one that its users know, and each of them refuses what is not in it."""

import importlib
from dataclasses import fields

import pytest
import torch

from cdistill import choices
from cdistill.ops import _torch_losses, reference
from cdistill.ops._dispatch import _MODULES
from cdistill.ops._engines import ENGINES
from cdistill.ops._problem import Comparison, VocabularyOptions, VocabularyRows
from cdistill.train.recipes import Recipe, recipe_from_dict

UNKNOWN = "unheard-of"


def backends():
    return {impl: importlib.import_module(_MODULES[impl]) for impl in choices.IMPLS}


def test_lists_hold_what_is_there():
    from cdistill.kernels import alignment_loss

    assert tuple(_MODULES) == choices.IMPLS
    assert tuple(ENGINES) == choices.ENGINES
    assert tuple(alignment_loss.LOSSES) == choices.ALIGNMENT_LOSSES
    assert tuple(_torch_losses.DISTANCES) == choices.RELATION_LOSSES == (*choices.ALIGNMENT_LOSSES, "reverse_kl")
    assert set(choices.SHARES) == set(_torch_losses.OF_SHARES)


@pytest.mark.parametrize("impl", choices.IMPLS)
def test_a_backend_refuses_a_loss_or_a_reduction_that_it_does_not_know(impl):
    """As when one has been added to the list alone: it must not become another one."""
    a, valid, of = torch.rand(1, 2, 8), torch.ones(1, 8, dtype=torch.bool), backends()[impl]
    both, grad = (valid[:, :2].contiguous(), valid), torch.ones(1)
    losses = choices.RELATION_LOSSES if of.HAS_REVERSE_KL else choices.ALIGNMENT_LOSSES
    for call in (
        lambda **names: of.alignment_loss(a, Comparison(*both, a, **names, sink_filter=False)),
        lambda **names: of.alignment_grad(a, Comparison(*both, a, **names, sink_filter=False), grad, a.dtype),
    ):
        for loss in losses:
            for reduction in choices.REDUCTIONS:
                assert torch.isfinite(call(loss=loss, reduction=reduction)).all()
        for options in ({"loss": UNKNOWN, "reduction": "row"}, {"loss": "cosine", "reduction": UNKNOWN}):
            name = next(key for key, value in options.items() if value == UNKNOWN)
            with pytest.raises(ValueError, match=f"^{name}.*{UNKNOWN}"):
                call(**options)


@pytest.mark.parametrize("names", [(UNKNOWN, "row"), ("cosine", UNKNOWN)])
def test_the_oracle_refuses_a_loss_or_a_reduction_that_it_does_not_know(names):
    with pytest.raises(ValueError, match=f"'{UNKNOWN}' is not known here"):
        reference.slice_distance(torch.rand(2, 3), torch.rand(2, 3), *names)


@pytest.mark.parametrize("impl", choices.IMPLS)
def test_a_backend_refuses_a_divergence_that_it_does_not_know(impl):
    logits, labels, losses = torch.rand(3, 8), torch.zeros(3, dtype=torch.long), torch.zeros(2, 3)
    options = VocabularyOptions(UNKNOWN, 1.0, 0.5, 1.0, 1.0, gradient=True)
    with pytest.raises(ValueError, match=f"^divergence.*{UNKNOWN}"):
        backends()[impl].vocabulary_losses(VocabularyRows(logits, logits.clone(), None, labels, *losses), options)


@pytest.mark.parametrize(
    ("field", "names"),
    [
        ("matching", choices.MATCHINGS),
        ("loss", choices.ALIGNMENT_LOSSES),
        ("reduction", choices.REDUCTIONS),
        ("layers", choices.NAMED_SPANS),
        ("rows", choices.ROWS),
        ("heads", choices.ALIGNED_HEADS),
        ("head_matching", choices.HEAD_MATCHINGS),
        ("target", choices.TARGETS),
        ("engine", choices.VAT_ENGINES),
    ],
)
def test_configurations_and_recipes_take_the_names_of_a_list_and_no_other(field, names):
    for name in names:
        choices.VATConfig(**{field: name})
        assert getattr(recipe_from_dict(made(vat={field: name})).vat, field) == name
    for make in (lambda: choices.VATConfig(**{field: UNKNOWN}), lambda: recipe_from_dict(made(vat={field: UNKNOWN}))):
        with pytest.raises(ValueError, match=rf"^vat\.{field} must be one of {', '.join(names)}, got '{UNKNOWN}'$"):
            make()


def test_divergences_of_recipes():
    for name in choices.DIVERGENCES:
        assert recipe_from_dict(made(kd={"divergence": name})).kd == choices.KDConfig(divergence=name)
    with pytest.raises(ValueError, match=rf"^kd\.divergence must be one of .*got '{UNKNOWN}'$"):
        recipe_from_dict(made(kd={"divergence": UNKNOWN}))


def made(**sections):
    from cdistill.train.recipes import load_recipe, recipe_to_dict

    return recipe_to_dict(load_recipe("demo-compodistill")) | sections


def test_a_recipe_holds_the_configuration_itself():
    vat, kd = ({f.name: f for f in fields(Recipe)}[name].default_factory() for name in ("vat", "kd"))
    assert isinstance(vat, choices.VATConfig) and isinstance(kd, choices.KDConfig)
