"""How an attention engine is chosen, and the adapters of the flash-attn packages.

Those packages need a GPU. Here their modules are stand-ins with the published signatures that compute eagerly, so what is
tested is our side: layouts, arguments, and where the gradient of the log-sum-exp goes.
"""

import importlib.util
from types import SimpleNamespace

import pytest
import torch
from op_cases import assert_as_exact_as_eager

from cdistill.ops import AttentionProblem, _engines, _engines_flash_attn
from cdistill.ops._dispatch import backend
from cdistill.ops._engine import attention_backward, attention_forward
from cdistill.ops._engines import ENGINES, engine


def eager(q, k, v, causal, scale):
    """out (B,Hq,T,D) and lse (B,Hq,T)."""
    group = q.shape[1] // k.shape[1]
    s = q @ k.repeat_interleave(group, 1).mT * scale
    if causal:
        s = s.masked_fill(torch.ones(s.shape[-2:]).triu(1).bool(), -torch.inf)
    return s.softmax(-1) @ v.repeat_interleave(group, 1), s.logsumexp(-1)


def tokens_first(*tensors):
    return [x.transpose(1, 2) for x in tensors]


def forward(q, k, v, softmax_scale, causal):
    assert q.shape[1] == k.shape[1], "tokens are the second axis"
    out, lse = eager(*tokens_first(q, k, v), causal, softmax_scale)
    return out.transpose(1, 2).contiguous(), lse


def backward(dout, q, k, v, out, lse, softmax_scale, causal, dlse=None):
    """As flash attention does it: from the saved out and lse, with delta = rowsum(dout * out)."""
    dout, q, k, v, out = tokens_first(dout, q, k, v, out)
    group = q.shape[1] // k.shape[1]
    keys, values = (x.repeat_interleave(group, 1) for x in (k, v))
    p = (q @ keys.mT * softmax_scale - lse[..., None]).exp()
    if causal:
        p = p.tril()
    delta = (dout * out).sum(-1) - (0 if dlse is None else dlse)
    ds = p * (dout @ values.mT - delta[..., None]) * softmax_scale
    grads = ds @ keys, ds.mT @ q, p.mT @ dout
    return tokens_first(grads[0], *(g.unflatten(1, (-1, group)).sum(2) for g in grads[1:]))


def flash_attn_2():
    def _flash_attn_forward(
        q,
        k,
        v,
        dropout_p,
        softmax_scale,
        causal,
        window_size_left,
        window_size_right,
        softcap,
        alibi_slopes,
        return_softmax,
    ):
        assert (dropout_p, window_size_left, window_size_right, softcap, alibi_slopes) == (0.0, -1, -1, 0.0, None)
        return *forward(q, k, v, softmax_scale, causal), None, None

    def _flash_attn_backward(
        dout, q, k, v, out, softmax_lse, dq, dk, dv, dropout_p, softmax_scale, causal, window_size_left,
        window_size_right, softcap, alibi_slopes, deterministic, rng_state=None
    ):  # fmt: skip
        for buffer, g in zip(
            (dq, dk, dv), backward(dout, q, k, v, out, softmax_lse, softmax_scale, causal), strict=True
        ):
            buffer.copy_(g)

    return SimpleNamespace(_flash_attn_forward=_flash_attn_forward, _flash_attn_backward=_flash_attn_backward)


def flash_attn_3():
    def _flash_attn_forward(q, k, v, k_new=None, v_new=None, softmax_scale=None, causal=False):
        return *forward(q, k, v, softmax_scale, causal), None, None

    def _flash_attn_backward(
        dout, q, k, v, out, softmax_lse, cu_seqlens_q=None, cu_seqlens_k=None, dq=None, dk=None, dv=None,
        softmax_scale=None, is_causal=False, deterministic=False
    ):  # fmt: skip
        for buffer, g in zip(
            (dq, dk, dv), backward(dout, q, k, v, out, softmax_lse, softmax_scale, is_causal), strict=True
        ):
            buffer.copy_(g)

    return SimpleNamespace(_flash_attn_forward=_flash_attn_forward, _flash_attn_backward=_flash_attn_backward)


def flash_attn_4():
    def _flash_attn_fwd(q, k, v, softmax_scale=None, causal=False, return_lse=False):
        assert return_lse
        return forward(q, k, v, softmax_scale, causal)

    def _flash_attn_bwd(q, k, v, out, dout, lse, softmax_scale=None, causal=False, deterministic=False, dlse=None):
        return tuple(backward(dout, q, k, v, out, lse, softmax_scale, causal, dlse))

    return SimpleNamespace(_flash_attn_fwd=_flash_attn_fwd, _flash_attn_bwd=_flash_attn_bwd)


