"""Every Triton kernel compiles for every supported architecture, without spills and within its shared memory; needs no GPU."""

import csv
import itertools
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ATTENTION = {
    "row_lse_kernel",
    "row_lse_backward_dq_kernel",
    "row_lse_backward_dk_kernel",
    "slice_forward_kernel",
    "head_cosine_kernel",
    "slice_backward_rows_kernel",
    "slice_backward_cols_kernel",
    "add_rows_kernel",
    "fold_kernel",
    "unfold_kernel",
    "key_bounds_kernel",
    "flash_forward_kernel",
    "flash_rows_kernel",
    "flash_dkdv_kernel",
    "flash_dq_kernel",
}
LOSSES = {
    "row_size_kernel",
    "row_sum_kernel",
    "gradient_kernel",
    "squared_deviation_kernel",
    "column_sum_kernel",
    "column_gradient_kernel",
    "claim_kernel",
    "check_kernel",
}
VOCABULARY = {"vocabulary_kernel", "top_vocabulary_kernel"}
ARCHITECTURES = ("80", "86", "89", "90", "100", "120")
HEAD_DIMS = "16 32 64 128 256"


def run(*command):
    """stdout of a Python process in which Triton compiles instead of interpreting."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, *command], cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.fixture(scope="module")
def table():
    """The rows of the kept table, after a look whether each configuration of today's code is among them."""
    today = run(
        "-c", "from benchmarks import aot; print(*[k for c in aot.grid() for k in aot.configurations(c)])"
    ).split()
    with (ROOT / "benchmarks/results/aot.csv").open() as file:
        next(file)
        rows = list(csv.DictReader(file))
    assert [r["key"] for r in rows] == today, "run python -m benchmarks.aot: it compiles what has changed"
    return rows


def test_every_kernel_compiles_for_every_architecture(table):
    for dtype in ("bf16", "fp16", "fp32"):
        found = {(r["kernel"], r["arch"], r["head_dim"]) for r in table if r["dtype"] == dtype and r["head_dim"] != "0"}
        wanted = set(itertools.product(ATTENTION, ARCHITECTURES, HEAD_DIMS.split()))
        if dtype == "bf16":
            wanted |= set(itertools.product(ATTENTION, ("80", "90"), ["24", "40", "72", "96", "192"]))
        assert found == wanted
        alone = {(r["kernel"], r["arch"]) for r in table if r["dtype"] == dtype and r["head_dim"] == "0"}
        assert alone == set(itertools.product(LOSSES | VOCABULARY if dtype == "fp32" else VOCABULARY, ARCHITECTURES))


def test_no_configuration_has_a_problem(table):
    assert [r for r in table if r["problem"]] == []
    assert all(int(r["ctas_per_multiprocessor"]) >= 1 for r in table)


def test_the_table_says_what_the_compiler_says(table):
    """One configuration of each kernel, other ones in every run, compiled now."""
    sample = [
        random.choice([r for r in table if r["kernel"] == kernel]) for kernel in sorted(ATTENTION | LOSSES | VOCABULARY)
    ]
    for row, now in zip(sample, json.loads(run("-c", COMPILED_NOW, json.dumps(sample))), strict=True):
        assert row == {name: str(value) for name, value in now.items()}


COMPILED_NOW = """
import json, sys
from benchmarks import aot

rows = []
for row in json.loads(sys.argv[1]):
    losses = row["head_dim"] == "0"
    cell = ("losses", int(row["arch"])) if losses else (row["dtype"], int(row["arch"]), int(row["head_dim"]))
    launch, dtype, head_dim = aot.configurations(cell)[row["key"]]
    rows.append(aot.compiled_row(row["key"], launch, cell[1], dtype, head_dim))
print(json.dumps(rows))
"""


