"""Registers, spills and shared memory of every Triton kernel, compiled ahead of time: `python -m benchmarks.aot`.

The table, benchmarks/results/aot.csv, names each configuration by two hashes (`_configurations.py`), of the kernel's code and
of its IR, both with what it is compiled for. After a change only what has another IR is compiled again; so it is where the
counts of `_compiled.py` are made by other code. Needs no GPU. What there is between products is counted on Hopper alone, whose
compiled code the gate judges by it.

The launchers run on meta tensors with the launch recorded instead of made, so what is compiled is exactly
what they would launch.
"""

import argparse
import ast
import contextlib
import csv
import hashlib
import inspect
import io
import itertools
import os
import re
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from unittest import mock

import torch
import triton
from cdistill.kernels import _launch, backend, flash_attention, flash_gradient, vocabulary_losses
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import CompiledKernel

from benchmarks import _compiled
from benchmarks._configurations import compile_options, described, ir, key, source
from cdistill import choices
from cdistill.ops._problem import AttentionProblem, Comparison, VocabularyOptions, VocabularyRows

# Compute capability -> shared memory in bytes that a program may take, and that a multiprocessor has.
SHARED_MEMORY = {
    80: (166912, 167936),
    86: (101376, 102400),
    89: (101376, 102400),
    90: (232448, 233472),
    100: (232448, 233472),
    120: (101376, 102400),
}
ARCHITECTURES = _launch.ARCHITECTURES
THREADS_PER_MULTIPROCESSOR = {80: 2048, 90: 2048, 100: 2048}  # others: 1536
REGISTERS_PER_MULTIPROCESSOR = 65536
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
CAREFUL_HEAD_DIMS = (64,)  # programs that hardly ever run are compiled for these alone
BENCHMARKED_HEAD_DIMS = (64, 128)  # of benchmarks/_contenders.py: compiled for its main shape, too
HOPPER = 90
# Of kernels with Hopper's own matrix instructions: products that several warps repeat, instructions that wait for each other,
# and in loops what there is between products. Flash attention needs no more of shared memory than 6 numbers of rows a product;
# 30 are a key mask's at head dimension 256. A slice's gradient is read in a layout of its own and moved to that of the
# scores; so is the target of the cosine of heads, whose sums cross warps.
MOST_ON_HOPPER = {
    "replicated_wgmma": 0,
    "serialised_wgmma": 0,
    "tile_conversions": 0,
    "shared_accesses": 32,
    "narrow_loads": 0,
}
MORE_ON_HOPPER = {
    "slice_backward_rows_kernel": {"tile_conversions": 1},
    "slice_backward_cols_kernel": {"tile_conversions": 1},
    "head_cosine_kernel": {"tile_conversions": 1, "shared_accesses": 128},
}
TABLE = Path(__file__).parent / "results/aot.csv"


def made_by() -> str:
    """What the table's rows are made by: the compiler's version, and a hash of the code that counts in what it makes."""
    tree = ast.parse(inspect.getsource(_compiled))
    counts = hashlib.sha256(ast.unparse(tree).encode()).hexdigest()[:12]
    return f"triton {triton.__version__}, counts {counts}"


def recorded(call, arch: int, multiprocessors: int = 1) -> list[tuple]:
    """The (kernel, arguments) that ``call`` would launch on ``arch``."""
    launches: list[tuple] = []
    with (
        mock.patch.object(_launch, "launch", lambda kernel, grid, device, **args: launches.append((kernel, args))),
        mock.patch.object(_launch, "architecture", lambda device: arch),
        mock.patch.object(_launch, "multiprocessors", lambda device: multiprocessors),
    ):
        call()
    return launches


def benchmarked_launches(arch: int, head_dim: int, dtype: torch.dtype) -> list[tuple]:
    """What `attention_with_alignment` and `row_lse` launch at the benchmark's main shape: a kv head per head, no key mask."""
    B, H, T, R, V = 4, 16, 4096, 256, 2880

    def empty(*shape, dtype=torch.float32):
        return torch.empty(*shape, dtype=dtype, device="meta")

    def call():
        q = empty(B, H, T, head_dim, dtype=dtype)
        rows, cols = empty(B, R, dtype=torch.int64), empty(B, V, dtype=torch.int64)
        x = AttentionProblem(q, q, q, scale=head_dim**-0.5, rows=rows, cols=cols)
        out, _, lse = flash_attention.flash_forward(x)
        x = x._replace(lse=lse)
        backend.slice_forward(x)
        backend.slice_backward(
            x, empty(B, R, V, dtype=dtype), lambda dlse: flash_gradient.flash_backward(x, out, out, dlse)[:2]
        )
        backend.row_lse(x)
        backend.row_lse_backward(x, empty(B, H, T))

    return [launch for launch in recorded(call, arch, multiprocessors=132) if not launch[1].get("CAREFUL")]


