"""Every Triton kernel compiles for every supported architecture, without spills and within its shared memory; needs no GPU."""

import json
import os
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
    "slice_backward_dq_kernel",
    "slice_backward_dk_kernel",
}
LOSSES = {
    "row_size_kernel",
    "row_sum_kernel",
    "gradient_kernel",
    "squared_deviation_kernel",
    "column_sum_kernel",
    "column_gradient_kernel",
}


def run(*command):
    """stdout of a Python process in which Triton compiles instead of interpreting."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, *command], cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.fixture(scope="module")
def compiled():
    return json.loads(run("-m", "benchmarks.aot", "--quick", "--json"))


def test_every_kernel_compiles_for_every_architecture(compiled):
    found = {(r["kernel"], r["arch"], r["head_dim"]) for r in compiled if r["dtype"] == "bf16"}
    assert found == {(kernel, arch, d) for kernel in ATTENTION for arch in (80, 89, 90, 100, 120) for d in (64, 128)}
    assert {r["kernel"] for r in compiled if not r["head_dim"]} == LOSSES
    for dtype in ("fp16", "fp32"):
        assert {r["kernel"] for r in compiled if r["dtype"] == dtype and r["head_dim"]} == ATTENTION


def test_no_spills_and_shared_memory_fits(compiled):
    assert [r for r in compiled if r["spill_bytes"] or r["shared"] > r["shared_limit"]] == []


def test_hopper_takes_both_operands_from_shared_memory(compiled):
    assert [r for r in compiled if r["arch"] == 90 and r["register_wgmma"]] == []


def test_counts_and_strides_of_a_batch_do_not_recompile():
    code = """
import json
from benchmarks import aot
launches = aot.attention_launches(90, 64, aot.DTYPES["bf16"]) + aot.loss_launches(90)
batch = ("R", "V", "T", "stride_qb", "stride_qh", "stride_qt", "stride_kb", "stride_kh", "stride_kt", "stride_s",
         "stride_gb", "stride_gh", "stride_gr")
print(json.dumps([
    (kernel.__name__, p.name)
    for kernel, _ in launches
    for p in kernel.params
    if p.name in batch and (p.is_constexpr or not p.do_not_specialize)
]))
"""
    assert json.loads(run("-c", code)) == []
