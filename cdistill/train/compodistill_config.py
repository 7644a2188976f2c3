"""The arguments of `cdistill.CompoDistillTrainer`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from typing import Any

from transformers import TrainingArguments

from cdistill.choices import KDConfig, OnPolicyConfig, VATConfig
from cdistill.errors import InputError

COMPILED = (
    "torch_compile must be False: a compiled model hides the attention that is aligned; compile the student's layers before "
    "(for layer in student.model.language_model.layers: layer.compile())"
)


@dataclass
class CompoDistillConfig(TrainingArguments):
    """transformers' `TrainingArguments` and what CompoDistill adds (SPEC section 4: L_ar + L_kd + L_vat).

    Attributes:
        vat: fields of `cdistill.vat.VATConfig` that are not at their defaults.
        kd: fields of the divergence over the vocabulary: divergence, temperature, beta, weight.
        vat_weight: weight of the alignment; 0 leaves it out, as ``kd={"weight": 0}`` does with the divergence.
        on_policy: share of samples in which a reply that the student generates takes the place of an answer (TRL's ``lmbda``).
        temperature, top_p, max_new_tokens, vllm_server: how it generates (`cdistill.OnPolicyConfig`); the temperature of the
            loss is ``kd``'s.
        train_vision: train the student's vision encoder, too.
        template: for rows that the trainer encodes: how a conversation becomes text (`cdistill.data.templates.Template`).
        max_length: their tokens at most, visual ones included; a longer sample is cut, never within an image.
        model_init_kwargs, teacher_model_init_kwargs: for ``from_pretrained``, of models given by name.

    Columns that the models do not know stay in the rows (``remove_unused_columns``), and gradient checkpointing is
    non-reentrant, unless said otherwise.

    Raises:
        ValueError: a field of ``vat`` or ``kd`` that there is not, or that has another value than it may; reentrant gradient
            checkpointing, which loses the gradient of the alignment; label smoothing; ``torch_compile``, which hides the
            attention that is aligned; batches that one process dispatches, which splits images from their samples.
    """

    _VALID_DICT_FIELDS = [  # noqa: RUF012 (as in TrainingArguments)
        *TrainingArguments._VALID_DICT_FIELDS,
        "vat",
        "kd",
        "model_init_kwargs",
        "teacher_model_init_kwargs",
    ]

    remove_unused_columns: bool = False
    vat: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Fields of the visual attention alignment, such as {'layers': 'all'}."}
    )
    kd: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Fields of the divergence over the vocabulary, such as {'weight': 0.5}."}
    )
    vat_weight: float = field(default=1.0, metadata={"help": "Weight of the visual attention alignment."})
    on_policy: float = field(default=0.0, metadata={"help": "Share of samples with replies of the student's own."})
    temperature: float = field(default=1.0, metadata={"help": "Temperature of the student's replies."})
    top_p: float = field(default=1.0, metadata={"help": "Share of the probability that they are drawn from."})
    max_new_tokens: int = field(default=128, metadata={"help": "Tokens of a reply at most."})
    vllm_server: str | None = field(
        default=None, metadata={"help": "http://HOST:PORT of a vLLM server that generates the replies."}
    )
    train_vision: bool = field(default=False, metadata={"help": "Train the student's vision encoder, too."})
    template: str = field(default="auto", metadata={"help": "How a conversation becomes text."})
    max_length: int | None = field(default=None, metadata={"help": "Tokens of a sample at most."})
    model_init_kwargs: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Keywords of from_pretrained for a student given by name."}
    )
    teacher_model_init_kwargs: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Keywords of from_pretrained for a teacher given by name."}
    )

    def __post_init__(self) -> None:
        for name in ("vat", "kd"):
            value: Any = getattr(self, name)
            if is_dataclass(value) and not isinstance(value, type):
                setattr(self, name, asdict(value))
        if self.torch_compile or self.torch_compile_backend or self.torch_compile_mode:
            raise InputError(COMPILED)  # before it is left to accelerate
        super().__post_init__()
        made(VATConfig, "vat", self.vat)
        made(KDConfig, "kd", self.kd)
        _ = self.generation
        if not 0 <= self.vat_weight < float("inf"):
            raise InputError(f"vat_weight must be at least 0 and finite, got {self.vat_weight}")
        given: Any = self.gradient_checkpointing_kwargs
        reentrant = isinstance(given, Mapping) and given.get("use_reentrant")
        if reentrant and self.vat_weight:
            raise InputError(
                "gradient_checkpointing_kwargs: use_reentrant loses the gradient of the alignment: set it to False, or "
                "vat_weight to 0"
            )
        if self.label_smoothing_factor:
            raise InputError("label_smoothing_factor must be 0: the losses are taken without logits")
        batches: Any = self.accelerator_config
        if batches.dispatch_batches:
            raise InputError(
                "accelerator_config: dispatch_batches must be False: it splits pixel_values, which hold images or patches in "
                "turn, as if they held samples"
            )
        batches.dispatch_batches = False  # by default a stream's batches are

    @property
    def generation(self) -> OnPolicyConfig:
        """How the student generates. Raises ValueError for a field that cannot be."""
        values = {f.name: getattr(self, f.name) for f in fields(OnPolicyConfig)}
        try:
            return OnPolicyConfig(**values)
        except ValueError as error:
            raise InputError(str(error).removeprefix("generation.")) from None


def made(kind: Callable[..., Any], name: str, values: Any) -> Any:
    """A frozen configuration of a field's values. Raises ValueError naming the field."""
    if values is not None and not isinstance(values, Mapping):
        raise InputError(f"{name} must be a mapping of its fields, got {values!r}")
    try:
        return kind(**(values or {}))
    except TypeError as error:
        raise InputError(f"{name}: {str(error).partition(') ')[2] or error}") from None
    except ValueError as error:
        raise InputError(str(error) if str(error).startswith(name) else f"{name}.{error}") from None
