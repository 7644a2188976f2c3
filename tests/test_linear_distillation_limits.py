"""linear_distillation: its memory, bad input, and heads that are gone by the backward pass."""

import json
import re

import forks
import pytest
import torch
from op_cases import allocations, device_of
from vocabulary_cases import LEAVES, call, draw, gradients_of, run, values_and_gradients, with_topk

from cdistill.ops import linear_distillation, reference
from cdistill.ops._dispatch import IMPLS

ON_THE_CPU = [impl for impl in IMPLS if device_of(impl) == "cpu"]  # whose allocator is watched
pytestmark = pytest.mark.usefixtures("poisoned_empty")


@pytest.mark.parametrize("impl", ON_THE_CPU)
def test_chunks_are_as_large_as_the_budget(impl, monkeypatch):
    inputs = draw(n=21, ignored=0.0)
    whole = run(impl, inputs)
    for rows in (1, 6):
        budget = dict.fromkeys(("cpu", "cuda"), rows * 2 * 64 * 4)
        monkeypatch.setattr("cdistill.ops._vocabulary.CHUNK_BYTES", budget)
        torch.testing.assert_close(run(impl, inputs).kd, whole.kd)
        assert max(allocations(lambda: run(impl, inputs))) == rows * 2 * 64 * 4


@pytest.mark.parametrize("impl", ON_THE_CPU)
def test_no_logits_of_all_rows_and_no_head_gradient_when_frozen(impl):
    inputs = draw(n=12, vocab=(512, 512), ignored=0.0)

    def largest(function, leaves):
        function(inputs)  # what only a first call allocates
        return max(allocations(lambda: gradients_of(function, inputs, (1.0, 1.0), leaves))) / 4

    def chunked(chunk_size):
        return lambda x: run(impl, x, chunk_size=chunk_size)

    logits, head = 2 * 4 * 512, 512 * 8
    assert largest(chunked(4), LEAVES[:1]) == logits == head
    assert largest(chunked(3), LEAVES[:1]) == 0.75 * logits
    assert largest(chunked(3), LEAVES) == head
    assert largest(lambda x: call(reference.linear_distillation, x), LEAVES[:1]) == 12 * 512


# Growth of the resident memory in MB over forward and backward passes of a 151,936-token vocabulary.
GROWTH = """
import json
import sys
import torch
from cdistill.ops import linear_distillation, reference
from cdistill.ops._dispatch import IMPLS

impl, dtype, passes = sys.argv[1], getattr(torch, sys.argv[2]), json.loads(sys.argv[3])
torch.set_num_threads(2)

def resident(field):
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) / 1024 for line in status if line.startswith(field))

def growth(rows, trained, width, vocab=151936):
    hidden, head, teacher_hidden, teacher_head = (
        torch.randn(n, w).to(dtype) for n, w in ((rows, width), (vocab, width), (rows, 64), (vocab, 64))
    )
    bias = torch.zeros(vocab, dtype=dtype).requires_grad_()
    hidden.requires_grad_(), head.requires_grad_(trained)
    labels = torch.randint(vocab, (rows,))
    with open("/proc/self/clear_refs", "w") as clear_refs:
        clear_refs.write("5")  # forget the peak so far
    before = resident("VmRSS")
    op = reference.linear_distillation if impl == "reference" else linear_distillation
    options = {} if impl == "reference" else {"impl": impl}
    result = op(hidden, head, teacher_hidden, teacher_head, labels, student_bias=bias, **options)
    ((result.ce + result.kd) / rows).backward()
    return resident("VmHWM") - before

growth(4, True, 64, vocab=1000)
print(json.dumps([growth(*each) for each in passes]))
"""
BUFFERS_MB = 64