def attention_launches(arch: int, head_dim: int, dtype: torch.dtype) -> list[tuple]:
    """One launch of every attention kernel, causal: with grouped heads and a split lse; with a key mask and a natural lse.

    At the head dimensions of the benchmark also its own launches, in the dtype that it is in.
    """
    B, Hq, T, R, V = 2, 8, 4096, 256, 2880
    few = Hq * head_dim - 8  # columns for which the backward pass keeps no dq

    def empty(*shape, dtype=torch.float32):
        return torch.empty(*shape, dtype=dtype, device="meta")

    def call(kv_heads, key_mask):
        q, k = empty(B, Hq, T, head_dim, dtype=dtype), empty(B, kv_heads, T, head_dim, dtype=dtype)
        rows, cols = empty(B, R, dtype=torch.int64), empty(B, V, dtype=torch.int64)
        lse = dlse = empty(B, Hq, T)
        if key_mask is None:
            lse = empty(2, B, Hq, T)
        grad = empty(B, R, V, dtype=torch.bfloat16 if dtype == torch.bfloat16 else torch.float32)
        gradients = empty(B, Hq, T, head_dim, dtype=dtype), empty(B, kv_heads, T, head_dim, dtype=dtype)
        x = AttentionProblem(q, k, k, key_mask, scale=head_dim**-0.5, rows=rows, cols=cols, lse=lse)
        backend.row_lse(x)
        backend.row_lse_backward(x, dlse)
        backend.row_lse_backward(x, dlse, into=gradients)
        backend.slice_forward(x)
        backend.slice_forward(x._replace(each=True))
        backend.slice_accumulate(x, empty(9, B, R, V, dtype=dtype), [0, 8])
        for V1 in (V, few):
            backend.slice_backward(x._replace(cols=cols[:, :V1]), grad[..., :V1], lambda _: gradients)
        target = empty(B, Hq, R, V)
        _, kept = backend.head_cosine(x, target)
        backend.head_cosine(x._replace(lse=None), target)
        backend.head_cosine_backward(x, kept, target, dlse[..., :R], lambda _: gradients)
        backend.head_cosine_backward(x._replace(lse=None), kept, target, dlse[..., :R], None)
        saved, _ = backend.fold_dlse(q, q, dlse, rows)
        backend.unfold_dlse(q, saved, rows)
        out, _, split = flash_attention.flash_forward(x)
        flash_gradient.flash_backward(x._replace(lse=split), out, out, dlse)

    mask = empty(B, T, dtype=torch.bool)
    launches = recorded(lambda: call(2, None), arch) + recorded(lambda: call(Hq, mask), arch, multiprocessors=1 << 20)
    if head_dim in BENCHMARKED_HEAD_DIMS and dtype == torch.bfloat16:
        launches += benchmarked_launches(arch, head_dim, dtype)
    return launches


def loss_launches(arch: int) -> list[tuple]:
    """Every kernel of the alignment losses in every variant, once."""
    a = torch.empty(2, 256, 2880, device="meta")
    valid = [torch.empty(2, n, dtype=torch.bool, device="meta") for n in (256, 2880)]

    def call():
        for loss, reduction in itertools.product(choices.ALIGNMENT_LOSSES, choices.REDUCTIONS):
            sink_filter = reduction == "column" and loss == "cosine"
            compared = Comparison(*valid, a, loss, reduction, sink_filter)
            backend.alignment_loss(a, compared)
            for dtype in (torch.float32, torch.bfloat16):
                backend.alignment_grad(a, compared, a[:, 0, 0], dtype)
        q = torch.empty(2, 1, 4096, 16, device="meta")
        cols = torch.empty(2, 2880, dtype=torch.int64, device="meta")
        backend.regions(AttentionProblem(q, q, key_mask=valid[0], rows=cols[:, :256], cols=cols))

    return recorded(call, arch)


