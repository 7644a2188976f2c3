"""Peak memory of the CPU ops: it grows neither with T*T nor with Hq*R*V, measured so that the eager oracle fails."""

import os

import forks
import pytest
import torch
from op_cases import Case, draw, peak_memory

from cdistill.ops import attention_alignment, reference

MB = 2**20

RESIDENT = """
def resident(field):
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) / 1024 for line in status if line.startswith(field))
"""

# Peak resident memory of a forward and backward pass, in MB, at sizes where a (T,T) matrix of one head takes 64 MB
# ("tokens") or the slices of all heads 64 MB ("heads"); the (R,V) slice itself takes 0.1 MB or 1 MB.
PEAK_OF_A_PROCESS = """
import sys
from dataclasses import replace
import torch
from op_cases import Case, draw
from cdistill.ops import attention_alignment, reference

SIZES = {
    "tokens": Case(batch=1, q_heads=1, k_heads=1, tokens=4096, rows=64, cols=512),
    "heads": Case(batch=1, q_heads=64, k_heads=8, tokens=520, rows=512, cols=512),
}
torch.set_num_threads(2)
impl = sys.argv[1]

def run(inputs):
    op = reference.attention_alignment if impl == "reference" else attention_alignment
    options = {} if impl == "reference" else {"impl": impl}
    tensors = (inputs[name] for name in ("q", "k", "target", "rows", "cols"))
    op(*tensors, reduction="matrix", **options).sum().backward()

for case in (Case(batch=1), *SIZES.values()):
    inputs = draw(replace(case, q_heads=1, k_heads=1))
    inputs["target"] = inputs["target"][:, 0].clone()
    for name, heads in (("q", case.q_heads), ("k", case.k_heads)):
        inputs[name] = torch.randn(1, heads, case.tokens, case.width, requires_grad=True)
    with open("/proc/self/clear_refs", "w") as clear_refs:
        clear_refs.write("5")  # forget the peak so far
    before = resident("VmRSS")
    run(inputs)
    growth = resident("VmHWM") - before
    if case in SIZES.values():
        print(growth)
"""


def process_growth(impl):
    """Growth of the resident memory over one pass in a fresh process, in MB, at the sizes "tokens" and "heads"."""
    return measured(RESIDENT + PEAK_OF_A_PROCESS, impl)


def measured(code, *arguments):
    """The numbers that a process of its own writes."""
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}  # freed tensors go back, so that later ones are seen
    done = forks.python("-c", code, *arguments, env=environment)
    assert done.returncode == 0, done.stderr
    return [float(line) for line in done.stdout.split()]


@pytest.mark.parametrize("impl", ["torch", "cpp"])
def test_a_process_needs_far_less_than_the_matrices(impl):
    assert max(process_growth(impl)) < 32


def test_the_measurement_sees_the_matrices_of_the_oracle():
    assert min(process_growth("reference")) > 128


def live_peak(case, impl, kind):
    """Peak bytes of tensors made during forward and backward, without the two returned gradients."""
    inputs = draw(Case(**{**case.__dict__, "q_heads": 1, "k_heads": 1}))
    q = torch.randn(case.batch, case.q_heads, case.tokens, case.width, requires_grad=True)
    k = torch.randn(case.batch, case.k_heads, case.tokens, case.width, requires_grad=True)
    target = inputs["target"][:, 0].clone()
    op, options = (
        (reference.attention_alignment, kind) if impl == "reference" else (attention_alignment, kind | {"impl": impl})
    )

    def step():
        op(q, k, target, inputs["rows"], inputs["cols"], **options).sum().backward()

    return peak_memory(step) - 4 * (q.numel() + k.numel())


KINDS = [
    {"loss": "cosine", "reduction": "row"},
    {"loss": "kl", "reduction": "matrix"},
    {"loss": "mse", "reduction": "column", "sink_filter": True},
]


@pytest.mark.parametrize("kind", KINDS, ids=["row", "matrix", "sink"])
def test_tensors_alive_are_a_few_slices_however_many_heads(kind, monkeypatch):
    monkeypatch.setattr("cdistill.ops._torch.BLOCK_BYTES", 2**16)
    case = Case(batch=2, q_heads=32, k_heads=4, tokens=160, rows=128, cols=128, padding=0)
    slice_bytes = 4 * case.batch * case.rows * case.cols
    assert live_peak(case, "torch", kind) < 12 * slice_bytes
    assert live_peak(case, "reference", kind) > case.q_heads * slice_bytes


def test_cpp_alignment_needs_two_slices():
    case = Case(batch=1, q_heads=32, k_heads=4, tokens=300, rows=256, cols=256, padding=0)
    slice_bytes = 4 * case.batch * case.rows * case.cols
    positions = 40 * case.tokens * case.q_heads  # lse, rows, cols and the like
    assert live_peak(case, "cpp", KINDS[0]) < 2 * slice_bytes + positions


# Growth of the process over a forward and backward pass in MB, without the gradients of q and k.
GROWTH_OF_CPP = """
import sys
import torch
from cdistill.ops import attention_alignment

threads, rows, cols, tokens, heads, width, dtype, given = (eval(x) for x in sys.argv[1:])
torch.set_num_threads(threads)

def make(tokens, rows, cols):
    q, k = (torch.randn(1, heads, tokens, width).to(dtype).requires_grad_() for _ in range(2))
    order = torch.randperm(tokens)[None]
    lse = torch.zeros(1, heads, tokens) if given else None
    return q, k, torch.rand(1, rows, cols), order[:, :rows], order[:, -cols:], lse

def run(q, k, target, rows, cols, lse):
    attention_alignment(q, k, target, rows, cols, lse=lse, impl="cpp").sum().backward()

run(*make(64, 8, 8))
inputs = make(tokens, rows, cols)
with open("/proc/self/clear_refs", "w") as clear_refs:
    clear_refs.write("5")
before = resident("VmRSS")
run(*inputs)
print(resident("VmHWM") - before - 2 * inputs[0].nbytes / 2**20)
"""


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("given", [True, False], ids=["given-lse", "own-lse"])
@pytest.mark.parametrize("dtype", ["torch.float32", "torch.bfloat16"])
def test_cpp_needs_two_slices_and_16_mb_per_thread(dtype, given, threads):
    """At a slice of 32 MB beside gradients of 1 MB, so that a third one would not fit under the bound."""
    rows, cols, tokens, heads, width = 1024, 8192, 9300, 1, 16
    (growth,) = measured(RESIDENT + GROWTH_OF_CPP, threads, rows, cols, tokens, heads, width, dtype, given)
    assert 48 < growth < 2 * 32 + 16 * threads


def test_every_token_as_a_row_makes_no_square_matrix(monkeypatch):
    monkeypatch.setattr("cdistill.ops._torch.BLOCK_BYTES", 2**16)
    case = Case(batch=1, q_heads=1, k_heads=1, tokens=1024, rows=1024, cols=16, padding=0)
    assert live_peak(case, "torch", KINDS[1]) < MB
    assert live_peak(case, "reference", KINDS[1]) > 4 * MB
