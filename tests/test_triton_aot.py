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


SERVER = """
import contextlib, io, json, os, runpy, sys, traceback

answers = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)
for line in sys.stdin:
    sys.argv = json.loads(line)
    printed, error = io.StringIO(), ""
    try:
        with contextlib.redirect_stdout(printed):
            runpy.run_path(sys.argv[0], run_name="__main__")
    except BaseException:
        error = traceback.format_exc()
    print(json.dumps([printed.getvalue(), error]), file=answers, flush=True)
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """stdout of a program that one process carries out for all tests, in which Triton compiles instead of interpreting.

    Programs are in files, from which Triton reads the source of kernels.
    """
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | {"PYTHONPATH": str(ROOT)}
    server = subprocess.Popen(
        [sys.executable, "-c", SERVER], cwd=ROOT, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )

    def run(program, *arguments):
        path = tmp_path_factory.mktemp("programs") / "program.py"
        path.write_text(program)
        print(json.dumps([str(path), *arguments]), file=server.stdin, flush=True)
        printed, error = json.loads(server.stdout.readline())
        assert not error, error[-2000:]
        return printed

    yield run
    server.communicate(timeout=60)
    assert server.returncode == 0


@pytest.fixture(scope="module")
def table(run):
    """The rows of the kept table, after a look whether each configuration of today's code is among them."""
    today = run(
        "from benchmarks import aot; print(aot.made_by()); print(*[k for c in aot.grid() for k in aot.configurations(c)])",
    ).splitlines()
    with (ROOT / "benchmarks/results/aot.csv").open() as file:
        made_by = next(file).removeprefix("# ").strip()
        rows = list(csv.DictReader(file))
    assert made_by == today[0], "run python -m benchmarks.aot: what compiles or counts is another version"
    today = today[1].split()
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


def test_on_hopper_every_loop_is_counted(table):
    """Elsewhere they are empty."""
    counts = ("wgmma_products", "replicated_mma", "tile_conversions", "shared_accesses", "narrow_loads")
    assert [r["key"] for r in table if r["arch"] == "90" and not all(r[name] for name in counts)] == []


def test_the_benchmarks_main_shape_is_compiled(table):
    """A kv head for each head, no key mask, a split lse: what the shapes of the benchmark launch in bf16."""
    wanted = {"slice_forward_kernel", "slice_backward_rows_kernel", "slice_backward_cols_kernel", "flash_rows_kernel"}
    wanted |= {"row_lse_backward_dq_kernel", "row_lse_backward_dk_kernel"}
    for arch, head_dim in itertools.product(ARCHITECTURES, ("64", "128")):
        rows = [r for r in table if (r["arch"], r["head_dim"], r["dtype"]) == (arch, head_dim, "bf16")]
        assert {r["kernel"] for r in rows if r["variant"] == "split lse"} == wanted
        plain = {r["kernel"] for r in rows if not r["variant"]}
        assert {"row_lse_kernel", "flash_forward_kernel", "flash_dkdv_kernel", "flash_dq_kernel"} <= plain


def test_the_table_says_what_the_compiler_says(table, run):
    """One configuration each of some kernels, other ones in every run, compiled now: code that changed has another key."""
    kernels = (
        random.sample(sorted(ATTENTION), 5) + random.sample(sorted(LOSSES), 2) + random.sample(sorted(VOCABULARY), 1)
    )
    sample = [random.choice([r for r in table if r["kernel"] == kernel]) for kernel in kernels]
    for row, now in zip(sample, json.loads(run(COMPILED_NOW, json.dumps(sample))), strict=True):
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


def test_a_key_follows_the_code_and_not_its_comments(run, tmp_path):
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
    keys = run(
        f"import sys\nsys.path.insert(0, {str(tmp_path)!r})\n"
        "from benchmarks import _configurations\nimport kernel_0, kernel_1, kernel_2, kernel_3\n"
        "print(*[_configurations.code(module.kernel) for module in (kernel_0, kernel_1, kernel_2, kernel_3)])"
    )
    first, commented, other_constant, other_function = keys.split()
    assert commented == first
    assert len({first, other_constant, other_function}) == 3


REWRITTEN = """
import json, sys, torch
sys.path.insert(0, sys.argv[1])
import written_0, written_1, written_2, written_3
from benchmarks import _configurations, aot

p = torch.empty(16, device="meta")
args = {"p_x": p, "N": 100, "stride": 7, "BN": 64, "num_warps": 4, "num_stages": 1}
launches = [(module.kernel, args) for module in (written_0, written_1, written_2, written_3)]
launches.append((written_0.kernel, args | {"num_warps": 8}))
irs = [_configurations.ir(launch, 90) for launch in launches] + [_configurations.ir(launches[0], 80)]

aot.configurations = lambda cell: {f"new {i}": (launches[i], "fp32", 0) for i in cell[2]}
known = {"old": {"key": "old", "ir": irs[0], "registers": "measured"}}
rows = aot.compile_cell(("fp32", 90, (1, 2)), known)
print(json.dumps([irs, [_configurations.code(kernel) for kernel, _ in launches[:4]], rows]))
"""


