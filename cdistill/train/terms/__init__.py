"""The terms of the loss: a class for each, and the list of those that objectives and `cdistill.distill` may name.

A term from outside extends `Term` and is registered by `register_term` (docs/walks/add-a-term.md). Importing this package
imports no torch.
"""

from __future__ import annotations

from collections.abc import Iterable
from inspect import Parameter, signature
from math import isfinite

from cdistill.errors import InputError
from cdistill.train.terms.alignment import Alignment
from cdistill.train.terms.answers import Answers
from cdistill.train.terms.base import LABELS, PER, SIGNALS, Memory, Settings, Sizes, Term
from cdistill.train.terms.divergence import Divergence
from cdistill.train.terms.grounding import Grounding
from cdistill.train.terms.hidden import HiddenStates
from cdistill.train.terms.multimodal import MultimodalDistillation
from cdistill.train.terms.patches import Patches
from cdistill.train.terms.relations import SelfRelations
from cdistill.train.terms.salient import SalientTokens
from cdistill.train.terms.several import WeightedAlignment, WeightedDivergence
from cdistill.train.terms.visual_relations import RelationDistillation

__all__ = ["TERMS", "Memory", "Settings", "Sizes", "Term", "check_terms", "configured", "register_term", "term_named"]

# In the order in which they are shown.
_BASELINES = (HiddenStates, MultimodalDistillation, RelationDistillation, SelfRelations, SalientTokens)
TERMS: dict[str, type[Term]] = {
    term.name: term for term in (Patches, Answers, Grounding, Divergence, Alignment, *_BASELINES)
}
# In their places with several teachers.
OF_SEVERAL: dict[str, type[Term]] = {term.name: term for term in (WeightedDivergence, WeightedAlignment)}
# Keys that stand beside those of the terms in results, batches and logged lines.
RESERVED = (
    *("loss", "idle", "samples", "counted", "labels", "stage", "step", "skipped", "learning_rate", "samples_per_s"),
    *("elapsed_s", "epoch", "grad_norm"),
)


def register_term(term: type[Term]) -> type[Term]:
    """Let objectives and `cdistill.distill` name a term; may be used as a decorator of its class.

    Raises:
        ValueError: it is no complete `Term`, or one of its keys is taken.
    """
    if not (isinstance(term, type) and issubclass(term, Term)):
        raise InputError(f"a term must be a subclass of cdistill.Term, got {term!r}")
    _check(term)
    made_by_run = term.configured.__func__ is not Term.configured.__func__  # type: ignore[attr-defined]
    if not made_by_run and any(_must_be_given(p) for p in signature(term).parameters.values()):
        raise InputError(
            f"term {term.name!r}: configured must make it, or its __init__ have defaults for all arguments"
        )
    taken = {key: other for other in TERMS.values() for key in (other.name, *other.details)}
    for key in (term.name, *term.details):
        if key in taken:
            raise InputError(f"term {term.name!r}: the key {key!r} is taken by {taken[key].__name__}: choose another")
    TERMS[term.name] = term
    return term


def term_named(name: str) -> type[Term]:
    """The class of a term. Raises ValueError for a name that no term has."""
    if name not in TERMS:
        raise InputError(
            f"terms must be of {', '.join(TERMS)}, got {name!r}: one from outside is registered by cdistill.register_term"
        )
    return TERMS[name]


def configured(names: Iterable[str], settings: Settings) -> tuple[Term, ...]:
    """Terms by name as a run configures them, without those that it leaves out."""
    several = OF_SEVERAL if settings.teachers else {}
    found = (several.get(name, term_named(name)).configured(settings) for name in names)
    return tuple(term for term in found if term is not None)


def check_terms(terms: Iterable[Term | type[Term]], *, reads_apart: bool = False) -> None:
    """Raise ValueError unless terms can make one loss: complete, different, of labels of one kind, one that sees attention.

    With ``reads_apart`` teacher and student have encodings of their own, and no term may compare the two token by token.
    """
    terms = tuple(terms)
    seen: set[str] = set()
    for term in terms:
        _check(term)
        for key in (term.name, *term.details):
            if key in seen:
                raise InputError(f"two terms of a loss have the key {key!r}: leave one of them out")
            seen.add(key)
    alike = [term.name for term in terms if reads_apart and {"visual", "relations"} & set(term.teacher)]
    if alike:
        raise InputError(
            f"term {alike[0]!r} compares teacher and student at the same tokens, and these two encode samples differently: "
            "leave it out, or take a pair with equal visual tokens"
        )
    if len({term.labels for term in terms}) > 1:
        kinds = ", ".join(f"{term.name} has those of {term.labels}" for term in terms)
        raise InputError(f"terms of one loss must have labels of one kind: {kinds}")
    looking = [term.name for term in terms if term.attention]
    if len(looking) > 1:
        raise InputError(
            f"one term of a loss may see the student's attention, got {' and '.join(looking)}: leave one out"
        )


def _must_be_given(parameter: Parameter) -> bool:
    return parameter.default is Parameter.empty and parameter.kind not in (
        Parameter.VAR_POSITIONAL,
        Parameter.VAR_KEYWORD,
    )


def _check(term: Term | type[Term]) -> None:
    """Raise ValueError for a term that is not complete."""
    kind = term if isinstance(term, type) else type(term)
    if not (isinstance(term.name, str) and term.name.isidentifier()) or term.name in RESERVED:
        wanted = f"an identifier, and none of {', '.join(RESERVED)}"
        raise InputError(f"term {kind.__name__}: name must be {wanted}, got {term.name!r}")
    if not term.title:
        raise InputError(f"term {term.name!r}: title must say what a stage's first line calls it")
    if kind.forward is Term.forward:
        raise InputError(f"term {term.name!r}: forward must give its sum over a batch")
    for attribute, allowed in (("per", PER), ("labels", LABELS)):
        if getattr(term, attribute) not in allowed:
            got = getattr(term, attribute)
            raise InputError(f"term {term.name!r}: {attribute} must be one of {', '.join(allowed)}, got {got!r}")
    for attribute in ("inputs", "teacher", "details"):
        if isinstance(getattr(term, attribute), str):
            raise InputError(f"term {term.name!r}: {attribute} must be a tuple of names, got a string")
    unknown = [what for what in term.teacher if what not in SIGNALS]
    if unknown:
        raise InputError(f"term {term.name!r}: teacher must be of {', '.join(SIGNALS)}, got {unknown[0]!r}")
    if not (isinstance(term.weight, int | float) and term.weight >= 0 and isfinite(term.weight)):
        raise InputError(f"term {term.name!r}: weight must be at least 0 and finite, got {term.weight!r}")
