"""What only the Triton backend promises: padded head dimensions, fp16, tiles that do not fit, memory it never touches.

Runs on the GPU if there is one, else on Triton's interpreter; the contract all backends share is tested with the ops.
"""

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cdistill.kernels import _launch, backend, slice_gradient

from cdistill import choices
from cdistill.ops import attention_alignment, attention_with_alignment, reference
from cdistill.ops._contract import attention_problem
from cdistill.ops._problem import Comparison

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
    lse = at_rows(s.logsumexp(-1), rows)
    return torch.where((rows >= 0)[:, None] & (lse > -torch.inf), lse, torch.inf)


def at_rows(x, rows):
    """x (B,Hq,T) at the rows: (B,Hq,R)."""
    return x.gather(-1, rows.clamp(min=0).long()[:, None].expand(-1, x.shape[1], -1))


def eager(q, k, rows, cols, key_mask, dtype, *, causal, each, grad):
    """Slice and its gradients in q and k through the softmax, everything computed in ``dtype``."""
    q, k = q.to(dtype).requires_grad_(), k.to(dtype).requires_grad_()
    a = reference.attention_slice(q, k, rows, cols, causal=causal, key_mask=key_mask, heads="each" if each else "mean")
    return a.detach(), *torch.autograd.grad(a, (q, k), grad.to(dtype))


def ours(q, k, rows, cols, key_mask, *, causal, each, grad):
    heads = "each" if each else "mean"
    x = attention_problem(q, k, None, (rows, cols), causal=causal, scale=None, key_mask=key_mask, heads=heads)
    x = x._replace(lse=backend.row_lse(x))
    dq, dk, _ = backend.slice_backward(x, grad, lambda dlse: backend.row_lse_backward(x, dlse))
    return backend.slice_forward(x), dq, dk


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


@pytest.mark.parametrize("causal", [True, False])
def test_tiles_that_all_rows_see_and_others(causal):
    """Rows and columns in order: the first tile needs no mask, the others do. What lies behind the columns does not count."""
    q, k, *_ = draw(41, B=1, T=80, D=16)
    rows, cols = torch.arange(36, 52, device=DEVICE)[None], torch.arange(71, device=DEVICE)[None]
    grad = torch.full((1, 16, 72), torch.nan, device=DEVICE)[..., :71].copy_(normal(42, 1, 16, 71))
    options = {"causal": causal, "each": False, "grad": grad}
    exact = eager(q, k, rows, cols, None, torch.float64, **options)
    rounded = eager(q, k, rows, cols, None, torch.float32, **options)
    for got, want, same in zip(ours(q, k, rows, cols, None, **options), exact, rounded, strict=True):
        assert_close(got, want, same)


def test_row_lse_of_every_kind_of_row():
    q, k, rows, cols, key_mask = draw(3)
    key_mask[0, : int(rows[0, 0]) + 1] = False
    for causal in (True, False):
        x = attention_problem(q, k, None, (rows, cols), causal=causal, scale=0.3, key_mask=key_mask)
        top, share = backend.row_lse(x)
        got = at_rows((top - share.log2()) * math.log(2), rows)
        got = torch.where((rows >= 0)[:, None], got, torch.inf)
        want = row_lse_of(q.double(), k.double(), rows, causal, 0.3, key_mask)
        assert torch.equal(got == torch.inf, want == torch.inf)
        assert causal == bool((got[0, :, 0] == torch.inf).all())
        torch.testing.assert_close(got.double(), want, rtol=1e-6, atol=1e-5)