def test_a_key_follows_the_code_and_not_its_comments(tmp_path):
    code = """
import triton, triton.language as tl

FACTOR = tl.constexpr({factor})

@triton.jit
def inner(x):
    return x * {inner} * FACTOR

@triton.jit
def kernel(p_x):
    {comment}
    tl.store(p_x, inner(tl.load(p_x)))
"""
    for i, (factor, inner, comment) in enumerate(((1, 2, ""), (1, 2, "# a comment"), (3, 2, ""), (1, 3, ""))):
        path = tmp_path / f"kernel_{i}.py"  # Triton reads the source of a kernel from its file
        path.write_text(code.format(factor=factor, inner=inner, comment=comment))
    (tmp_path / "keys.py").write_text(
        "from benchmarks import aot\nimport kernel_0, kernel_1, kernel_2, kernel_3\n"
        "print(*[aot.code(module.kernel) for module in (kernel_0, kernel_1, kernel_2, kernel_3)])"
    )
    first, commented, other_constant, other_function = run(str(tmp_path / "keys.py")).split()
    assert commented == first
    assert len({first, other_constant, other_function}) == 3


WIDTH_OF_ACCESSES = """
import re, torch, triton
from benchmarks import aot
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

kernel, args = aot.vocabulary_launches(90, torch.bfloat16)[0]
signature, constants, attributes = aot.specialised(kernel, args)
source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
options = {"num_warps": args["num_warps"], "num_stages": args["num_stages"]}
ptx = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm["ptx"]
print(len(re.findall(r"(?:ld|st)\\.global[^;]*v4\\.b32", ptx)), len(re.findall(r"(?:ld|st)\\.global[^;]*\\.b16", ptx)))
"""


def test_rows_of_logits_are_read_and_written_16_bytes_at_a_time():
    """Four loops' loads and the gradient's store; by 2 bytes only the label's logit. Vocabularies end anywhere."""
    wide, narrow = map(int, run("-c", WIDTH_OF_ACCESSES).split())
    assert (wide, narrow) == (5, 1)


def test_slices_on_hopper_take_both_operands_from_shared_memory(table):
    slices = [r for r in table if r["arch"] == "90" and r["head_dim"] in ("64", "128") and r["dtype"] != "fp32"]
    slices = [r for r in slices if r["kernel"].startswith(("slice", "row_lse"))]
    assert slices and not any(int(r["register_wgmma"]) for r in slices)


def test_the_check_finds_a_transposed_operand_in_registers(tmp_path):
    """What a plain dot(trans(ds), q) compiles to on Hopper, and the same without the transposition."""
    code = """
import triton, triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from benchmarks.aot import transposed_register_operands

@triton.jit
def kernel(p_q, p_out, TRANSPOSED: tl.constexpr):
    o_q = tl.arange(0, 64)[:, None] * 64 + tl.arange(0, 64)[None, :]
    b_q = tl.load(p_q + o_q)
    b_ds = tl.exp2(tl.dot(b_q, tl.trans(b_q)))
    if TRANSPOSED:
        b_ds = tl.trans(b_ds)
    tl.store(p_out + o_q, tl.dot(b_ds.to(tl.bfloat16), b_q))

for transposed in (True, False):
    signature = {"p_q": "*bf16", "p_out": "*fp32", "TRANSPOSED": "constexpr"}
    attributes = {(i,): [["tt.divisibility", 16]] for i in (0, 1)}
    source = ASTSource(kernel, signature, {"TRANSPOSED": transposed}, attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4})
    print(transposed_register_operands(compiled.asm["ttgir"]))
"""
    path = tmp_path / "kernel.py"  # Triton reads the source of a kernel from its file
    path.write_text(code)
    assert run(str(path)).split() == ["1", "0"]


def test_counts_and_strides_of_a_batch_do_not_recompile():
    code = """
import json
from benchmarks import aot
from cdistill.kernels import _launch
launches = aot.attention_launches(90, 64, aot.DTYPES["bf16"]) + aot.loss_launches(90)
batch = {*_launch.BATCH_DEPENDENT, "stride_s", "windows"}
print(json.dumps([
    (kernel.__name__, p.name)
    for kernel, _ in launches
    for p in kernel.params
    if p.name in batch and (p.is_constexpr or not p.do_not_specialize)
]))
"""
    assert json.loads(run("-c", code)) == []
