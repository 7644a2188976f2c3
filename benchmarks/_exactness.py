"""How results are judged by float64, and how checks run, each in a process of its own.

A failing kernel can spoil the whole process for the next one; the others share what they compile through the caches of Triton
and torch. The checks are in `_exactness_attention` and `_exactness_distillation`.
"""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from benchmarks._measure import gpu, one_line

ROOT = Path(__file__).parent.parent
CHECK_SECONDS = 110.0  # compiling is most of it

Results = dict[str, Tensor]
Check = Callable[[torch.device], None]


class InexactError(AssertionError):
    """Which parts are too far from float64, each with what was found."""

    def __init__(self, parts: dict[str, str]):
        super().__init__("\n".join(f"{part}: {found}" for part, found in parts.items()))
        self.parts = parts


def excess(got: Tensor, same: Tensor, exact: Tensor) -> float:
    """|got - exact| / (2 * |same - exact| + 1e-5 * |exact|) in the maximum norm; at most 1 where got is right.

    ``same`` is eager in got's dtype. NaN is infinitely wrong.
    """
    if not exact.numel():
        return 0.0
    error = (got.double() - exact).abs().max()
    allowed = 2 * (same.double() - exact).abs().max() + 1e-5 * exact.abs().max()
    ratio = float(torch.where(error == 0, 0.0, error / allowed))
    return ratio if ratio == ratio else float("inf")


def worst(got: Results, same: Results, exact: Results) -> tuple[float, str]:
    """The largest excess of the results both have, and its name."""
    return max((excess(x, same[name], exact[name]), name) for name, x in got.items())


def fault(ours: Callable[[], Results], same: Results, exact: Results) -> str | None:
    """What is wrong with these results; None if nothing is."""
    try:
        ratio, name = worst(ours(), same, exact)
    except Exception as error:
        return one_line(error)
    return f"{name}: error {ratio:.2f} times what is allowed" if ratio > 1 else None


def gradients(outputs: dict[str, Tensor], grads: list[Tensor], leaves: dict[str, Tensor]) -> Results:
    """The outputs, and the gradients of the leaves that were used."""
    pairs = zip(outputs.values(), grads, strict=True)
    found = torch.autograd.grad(
        list(outputs.values()), list(leaves.values()), [g.to(x.dtype) for x, g in pairs], allow_unused=True
    )
    named = {f"d{name}": x for name, x in zip(leaves, found, strict=True) if x is not None}
    return {name: x.detach() for name, x in outputs.items()} | named


def check_assertion(device: torch.device, script: str) -> None:
    """The script accepts 63, and at 64 a device-side assertion stops its process."""
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.split() == ["accepted", "63"], done.stdout
    assert done.returncode != 0 and "device-side assert" in done.stderr, done.stderr[-500:]


def run_apart(module: str, name: str, seconds: float = CHECK_SECONDS) -> dict[str, str] | None:
    """Run one check of a module in a fresh process: the parts that failed, each with what was found; or nothing.

    None if it has not ended after ``seconds``, unless these are all that a check may take.
    """
    command = [sys.executable, "-m", module, name]
    env = {**os.environ, "TORCHINDUCTOR_COMPILE_THREADS": "1", "OMP_NUM_THREADS": "1"}
    try:
        done = subprocess.run(
            command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=min(seconds, CHECK_SECONDS)
        )
    except subprocess.TimeoutExpired:
        return None if seconds < CHECK_SECONDS else {"": f"not finished after {CHECK_SECONDS:.0f} s"}
    if done.returncode == 0:
        return {}
    lines = [line.split("\t") for line in done.stdout.splitlines() if line.startswith("\t")]
    return {part: found for _, part, found in lines} or {"": done.stderr.strip()[-1500:] or f"exit {done.returncode}"}


def main(check: Check) -> int:
    """Exit code of a process that runs one check; what failed goes to standard output, for `run_apart`."""
    try:
        check(gpu())
    except InexactError as error:
        for part, found in error.parts.items():
            print(f"\t{part}\t{found}")
        return 1
    return 0