def test_fp16_keeps_gradients_far_outside_its_range():
    q, k, rows, cols, key_mask = draw(4, Hq=1, D=16, dtype=torch.float16)
    grad = normal(5, 2, 19, 41)
    x = attention_problem(q, k, None, (rows, cols), causal=True, scale=0.25, key_mask=key_mask)
    x = x._replace(lse=backend.row_lse(x))

    def wide(grad):
        """dk and dlse in fp32, so that only what happens inside the kernel is rounded to fp16."""
        zeros = torch.zeros(q.shape, device=DEVICE), torch.zeros(k.shape, device=DEVICE)
        _, dk, dlse = backend.slice_backward(x, grad, lambda _: zeros)
        dk_of_lse = backend.row_lse_backward(x, dlse, into=tuple(map(torch.zeros_like, zeros)))
        return dk, dlse, *dk_of_lse

    plain = wide(grad)
    for factor in (2.0**-40, 2.0**20):
        for got, want in zip(wide(grad * factor), plain, strict=True):
            torch.testing.assert_close(got, want * factor, rtol=1e-3, atol=1e-3 * float(want.abs().max()) * factor)


def test_gradients_add_to_what_is_there_and_any_grad_strides_do():
    q, k, rows, cols, key_mask = draw(6)
    x = attention_problem(q, k, None, (rows, cols), causal=True, scale=0.2, key_mask=key_mask)
    x = x._replace(lse=backend.row_lse(x))
    grad = normal(7, 2, 41, 19).transpose(1, 2)
    padded = torch.full((2, 19, 48), torch.nan, device=DEVICE)[..., :41].copy_(grad)
    results = []
    for start, g in ((0.0, grad.contiguous()), (3.0, grad), (0.0, padded)):
        base = (torch.full((2, 50, 2, 24), start, device=DEVICE).transpose(1, 2), torch.full_like(k, start))
        dq, dk, dlse = backend.slice_backward(x, g, lambda _, base=base: base)
        assert dq is base[0] and dk is base[1]
        results.append((dq - start, dk - start, dlse))
    new = backend.slice_backward(x, grad, None)
    for one, two, behind, three in zip(*results, new, strict=True):
        torch.testing.assert_close(one, two, rtol=0, atol=1e-6)
        torch.testing.assert_close(one, three, rtol=0, atol=1e-6)
        assert torch.equal(one, behind)
    into = (torch.full_like(q, 3.0), torch.full_like(k, 3.0))
    backend.row_lse_backward(x, new[2], into=into)
    for got, want in zip(into, backend.row_lse_backward(x, new[2]), strict=True):
        torch.testing.assert_close(got - 3, want, rtol=0, atol=1e-6)
    ones = torch.ones((), device=DEVICE).expand(2, 19, 41)
    _, _, dlse = backend.slice_backward(x, ones, None)
    a = backend.slice_forward(x._replace(each=True))
    torch.testing.assert_close(
        at_rows(dlse, rows)[rows.expand(2, 2, 19) >= 0], (-a.sum(-1) / 2)[rows.expand(2, 2, 19) >= 0]
    )


def test_gradients_are_read_behind_their_last_column_where_there_is_room():
    store = torch.empty(2, 3, 16, device=DEVICE)
    padded, exact = store[..., :9], store.flatten()[: 5 * 16 + 9]  # without the 7 numbers behind the last row
    unit = slice_gradient.gradient_unit
    assert unit(store[:, None]) == unit(padded[:, None]) == unit(padded[:, None].expand(2, 4, 3, 9)) == 8
    assert unit(exact.clone().as_strided((2, 1, 3, 9), (48, 48, 16, 1))) == 1
    assert unit(padded.contiguous()[:, None]) == 1
    assert unit(padded[:, None].transpose(2, 3)) == 1
    assert unit(store[0, 0].expand(2, 1, 3, 16)) == 8
    assert unit(store[0, 0, :1].expand(2, 1, 3, 9)) == 1


