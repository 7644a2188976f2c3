"""The transformers hook: SDPA makes a layer's output, and a recorder passed to the model sees its queries and keys.

A recorder may make the output itself, where alignment and attention share their passes, or change it in some rows.

A model's implementation stays "sdpa", by name and by what it computes: models ask for that name to build sparse masks, to
shorten queries and more, and another name would silently change what they compute. So transformers' own functions of that
name are wrapped, once for the process; without the keyword they do what they did. `install` marks the modules whose queries
and keys a recorder may see. The recorder travels as a keyword of the model's forward pass, so the hook keeps no state; a hook
on the model puts it into what tells the layers of one pass from those of the next::

    install(model)
    recorder = TeacherTargets(matches, regions, key_mask=batch["attention_mask"])
    model(**batch, cdistill_vat=recorder)
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial, wraps
from typing import TYPE_CHECKING, Any
from weakref import ReferenceType, ref

import torch
from torch import Tensor, nn

from cdistill.errors import InputError
from cdistill.families import family_of
from cdistill.vat.generation import GenerationRecorder
from cdistill.vat.recorders import Recorder, RowChanges
from cdistill.vat.regions import require_on_device

if TYPE_CHECKING:
    from transformers import PreTrainedModel

IMPLEMENTATION = "sdpa"
KEYWORD = "cdistill_vat"

_INSIDE = "_cdistill_inside"  # of an exchange of tokens for heads: the attention that it is made around

# On a module of an installed text model, whose queries and keys recorders may see: keywords that its family refuses.
_MARK = "_cdistill_vat"
# On a function of transformers' registries: it is our wrapper.
_WRAPPER = "_cdistill_wrapper"
# The (B, T) padding mask and the version of the (B, 1, T, T) mask that it stands on, which is causality and padding alone: the
# attention function could not tell that without reading T * T values.
_PADDING = "_cdistill_padding"
# The recorder's (B, T) sequence numbers, kept with its version on a mask that has been found to be their packing.
_PACKING = "_cdistill_packing"


class _Pass:
    """One forward pass that carries a recorder, and the layers that it has shown to it.

    Only calls of the model make one: gradient checkpointing runs layers again within the pass that they belong to.
    """

    def __init__(self, recorder: Any) -> None:
        self.recorder, self.exchange = recorder, getattr(recorder, "exchange", None)
        self.packing = getattr(recorder, "packing", None)
        self._seen: dict[int, list[tuple[ReferenceType[Tensor], int]]] = {}

    def enter(self, layer: int, query: Tensor, key: Tensor) -> None:
        """Raise ValueError for a layer whose queries and keys are others than those of its attention before.

        DiffLlama's are the same, with other values. A recomputation in a backward pass makes its own.
        """
        if torch._C._current_graph_task_id() != -1:
            return
        before = self._seen.get(layer)
        if before is None:
            self._seen[layer] = [(ref(x), _version(x)) for x in (query, key)]
        elif any(kept() is not x or v != _version(x) for (kept, v), x in zip(before, (query, key), strict=True)):
            raise InputError(
                f"layer {layer} attends more than once in one forward pass, and a recorder takes one attention of each layer: "
                "align other layers (student_layers and teacher_layers of VATConfig), or use another family"
            )


def _begin_pass(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A pre-hook of models that hold each other, of which the outermost one that is called begins the pass."""
    recorder = kwargs.get(KEYWORD)
    if recorder is None or isinstance(recorder, _Pass):
        return None
    return args, kwargs | {KEYWORD: _Pass(recorder)}


