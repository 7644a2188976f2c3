"""What each stage trains and by which losses: one table, and the function that freezes everything else."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cdistill._plugins import registers_everywhere
from cdistill.choices import KDConfig
from cdistill.errors import InputError
from cdistill.train.terms import Settings, Term, check_terms, configured, term_named

if TYPE_CHECKING:
    from cdistill.data.tokens import Vocabularies
    from cdistill.vat import VAT

PARTS = ("vision", "language", "adapter")


@dataclass(frozen=True)
class Objective:
    """Losses of a stage, by the names of their terms (`cdistill.train.terms`), and the parts it trains (`PARTS`).

    Raises ValueError for a name that no term has, terms that cannot make one loss, and other parts.
    """

    losses: tuple[str, ...]
    trained: tuple[str, ...]

    def __post_init__(self) -> None:
        if not self.losses:
            raise InputError("losses must name at least one term")
        check_terms(self.kinds)
        for part in self.trained:
            if part not in PARTS:
                raise InputError(f"trained must be of {', '.join(PARTS)}, got {part!r}")

    @property
    def kinds(self) -> tuple[type[Term], ...]:
        """Classes of the terms."""
        return tuple(map(term_named, self.losses))

    @property
    def distils(self) -> bool:
        """Whether a loss needs the teacher."""
        return any(term.teacher for term in self.kinds)

    @property
    def inputs(self) -> tuple[str, ...]:
        """Keys of a batch that only its terms read."""
        return tuple(key for term in self.kinds for key in term.inputs)

    @property
    def trains_on_patches(self) -> bool:
        """Whether its labels are those of image patches, so that no language model is run."""
        return any(term.labels == "patches" for term in self.kinds)

    @property
    def has_builtin_labels(self) -> bool:
        """Whether only the built-in task has what its terms read of a batch."""
        return self.trains_on_patches or bool(self.inputs)

    @property
    def takes_replies(self) -> bool:
        """Whether answers may be the student's own: a teacher judges them, and no key of a batch is of the given ones."""
        return self.distils and not self.has_builtin_labels

    def terms(
        self,
        *,
        kd: KDConfig | None = None,
        vat: VAT | None = None,
        vat_weight: float = 1.0,
        vocabularies: Vocabularies | None = None,
        vats: tuple[VAT, ...] = (),
        teachers: tuple[str, ...] = (),
    ) -> tuple[Term, ...]:
        """Its terms as a run configures them, without those that it leaves out (alignment without a ``vat``)."""
        settings = Settings(kd or KDConfig(), vat, vat_weight, vocabularies, vats, teachers)
        return configured(self.losses, settings)


# `adapter` is the light map alone where the teacher's adapter is fetched (TAF), the whole adapter elsewhere.
OBJECTIVES = {
    "vision": Objective(("patch",), ("vision",)),
    "text": Objective(("ar",), ("language",)),
    "ground": Objective(("ar", "ground"), ("language", "adapter")),
    "pt": Objective(("ar",), ("adapter",)),
    "dpt": Objective(("ar", "kd"), ("adapter",)),
    "dft": Objective(("ar", "kd", "vat"), ("language", "adapter")),
    "opd": Objective(("ar", "kd", "vat"), ("language", "adapter")),  # dft on the student's own replies, too
    "sft": Objective(("ar",), ("language", "adapter")),
    # Baselines in the place of dft (docs/reproduce.md).
    "hidden": Objective(("ar", "kd", "hidden"), ("language", "adapter")),
    "mdist": Objective(("ar", "kd", "mdist"), ("language", "adapter")),
    "rdist": Objective(("ar", "kd", "rdist"), ("language", "adapter")),
    "llava_kd": Objective(("ar", "kd", "mdist", "rdist"), ("language", "adapter")),
    "relation": Objective(("ar", "kd", "relation"), ("language", "adapter")),
    "iva": Objective(("ar", "kd", "iva"), ("language", "adapter")),
    "llava_kd_dpt": Objective(("ar", "kd", "mdist", "rdist"), ("adapter",)),  # in the place of dpt
}


# Objectives that every process of a run knows.
_EVERYWHERE = set(OBJECTIVES)


def register_objective(name: str, losses: tuple[str, ...], trained: tuple[str, ...]) -> Objective:
    """Let stages of recipes name an objective of one's own, as ``objective: NAME``, in this process or, where a plugin calls
    it (`cdistill._plugins`), in all of a run.

    Args:
        losses: names of terms, of one's own too (`cdistill.register_term`).
        trained: of language and adapter, the parts that take gradients.

    Raises:
        ValueError: the name is taken, the vision encoder would be trained, which stages share with the teacher, or as
            `Objective`.
    """
    if name in OBJECTIVES:
        raise InputError(f"objective {name!r} is taken: choose another name")
    try:
        objective = Objective(tuple(losses), tuple(trained))
    except ValueError as error:
        raise InputError(f"objective {name!r}: {error}") from None
    if objective.trains_on_patches or "vision" in objective.trained:
        raise InputError(
            f"objective {name!r}: only objective vision trains the vision encoder, and on patches: stages share it with the "
            "teacher; leave vision and terms on patches out"
        )
    OBJECTIVES[name] = objective
    if registers_everywhere():
        _EVERYWHERE.add(name)
    return objective


def require_known_everywhere(names: Iterable[str], processes: int) -> None:
    """Raise ValueError for an objective of one's own, which processes that are started for a recipe would not know."""
    for name in names:
        if name not in _EVERYWHERE:
            raise InputError(
                f"objective {name!r} is known in this process alone, and processes is {processes}: set it to 1, register it in "
                "a plugin, or start a script that does and calls cdistill.train.run under torchrun"
            )


def set_trained(student: Any, objective: Objective) -> None:
    """Let the objective's parts of a model take gradients, and nothing else; of a language model with LoRA, that alone."""
    import torch

    from cdistill.models.llava import image_size, vision_features
    from cdistill.models.parts import named_parts

    parts = list(named_parts(student))
    trained = set(objective.trained)
    if "language" in trained and any(part == "lora" for _, _, part in parts):
        trained = trained - {"language"} | {"lora"}
    for _, parameter, part in parts:
        parameter.requires_grad_(part in trained)
    if "vision" in objective.trained:
        # Layers above the one whose features are used get no gradient, yet under ZeRO weight decay would move them.
        tower = student.model.vision_tower.requires_grad_(True)
        vision = student.config.vision_config
        pixels = next(tower.parameters()).new_zeros(1, vision.num_channels, *image_size(vision))
        features = vision_features(student, pixels)
        parameters = list(tower.parameters())
        for p, gradient in zip(
            parameters, torch.autograd.grad(features.sum(), parameters, allow_unused=True), strict=True
        ):
            p.requires_grad_(gradient is not None)
