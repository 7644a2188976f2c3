"""What of a student and a teacher is run, and whether they can be distilled: same tokens, same visual tokens, same P_T."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from cdistill.errors import InputError
from cdistill.families import family_of
from cdistill.models.llava import Llava, VisualTokens, visual_tokens
from cdistill.models.load import Model
from cdistill.models.parts import has_vision, parameters_of
from cdistill.models.taf import TAFAdapter, adapter_layers, linear_layers

MOST_PADDING = 256  # tokens, or 1 %: of embeddings that are padded


def unwrapped(model: Any, side: str) -> Any:
    """The model of transformers inside what a caller holds: itself, or what a peft model or ``torch.compile`` wraps.

    Its layers are run without the wrapper, so only wrappers that add nothing to them are taken off. Raises ValueError, naming
    the ``side``, for all others: prompt, P- and prefix tuning, tuners with a forward pass or a loss of their own, and what
    belongs around both models (DistributedDataParallel, an engine).
    """
    model = getattr(model, "_orig_mod", model)
    if isinstance(model, PreTrainedModel):
        return model
    if not hasattr(model, "peft_config"):
        kind = type(model)
        raise InputError(
            f"the {side} must be a model of transformers or a peft model, got {kind.__module__}.{kind.__qualname__}: "
            "wrap what distill() returns, not what it is given"
        )
    _check_adapters(model, side)
    return unwrapped(model.get_base_model(), side)


def _check_adapters(model: Any, side: str) -> None:
    """Raise ValueError unless a peft model computes what its base model does, whose layers hold the adapters."""
    from peft.tuners.tuners_utils import BaseTuner

    for config in model.peft_config.values():
        kind = str(getattr(config.peft_type, "value", config.peft_type))
        if config.is_prompt_learning:
            why = "puts tokens before the text that the base model does not have"
        elif getattr(config, "alora_invocation_tokens", None):
            why = "needs the places of its invocation tokens (alora_invocation_tokens)"
        elif kind == "ADALORA" and side == "student" and config.orth_reg_weight:
            why = f"adds a regulariser to the loss (orth_reg_weight {config.orth_reg_weight}); set it to 0, or"
        elif kind != "ADALORA" and getattr(type(model.base_model), "forward", None) is not BaseTuner.forward:
            why = "has a forward pass of its own"
        else:
            continue
        raise InputError(f"the {side}'s {kind} {why}: use LoRA or another peft method that changes layers alone")


def shares_encoder(student: Model, teacher: Model) -> bool:
    """Whether two LLaVAs have one vision encoder and take the same of it, so that an image need be looked at once."""
    if not isinstance(student, Llava) or not isinstance(teacher, Llava):
        return False
    ours, theirs = student.config, teacher.config
    same = ours.vision_feature_select_strategy == theirs.vision_feature_select_strategy
    same = same and _feature_layers(ours) == _feature_layers(theirs)
    return same and _equal(student.model.vision_tower, teacher.model.vision_tower)


def check_pair(student: Model, teacher: Model) -> None:
    """Raise ValueError unless two models can be distilled: same visual tokens, and with TAF one encoder and the same P_T.

    LLaVAs without TAF may have vision encoders of their own, if their visual tokens stand for the same patches.
    """
    check_configurations(student, teacher)
    if isinstance(student, Llava) and isinstance(teacher, Llava):
        check_fetched(student, teacher)


def check_configurations(student: Model, teacher: Model) -> None:
    """What of `check_pair` needs no weights: vocabularies, and visual tokens."""
    difference = visual_difference(student, teacher)
    if difference is not None:
        raise InputError(difference)


def check_apart(student: Model, teacher: Model) -> None:
    """Raise ValueError unless two models can be distilled that each have an encoding of the samples of their own.

    They need one vocabulary. A student with TAF sees what its teacher sees, so it cannot have other visual tokens.
    """
    _refuse_fetched(student, visual_difference(student, teacher) or "their image processors differ")


def _refuse_fetched(student: Model, why: str) -> None:
    if isinstance(getattr(student.model, "multi_modal_projector", None), TAFAdapter):
        raise InputError(f"student.taf must be false for a student with other visual tokens than its teacher: {why}")


def check_spans(student: Model, teacher: Model, *, resampled: bool) -> str | None:
    """What of `check_pair` needs no weights, for two models of different tokenizers; with ``resampled`` their visual tokens may
    be others, too: the difference is returned."""
    difference = visual_difference(student, teacher, one_tokenizer=False)
    if difference is None:
        return None
    if not resampled:
        raise InputError(f"{difference}; vat.visual resample aligns attention to other visual tokens")
    _refuse_fetched(student, difference)
    return difference


def visual_difference(student: Model, teacher: Model, *, one_tokenizer: bool = True) -> str | None:
    """Why two models cannot read the same encoding of a sample, by their configurations; None if they can.

    Without ``one_tokenizer``, why they do not see the same tokens of an image, whatever their ids.

    Raises ValueError for vocabularies that differ, or only one model with a vision encoder.
    """
    _check_common(student, teacher, one_tokenizer=one_tokenizer)
    try:
        _check_visual(student, teacher, one_tokenizer=one_tokenizer)
    except InputError as error:
        return str(error)
    return None


def _check_common(student: Model, teacher: Model, *, one_tokenizer: bool = True) -> None:
    if has_vision(student) != has_vision(teacher):
        raise InputError(f"only the {'student' if has_vision(student) else 'teacher'} has a vision encoder")
    if one_tokenizer:
        _check_vocabulary(student.config.get_text_config(), teacher.config.get_text_config())


def _check_visual(student: Model, teacher: Model, *, one_tokenizer: bool) -> None:
    if isinstance(student, Llava) and isinstance(teacher, Llava):
        if one_tokenizer:
            _check_equal("image_token_id", student.config, teacher.config)
        _check_visual_tokens(student, teacher)
        return
    ours, theirs = family_of(student), family_of(teacher)
    for name in dict.fromkeys(ours.visual_fields + theirs.visual_fields):
        if one_tokenizer or not name.endswith("_token_id"):
            _check_equal(name, student.config, teacher.config)
    if has_vision(student):
        for name in dict.fromkeys(ours.encoder_fields + theirs.encoder_fields):
            _check_equal(name, student.config.vision_config, teacher.config.vision_config, "vision_config.")


def _feature_layers(config: Any) -> list[int]:
    """Feature layers counted from the first: of 3 layers, whose hidden states are 4, -2 is 2."""
    layers = config.vision_feature_layer
    layers = [layers] if isinstance(layers, int) else list(layers)
    count = getattr(config.vision_config, "num_hidden_layers", None)
    return layers if count is None else [layer % (count + 1) for layer in layers]


def _check_visual_tokens(student: Llava, teacher: Llava) -> None:
    """Every position among an image's visual tokens must be the same patch for both models."""
    for name in ("image_size", "patch_size"):
        _check_equal(name, student.config.vision_config, teacher.config.vision_config, "vision_config.")
    ours, theirs = visual_tokens(student.config), visual_tokens(teacher.config)
    if ours != theirs:
        raise InputError(
            f"visual tokens of an image differ: student {_described(ours, student)}, teacher {_described(theirs, teacher)}"
        )