def install(model: "PreTrainedModel") -> None:
    """Let recorders see the attention of the text model of ``model``, which runs on SDPA; outputs stay SDPA's, bit for bit.

    (Unless a recorder makes them.) ``model`` is a Llava-like transformers model or a plain causal language model. A vision
    tower keeps its own attention, a text model of another implementation is switched to SDPA. Installing twice is harmless,
    copies of the model are installed, and nothing of it is part of a saved model. Raises ValueError for a model whose text
    model is not causal softmax attention over one sequence that holds the visual tokens: encoder-decoders, cross-attention,
    chunked attention, attention that does not run on SDPA or is not chosen through transformers' AttentionInterface.
    """
    text_model = text_model_of(model)
    modules = _attention_modules(model, text_model)
    _register()
    if text_model.config._attn_implementation != IMPLEMENTATION:
        text_model.set_attn_implementation(IMPLEMENTATION)
    refused = family_of(model).refused_keywords
    for module in modules:
        setattr(module, _MARK, refused)
    _leave_passes(model)
    for module in _around(model):
        module.register_forward_pre_hook(_begin_pass, with_kwargs=True)


def uninstall(model: "PreTrainedModel", implementation: str = "sdpa") -> None:
    """Hide the text model from recorders, and switch it to one of transformers' own attention implementations."""
    text_model = text_model_of(model)
    _leave_passes(model)
    for module in text_model.modules():
        vars(module).pop(_MARK, None)
    if text_model.config._attn_implementation != implementation:
        text_model.set_attn_implementation(implementation)


@contextmanager
def installed(model: "PreTrainedModel") -> Iterator["PreTrainedModel"]:
    """`install` for the duration of a ``with`` block; afterwards the text model is as it was before."""
    text_model = text_model_of(model)
    previous = text_model.config._attn_implementation
    was_installed = is_installed(model)
    install(model)
    try:
        yield model
    finally:
        if not was_installed:
            uninstall(model, previous)


def is_installed(model: "PreTrainedModel") -> bool:
    """Whether recorders see the attention of ``model``."""
    return any(hasattr(module, _MARK) for module in text_model_of(model).modules())


def text_model_of(model: "PreTrainedModel") -> "PreTrainedModel":
    """The submodule of ``model`` that owns its text configuration; ValueError if there is none."""
    from transformers import PreTrainedModel

    text_config = model.config.get_text_config(decoder=True)
    text_model = next((m for m in model.modules() if isinstance(m, PreTrainedModel) and m.config is text_config), None)
    if text_model is None:
        raise InputError(f"{type(model).__name__} has no submodule that owns its text configuration")
    return text_model


def _around(model: nn.Module) -> list[nn.Module]:
    """The models, one within the other, that may be called with a recorder: those that hold marked modules."""
    from transformers import PreTrainedModel

    models = [m for m in model.modules() if isinstance(m, PreTrainedModel)]
    return [m for m in models if any(hasattr(inner, _MARK) for inner in m.modules())]


def _leave_passes(model: nn.Module) -> None:
    for module in model.modules():
        for key in [key for key, hook in module._forward_pre_hooks.items() if hook is _begin_pass]:
            del module._forward_pre_hooks[key]
            module._forward_pre_hooks_with_kwargs.pop(key, None)


def _attention_modules(model: "PreTrainedModel", text_model: "PreTrainedModel") -> list[nn.Module]:
    """The modules of the text model that know their layer; ValueError for attention that cannot be aligned whatever is run."""
    name, config = type(text_model).__name__, text_model.config
    if getattr(model.config, "is_encoder_decoder", False) or getattr(config, "is_encoder_decoder", False):
        raise InputError(
            f"{type(model).__name__} is an encoder-decoder, which visual attention alignment does not support: it needs a "
            "causal language model whose sequence holds the visual tokens"
        )
    if not text_model._supports_sdpa:
        raise InputError(
            f"{name} does not run on SDPA, because its attention is no plain softmax of q k^T (such as "
            "logit soft-capping or attention sinks), which visual attention alignment does not support"
        )
    modules = [
        m
        for m in text_model.modules()
        if getattr(m, "layer_idx", None) is not None and type(getattr(m, "config", config)) is type(config)
    ]
    if not text_model._can_set_attn_implementation() or not modules:
        raise InputError(
            f"{name} does not choose its attention through transformers' AttentionInterface; "
            "visual attention alignment needs a model that does"
        )
    if any("CrossAttention" in type(m).__name__ for m in text_model.modules()):
        raise InputError(
            f"{name} sees images by cross-attention, which visual attention alignment does not support: it needs visual "
            "tokens in the language model's own sequence"
        )
    if any((getattr(config, cycles, None) or 1) > 1 for cycles in ("H_cycles", "L_cycles")):
        raise InputError(
            f"{name} runs its layers several times in a pass, which visual attention alignment does not support"
        )
    if "chunked_attention" in (getattr(config, "layer_types", None) or ()):
        raise InputError(
            f"{name} has layers of chunked attention, which visual attention alignment does not support; use another family"
        )
    return modules


