"""attention_relation on every backend: any call against float64, its meaning by attention_alignment, memory, refusals."""

import re

import pytest
import torch
from op_cases import device_of, peak_memory, with_gradients
from relation_cases import REDUCTIONS, Call, check, drawn, tensor

from cdistill import choices
from cdistill.ops import attention_alignment, attention_relation, attention_slice, reference

pytestmark = pytest.mark.usefixtures("poisoned_empty")


KINDS = [
    {"loss": loss, "reduction": reduction, "sink_filter": sink_filter, "heads": heads}
    for (loss, heads), (reduction, sink_filter) in zip(
        [
            ("cosine", "mean"),
            ("kl", "each"),
            ("mse", "each"),
            ("jsd", "mean"),
            ("reverse_kl", "each"),
            ("reverse_kl", "mean"),
        ],
        [("row", False), ("matrix", False), ("column", True), ("column", False), ("row", False), ("matrix", False)],
        strict=True,
    )
]
KIND_NAMES = [f"{k['loss']}-{k['reduction']}-{k['heads']}" for k in KINDS]
each_kind = pytest.mark.parametrize("kind", KINDS, ids=KIND_NAMES)

on_cpu = pytest.mark.parametrize("impl", ["torch", "cpp"])


@each_kind
@on_cpu
def test_losses_and_gradients_match_float64(kind, impl):
    check(drawn(layers=2, **kind), impl)


@pytest.mark.parametrize("kind", KINDS[:3] + KINDS[4:5], ids=KIND_NAMES[:3] + KIND_NAMES[4:5])
def test_triton_matches_float64(kind):
    call = drawn(layers=2, **kind)
    call.block = 5
    check(call, "triton")


@each_kind
@on_cpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_as_exact_as_eager_half_precision(kind, dtype, impl):
    check(drawn(dtype=dtype, **kind), impl)


@pytest.mark.parametrize("kind", [KINDS[0], KINDS[1]], ids=KIND_NAMES[:2])
def test_triton_in_half_precision(kind):
    check(drawn(numbers=(1, 1), dtype=torch.float16, **kind), "triton")


@on_cpu
@pytest.mark.parametrize("relations", [("qq", "kk"), ("vv", "qk")])
def test_relations_of_one_kind_and_given_log_sum_exps(relations, impl):
    call = drawn(numbers=(4, 2), layers=2, loss="kl", reduction="matrix")
    for side, relation in zip((call.student, call.teacher), relations, strict=True):
        side.relation = relation
        read = side.read(0)
        side.lse = [torch.full((2, read[0].shape[1], read[0].shape[2]), 4.0) for _ in side.q]
    assert check(call, impl)[-1].any()


@pytest.mark.parametrize("loss", choices.ALIGNMENT_LOSSES)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_the_loss_is_that_of_attention_alignment_with_a_stored_target(loss, reduction):
    call = drawn(layers=3, loss=loss, reduction=reduction[0], sink_filter=reduction[1])
    (q, k), options = call.student.read(0), call.options
    places = options["teacher_rows"], options["teacher_cols"]
    slices = [
        attention_slice(*call.teacher.read(i), *places, key_mask=options["teacher_key_mask"], impl="cpp")
        for i in range(3)
    ]
    how = {"loss": loss, "reduction": reduction[0], "sink_filter": reduction[1], "key_mask": options["key_mask"]}
    target, impl = torch.stack(slices).mean(0), {"impl": "cpp"}
    stored = with_gradients(lambda q, k: attention_alignment(q, k, target, call.rows, call.cols, **how, **impl), [q, k])
    recomputed = with_gradients(lambda *x: call.run(attention_relation, x, **impl), [q, k])
    for x, y in zip(recomputed, stored, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-6 * y.abs().max().item())


def test_places_and_mask_of_the_teacher_are_the_students_unless_given():
    call = drawn(tokens=(23, 23))
    for name in ("teacher_rows", "teacher_cols", "teacher_key_mask"):
        call.options.pop(name)
    default = call.run(attention_relation, call.leaves(), impl="cpp")
    given = {"teacher_rows": call.rows, "teacher_cols": call.cols, "teacher_key_mask": call.options["key_mask"]}
    assert torch.equal(default, call.run(attention_relation, call.leaves(), impl="cpp", **given))
    given["teacher_key_mask"] = torch.ones_like(call.options["key_mask"])
    other = call.run(attention_relation, call.leaves(), impl="cpp", **given)
    assert other[0] == default[0] and other[1] != default[1]