@pytest.mark.parametrize("package", [flash_attn_2, flash_attn_3, flash_attn_4], ids=lambda f: f.__name__)
@pytest.mark.parametrize("causal", [True, False])
def test_adapters_of_the_flash_attn_packages(package, causal, monkeypatch):
    chosen = ENGINES[package.__name__]
    module = package()
    monkeypatch.setattr(type(chosen), "_module", lambda self: module)
    g = torch.Generator().manual_seed(int(causal))
    q, k, v, dout = (torch.randn(2, h, 11, 16, generator=g) for h in (4, 2, 2, 4))
    dlse = torch.randn(2, 4, 11, generator=g)
    dout[:, :, 3] = 0
    problem = AttentionProblem(q, k, v, causal=causal, scale=0.3)
    for upstream in ((dout, None), (dout, dlse), (None, dlse)):

        def gradients(dtype, upstream=upstream):
            leaves = [y.to(dtype, copy=True).requires_grad_() for y in (q, k, v)]
            results = eager(*leaves, causal, 0.3)
            used = [(y, u.to(dtype)) for y, u in zip(results, upstream, strict=True) if u is not None]
            outputs, upstream_grads = zip(*used, strict=True)
            grads = torch.autograd.grad(outputs, leaves, upstream_grads, materialize_grads=True)
            return [y.detach() for y in results] + list(grads)

        out, lse, _ = attention_forward(chosen, problem)
        before = out.clone()
        grads = attention_backward(chosen, problem._replace(lse=lse), out, *upstream, backend(None, q))
        assert torch.equal(out, before)
        assert_as_exact_as_eager([out, lse, *grads], gradients(torch.float32), gradients(torch.float64))


def on_gpu(capability, installed, monkeypatch):
    """A problem that claims to lie on a GPU of this capability, where these packages can be imported."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "a GPU")
    monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: True)
    monkeypatch.setattr(_engines, "backend", lambda impl, q: None)
    for module in (_engines, _engines_flash_attn):
        monkeypatch.setattr(
            module, "find_spec", lambda name: importlib.util.find_spec("math") if name in installed else None
        )

    class Claims:
        is_cuda, device, dtype = True, torch.device("cuda"), torch.bfloat16

        def __init__(self, *shape):
            self.shape = shape

    def problem(width=128, key_mask=None, dtype=torch.bfloat16):
        tensor = Claims(1, 2, 8, width)
        tensor.dtype = dtype
        return AttentionProblem(tensor, tensor, tensor, key_mask=key_mask)

    return problem


FA2, FA3, FA4 = (ENGINES[f"flash_attn_{n}"].module for n in (2, 3, 4))


@pytest.mark.parametrize(
    ("capability", "installed", "expected"),
    [
        ((9, 0), {"triton", FA2, FA3, FA4}, "flash_attn_3"),
        ((9, 0), {"triton", FA2}, "torch_cudnn"),
        ((10, 0), {"triton", FA2, FA3, FA4}, "flash_attn_4"),
        ((10, 0), {"triton"}, "torch_cudnn"),
        ((8, 0), {"triton", FA2, FA3, FA4}, "flash_attn_2"),
        ((8, 9), {"triton"}, "torch_flash"),
        ((12, 0), {"triton"}, "torch_flash"),
    ],
)
def test_the_default_is_the_first_that_is_there(capability, installed, expected, monkeypatch):
    problem = on_gpu(capability, installed, monkeypatch)
    assert engine(None, problem()) is ENGINES[expected]
    assert engine(None, problem(key_mask=object())) is ENGINES["triton"]
    assert engine(None, problem(dtype=torch.float32)) is ENGINES["triton"]


def test_deterministic_algorithms_rule_cudnn_out(monkeypatch):
    problem = on_gpu((9, 0), {"triton"}, monkeypatch)
    torch.use_deterministic_algorithms(True)
    try:
        assert engine(None, problem()) is ENGINES["triton"]
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("name", ["flash_attn_2", "flash_attn_4"])
def test_a_package_that_cannot_be_imported_is_named(name, tmp_path, monkeypatch):
    (tmp_path / "flash_attn").mkdir()
    (tmp_path / "flash_attn/__init__.py").write_text("raise ImportError('undefined symbol: of another torch')")
    monkeypatch.syspath_prepend(tmp_path)
    assert "cannot be imported (undefined symbol: of another torch)" in ENGINES[name].missing()


def test_refusals_say_why(monkeypatch):
    problem = on_gpu((8, 0), {"triton", FA2, FA3, FA4}, monkeypatch)
    for name, x, why in (
        ("torch_cudnn", problem(width=192), "has head dims up to 128, q has 192"),
        ("torch_flash", problem(key_mask=object()), "takes no key_mask"),
        ("flash_attn_2", problem(dtype=torch.float32), "needs float16 or bfloat16, q is float32"),
        ("flash_attn_3", problem(), "does not support a GPU"),
    ):
        with pytest.raises(ValueError) as error:
            engine(name, x)
        assert str(error.value) == f"engine={name!r} {why}"
    problem = on_gpu((8, 0), set(), monkeypatch)
    with pytest.raises(ValueError, match=r"no attention engine can run here \(flash_attn_2: .*; triton: "):
        engine(None, problem(key_mask=object()))
