"""Registers, spills and shared memory of every Triton kernel, compiled ahead of time: `python -m benchmarks.aot`.

Needs no GPU. The launchers run on meta tensors with the launch recorded instead of made, so what is compiled is exactly
what they would launch.
"""

import argparse
import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from unittest import mock

import torch
import triton
from cdistill.kernels import _launch, attention_slice
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

ARCHITECTURES = (80, 89, 90, 100, 120)
SHARED_MEMORY = {80: 166912, 89: 101376, 90: 232448, 100: 232448, 120: 101376}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
POINTERS = {
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.float32: "*fp32",
    torch.int32: "*i32",
    torch.uint8: "*u8",
}
CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"


def recorded(call, arch: int) -> list[tuple]:
    """The (kernel, arguments) that ``call`` would launch on ``arch``."""
    launches: list[tuple] = []
    record = mock.patch.object(_launch, "launch", lambda kernel, grid, device, **args: launches.append((kernel, args)))
    with record, mock.patch.object(_launch, "architecture", lambda device: arch):
        call()
    return launches


def attention_launches(arch: int, head_dim: int, dtype: torch.dtype) -> list[tuple]:
    """One launch of every attention kernel: grouped heads, causal, no key mask, head mean."""
    B, Hq, Hkv, T, R, V = 2, 8, 2, 4096, 256, 2880

    def empty(*shape, dtype=torch.float32):
        return torch.empty(*shape, dtype=dtype, device="meta")

    q, k = empty(B, Hq, T, head_dim, dtype=dtype), empty(B, Hkv, T, head_dim, dtype=dtype)
    rows, cols = empty(B, R, dtype=torch.int32), empty(B, V, dtype=torch.int32)
    lse, grad = empty(B, Hq, R), empty(B, R, V)
    dq, dk = empty(B, Hq, T, head_dim), empty(B, Hkv, T, head_dim)
    options = {"causal": True, "scale": head_dim**-0.5, "key_mask": None}

    def call():
        attention_slice.row_lse(q, k, rows, **options)
        attention_slice.slice_forward(q, k, lse, rows, cols, **options, each=False)
        attention_slice.slice_backward(q, k, lse, rows, cols, grad, dq, dk, **options, each=False)
        attention_slice.row_lse_backward(q, k, lse, rows, lse, dq, dk, **options)

    return recorded(call, arch)


def loss_launches(arch: int) -> list[tuple]:
    """Every loss kernel in every variant, once."""
    a = torch.empty(2, 256, 2880, device="meta")
    valid = [torch.empty(2, n, dtype=torch.bool, device="meta") for n in (256, 2880)]

    def call():
        for loss, reduction in itertools.product(("cosine", "mse", "kl"), ("row", "matrix", "column")):
            options = {"loss": loss, "reduction": reduction, "sink_filter": reduction == "column" and loss == "cosine"}
            attention_slice.alignment_loss(a, a, *valid, **options)
            attention_slice.alignment_grad(a, a, *valid, a[:, 0, 0], **options)

    return recorded(call, arch)


def specialised(kernel, args: dict) -> tuple[dict, dict, dict]:
    """Signature, constants and attributes that Triton's launcher would derive from the arguments."""
    signature, constants, attributes = {}, {}, {}
    for i, parameter in enumerate(kernel.params):
        name, value = parameter.name, args[parameter.name]
        if parameter.is_constexpr or value is None:
            signature[name], constants[name] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[name] = POINTERS[value.dtype]
            attributes[(i,)] = [["tt.divisibility", 16]]
        elif isinstance(value, float):
            signature[name] = "fp32"
        elif value == 1 and not parameter.do_not_specialize:
            signature[name], constants[name] = "constexpr", value
        else:
            signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            if value % 16 == 0 and not parameter.do_not_specialize:
                attributes[(i,)] = [["tt.divisibility", 16]]
    return signature, constants, attributes


def register_wgmma(ptx: str) -> int:
    """Hopper matrix instructions whose left operand comes from registers."""
    operands = (m.group(0).split("}", 1)[1] for m in re.finditer(r"wgmma\.mma_async[^;]*\}[^;]*;", ptx))
    return sum("{" in o for o in operands)


def compile_one(launch: tuple, arch: int) -> dict:
    kernel, args = launch
    signature, constants, attributes = specialised(kernel, args)
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    options = {name: args[name] for name in ("num_warps", "num_stages") if name in args}
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        usage = subprocess.run(
            [CUOBJDUMP, "--dump-resource-usage", cubin.name], capture_output=True, text=True, check=True
        )
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", usage.stdout).groups()
    variant = [str(v) for n, v in constants.items() if n in ("LOSS", "TERM")]
    if args.get("p_size") is not None:
        variant.append("slice")
    return {
        "kernel": kernel.__name__,
        "variant": "/".join(variant),
        "arch": arch,
        "registers": int(registers),
        "spill_bytes": int(stack),
        "shared": compiled.metadata.shared,
        "shared_limit": SHARED_MEMORY[arch],
        "register_wgmma": register_wgmma(compiled.asm["ptx"]),
    }


def compile_all(job: tuple) -> list[dict]:
    """Compile one job: ("losses", arch) or (dtype name, arch, head dim)."""
    dtype, arch, *head_dim = job
    if dtype == "losses":
        launches, label = loss_launches(arch), {"dtype": "fp32", "head_dim": 0}
    else:
        launches, label = attention_launches(arch, *head_dim, DTYPES[dtype]), {"dtype": dtype, "head_dim": head_dim[0]}
    rows: dict[tuple, dict] = {}
    for kernel, args in launches:
        signature, constants, _ = specialised(kernel, args)
        key = (kernel.__name__, str(signature), str(constants))
        if key not in rows:
            rows[key] = {**compile_one((kernel, args), arch), **label}
    return list(rows.values())


def jobs(quick: bool) -> list[tuple]:
    if quick:
        wanted: list[tuple] = [("bf16", arch, d) for arch in ARCHITECTURES for d in (64, 128)]
        wanted += [("fp16", 89, 72), ("fp32", 80, 24)]
        return [*wanted, ("losses", 90)]
    wanted = list(itertools.product(DTYPES, ARCHITECTURES, (16, 24, 40, 64, 72, 128, 256)))
    return wanted + [("losses", arch) for arch in ARCHITECTURES]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="the part of the grid that the tests compile")
    parser.add_argument(
        "--only", nargs=3, action="append", metavar=("DTYPE", "ARCH", "HEAD_DIM"), help="one cell of it"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON list instead of a table")
    options = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET"):
        parser.error("unset TRITON_INTERPRET: the interpreter's kernels cannot be compiled")
    wanted = [(t, int(a), int(d)) for t, a, d in options.only] if options.only else jobs(options.quick)
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TRITON_CACHE_DIR"] = cache
        with ProcessPoolExecutor(2) as pool:
            results = list(itertools.chain.from_iterable(pool.map(compile_all, wanted)))
    if options.json:
        json.dump(results, sys.stdout)
        return
    print(f"triton {triton.__version__}")
    for r in results:
        print(
            f"sm_{r['arch']:<4} {r['kernel']:<28} {r['variant']:<20} {r['dtype']} D={r['head_dim']:<4} "
            f"registers {r['registers']:<4} spill {r['spill_bytes']:<5} shared {r['shared']:<7} of {r['shared_limit']} "
            f"register wgmma {r['register_wgmma']}"
        )


if __name__ == "__main__":
    main()
