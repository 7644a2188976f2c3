"""What visual attention alignment is compared with: transformers' eager attention matrices, in fp32 and in float64."""

import copy

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode
from vat_models import gradients, inputs

from cdistill.ops import reference


class KeepFloat64(TorchFunctionMode):
    """Leaves float64 alone where transformers casts to fp32: in softmax, norms, rotary embeddings and linear attention."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if args and isinstance(args[0], torch.Tensor) and args[0].dtype == torch.float64:
            if func is torch.Tensor.float:
                return args[0]
            if func in (torch.Tensor.to, F.softmax):
                args = tuple(torch.float64 if x is torch.float32 else x for x in args)
                if kwargs.get("dtype") is torch.float32:
                    kwargs["dtype"] = torch.float64
            if func is torch.Tensor.matmul:  # of frequencies with positions that were cast, in transformers 5.17
                args = tuple(x.double() for x in args)
        return func(*args, **kwargs)


def eager_attentions(model, batch, dtype):
    """Attention matrices (B,Hq,T,T) of every attention layer by transformers' eager implementation, which it is switched to."""
    model.to(dtype).set_attn_implementation("eager")
    batch = {name: x.to(dtype) if x.is_floating_point() else x for name, x in inputs(batch).items()}
    with KeepFloat64():
        attentions = model(**batch, use_cache=False, output_attentions=True).attentions
    assert all(a.dtype == dtype for a in attentions)
    return attentions


def sample_loss(a, t, config):
    """Loss of one sample's slices (R,V)."""
    if a.numel() == 0:
        return a.sum()
    return reference.slice_distance(a, t, config.loss, config.reduction, config.sink_filter)


def places_of(regions):
    """(sample, rows, cols) of every sample of a batch, padding left out."""
    pairs = zip(regions.rows.long(), regions.cols.long(), strict=True)
    return [(b, rows[rows >= 0], cols[cols >= 0]) for b, (rows, cols) in enumerate(pairs)]


def eager_losses(student_maps, teacher_maps, vat, places):
    """The loss of every matched layer and sample, (L, samples), from attention matrices by layer."""
    layers = []
    for match in vat.matches:
        losses = []
        for b, r, c in places:
            a = student_maps[match.student][b][:, r[:, None], c]
            window = [teacher_maps[j][b][:, r[:, None], c] for j in match.teachers]
            if match.heads is not None:
                matched = zip(window, match.heads, strict=True)
                window = [torch.stack([x[list(group)].mean(0) for group in groups]) for x, groups in matched]
            t = torch.stack(window).mean(0)
            pairs = [(a.mean(0), t.mean(0))] if vat.config.heads == "mean" else list(zip(a, t, strict=True))
            losses.append(torch.stack([sample_loss(x, y, vat.config) for x, y in pairs]).mean())
        layers.append(torch.stack(losses))
    return torch.stack(layers)


def eager_loss(student, teacher, batch, vat, places, dtype, attention_layers=(None, None)):
    """L_vat from eager attention matrices, and its gradients; models are copied.

    ``places`` are (row of the batch, query positions, visual positions) of every sample; ``attention_layers`` of student and
    teacher say which layers the matrices belong to, where not all layers have one.
    """
    losses, student = per_sample_eager_losses(student, teacher, batch, vat, places, dtype, attention_layers)
    loss = losses.mean(1).sum() if vat.config.layer_sum else losses.mean()
    loss.backward()
    return loss.detach(), gradients(student)


def per_sample_eager_losses(student, teacher, batch, vat, places, dtype, attention_layers=(None, None)):
    """`eager_losses` (L, samples) with their graph, and the copy of the student that they belong to."""
    student, teacher = copy.deepcopy(student), copy.deepcopy(teacher)
    with torch.no_grad():
        teacher_maps = eager_attentions(teacher, batch, dtype)
    student_maps = eager_attentions(student, batch, dtype)
    maps = [
        list(found) if layers is None else dict(zip(layers, found, strict=True))
        for layers, found in zip(attention_layers, (student_maps, teacher_maps), strict=True)
    ]
    return eager_losses(*maps, vat, places), student


def assert_like_eager(ours, eager, truth, scale_of=None):
    """|ours - f64| <= 2 * |eager - f64| + 1e-5 * scale, by the largest entry."""
    scale = (truth if scale_of is None else scale_of).abs().max()
    assert scale > 0
    error, eager_error = (ours - truth).abs().max(), (eager - truth).abs().max()
    assert error <= 2 * eager_error + 1e-5 * scale, (error, eager_error, scale)


def assert_gradients_like_eager(grads, eager, truth):
    """`assert_like_eager` for every parameter, and the same parameters have a gradient."""
    assert grads.keys() == truth.keys()
    for name, grad in grads.items():
        # a key bias without rotary embedding has the exact gradient 0: its error is judged beside its weight's gradient
        scale_of = truth[name.replace("k_proj.bias", "k_proj.weight")]
        assert_like_eager(grad, eager[name], truth[name], scale_of)