def vocabulary_launches(arch: int, dtype: torch.dtype) -> list[tuple]:
    """Both kernels of the losses over the vocabulary in every variant, once."""
    c, V = 64, 151936
    labels = torch.empty(c, dtype=torch.int64, device="meta")
    losses = torch.empty(2, c, device="meta")

    def top(k: int) -> tuple:
        return torch.empty(c, k, device="meta"), torch.empty(c, k, dtype=torch.int64, device="meta"), losses[0]

    def call():
        logits = torch.empty(c, V, dtype=dtype, device="meta")
        variants = itertools.product(choices.DIVERGENCES, (1.0, 2.0), (True, False))
        for divergence, temperature, gradient in variants:
            options = VocabularyOptions(divergence, temperature, 0.5, 1.0, 1.0, gradient)
            for teacher, stored in ((logits, None), (None, top(64)), (None, top(vocabulary_losses.MOST_TOP))):
                backend.vocabulary_losses(VocabularyRows(logits, teacher, stored, labels, *losses), options)

    return recorded(call, arch)


def compiled(launch: tuple, arch: int) -> tuple[CompiledKernel, str]:
    """A launch's kernel as Triton compiles it, and what ptxas says of it."""
    log = io.StringIO()
    with knobs.nvidia.scope(), knobs.compilation.scope(), contextlib.redirect_stdout(log):
        knobs.nvidia.dump_ptxas_log = True
        knobs.compilation.always_compile = True  # what comes from a cache has no log
        result = triton.compile(source(launch), target=GPUTarget("cuda", arch, 32), options=compile_options(launch[1]))
    return result, log.getvalue()


def compile_one(launch: tuple, arch: int) -> dict:
    made, log = compiled(launch, arch)
    ttgir, ptx = made.asm["ttgir"], made.asm["ptx"]
    registers, stack = re.findall(r"Used (\d+) registers", log)[-1], re.findall(r"(\d+) bytes stack frame", log)[-1]
    shared, limits = made.metadata.shared, SHARED_MEMORY[arch]
    threads = 32 * launch[1]["num_warps"]
    return {
        **described(launch, arch),
        "registers": int(registers),
        "spill_bytes": int(stack),
        "shared": shared,
        "shared_limit": limits[0],
        "ctas_per_multiprocessor": min(
            REGISTERS_PER_MULTIPROCESSOR // (threads * -(-int(registers) // 8) * 8),
            THREADS_PER_MULTIPROCESSOR.get(arch, 1536) // threads,
            limits[1] // (shared + 1024),  # the system keeps 1 KiB of every program
        ),
        "register_wgmma": _compiled.register_wgmma(ptx),
        "transposed_operands": _compiled.transposed_register_operands(ttgir),
    } | (hopper_counts(ttgir, ptx, log) if arch == HOPPER else dict.fromkeys(hopper_counts("", "", ""), ""))


def hopper_counts(ttgir: str, ptx: str, log: str) -> dict:
    return {
        "wgmma_products": _compiled.wgmma_products(ttgir),
        "replicated_wgmma": _compiled.replicated_products(ttgir, r"ttng\.warp_group_dot"),
        "replicated_mma": _compiled.replicated_products(ttgir, r"tt\.dot"),
        "serialised_wgmma": _compiled.serialised_wgmma(log),
        "tile_conversions": _compiled.tile_conversions(ttgir),
        "shared_accesses": _compiled.shared_accesses(ttgir, ptx),
        "narrow_loads": _compiled.narrow_loads(ptx),
    }


def grid() -> list[tuple]:
    """All cells; a head dimension shares its tiles with the next power of 2, and bf16 with fp16."""
    cells: list[tuple] = [
        (dtype, arch, d) for dtype in DTYPES for arch in ARCHITECTURES for d in (16, 32, 64, 128, 256)
    ]
    cells += [("bf16", arch, d) for arch in (80, 90) for d in (24, 40, 72, 96, 192)]
    return cells + [("losses", arch) for arch in ARCHITECTURES]


def configurations(cell: tuple) -> dict[str, tuple]:
    """Key -> (launch, dtype, head dimension) of all that is compiled for ("losses", arch) or (dtype name, arch, head dim)."""
    dtype, arch, *head_dim = cell
    if dtype == "losses":
        parts = [("fp32", 0, loss_launches(arch))]
        parts += [(name, 0, vocabulary_launches(arch, of)) for name, of in DTYPES.items()]
    else:
        parts = [(dtype, *head_dim, attention_launches(arch, *head_dim, DTYPES[dtype]))]
    found: dict[str, tuple] = {}
    for name, width, launches in parts:
        for launch in launches:
            if not launch[1].get("CAREFUL") or width in CAREFUL_HEAD_DIMS:
                found.setdefault(key(launch, arch), (launch, name, width))
    return found