def _register() -> None:
    """Wrap what transformers holds for SDPA, unless it is wrapped; others may have put their own function there meanwhile."""
    from transformers import AttentionInterface, AttentionMaskInterface, GenerationMixin
    from transformers.masking_utils import causal_mask_function

    attention, mask = AttentionInterface()[IMPLEMENTATION], AttentionMaskInterface()[IMPLEMENTATION]
    if not hasattr(attention, _WRAPPER):
        AttentionInterface.register(IMPLEMENTATION, _attention(attention))
    if not hasattr(mask, _WRAPPER):
        AttentionMaskInterface.register(IMPLEMENTATION, _mask(mask, causal_mask_function))
    if not hasattr(GenerationMixin._validate_model_kwargs, _WRAPPER):
        setattr(GenerationMixin, "_validate_model_kwargs", _validation(GenerationMixin._validate_model_kwargs))  # noqa: B010


def _attention(sdpa: Callable[..., tuple[Tensor, None]]) -> Callable[..., tuple[Tensor, None]]:
    @wraps(sdpa)
    def attention(
        module: nn.Module,
        query: Tensor,  # (B, Hq, T, D)
        key: Tensor,  # (B, Hkv, T, D)
        value: Tensor,
        attention_mask: Tensor | None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        recorder = kwargs.pop(KEYWORD, None)
        exchange = getattr(recorder, "exchange", None) if hasattr(module, _MARK) else None
        if exchange is not None and not kwargs.pop(_INSIDE, False):
            _require_shardable(module, query, recorder, attention_mask, kwargs)
            attend = partial(attention, **{KEYWORD: recorder, _INSIDE: True})
            return exchange(attend, module, query, key, value, **kwargs)  # type: ignore[no-any-return]
        made = None if recorder is None else _record(recorder, module, query, key, value, attention_mask, kwargs)
        if isinstance(made, Tensor):
            return made.transpose(1, 2).contiguous(), None
        if exchange is not None and recorder.packing is not None:
            out = recorder.packing.attention(sdpa, module, query, key, value, **kwargs)
        else:
            out, _ = sdpa(module, query, key, value, attention_mask, **kwargs)
        return (out if made is None else made.applied_to(out)), None

    setattr(attention, _WRAPPER, True)
    return attention


@torch.compiler.disable  # one code for all layers: a compiler would make one for each layer_idx that it reads here
def _record(
    recorder: Any,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    kwargs: dict[str, Any],
) -> Tensor | RowChanges | None:
    """Show a layer's queries and keys to the recorder if it wants them; the layer's attention, or changes to it, if it has
    made that, too."""
    if not hasattr(module, _MARK):  # a vision tower's, or a model that is not installed
        return None
    this_pass = recorder if isinstance(recorder, _Pass) else None
    recorder = recorder if this_pass is None else this_pass.recorder
    if not isinstance(recorder, Recorder):
        raise InputError(f"{KEYWORD} must be a recorder of cdistill.vat, got {type(recorder).__name__}")
    layer: Any = module.layer_idx
    if layer not in recorder.layers:
        return None
    if this_pass is not None:
        this_pass.enter(layer, query, key)
    sequence, cached = getattr(recorder, "sequence", None), isinstance(recorder, GenerationRecorder)
    if isinstance(recorder, GenerationRecorder):
        key = recorder.show(layer, query, key, attention_mask)
    _require_plain_causal(layer, module, query, key, attention_mask, kwargs, packed=sequence is not None, cached=cached)
    if sequence is None:
        padding = getattr(attention_mask, _PADDING, (None, None))[0]
        _require_same_padding(
            recorder.key_mask, padding[:, : key.shape[2]] if cached and padding is not None else padding
        )
    else:
        _require_same_packing(sequence, query, attention_mask)
    try:
        out = recorder.record(layer, query, key, value, scale=kwargs.get("scaling"), causal=True)
    except InputError as error:
        raise InputError(f"layer {layer} ({type(module).__name__}): {error}") from None
    if out is not None and kwargs.get("dropout"):
        raise InputError(f"layer {layer} uses attention dropout, which needs vat.engine sdpa")
    return out


def _mask(sdpa_mask: Callable[..., Tensor | None], causal: Callable[..., Any]) -> Callable[..., Tensor | None]:
    @wraps(sdpa_mask)
    def mask(*args: Any, **kwargs: Any) -> Tensor | None:
        result = sdpa_mask(*args, **kwargs)
        if result is None or torch.compiler.is_compiling():
            return result
        local_size = kwargs.get("local_size")
        # a window as wide as the sequence hides nothing; transformers forbids the skip where it overlays anything else
        wide = (
            local_size is not None and kwargs["kv_length"] <= local_size and kwargs.get("allow_is_causal_skip", False)
        )
        if kwargs.get("mask_function") is causal or wide:
            setattr(result, _PADDING, (kwargs.get("attention_mask"), _version(result)))
        return result

    setattr(mask, _WRAPPER, True)
    return mask


def _validation(validate: Callable[..., None]) -> Callable[..., None]:
    """What `generate` finds no fault with: of an installed model also a recorder of generation."""

    @wraps(validate)
    def validation(model: Any, model_kwargs: dict[str, Any]) -> None:
        recorder = model_kwargs.get(KEYWORD)
        if recorder is None or not is_installed(model):
            validate(model, model_kwargs)
            return
        if not isinstance(recorder, GenerationRecorder):
            raise InputError(f"{KEYWORD} of generate must be a GenerationRecorder, got {type(recorder).__name__}")
        validate(model, {name: value for name, value in model_kwargs.items() if name != KEYWORD})

    setattr(validation, _WRAPPER, True)
    return validation


def _version(mask: Tensor) -> int:
    """Counts what is written into a mask; tensors of inference mode do not count it."""
    return -1 if mask.is_inference() else mask._version


def _is_causality_and_padding(mask: Tensor) -> bool:
    """Whether a mask is as `_mask` left it: models also write sparse selections into it."""
    _, version = getattr(mask, _PADDING, (None, None))
    return version == _version(mask)


def _require_plain_causal(
    layer: int,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    attention_mask: Tensor | None,
    kwargs: dict[str, Any],
    *,
    packed: bool,
    cached: bool,
) -> None:
    """Raise ValueError unless the layer's attention is softmax(scale * q k^T) under causality and padding alone.

    The mask of ``packed`` samples is left to `_require_same_packing`, how many keys are ``cached`` to the recorder.
    """

    def refuse(what: str) -> ValueError:
        return InputError(f"layer {layer} uses {what}, which visual attention alignment does not support")

    for name, what in getattr(module, _MARK).items():
        if kwargs.get(name) is not None:
            raise refuse(what)
    is_causal = kwargs.get("is_causal")
    if is_causal is None:
        is_causal = getattr(module, "is_causal", True)
    if not is_causal or not getattr(getattr(module, "config", None), "is_causal", True):
        raise refuse("bidirectional attention")
    if query.shape[2] != key.shape[2] and not cached:
        raise refuse(
            f"{query.shape[2]} queries on {key.shape[2]} keys (a key-value cache, which GenerationRecorder alone takes, "
            "cross-attention, or logits_to_keep that leaves out queries)"
        )
    if packed:
        return
    window = kwargs.get("sliding_window")
    if window is not None and window < key.shape[2]:
        raise refuse(f"a sliding window of {window} of {key.shape[2]} tokens")
    if attention_mask is not None and not _is_causality_and_padding(attention_mask):
        raise refuse(
            "a mask other than causality and padding (bidirectional images, sparse attention, a 4-D mask, or packed samples "
            "without cdistill.vat.packed_regions)"
        )


def _require_shardable(
    module: Any, query: Tensor, sharded: Any, attention_mask: Tensor | None, kwargs: dict[str, Any]
) -> None:
    """Raise ValueError unless a layer's attention is causal alone, within the sequences of packed rows, so that it is the same
    without its mask for all tokens."""
    tokens, packing = query.shape[2] * sharded.exchange.size, sharded.packing
    window, is_causal = kwargs.get("sliding_window"), kwargs.get("is_causal")
    found = [what for name, what in getattr(module, _MARK).items() if kwargs.get(name) is not None]
    if window is not None and window < tokens:
        found.append(f"a sliding window of {window} of {tokens} tokens")
    if not (getattr(module, "is_causal", True) if is_causal is None else is_causal):
        found.append("bidirectional attention")
    if packing is None and attention_mask is not None and not _is_causality_and_padding(attention_mask):
        found.append("a mask other than causality")
    if getattr(attention_mask, _PADDING, (None, None))[0] is not None:
        found.append("a padding mask")
    if found:
        raise InputError(f"layer {module.layer_idx} uses {found[0]}, which sequence_parallel does not support")
    if packing is not None:
        _require_same_packing(packing.own, query, attention_mask)


def _require_same_padding(key_mask: Tensor | None, padding: Tensor | None) -> None:
    """Raise ValueError unless recorder and model hide the same keys; on CUDA a device-side assertion (no sync)."""
    message = "key_mask of the recorder must be the attention_mask (B, T) of the model's forward pass"
    if key_mask is None and padding is None:
        return
    if key_mask is None or padding is None:
        given = padding if key_mask is None else key_mask
        assert given is not None
        same = given.all()
    elif key_mask.shape != padding.shape:
        raise InputError(f"{message}, got {tuple(key_mask.shape)} for {tuple(padding.shape)}")
    else:
        same = (key_mask == padding.to(key_mask.device)).all()
    require_on_device(same, message)


def _require_same_packing(sequence: Tensor, query: Tensor, attention_mask: Tensor | None) -> None:
    """Raise ValueError unless the model's mask is causality within the sequences, (B, T), of each row and nothing else.

    Reads the T * T values of a mask, as making it did, once for all layers that share it. On CUDA a device-side assertion.
    """
    message = (
        "the model must keep the packed samples of the recorder apart: call it with their position_ids, with "
        "use_cache=False and without attention_mask"
    )
    if (query.shape[0], query.shape[2]) != sequence.shape:
        raise InputError(f"the recorder has packed rows {tuple(sequence.shape)}, not {query.shape[0], query.shape[2]}")
    if attention_mask is None:  # plain causality
        require_on_device((sequence == 0).all(), message)
        return
    checked, version = getattr(attention_mask, _PACKING, (None, None))
    if checked is not sequence or version != _version(attention_mask):
        batch, length = sequence.shape
        if attention_mask.dtype != torch.bool or attention_mask.shape != (batch, 1, length, length):
            raise InputError(message)
        expected = (sequence[:, :, None] == sequence[:, None, :]).tril()[:, None]
        require_on_device((attention_mask == expected.to(attention_mask.device)).all(), message)
        setattr(attention_mask, _PACKING, (sequence, _version(attention_mask)))
