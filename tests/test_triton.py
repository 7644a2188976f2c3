"""What only the Triton backend promises: padded head dimensions, fp16, tiles that do not fit, memory it never touches.

Runs on the GPU if there is one, else on Triton's interpreter; the contract all backends share is tested with the ops.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cdistill.kernels import attention_slice as backend

from cdistill.ops import reference

ROOT = Path(__file__).parent.parent
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def normal(seed, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def draw(seed, *, B=2, Hq=2, Hkv=1, T=50, D=24, R=19, V=41, dtype=torch.float32, masked=True):
    """q, k, rows, cols, key_mask: ragged rows and columns, a sample without rows when there is more than one."""
    g = torch.Generator().manual_seed(seed)
    q = torch.randn(B, T, Hq, D, generator=g).to(dtype).transpose(1, 2)
    k = torch.randn(B, Hkv, T, D, generator=g).to(dtype)
    rows = torch.stack([torch.randperm(T, generator=g)[:R] for _ in range(B)]).to(torch.int32)
    cols = torch.stack([torch.randperm(T, generator=g)[:V] for _ in range(B)]).to(torch.int32)
    rows[0, R - 3 :] = -1
    cols[0, : V // 4] = -1
    if B > 1:
        rows[-1] = -1
    key_mask = torch.rand(B, T, generator=g) > 0.2 if masked else None
    key_mask = key_mask.to(DEVICE) if masked else None
    return q.to(DEVICE), k.to(DEVICE), rows.to(DEVICE), cols.to(DEVICE), key_mask


def row_lse_of(q, k, rows, causal, scale, key_mask):
    """(B,Hq,R) by its definition."""
    k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
    T = q.shape[2]
    seen = torch.ones(q.shape[0], 1, T, T, dtype=torch.bool, device=q.device)
    if causal:
        seen = seen.tril()
    if key_mask is not None:
        seen = seen & key_mask[:, None, None]
    s = (q @ k.transpose(-1, -2) * scale).masked_fill(~seen, -torch.inf)
    lse = s.logsumexp(-1).gather(-1, rows.clamp(min=0).long()[:, None].expand(-1, q.shape[1], -1))
    return torch.where((rows >= 0)[:, None] & (lse > -torch.inf), lse, torch.inf)


def eager(q, k, rows, cols, key_mask, dtype, *, causal, each, grad):
    """Slice and its gradients in q and k through the softmax, everything computed in ``dtype``."""
    q, k = q.to(dtype).requires_grad_(), k.to(dtype).requires_grad_()
    a = reference.attention_slice(q, k, rows, cols, causal=causal, key_mask=key_mask, heads="each" if each else "mean")
    return a.detach(), *torch.autograd.grad(a, (q, k), grad.to(dtype))


def ours(q, k, rows, cols, key_mask, *, causal, each, grad):
    options = {"causal": causal, "scale": q.shape[3] ** -0.5, "key_mask": key_mask}
    lse = backend.row_lse(q, k, rows, **options)
    a = backend.slice_forward(q, k, lse, rows, cols, **options, each=each)
    dq, dk = q.new_zeros(q.shape, dtype=torch.float32), k.new_zeros(k.shape, dtype=torch.float32)
    dlse = backend.slice_backward(q, k, lse, rows, cols, grad, dq, dk, **options, each=each)
    backend.row_lse_backward(q, k, lse, rows, dlse, dq, dk, **options)
    return a, dq, dk


def assert_close(got, want, eager_same_dtype):
    """|ours - f64| <= 2 * |eager same dtype - f64| + 1e-5 * scale."""
    limit = 2 * (eager_same_dtype.double() - want).abs().max() + 1e-5 * want.abs().max()
    assert (got.double() - want).abs().max() <= limit


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
@pytest.mark.parametrize(
    ("D", "Hkv", "causal", "each"),
    [(24, 1, True, False), (40, 2, False, False), (72, 1, True, True), (128, 2, True, False)],
)
def test_slice_and_gradients_match_float64(D, Hkv, causal, each, dtype, poisoned_empty):
    q, k, rows, cols, key_mask = draw(D, D=D, Hkv=Hkv, dtype=dtype)
    shape = (2, 2, 19, 41) if each else (2, 19, 41)
    grad = normal(1, *shape)
    options = {"causal": causal, "each": each, "grad": grad}
    exact = eager(q, k, rows, cols, key_mask, torch.float64, **options)
    rounded = eager(q, k, rows, cols, key_mask, dtype, **options)
    for got, want, same in zip(ours(q, k, rows, cols, key_mask, **options), exact, rounded, strict=True):
        assert got.dtype == torch.float32
        assert_close(got, want, same)


@pytest.mark.parametrize(("R", "V"), [(1, 1), (16, 32), (17, 33)])
def test_counts_around_the_tile_edges(R, V, poisoned_empty):
    q, k, rows, cols, _ = draw(R, B=1, Hq=2, Hkv=1, R=max(R, 4), V=V, D=16)
    rows = rows[:, :R].contiguous()
    grad = normal(V, 1, R, V)
    options = {"causal": False, "each": False, "grad": grad}
    exact = eager(q, k, rows, cols, None, torch.float64, **options)
    rounded = eager(q, k, rows, cols, None, torch.float32, **options)
    for got, want, same in zip(ours(q, k, rows, cols, None, **options), exact, rounded, strict=True):
        assert_close(got, want, same)


def test_row_lse_of_every_kind_of_row():
    q, k, rows, _, key_mask = draw(3)
    key_mask[0, : int(rows[0, 0]) + 1] = False
    for causal in (True, False):
        got = backend.row_lse(q, k, rows, causal=causal, scale=0.3, key_mask=key_mask)
        want = row_lse_of(q.double(), k.double(), rows, causal, 0.3, key_mask)
        assert torch.equal(got == torch.inf, want == torch.inf)
        assert causal == bool((got[0, :, 0] == torch.inf).all())
        torch.testing.assert_close(got.double(), want, rtol=1e-6, atol=1e-5)


def test_fp16_keeps_gradients_far_outside_its_range():
    q, k, rows, cols, key_mask = draw(4, Hq=1, D=16, dtype=torch.float16)
    grad = normal(5, 2, 19, 41)
    plain = ours(q, k, rows, cols, key_mask, causal=True, each=False, grad=grad)
    for factor in (2.0**-40, 2.0**20):
        scaled = ours(q, k, rows, cols, key_mask, causal=True, each=False, grad=grad * factor)
        for got, want in zip(scaled[1:], plain[1:], strict=True):
            torch.testing.assert_close(got, want * factor, rtol=1e-3, atol=1e-3 * float(want.abs().max()) * factor)


def test_gradients_add_to_what_is_there_and_any_grad_strides_do():
    q, k, rows, cols, key_mask = draw(6)
    options = {"causal": True, "scale": 0.2, "key_mask": key_mask}
    lse = backend.row_lse(q, k, rows, **options)
    grad = normal(7, 2, 41, 19).transpose(1, 2)
    results = []
    for base, g in ((0.0, grad.contiguous()), (3.0, grad)):
        dq, dk = torch.full((2, 2, 50, 24), base, device=DEVICE), torch.full((2, 1, 50, 24), base, device=DEVICE)
        dlse = backend.slice_backward(q, k, lse, rows, cols, g, dq, dk, **options, each=False)
        results.append((dq - base, dk - base, dlse))
    for one, two in zip(*results, strict=True):
        torch.testing.assert_close(one, two, rtol=0, atol=1e-6)
    ones = torch.ones((), device=DEVICE).expand(2, 19, 41)
    dq, dk = torch.zeros(2, 2, 50, 24, device=DEVICE), torch.zeros(2, 1, 50, 24, device=DEVICE)
    dlse = backend.slice_backward(q, k, lse, rows, cols, ones, dq, dk, **options, each=False)
    a = backend.slice_forward(q, k, lse, rows, cols, **options, each=True)
    torch.testing.assert_close(dlse, -a.sum(-1) / 2)


def test_hidden_vectors_are_never_read():
    q, k, rows, cols, key_mask = draw(8)
    grad = normal(9, 2, 19, 41)
    clean = ours(q, k, rows, cols, key_mask, causal=True, each=False, grad=grad)
    used = torch.zeros(2, 50, dtype=torch.bool, device=DEVICE)
    for b in range(2):
        used[b, rows[b][rows[b] >= 0].long()] = True
    q = torch.where(used[:, None, :, None], q, torch.nan)
    k = torch.where(key_mask[:, None, :, None], k, torch.nan)
    for got, want in zip(ours(q, k, rows, cols, key_mask, causal=True, each=False, grad=grad), clean, strict=True):
        assert torch.equal(got, want)


CASES = [(loss, reduction, False) for loss in ("cosine", "mse", "kl") for reduction in ("row", "matrix", "column")]


@pytest.mark.parametrize(
    ("loss", "reduction", "sink_filter"), [*CASES, *((x, "column", True) for x in ("cosine", "kl"))]
)
def test_losses_match_float64(loss, reduction, sink_filter, poisoned_empty):
    g = torch.Generator().manual_seed(len(loss) + len(reduction))
    N, R, V = 3, 37, 131
    a = torch.rand(N, R, V, generator=g) ** 6 / V
    t = (a + torch.rand(N, R, V, generator=g) ** 6 / V) / 2
    row_valid, col_valid = torch.rand(N, R, generator=g) > 0.3, torch.rand(N, V, generator=g) > 0.3
    a, t, row_valid, col_valid = (x.to(DEVICE) for x in (a, t, row_valid, col_valid))
    row_valid[2] = False
    a[0, int(row_valid[0].nonzero()[0])] = 0
    a[~row_valid] = torch.nan
    a.transpose(1, 2)[~col_valid] = torch.nan
    grad_out = normal(13, N)

    a64 = a.double().nan_to_num().requires_grad_()
    want = torch.stack(
        [
            reference.slice_distance(x[r][:, c], y[r][:, c], loss, reduction, sink_filter) if r.any() else x.sum() * 0
            for x, y, r, c in zip(a64, t.double(), row_valid, col_valid, strict=True)
        ]
    )
    (want_grad,) = torch.autograd.grad(want, a64, grad_out.double())

    options = {"loss": loss, "reduction": reduction, "sink_filter": sink_filter}
    got = backend.alignment_loss(a, t, row_valid, col_valid, **options)
    got_grad = backend.alignment_grad(a, t, row_valid, col_valid, grad_out, **options)
    torch.testing.assert_close(got.double(), want.detach(), rtol=1e-5, atol=1e-7)
    assert (got_grad.double() - want_grad).abs().max() <= 1e-5 * want_grad.abs().max()
    assert not got_grad[~row_valid].any() and not got_grad.transpose(1, 2)[~col_valid].any()


def test_cosine_of_faint_and_of_nearly_equal_rows():
    g = torch.Generator().manual_seed(11)
    t = torch.rand(1, 4, 70, generator=g).to(DEVICE)
    valid = torch.ones(1, 4, dtype=torch.bool, device=DEVICE), torch.ones(1, 70, dtype=torch.bool, device=DEVICE)
    a = t + 1e-4 * normal(14, 1, 4, 70)
    for reduction in ("row", "matrix"):
        want = reference.slice_distance(a[0].double(), t[0].double(), "cosine", reduction)
        for factor in (1.0, 2.0**-80):
            got = backend.alignment_loss(a * factor, t, *valid, loss="cosine", reduction=reduction, sink_filter=False)
            torch.testing.assert_close(got[0].double(), want, rtol=1e-3, atol=0)


@pytest.mark.parametrize(("R", "V"), [(0, 5), (5, 0)])
def test_nothing_to_compare(R, V):
    q, k, _, _, _ = draw(12)
    rows, cols = (
        torch.zeros(2, R, dtype=torch.int32, device=DEVICE),
        torch.zeros(2, V, dtype=torch.int32, device=DEVICE),
    )
    a, dq, dk = ours(q, k, rows, cols, None, causal=True, each=False, grad=torch.zeros(2, R, V, device=DEVICE))
    assert a.shape == (2, R, V) and not dq.any() and not dk.any()
    valid = torch.ones(2, R, dtype=torch.bool, device=DEVICE), torch.ones(2, V, dtype=torch.bool, device=DEVICE)
    options = {"loss": "cosine", "reduction": "matrix", "sink_filter": False}
    assert backend.alignment_loss(a, a, *valid, **options).tolist() == [0, 0]
    assert backend.alignment_grad(a, a, *valid, torch.ones(2, device=DEVICE), **options).shape == (2, R, V)


def test_the_mounted_package_imports_from_anywhere(tmp_path):
    code = "import cdistill.kernels.attention_slice as m; print(m.alignment_loss.__module__)"
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.stdout.strip() == "cdistill.kernels.alignment_loss", done.stderr