def test_a_row_goes_on_with_other_code_of_the_same_ir(run, tmp_path):
    """A place computed by a function of its own is the same IR, with constants met in another order; other factors are not."""
    code = """
import triton, triton.language as tl

@triton.jit
def place(x, o, stride):
    return x + o * stride * 8

@triton.jit
def kernel(p_x, N, stride, BN: tl.constexpr):
    o_n = tl.program_id(0) * 5 + tl.arange(0, BN)
    p_n = {place}
    tl.store(p_n, tl.load(p_n, mask=o_n < N * 3) + 2.0, mask=o_n < N * 3)
"""
    places = ("p_x + o_n * stride * 8", "place(p_x, o_n, stride)", "p_x + o_n * N * 8", "p_x + o_n * stride * 16")
    for i, place in enumerate(places):
        (tmp_path / f"written_{i}.py").write_text(code.format(place=place))
    irs, codes, (same, other) = json.loads(run(REWRITTEN, str(tmp_path)))
    assert len(set(codes)) == 4
    assert irs[1] == irs[0]
    assert len(set(irs)) == 5
    assert same == {"key": "new 1", "ir": irs[0], "registers": "measured", "dtype": "fp32", "head_dim": 0}
    assert other["ir"] == irs[2]
    assert int(other["registers"]) > 0


WIDTH_OF_ACCESSES = """
import re, torch
from benchmarks import aot

ptx = aot.compiled(aot.vocabulary_launches(90, torch.bfloat16)[0], 90)[0].asm["ptx"]
print(len(re.findall(r"(?:ld|st)\\.global[^;]*v4\\.b32", ptx)), len(re.findall(r"(?:ld|st)\\.global[^;]*\\.b16", ptx)))
"""


def test_rows_of_logits_are_read_and_written_16_bytes_at_a_time(run):
    """Four loops' loads and the gradient's store; by 2 bytes only the label's logit. Vocabularies end anywhere."""
    wide, narrow = map(int, run(WIDTH_OF_ACCESSES).split())
    assert (wide, narrow) == (5, 1)


def test_slices_on_hopper_take_both_operands_from_shared_memory(table):
    slices = [r for r in table if r["arch"] == "90" and r["head_dim"] in ("64", "128") and r["dtype"] != "fp32"]
    slices = [r for r in slices if r["kernel"].startswith(("slice", "row_lse"))]
    assert slices and not any(int(r["register_wgmma"]) for r in slices)


FAULTY = """
import json, sys, torch, triton, triton.language as tl
from benchmarks import aot

@triton.jit
def kernel(p_k, p_q, p_factor, p_out, N, NARROW: tl.constexpr, TRANSPOSED: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):
    D: tl.constexpr = 128
    o_m, o_d = tl.arange(0, BM), tl.arange(0, D)
    b_k = tl.load(p_k + o_m[:, None] * D + o_d[None, :])
    b_acc = tl.zeros((BM, D), tl.float32)
    for i_n in tl.range(0, N, BN):
        o_n = i_n + tl.arange(0, BN)
        b_q = tl.load(p_q + o_n[:, None] * D + o_d[None, :])
        b_p = tl.exp2(tl.dot(b_k, tl.trans(b_q)))
        if NARROW:
            p_tile = p_factor + o_m[:, None] * 4096 + o_n[None, :]
            b_p *= tl.load(p_tile, mask=(o_n < N)[None, :], other=0.0)
        if TRANSPOSED:
            b_p = tl.trans(b_p)
        b_acc = tl.dot(b_p.to(tl.bfloat16), b_q, b_acc)
    tl.store(p_out + o_m[:, None] * D + o_d[None, :], b_acc)

p, out = torch.empty(16, dtype=torch.bfloat16, device="meta"), torch.empty(16, device="meta")
args = {"p_k": p, "p_q": p, "p_factor": p, "p_out": out, "N": 100, "NARROW": False, "TRANSPOSED": False, "num_stages": 2}
sound = {"BM": 128, "BN": 64, "num_warps": 8}
slow = {"BM": 64, "BN": 32, "num_warps": 8, "NARROW": True}
transposed = {"BM": 64, "BN": 64, "num_warps": 4, "TRANSPOSED": True}
rows = [aot.compile_one((kernel, args | form), 90) for form in (sound, slow, transposed)]
limits = rows[0] | aot.MOST_ON_HOPPER
over = [aot.problem(limits | {name: most + 1}) for name, most in aot.MOST_ON_HOPPER.items()]
print(json.dumps([[(row, aot.problem(row)) for row in rows], aot.problem(limits), over]))
"""


def test_the_gate_sees_each_fault(run):
    """Of Hopper's products: 64 rows for 8 warps, which also makes ptxas wait after each, factors read two bytes at a time and
    moved to other threads; and a transposed left operand in registers. The sound form has none of it."""
    forms, at_limits, over_one_limit = json.loads(run(FAULTY))
    (sound, none), (slow, slow_problem), (transposed, transposed_problem) = forms
    counts = ("replicated_wgmma", "serialised_wgmma", "tile_conversions", "shared_accesses", "narrow_loads")
    assert sound["wgmma_products"] == 2
    assert [sound[name] for name in counts] == [0] * 5
    assert none == ""
    assert all(slow[name] for name in counts)
    assert slow_problem == "replicated wgmma, serialised wgmma, tile conversions, narrow loads"
    assert (sound["transposed_operands"], slow["transposed_operands"]) == (0, 0)
    assert transposed["transposed_operands"]
    assert "transposed register operand" in transposed_problem
    assert at_limits == ""
    assert over_one_limit == [name.replace("_", " ") for name in counts]


def test_counts_and_strides_of_a_batch_do_not_recompile(run):
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
    assert json.loads(run(code)) == []