@on_cpu
def test_reverse_kl_is_kl_with_the_models_exchanged(impl):
    one = drawn(numbers=(2, 2), tokens=(23, 23))
    for name in ("teacher_rows", "teacher_cols", "key_mask", "teacher_key_mask"):
        one.options.pop(name)
    other = Call(one.teacher, one.student, one.rows, one.cols, dict(one.options))
    a, b = (
        call.run(attention_relation, [x.to(device_of(impl)) for x in call.leaves()], loss=loss, impl=impl)
        for call, loss in ((one, "kl"), (other, "reverse_kl"))
    )
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@on_cpu
@pytest.mark.parametrize("loss", ["kl", "reverse_kl", "jsd"])
@pytest.mark.parametrize("reduction", ["row", "matrix"])
def test_faint_shares_live(loss, reduction, impl):
    """Two logits 0 and -gap against two that are alike: down to shares of 2^-126 value and gradient are those of float64."""
    places = torch.tensor([[1]]), torch.tensor([[0, 1]])
    for gap, faint in ((18.0, "student"), (60.0, "teacher"), (80.0, "student"), (80.0, "teacher")):
        q, k, alike = (torch.zeros(1, 1, 2, 16) for _ in range(3))
        q[..., 0], k[0, 0, 1, 0] = 4.0, -gap
        alike[..., 0] = 0.5

        def run(op, *leaves, faint=faint, q=q, k=k, alike=alike, **options):
            teacher = (alike, alike) if faint == "student" else (q, k)
            teacher = (x.to(leaves[0]) for x in teacher)
            return op(*leaves, *teacher, *places, loss=loss, reduction=reduction, **options)

        leaves = [q, k] if faint == "student" else [alike, alike.clone()]
        ours = with_gradients(lambda *x: run(attention_relation, *x, impl=impl), leaves)
        exact = with_gradients(lambda *x: run(reference.attention_relation, *x), [x.double() for x in leaves])
        for x, y in zip(ours, exact, strict=True):
            torch.testing.assert_close(x.double(), y, rtol=2e-5, atol=1e-7)


@on_cpu
@pytest.mark.parametrize("loss", ["cosine", "reverse_kl"])
def test_small_distances_keep_their_digits(loss, impl):
    """Of slices that differ by a thousandth the distance is some 1e-7, of which the textbook form keeps no digit in fp32."""
    generator = torch.Generator().manual_seed(0)
    q, k = (tensor(generator, (0, 1, 2), 0, 1, 1, 30, 16) for _ in range(2))
    near = k + 2e-4 * torch.randn(k.shape, generator=generator)
    places = torch.arange(20, 28)[None], torch.arange(3, 19)[None]
    for reduction in ("row", "matrix"):
        exact = reference.attention_relation(
            q.double(), near.double(), q.double(), k.double(), *places, loss=loss, reduction=reduction
        )
        there = [x.to(device_of(impl)) for x in (q, near, q, k, *places)]
        found = attention_relation(*there, loss=loss, reduction=reduction, impl=impl)
        assert exact < 1e-6
        torch.testing.assert_close(found.cpu().double(), exact, rtol=2e-2, atol=0)


@on_cpu
def test_samples_without_rows_or_columns_and_calls_without_any(impl):
    for kind in KINDS[:4]:
        call = drawn(**kind)
        call.rows[0] = -1
        losses, dq, dk = check(call, impl)
        assert losses[0] == 0 and not dq[0].any() and not dk[0].any() and losses[1] != 0
        call.rows, call.options["teacher_rows"] = (torch.zeros(2, 0, dtype=torch.long) for _ in range(2))
        leaves = [x.to(device_of(impl)) for x in call.leaves()]
        losses, dq, dk = with_gradients(lambda *x: call.run(attention_relation, x, impl=impl), leaves)  # noqa: B023
        assert losses.tolist() == [0.0, 0.0] and not dq.any() and not dk.any()


def test_teachers_are_constants_whose_change_is_noticed_and_gradients_have_none():
    call = drawn(layers=2)
    for x in call.teacher.q:
        x.requires_grad_()
    leaves = [x.requires_grad_() for x in call.leaves()]
    loss = call.run(attention_relation, leaves, impl="cpp").sum()
    assert torch.autograd.grad(loss, call.teacher.q, allow_unused=True, retain_graph=True) == (None, None)
    first, second = (torch.autograd.grad(loss, leaves, retain_graph=True) for _ in range(2))
    assert all(torch.equal(x, y) for x, y in zip(first, second, strict=True))
    with pytest.raises(RuntimeError, match="no autograd formula"):
        (once,) = torch.autograd.grad(loss, leaves[:1], create_graph=True)
        once.sum().backward()
    loss = call.run(attention_relation, leaves, impl="cpp").sum()
    with torch.no_grad():
        call.teacher.q[1].add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def memory_beside_gradients(op, rows, cols, heads, **options):
    """Peak bytes of tensors during forward and backward, without the gradients of q and k."""
    tokens, generator = 512, torch.Generator().manual_seed(0)
    q, k, *teacher = (torch.randn(1, 4, tokens, 16, generator=generator, requires_grad=i < 2) for i in range(6))
    places = torch.arange(tokens - rows, tokens)[None], torch.arange(cols)[None]

    def step():
        op(q, k, teacher[:2], teacher[2:], *places, heads=heads, **options).sum().backward()

    step()
    q.grad = k.grad = None
    return peak_memory(step) - q.nbytes - k.nbytes


