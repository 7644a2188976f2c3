"""A smaller model made of a larger one: some of its decoder's layers are kept, some neurons of each MLP, some groups of heads.

Neurons and heads are chosen by their weights alone, so that nothing needs to be run: the product of the norms of what goes into
a neuron and of what comes out of it. Distillation has to bring back what is lost, as in Muralidharan et al., Minitron, 2024
(arXiv:2407.14679), which chooses by activations.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from cdistill.errors import InputError
from cdistill.models.folder import one_line
from cdistill.models.parts import language_model

# Linear layers of an MLP: those that end in its neurons, and the one that begins there.
MLPS = ((("gate_proj", "up_proj"), "down_proj"), (("fc1",), "fc2"))
_PLAIN = (bool, int, float, str, type(None))
_OWN = ("layer_idx", "training")  # of a layer, wherever it stands


def prune(
    model: Any,
    key: str,
    *,
    layers: int | Sequence[int] | None = None,
    intermediate_size: int | None = None,
    key_value_heads: int | None = None,
) -> None:
    """Keep a part of a model's decoder, in place; its configuration says so afterwards. Everything visual stays as it is.

    Args:
        model: a causal language model or a multimodal one, also on the meta device.
        key: what messages begin with.
        layers: numbers of the layers that are kept, in order, or how many, spread evenly from the first to the last.
        intermediate_size: neurons that are kept of each MLP.
        key_value_heads: key and value heads that are kept of each layer, with the query heads that share them.

    Raises:
        ValueError: more is asked for than there is, or the model's configuration cannot say what would be left. The model is
            then of no use any more.
    """
    decoder = language_model(model)
    config = model.config.get_text_config(decoder=True)
    if not isinstance(getattr(decoder, "layers", None), nn.ModuleList) or decoder.config is not config:
        raise InputError(f"{key} does not know where the layers of a {config.model_type} model are")
    if layers is not None:
        _keep_layers(decoder, config, _chosen(layers, len(decoder.layers), f"{key}.layers"), f"{key}.layers")
    if intermediate_size is not None:
        _keep_neurons(decoder, config, intermediate_size, f"{key}.intermediate_size")
    if key_value_heads is not None:
        _keep_heads(decoder, config, key_value_heads, f"{key}.key_value_heads")


def _chosen(layers: int | Sequence[int], count: int, key: str) -> list[int]:
    """Numbers of the layers that are kept, of so many."""
    most = layers if isinstance(layers, int) else 1 + max(layers)
    if most > count:
        raise InputError(f"{key} must be of the {count} layers that there are, 0 to {count - 1}, got {layers!r}")
    if isinstance(layers, int):
        return [round(i * (count - 1) / max(1, layers - 1)) for i in range(layers)]
    return list(layers)


def _keep_layers(decoder: Any, config: Any, kept: list[int], key: str) -> None:
    count = len(decoder.layers)
    for name, value in list(vars(config).items()):
        if "layer" not in name or not isinstance(value, list | tuple) or not value:
            continue
        if len(value) != count:
            raise InputError(
                f"{key} must be null: {name} of a {config.model_type} model tells of layers by their numbers"
            )
        setattr(config, name, [value[i] for i in kept])
    config.num_hidden_layers = len(kept)
    decoder.layers = nn.ModuleList([decoder.layers[i] for i in kept])
    for number, (layer, new) in enumerate(zip(decoder.layers, _fresh_layers(decoder, config, key), strict=True)):
        ours, theirs = _values(layer), _values(new)
        if ours != theirs:
            name = next(n for n in {**ours, **theirs} if ours.get(n, key) != theirs.get(n, key))
            raise InputError(
                f"{key} must be null or keep other layers: what would be layer {number} has another {name.lstrip('.')} there "
                f"than where it was, and the configuration of a {config.model_type} model cannot say so"
            )
        _become(layer, new)


def _keep_neurons(decoder: Any, config: Any, size: int, key: str) -> None:
    for layer in decoder.layers:
        mlp = getattr(layer, "mlp", None)
        found = [
            kind for kind in MLPS if all(isinstance(getattr(mlp, x, None), nn.Linear) for x in (*kind[0], kind[1]))
        ]
        if not found:
            raise InputError(
                f"{key} must be null: the MLP of a {config.model_type} model is none of linear layers one by one"
            )
        (inputs, output), *_ = found
        into, out = [getattr(mlp, name) for name in inputs], getattr(mlp, output)
        if size > out.in_features:
            raise InputError(f"{key} must be at most {out.in_features}, as there are no more neurons, got {size}")
        kept = _heaviest([x.weight for x in into], out.weight, size)
        for linear in into:
            _keep_rows(linear, kept)
        _keep_columns(out, kept)
    config.intermediate_size = size
    _agree(decoder, config, key)


def _keep_heads(decoder: Any, config: Any, groups: int, key: str) -> None:
    have, heads = config.num_key_value_heads, config.num_attention_heads
    if groups > have:
        raise InputError(f"{key} must be at most {have}, as there are no more, got {groups}")
    for layer in decoder.layers:
        attention = getattr(layer, "self_attn", None)
        parts: list[Any] = [getattr(attention, f"{x}_proj", None) for x in "qkvo"]
        if not all(isinstance(part, nn.Linear) for part in parts):
            raise InputError(
                f"{key} must be null: queries, keys and values of a {config.model_type} model are no layers one by one"
            )
        q, k, v, o = parts
        size, shared = v.out_features // have, heads // have  # channels of a head, query heads of a group
        if q.out_features != heads * size or k.out_features != have * size or o.in_features != heads * size:
            raise InputError(
                f"{key} must be null: queries, keys and values of a {config.model_type} model have unequal heads"
            )
        inward = v.weight.float().unflatten(0, (have, size)).flatten(1).norm(dim=1)
        outward = o.weight.float().unflatten(1, (have, shared * size)).transpose(0, 1).flatten(1).norm(dim=1)
        kept = (inward * outward).topk(groups).indices.sort().values
        channels = torch.arange(have * size, device=kept.device).view(have, size)[kept].flatten()
        wide = torch.arange(heads * size, device=kept.device).view(have, shared * size)[kept].flatten()
        _keep_rows(q, wide)
        _keep_rows(k, channels)
        _keep_rows(v, channels)
        _keep_columns(o, wide)
    config.head_dim, config.num_key_value_heads = size, groups
    config.num_attention_heads = groups * shared
    _agree(decoder, config, key)


def _heaviest(into: Sequence[Tensor], out: Tensor, size: int) -> Tensor:
    """Numbers of so many neurons, in order: those with the largest product of the norms of their weights."""
    weight = out.float().norm(dim=0)
    for rows in into:
        weight = weight * rows.float().norm(dim=1)
    return weight.topk(size).indices.sort().values


@torch.no_grad()
def _keep_rows(linear: nn.Linear, kept: Tensor) -> None:
    linear.weight = nn.Parameter(linear.weight.index_select(0, kept), linear.weight.requires_grad)
    if linear.bias is not None:
        linear.bias = nn.Parameter(linear.bias.index_select(0, kept), linear.bias.requires_grad)


@torch.no_grad()
def _keep_columns(linear: nn.Linear, kept: Tensor) -> None:
    linear.weight = nn.Parameter(linear.weight.index_select(1, kept), linear.weight.requires_grad)


def _fresh_layers(decoder: Any, config: Any, key: str) -> nn.ModuleList:
    """The layers, without weights, that whoever reads the configuration from its file will make."""
    written = type(config).from_dict(copy.deepcopy(config.to_dict()))
    try:
        with torch.device("meta"):
            return type(decoder)(written).layers
    except Exception as error:  # whatever a model's code says of sizes that it was not made for
        raise InputError(
            f"{key} must be null: a {config.model_type} model cannot be made so ({one_line(error)})"
        ) from None


def _values(layer: nn.Module) -> dict[str, Any]:
    """What a layer is made of: shapes of its weights, and the plain values that its modules hold."""
    found: dict[str, Any] = {name: tuple(parameter.shape) for name, parameter in layer.named_parameters()}
    for path, module in layer.named_modules():
        plain = {n: x for n, x in vars(module).items() if isinstance(x, _PLAIN) and n not in _OWN and n[0] != "_"}
        found |= {f"{path}.{name}": value for name, value in plain.items()}
    return found


def _become(layer: nn.Module, new: nn.Module) -> None:
    """Give a layer's modules the plain values of another's: its number, and sizes."""
    for module, fresh in zip(layer.modules(), new.modules(), strict=True):
        for name, value in vars(fresh).items():
            if isinstance(value, _PLAIN) and name != "training" and name[0] != "_":
                setattr(module, name, value)


def _agree(decoder: Any, config: Any, key: str) -> None:
    """Raise ValueError unless the configuration says what has become of the layers; whole numbers they take over."""
    for layer, new in zip(decoder.layers, _fresh_layers(decoder, config, key), strict=True):
        ours, theirs = ({n: x for n, x in _values(of).items() if type(x) is not int} for of in (layer, new))
        if ours != theirs:
            name = next(n for n in {**ours, **theirs} if ours.get(n, key) != theirs.get(n, key))
            raise InputError(
                f"{key} must be null: the configuration of a {config.model_type} model cannot say what would become of "
                f"{name.lstrip('.')}"
            )
        _become(layer, new)