@pytest.mark.skipif(DEVICE.type == "cuda", reason="the benchmarks check it on a GPU, with memory that is there")
@pytest.mark.parametrize("strides", [(16, 2**26 + 8), (2**31 + 8, 16), (2**31 + 3, 19)], ids=["token", "head", "odd"])
def test_offsets_beyond_32_bits(strides):
    """Vectors and gradients further apart than 2^31 elements; only the pages they lie on are ever touched."""
    T, D, dtype = 40, 16, torch.float16
    store = torch.empty(strides[0] + T * strides[1] + D, dtype=dtype)
    q = store.as_strided((1, 2, T, D), (0, *strides, 1)).copy_(normal(20, 1, 2, T, D))
    k = q[:, 1:] if strides[0] > 2**31 else q[:, :1]
    rows, cols = torch.tensor([[39, 37, 33]]), torch.arange(35)[None]
    options = {"causal": True, "each": True, "grad": normal(22, 1, 2, 3, 35)}
    exact = eager(q, k, rows, cols, None, torch.float64, **options)
    rounded = eager(q, k, rows, cols, None, dtype, **options)
    far = ours(q, k, rows, cols, None, **options)
    for got, want, same in zip(far, exact, rounded, strict=True):
        assert_close(got, want, same)
    grad = torch.empty(2**31 + 200).as_strided((1, 2, 3, 35), (0, 2**31 + 8, 40, 1)).copy_(options["grad"])
    for got, want in zip(ours(q, k, rows, cols, None, **(options | {"grad": grad})), far, strict=True):
        assert torch.equal(got, want)


def test_hidden_vectors_do_not_count():
    """Nor does the first vector, which the slice reads in the place of absent ones."""
    q, k, rows, cols, key_mask = draw(8)
    rows[rows == 0], key_mask[:, 0] = -1, False
    grad = normal(9, 2, 19, 41)
    clean = ours(q, k, rows, cols, key_mask, causal=True, each=False, grad=grad)
    used = torch.zeros(2, 50, dtype=torch.bool, device=DEVICE)
    for b in range(2):
        used[b, rows[b][rows[b] >= 0].long()] = True
    q = torch.where(used[:, None, :, None], q, torch.nan)
    k = torch.where(key_mask[:, None, :, None], k, torch.nan)
    for got, want in zip(ours(q, k, rows, cols, key_mask, causal=True, each=False, grad=grad), clean, strict=True):
        assert torch.equal(got, want)