def growth(impl, dtype, passes, monkeypatch):
    """Of passes of (rows, whether the head is trained, width)."""
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "65536")  # freed tensors go back to the system
    done = forks.python("-c", GROWTH, impl, str(dtype).removeprefix("torch."), json.dumps(passes))
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_memory_is_the_heads_gradient_and_two_buffers_whatever_the_rows(dtype, monkeypatch):
    """The bias is trained, too. In bf16 the head's gradient exists in fp32 and, once the buffers are gone, in bf16."""
    frozen = growth("cpp", dtype, [(rows, False, 64) for rows in (30, 120)], monkeypatch)
    assert max(frozen) < BUFFERS_MB + 12
    wide = 151936 * 192 * 4 / 2**20  # wider than both buffers: a second one would show
    own = wide / 2 if dtype == torch.bfloat16 else 0.0
    trained = growth("cpp", dtype, [(rows, True, 192) for rows in (30, 120)], monkeypatch)
    assert max(trained) < wide + max(BUFFERS_MB, own) + 12


def test_the_measurement_of_memory_sees_the_logits_of_the_oracle(monkeypatch):
    assert growth("reference", torch.float32, [(256, True, 64)], monkeypatch)[0] > 4 * 256 * 151936 * 4 / 2**20


BAD = [
    ({"temperature": 0.0}, "temperature must be a finite number above 0"),
    ({"temperature": 1e-320}, "temperature must be between 1e-30 and 1e+30 in size, which fp32 can hold, got 1e-320"),
    ({"temperature": -1}, "temperature must be"),
    ({"temperature": float("inf")}, "temperature must be"),
    ({"temperature": float("nan")}, "temperature must be"),
    ({"temperature": 1e-39}, "temperature must be"),
    ({"beta": 0.0}, "beta must be a number between 0 and 1"),
    ({"beta": 1}, "beta must be"),
    ({"divergence": "kl"}, "divergence must be one of"),
    ({"impl": "cuda"}, "impl must be None or one of ('torch', 'cpp', 'triton')"),
    ({"chunk_size": 0}, "chunk_size must be"),
    ({"ignore_index": None}, "ignore_index must be a whole number"),
    ({"loss_weights": (0.0, 0)}, "loss_weights must be two numbers that are not both 0"),
    ({"loss_weights": (1.0,)}, "loss_weights must be two numbers"),
    ({"loss_weights": (1.0, float("nan"))}, "loss_weights must be two finite numbers"),
    ({"loss_weights": (1e308, 1)}, "loss_weights must be two finite numbers"),
    ({"loss_weights": (1e-40, -1e-45)}, "loss_weights must not both be within 2^-100 of 0"),
    ({"topk_tail": "no"}, "topk_tail must be True or False, got 'no'"),
    (
        {"student_hidden": torch.zeros(13, 0), "student_head": torch.zeros(29, 0)},
        "student_hidden must have at least one",
    ),
    ({"ignore_index": 2**70}, "ignore_index must be a whole number"),
    ({"vocab_size": 30}, "vocab_size must be from 1 to 29"),
    ({"vocab_size": 0}, "vocab_size must be from 1 to 29"),
    ({"labels": torch.full((13,), 29)}, "labels must be from 0 to vocab_size-1 = 28"),
    ({"labels": torch.full((13,), -1)}, "labels must be from 0"),
    ({"labels": torch.zeros(13)}, "labels must be int64"),
    ({"labels": torch.zeros(12, dtype=torch.int64)}, "student_hidden must have shape (N, H) = (12, 8)"),
    ({"teacher_hidden": torch.zeros(12, 12)}, "teacher_hidden must have shape (N, H) = (13, 12)"),
    ({"student_head": torch.zeros(29, 9)}, "student_head must have shape (V, H) = (29, 8)"),
    ({"student_head": torch.zeros(29, 8).half()}, "student_head must have the dtype of student_hidden"),
    ({"teacher_head": torch.zeros(31)}, "teacher_head must have 2 dimensions"),
    ({"student_hidden": torch.zeros(13, 8).double()}, "student_hidden must be float16, bfloat16 or float32"),
    ({"student_bias": torch.zeros(31)}, "student_bias must have shape (V) = (29,)"),
    ({"teacher_bias": torch.zeros(31, dtype=torch.int64)}, "teacher_bias must have a floating dtype"),
    ({"teacher_hidden": torch.zeros(13, 12, device="meta")}, "teacher_hidden must be on cpu"),
    ({"teacher_head": None}, "teacher_head must be a tensor"),
    ({"teacher_topk": (torch.zeros(13, 3), torch.zeros(13, 3).long())}, "must be None with teacher_topk"),
]
VALUES, INDICES = torch.full((13, 3), -2.0), torch.arange(3).expand(13, 3)
BAD_TOPK = [
    (VALUES, "teacher_topk must be a pair (values, indices)"),
    ((VALUES[0], INDICES[0]), "teacher_topk values must have shape (N, K) with N = 13"),
    ((VALUES[:12], INDICES[:12]), "teacher_topk values must have shape (N, K) with N = 13"),
    ((VALUES, INDICES[:, :2]), "teacher_topk indices must have shape (N, K) = (13, 3)"),
    ((VALUES.long(), INDICES), "teacher_topk values must have a floating dtype"),
    ((VALUES, INDICES.float()), "teacher_topk indices must have an integer dtype"),
    ((VALUES, INDICES + 27), "teacher_topk indices must be distinct in a row and from 0 to vocab_size-1 = 28"),
    ((VALUES, INDICES - 1), "teacher_topk indices must be distinct"),
    ((VALUES, INDICES // 2), "teacher_topk indices must be distinct"),
    ((VALUES + 2, INDICES), "teacher_topk values must be log-probabilities"),
    ((torch.zeros(13, 29), torch.arange(29).expand(13, 29)), "teacher_topk must hold fewer than vocab_size = 29"),
]


@pytest.mark.parametrize("change, message", BAD, ids=[f"{next(iter(c))}-{i}" for i, (c, _) in enumerate(BAD)])
def test_bad_input_names_the_argument(change, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        call(linear_distillation, draw() | change)


@pytest.mark.parametrize("topk, message", BAD_TOPK, ids=[str(i) for i in range(len(BAD_TOPK))])
def test_bad_top_k_teachers(topk, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        call(linear_distillation, with_topk(draw(), 3) | {"teacher_topk": topk})


def test_more_tokens_than_the_triton_kernel_holds():
    inputs = with_topk(draw(vocab=(1100, 1100)), 1030)
    with pytest.raises(
        ValueError, match="teacher_topk must hold at most 1024 tokens a row for impl='triton', got 1030"
    ):
        run("triton", inputs)


@pytest.mark.parametrize("retain_graph", [False, True])
@pytest.mark.parametrize("loss_weights", [(1.0, 2.0), (1.0, 1.0)])
def test_a_head_that_is_gone_by_the_backward_pass(loss_weights, retain_graph):
    """As ZeRO-3 leaves it: the ratio of loss_weights needs no head any more, another one says what to do."""
    leaves = [draw()[name].requires_grad_() for name in LEAVES[:2]]
    result = call(linear_distillation, draw() | dict(zip(LEAVES, leaves, strict=False)), loss_weights=loss_weights)
    kept = result.ce + 2 * result.kd
    gradients = []
    leaves[1].register_hook(lambda gradient: gradients.append(gradient.clone()))
    whole, leaves[1].data = leaves[1].data, torch.empty(0)
    if loss_weights == (1.0, 1.0):
        with pytest.raises(RuntimeError, match="pass the weights with which the two losses"):
            torch.autograd.grad(kept, leaves, retain_graph=retain_graph)
        return
    dhidden, dhead = torch.autograd.grad(kept, leaves, retain_graph=retain_graph)
    leaves[1].data = whole
    expected = values_and_gradients("cpp", draw(), (1.0, 2.0), LEAVES[:2], loss_weights=(1, 2))[2:]
    torch.testing.assert_close([dhidden, dhead], list(expected))
