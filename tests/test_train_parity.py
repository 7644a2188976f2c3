"""One global batch, one gradient: however it is cut into processes, micro-batches and rows, and whatever these hold."""

import itertools
from unittest import mock

import numpy as np
import parity_cases
import pytest
from parity_cases import AXES, MICRO, Case, pairwise, train
from ranks import RankError
from test_terms import Features, Leading

import cdistill
from cdistill.runtime import launch
from cdistill.train import blank, model
from cdistill.train.objectives import OBJECTIVES
from cdistill.train.terms import TERMS

# Other cuts of one process's batches moved losses by at most 1.9e-6 and weights by 5.6e-7, which move by about 1e-2 in all.
LOSS, WEIGHTS = 1e-5, 3e-6


def assert_parity(case, ranks, train=train):
    """Two processes, or one with other micro-batches, train as one process does."""
    if case.mode == "one":
        ours = ranks.call(train, case, 2 * MICRO, world=1)
        losses, weights = ranks.call(train, case, MICRO, world=1)[0]
    else:
        alone = ranks.start(train, case, MICRO, world=1)
        try:
            ours = ranks.call(train, case, MICRO)
        finally:
            losses, weights = alone()[0]  # or the next call to that process would get it
    assert len(losses) == parity_cases.STEPS and weights
    for found, moved in ours:
        for a, b in zip(found, losses, strict=True):
            assert a == pytest.approx(b, rel=0, abs=LOSS)
        assert moved.keys() == weights.keys()
        for name, value in moved.items():
            np.testing.assert_allclose(value, weights[name], rtol=0, atol=WEIGHTS, err_msg=name)
            assert np.array_equal(value, ours[0][1][name])


@pytest.mark.parametrize("case", pairwise(), ids=str)
def test_any_cut_of_a_global_batch_gives_one_gradient(case, ranks):
    assert_parity(case, ranks)


def test_the_matrix_holds_every_pair_of_values_that_is_possible():
    possible = [Case(*values) for values in itertools.product(*AXES.values())]
    possible = [case for case in possible if case.possible]
    cases = pairwise()
    for one, other in itertools.combinations(AXES, 2):
        found, wanted = ({(getattr(c, one), getattr(c, other)) for c in some} for some in (cases, possible))
        assert found == wanted


@pytest.mark.parametrize("mode", ["2", "3"])
def test_terms_from_outside_have_one_gradient_too(mode, ranks):
    """One of them with parameters of its own, one over samples."""
    assert_parity(Case(mode, "llava", "alternating", "own", False, False, False, 3, False), ranks, train_by_own_terms)


def train_by_own_terms(case, micro):
    with mock.patch.dict(TERMS), mock.patch.dict(OBJECTIVES):
        for term in (Features, Leading):
            cdistill.register_term(term)
        cdistill.register_objective("own", ("ar", "kd", "feature", "leading"), ("language", "adapter"))
        losses, weights = train(case, micro)
    assert losses[0].keys() == {"loss", "ar", "kd", "feature", "leading"}
    return losses, weights


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_processes_that_disagree_are_noticed_in_the_first_step(family, ranks):
    case = Case("2", family, "words on one rank", "sft", False, False, False, 1, False)
    with pytest.raises(
        RankError, match=r"parity, step 1: process 0 and process 1 differ in their gradients .* first at "
    ):
        ranks.call(train_without_blanks, case)


def train_without_blanks(case):
    """As before there were blanks: an adapter without images gets its zeros at another place of the graph."""
    looks = model.needs_blank, blank.needs_blank
    model.needs_blank = blank.needs_blank = lambda student: False
    try:
        return train(case, MICRO)
    finally:
        model.needs_blank, blank.needs_blank = looks
        assert launch.launched()