@on_cpu
@pytest.mark.parametrize("kind", KINDS[:3], ids=KIND_NAMES[:3])
def test_memory_does_not_grow_with_the_slice(kind, impl, monkeypatch):
    monkeypatch.setattr("cdistill.ops._torch.BLOCK_BYTES", 2**16)
    monkeypatch.setattr("cdistill.ops._relation.CPU_ROWS", 96)
    small, large = (memory_beside_gradients(attention_relation, n, 256, impl=impl, **kind) for n in (192, 480))
    one_slice = 4 * 480 * 256 * (4 if kind["heads"] == "each" else 1)
    assert large - small < one_slice / 64
    assert large < 2 * one_slice


GOOD = {
    "student_q": torch.zeros(2, 4, 8, 16),
    "student_k": torch.zeros(2, 2, 8, 16),
    "teacher_q": [torch.zeros(2, 6, 9, 24)] * 2,
    "teacher_k": [torch.zeros(2, 3, 9, 24)] * 2,
    "rows": torch.tensor([[1, 2], [3, -1]]),
    "cols": torch.tensor([[0, 1, 2], [5, -1, -1]]),
}
BAD = [
    (
        {"student_q": torch.zeros(2, 4, 8, 12), "student_relation": "qq"},
        "student_q must have a head dim that is a multiple of 8",
    ),
    (
        {"student_k": torch.zeros(2, 3, 8, 16)},
        "student_k must have a number of heads that divides the 4 heads of student_q",
    ),
    ({"student_k": None}, "student_k must be a tensor, got NoneType"),
    ({"student_q": None, "student_relation": "vv"}, "student_q must be a tensor"),
    ({"teacher_k": None}, "teacher_k must be a tensor, got NoneType"),
    (
        {"teacher_k": torch.zeros(2, 3, 9, 24)},
        "teacher_k must hold as many layers as the window's other lists, 2, got 1",
    ),
    ({"teacher_q": []}, "teacher_q must hold at least one layer"),
    (
        {"teacher_q": [torch.zeros(2, 6, 9, 24), torch.zeros(2, 3, 9, 24)]},
        "teacher_q must have shape (B, H, T, D) = (2, 6",
    ),
    ({"teacher_q": [torch.zeros(2, 6, 9, 20)] * 2}, "teacher_k must have shape (B, Hkv, T, D) = (2, 3, 9, 20)"),
    ({"teacher_lse": torch.zeros(2, 6, 9)}, "teacher_lse must hold as many layers"),
    ({"teacher_lse": [torch.zeros(2, 6, 8)] * 2}, "teacher_lse must have shape (B, Hq, T) = (2, 6, 9)"),
    ({"student_lse": torch.zeros(2, 4, 8, dtype=torch.float64)}, "student_lse must be float32"),
    ({"teacher_rows": torch.tensor([[1], [2]])}, "teacher_rows must have shape (B, R) = (2, 2) like the student's"),
    ({"teacher_cols": torch.tensor([[0, 1, 9], [5, -1, -1]])}, "cols must hold positions from 0 to T-1 = 8"),
    ({"rows": torch.tensor([[1, 8], [3, -1]])}, "rows must hold positions from 0 to T-1 = 7"),
    ({"key_mask": torch.ones(2, 8, dtype=torch.bool)}, "teacher_key_mask must be given with a key_mask"),
    ({"teacher_key_mask": torch.ones(2, 8, dtype=torch.bool)}, "teacher_key_mask must have shape (B, T) = (2, 9)"),
    ({"teacher_scale": "1"}, "teacher_scale must be None or a finite number"),
    ({"scale": float("nan")}, "scale must be None or a finite number"),
    (
        {"heads": "each"},
        "heads='each' needs equally many heads, or a multiple of the other model's, got 4 for the student",
    ),
    ({"heads": "max"}, "heads must be one of"),
    ({"loss": "l1"}, "loss must be one of ('cosine', 'mse', 'kl', 'jsd', 'reverse_kl')"),
    ({"sink_filter": True}, "sink_filter needs reduction='column'"),
    ({"student_relation": "qv"}, "student_relation must be one of ('qk', 'qq', 'kk', 'vv')"),
    ({"teacher_relation": "attention"}, "teacher_relation must be one of"),
    ({"impl": "numpy"}, "impl must be None or one of"),
]


@pytest.mark.parametrize("change, message", BAD, ids=[f"{next(iter(c))}-{i}" for i, (c, _) in enumerate(BAD)])
def test_bad_input_names_the_argument(change, message):
    options = {"impl": "torch"} | GOOD | change
    tensors = [options.pop(name) for name in GOOD]
    with pytest.raises(ValueError, match=f"^{re.escape(message)}") as caught:
        attention_relation(*tensors, **options)
    assert "\n" not in str(caught.value)


def test_attention_alignment_says_why_it_has_no_reverse_kl():
    q, target, places = torch.zeros(1, 1, 4, 16), torch.zeros(1, 1, 1), [torch.zeros(1, 1, dtype=torch.long)] * 2
    with pytest.raises(ValueError, match=r"^loss must be one of .*'reverse_kl', which attention_relation alone has"):
        attention_alignment(q, q, target, *places, loss="reverse_kl")