def _described(tokens: VisualTokens | None, model: Llava) -> str:
    config: Any = model.config
    how = f"{config.vision_config.model_type}, {config.vision_feature_select_strategy}"
    if tokens is None:
        return f"any number ({how})"
    more = f", {tokens.special} of them no patches" if tokens.special else ""
    return f"{tokens.total} ({how}{more}{', without the first patch' if tokens.dropped else ''})"


def check_fetched(student: Llava, teacher: Llava) -> None:
    """Raise ValueError unless the adapter that a student with TAF has fetched is this teacher's."""
    adapter = student.model.multi_modal_projector
    if not isinstance(adapter, TAFAdapter):
        return
    if not shares_encoder(student, teacher):
        raise InputError(
            "vision_tower differs: a student with TAF sees through its teacher's encoder, at the same vision_feature_layer and "
            "vision_feature_select_strategy; this teacher has another"
        )
    trained = [p for layer in linear_layers(teacher.model.multi_modal_projector) for p in layer.parameters()]
    fetched = [p for layer in adapter.fetched for p in layer.parameters()]
    same = adapter.activations == [layer["activation"] for layer in adapter_layers(teacher)]
    if not same or len(fetched) != len(trained) or not all(map(_same, fetched, trained)):
        raise InputError("multi_modal_projector differs: the student's fetched adapter is not this teacher's")


def common_parameters(
    student: Model, teacher: Model, *, frozen: Collection[nn.Parameter] = ()
) -> dict[str, nn.Parameter]:
    """The student's parameters, by name, whose memory is the teacher's, too.

    Raises ValueError if one is trained, those that are about to be ``frozen`` left out.
    """
    theirs, spared = {_memory(p) for p in teacher.parameters()}, {id(p) for p in frozen}
    common = {name: p for name, p in student.named_parameters() if _memory(p) in theirs}
    check_frozen({name: p for name, p in common.items() if id(p) not in spared})
    return common