CASES = [(loss, reduction, False) for loss in choices.ALIGNMENT_LOSSES for reduction in choices.REDUCTIONS]


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

    compared = Comparison(row_valid, col_valid, t, loss, reduction, sink_filter)
    got = backend.alignment_loss(a, compared)
    got_grad = backend.alignment_grad(a, compared, grad_out)
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
            got = backend.alignment_loss(a * factor, Comparison(*valid, t, "cosine", reduction, False))
            torch.testing.assert_close(got[0].double(), want, rtol=1e-3, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
@pytest.mark.parametrize("target_dtype", [torch.float32, torch.bfloat16], ids=["fp32-target", "bf16-target"])
def test_row_cosine_of_each_head_never_makes_a_slice(dtype, target_dtype, monkeypatch, poisoned_empty):
    """For both ways the loss can be had: alone, and with attention. Nor a log-sum-exp, on which no cosine depends."""

    def made(*arguments, **options):
        raise AssertionError("a slice was made")

    whole = ("slice_forward", "alignment_loss", "alignment_grad", "slice_backward", "row_lse", "row_lse_backward")
    for name in whole:
        monkeypatch.setattr(backend, name, made)
    q, k, rows, cols, key_mask = draw(21, D=40, dtype=dtype)
    v = torch.randn(k.shape, generator=torch.Generator().manual_seed(22)).to(k)
    target = torch.rand(2, 2, 19, 41, generator=torch.Generator().manual_seed(23)).to(DEVICE, target_dtype)

    def results(dtype, function, **options):
        leaves = [x.detach().to(dtype).requires_grad_() for x in (q, k, v)]
        losses = function(leaves, target if dtype == q.dtype else target.to(dtype), **options)
        grads = torch.autograd.grad(losses, leaves[:2], torch.tensor([2e-9, 3.0], device=DEVICE).to(losses.dtype))
        return losses.detach(), *grads

    def oracle(leaves, target):
        return reference.attention_alignment(*leaves[:2], target, rows, cols, key_mask=key_mask, heads="each")

    def alone(leaves, target):
        return attention_alignment(*leaves[:2], target, rows, cols, key_mask=key_mask, heads="each", impl="triton")

    def together(leaves, target):
        options = {"key_mask": key_mask, "heads": "each", "impl": "triton", "engine": "triton"}
        return attention_with_alignment(*leaves, target, rows, cols, **options)[1]

    same, exact = results(dtype, oracle), results(torch.float64, oracle)
    for function in (alone, together):
        for got, want, eager_same in zip(results(dtype, function), exact, same, strict=True):
            assert_close(got, want, eager_same)


@pytest.mark.parametrize("causal", [True, False])
def test_row_cosine_without_an_lse_is_nan_where_the_softmax_is(causal):
    """Whatever is not finite: a query, a column, another key, a hidden one, or every score."""
    q, k, rows, cols, key_mask = draw(24, B=1, D=16, T=90, R=30, V=33)
    target = torch.rand(1, 2, 30, 33, generator=torch.Generator().manual_seed(25)).to(DEVICE)
    target[0, 0, 4] = 0.0
    outside = torch.ones(90, dtype=torch.bool, device=DEVICE)
    outside[cols[0][cols[0] >= 0].long()] = False
    places = {
        "query": int(rows[0, 3]),
        "column": int(cols[0, -1]),
        "other key": int((outside & key_mask[0]).nonzero()[2]),
        "hidden key": int((outside & ~key_mask[0]).nonzero()[2]),
    }
    key_mask[0, places["column"]] = True
    found = set()
    for place, value in [(x, y) for x in (*places, "keys") for y in (torch.inf, -torch.inf, torch.nan)]:
        inputs = {"q": q.clone(), "k": k.clone()}
        filled = inputs["q" if place == "query" else "k"]
        filled[0, :, places.get(place, slice(None)), 3] = value
        if place == "keys":
            inputs["q"][..., 3] = 1.0
        x = attention_problem(
            *inputs.values(), None, (rows, cols), causal=causal, scale=None, key_mask=key_mask, heads="each"
        )
        row_valid = backend.regions(x)[0][:, None].expand(1, 2, 30)
        loss, _ = backend.head_cosine(x, target)
        options = {"causal": causal, "key_mask": key_mask, "heads": "each"}
        want = reference.attention_slice(*inputs.values(), rows, cols, **options).isnan().any(-1)
        assert torch.equal(loss.isnan()[row_valid], want[row_valid]), (place, value)
        found |= {(place, bool(want[row_valid].any()))}
    assert {place for place, nan in found if nan} == {"query", "column", "other key", "keys"}


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
    compared = Comparison(*valid, a, "cosine", "matrix", False)
    assert backend.alignment_loss(a, compared).tolist() == [0, 0]
    assert backend.alignment_grad(a, compared, torch.ones(2, device=DEVICE)).shape == (2, R, V)


@pytest.mark.parametrize(
    ("capability", "used"), [((8, 0), 80), ((8, 7), 86), ((9, 0), 90), ((10, 3), 100), ((11, 0), 100), ((12, 1), 120)]
)
def test_tiles_of_a_gpu_between_the_known_ones(capability, used, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert _launch.architecture(torch.device("cuda")) == used


def test_the_mounted_package_imports_from_anywhere(tmp_path):
    code = "import cdistill.kernels.backend as m; print(m.alignment_loss.__module__)"
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.stdout.strip() == "cdistill.kernels.alignment_loss", done.stderr


def test_a_launch_refuses_what_its_kernel_does_not_take():
    from cdistill.kernels.lse_gradient import unfold_kernel

    with pytest.raises(TypeError, match=r"^unfold_kernel takes no p_lsee, CAREFULL$"):
        _launch.launch(unfold_kernel, (1,), torch.device("cpu"), p_lsee=None, CAREFULL=True)