def compile_cell(cell: tuple, known: dict[str, dict]) -> list[dict]:
    """The rows of a cell; those whose key is ``known`` are not compiled again, nor those of which a known row has the IR."""
    rows, alike = [], {row["ir"]: row for row in known.values()}
    for name, (launch, dtype, width) in configurations(cell).items():
        row = known.get(name) or alike.get(ir(launch, cell[1])) or compiled_row(name, launch, cell[1], dtype, width)
        rows.append({**row, "key": name, "dtype": dtype, "head_dim": width})  # a row may stand in several cells
    return rows


def compiled_row(key: str, launch: tuple, arch: int, dtype: str, head_dim: int) -> dict:
    """A configuration's row of the table, compiled now."""
    row = {"key": key, "ir": ir(launch, arch), **compile_one(launch, arch), "dtype": dtype, "head_dim": head_dim}
    return {**row, "problem": problem(row)}


def read_table() -> tuple[str, list[dict]]:
    """What made the kept table (as `made_by`), and its rows (all values are text)."""
    if not TABLE.exists():
        return "", []
    with TABLE.open() as file:
        made = file.readline().removeprefix("#").strip()
        return made, list(csv.DictReader(file))


def kept() -> dict[str, dict]:
    """The rows of the kept table that the present code would make, too, by their keys."""
    (made, rows), today = read_table(), made_by()
    if made.split(", ")[0] != today.split(", ")[0]:
        return {}
    return {r["key"]: r for r in rows if made == today or r["arch"] != str(HOPPER)}


def write_table(rows: list[dict]) -> None:
    """Keep the rows as the table."""
    with TABLE.open("w", newline="") as file:
        file.write(f"# {made_by()}\n")
        table = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        table.writeheader()
        table.writerows(rows)


def problem(row: dict) -> str:
    """Why a configuration must not be in the tile table; empty if it may.

    Careful programs may spill and be slow: hardly any runs.
    """
    often = "careful" not in row["variant"]
    problems = {
        "spills": row["spill_bytes"] and often,
        "shared memory": row["shared"] > row["shared_limit"],
        "transposed register operand": row["transposed_operands"],
    }
    if int(row.get("wgmma_products") or 0) and often:
        most = MOST_ON_HOPPER | MORE_ON_HOPPER.get(row["kernel"], {})
        problems |= {name.replace("_", " "): float(row[name]) > limit for name, limit in most.items()}
    return ", ".join(name for name, found in problems.items() if found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--only", nargs="+", metavar="DTYPE ARCH [HEAD_DIM]", action="append", help="print one cell of the grid"
    )
    parser.add_argument("--all", action="store_true", help="compile what the kept table already holds, too")
    options = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET"):
        parser.error("unset TRITON_INTERPRET: the interpreter's kernels cannot be compiled")
    known = {} if options.all else kept()
    cells = [(dtype, *map(int, numbers)) for dtype, *numbers in options.only] if options.only else grid()
    rows: list[dict] = []
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TRITON_CACHE_DIR"] = cache
        with ProcessPoolExecutor(2) as pool:
            for made in pool.map(compile_cell, cells, itertools.repeat(known)):
                rows += made
                if not options.only:
                    done = {row["key"] for row in rows}  # a run that ends early goes on from all that is known
                    write_table(rows + [row for name, row in known.items() if name not in done])
    if not options.only:
        write_table(rows)
    new, alike = [r for r in rows if r["key"] not in known], {r["ir"] for r in known.values()}
    compiled = sum(r["ir"] not in alike for r in new)
    print(
        f"triton {triton.__version__}, {len(rows)} configurations: {compiled} compiled, "
        f"{len(new) - compiled} of other code but the same IR, {len(rows) - len(new)} of the same code"
    )
    for r in rows:
        if options.only or r["problem"]:
            print(
                f"sm_{r['arch']:<4} {r['kernel']:<28} {r['variant']:<20} {r['dtype']} D={r['head_dim']:<4} "
                f"{r['tile']:<8} {r['num_warps']} warps  registers {r['registers']:<4} spill {r['spill_bytes']:<5} "
                f"shared {r['shared']:<7} CTAs {r['ctas_per_multiprocessor']} register wgmma {r['register_wgmma']} "
                f"shared accesses {r['shared_accesses']} {r['problem']}"
            )
    if any(r["problem"] for r in rows):
        sys.exit("configurations with a problem must not be in the tile table")


if __name__ == "__main__":
    main()