def check_frozen(common: Mapping[str, nn.Parameter]) -> None:
    """Raise ValueError if one of the parameters that student and teacher have in common is trained."""
    trained = next((name for name, p in common.items() if p.requires_grad), None)
    if trained is not None:
        raise InputError(
            f"{trained} is trained and also the teacher's: give distill() a teacher with weights of its own, such as "
            "copy.deepcopy(teacher) before the student gets its LoRA"
        )


def _memory(parameter: nn.Parameter) -> Any:
    """What two parameters have in common if one changes with the other; empty and partitioned ones are compared by identity."""
    local = getattr(parameter, "_local_tensor", parameter)
    if local.is_meta or not local.numel():
        return id(parameter)
    return local.device, local.data_ptr()


class CommonEncoder:
    """Whether two LLaVAs can look at an image once, asked before every batch: what either holds may change in between.

    They can while their vision encoders (and with TAF the fetched adapter and the teacher's) are equal and nothing of them
    is trained. Weights are compared again when they were written to, moved or replaced, but not while an engine holds them in
    parts.
    """

    def __init__(self, student: Model, teacher: Model) -> None:
        self.student, self.teacher = student, teacher
        self._state: Any = None
        self._equal = False

    def __call__(self) -> bool:
        """Whether images are to be looked at once now."""
        if not isinstance(self.student, Llava) or not isinstance(self.teacher, Llava):
            return False
        ours = parameters_of(self.student, "vision", "fetched")
        if any(p.requires_grad for p in ours):
            return False
        theirs = parameters_of(self.teacher, "vision", "adapter", "fetched")
        if self._state is not None and (_is_sharded(self.student) or _is_sharded(self.teacher)):
            return self._equal
        state = [(_memory(p), 0 if p.is_inference() else p._version) for p in (*ours, *theirs)]
        if state != self._state:
            self._state, self._equal = state, shares_encoder(self.student, self.teacher) and self._same_adapter()
        return self._equal

    def _same_adapter(self) -> bool:
        try:
            check_pair(self.student, self.teacher)
        except ValueError:
            return False
        return True


def _is_sharded(model: nn.Module) -> bool:
    """Whether ZeRO-3 or FSDP 2 holds a model in parts, also while a forward pass has them together."""
    from torch.distributed.fsdp import FSDPModule

    return any(hasattr(p, "ds_id") for p in model.parameters()) or any(
        isinstance(m, FSDPModule) for m in model.modules()
    )


def _check_vocabulary(student: Any, teacher: Any) -> None:
    """One tokenizer's embeddings may be padded to different sizes, and their special tokens have the same ids."""
    ours, theirs = student.vocab_size, teacher.vocab_size
    if abs(ours - theirs) > max(MOST_PADDING, max(ours, theirs) // 100):
        raise InputError(
            f"vocab_size differs: student {ours}, teacher {theirs}; both must have one tokenizer, unless kd.alignment "
            "of a recipe is merged or uld"
        )
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        if getattr(student, name, None) is not None and getattr(teacher, name, None) is not None:
            _check_equal(name, student, teacher)


def _check_equal(name: str, student: Any, teacher: Any, prefix: str = "") -> None:
    ours, theirs = getattr(student, name, None), getattr(teacher, name, None)
    if ours != theirs:
        raise InputError(f"{prefix}{name} differs: student {ours}, teacher {theirs}")


def _equal(a: nn.Module, b: nn.Module) -> bool:
    mine, theirs = (
        {**dict(m.named_parameters()), **dict(m.named_buffers())} for m in (a, b)
    )  # state_dict() shards FSDP's
    if any(t.is_meta or _is_part(t) for t in (*mine.values(), *theirs.values())):
        return False  # offloaded, or a part of the whole: each model looks for itself
    return mine.keys() == theirs.keys() and all(_same(mine[name], theirs[name]) for name in mine)


def _is_part(tensor: Tensor) -> bool:
    """Whether ZeRO-3 or FSDP 2 holds a part of a tensor here."""
    return hasattr(tensor, "ds_id") or hasattr(tensor, "_local_tensor")


def _same(a: Tensor, b: Tensor) -> bool:
    """Equality in the narrower of two dtypes, on whatever devices they are."""
    if hasattr(a, "ds_id") or hasattr(b, "ds_id"):
        raise InputError(
            "models that ZeRO-3 has partitioned cannot be compared: put them together before the engine does"
        )
    if a.is_meta or b.is_meta:
        raise InputError(
            "the teacher's multi_modal_projector is offloaded: keep it in memory (device_map) for a student that fetches it"
        )
    dtype = min(a.dtype, b.dtype, key=lambda d: d.itemsize)
    return torch.equal(a.to(b.device, dtype), b.to(dtype))
