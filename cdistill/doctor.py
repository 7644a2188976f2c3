"""``cdistill doctor``: what this machine has of what cdistill needs, and how to get what is missing."""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Any

from cdistill.runtime.memory import memory

OK, MISSING, BROKEN, UNUSED = "ok", "missing", "broken", "-"
HUB_SECONDS = 3.0
SHOWN = ("torch", "triton", "transformers", "deepspeed")
SPARED = ("triton", "deepspeed")  # without which something can still be done
EXTRAS = {
    "peft": ("lora", "student.lora"),
    "bitsandbytes": ("quantization", "teacher_memory.quantization"),
    "vl-convert-python": ("report", "`cdistill report`"),
    "gguf": ("gguf", "`cdistill export --format gguf`"),
}
LEAST_DISK = 10**9


@dataclass(frozen=True)
class Row:
    """One thing looked at: its state (`OK`, `MISSING`, `BROKEN` where nothing works without it, `UNUSED` where this machine has
    no use for it), what was found, and what to do about it."""

    name: str
    state: str
    found: str
    do: str = ""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what the command takes."""
    parser.add_argument("--json", action="store_true", help="print JSON instead of the table")


def main(options: argparse.Namespace) -> int:
    """Print the table; 1 if something is broken that everything needs, else 0."""
    rows = list(look())
    ready = all(row.state != BROKEN for row in rows)
    if options.json:
        print(json.dumps({"ready": ready, "rows": [asdict(row) for row in rows]}, indent=2))
        return 0 if ready else 1
    names, states = (max(len(getattr(row, field)) for row in rows) for field in ("name", "state"))
    for row in rows:
        print(f"{row.name:{names}}  {row.state:{states}}  {row.found}")
        if row.do:
            print(f"{'':{names}}  {'':{states}}  -> {row.do}")
    print("\nready: `cdistill init` comes next" if ready else "\nnot ready: what is broken comes first")
    return 0 if ready else 1


def look() -> Iterator[Row]:
    """Every row of the table, in its order."""
    yield Row("python", OK, f"{platform.python_version()} ({sys.executable})")
    yield from _packages()
    torch = _torch()
    gpus = torch is not None and torch.cuda.is_available()
    if isinstance(torch, Exception):
        yield Row(
            "torch", BROKEN, f"cannot be imported: {_line(torch)}", "reinstall it: pip install --force-reinstall torch"
        )
    else:
        yield from _cuda(torch)
        yield from _engines(torch)
    yield _compiler()
    yield _module(needed=not gpus)
    yield from _extras()
    yield _memory()
    yield _disk("disk here", Path.cwd(), "results and checkpoints are written here")
    yield _hub()


def _torch() -> Any:
    """The module, or what its import raised."""
    try:
        import torch
    except Exception as error:  # whatever a broken installation raises
        return error
    return torch


def _line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _packages() -> Iterator[Row]:
    """Packages that cdistill needs, with the versions it asks for."""
    from packaging.requirements import Requirement

    try:
        wanted = [Requirement(text) for text in requires("cdistill") or ()]
    except PackageNotFoundError:
        yield Row("cdistill", MISSING, "not installed: it runs from a folder", "pip install . in that folder")
        return
    others = 0
    for each in wanted:
        if each.marker is not None and not each.marker.evaluate({"extra": ""}):
            continue
        state = MISSING if each.name in SPARED else BROKEN
        try:
            found = version(each.name)
        except PackageNotFoundError:
            yield Row(each.name, state, "not installed", f"pip install '{each.name}{each.specifier}'")
            continue
        if not each.specifier.contains(found, prereleases=True):
            do = f"pip install '{each.name}{each.specifier}'"
            yield Row(each.name, state, f"{found}, needed is {each.specifier}", do)
        elif each.name in SHOWN:
            yield Row(each.name, OK, found)
        else:
            others += 1
    yield Row("other packages", OK, f"{others} more, as needed")


def _cuda(torch: Any) -> Iterator[Row]:
    """CUDA, driver and GPUs."""
    built, driver = torch.version.cuda, _driver()
    if not torch.cuda.is_available():
        yield Row("driver", UNUSED if driver is None else OK, "no NVIDIA driver" if driver is None else driver)
        if driver is None:
            yield Row("CUDA", UNUSED, "no GPU: training runs on the CPU, in fp32, which small models bear")
        elif built is None:
            yield Row("CUDA", MISSING, "torch is built for the CPU", "install the torch built for CUDA (pytorch.org)")
        else:
            yield Row(
                "CUDA", MISSING, f"{built}, but no GPU can be used", "see CUDA_VISIBLE_DEVICES, or renew the driver"
            )
        return
    yield Row("driver", OK, driver or "there")
    yield Row("CUDA", OK, str(built or torch.version.hip))
    for index in range(torch.cuda.device_count()):
        of = torch.cuda.get_device_properties(index)
        free, total = torch.cuda.mem_get_info(index)
        found = f"{of.name}, {_gb(total)}, {_gb(free)} free, capability {of.major}.{of.minor}"
        yield Row(f"GPU {index}", OK, found)


def _driver() -> str | None:
    """Version of NVIDIA's driver."""
    said = _said("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return said if said is not None and said[:1].isdigit() else None


def _said(*command: str) -> str | None:
    """The first line that a program prints, if it is there and ends well."""
    if shutil.which(command[0]) is None:
        return None
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    lines = done.stdout.strip().splitlines()
    return lines[0] if done.returncode == 0 and lines else None


def _engines(torch: Any) -> Iterator[Row]:
    """Every attention engine, tried on a small problem."""
    from cdistill.ops import flash_attention
    from cdistill.ops._engines import ENGINES

    gpu = torch.cuda.is_available()
    device, dtype = ("cuda", torch.float16) if gpu else ("cpu", torch.float32)
    q = torch.zeros(1, 2, 8, 64, device=device, dtype=dtype)
    for name, engine in ENGINES.items():
        missing = engine.missing()
        if missing is not None:
            found, _, do = missing.partition(": ")
            yield Row(
                f"engine {name}", MISSING if gpu else UNUSED, found, do if gpu else f"on a machine with a GPU: {do}"
            )
            continue
        try:
            flash_attention(q, q, q, engine=name)
        except (ValueError, RuntimeError) as error:
            yield Row(f"engine {name}", UNUSED, _line(error).removeprefix(f"engine={name!r} "))
        else:
            yield Row(f"engine {name}", OK, f"runs on the {'GPU' if gpu else 'CPU'}")


def _compiler() -> Row:
    names = [name for name in (os.environ.get("CXX"), "c++", "g++", "clang++") if name]
    for name in names:
        said = _said(name, "--version")
        if said is not None:
            return Row("C++ compiler", OK, said)
    what = "none: _C is built with one, and Triton, torch.compile and DeepSpeed's own kernels need one as they run"
    return Row("C++ compiler", MISSING, what, "install g++ or clang++, or name one by CXX")


def _module(*, needed: bool) -> Row:
    """The C++ module, which the ops need on the CPU."""
    state = BROKEN if needed else MISSING
    try:
        import cdistill._C as module
    except ImportError as error:
        checkout = Path(__file__).parents[1] / "setup.py"
        build = (
            "python setup.py build_ext --inplace" if checkout.is_file() else "pip install --force-reinstall cdistill"
        )
        return Row("module _C", state, f"not built for this Python ({_line(error)})", build)
    try:
        return Row("module _C", OK, f"built, uses {module.isa()}")
    except ValueError as error:
        return Row("module _C", state, _line(error), "unset CDISTILL_CPU_ISA")


def _extras() -> Iterator[Row]:
    for name, (extra, key) in EXTRAS.items():
        try:
            yield Row(name, OK, f"{version(name)}, for {key}")
        except PackageNotFoundError:
            yield Row(name, MISSING, f"not installed; {key} needs it", f"pip install 'cdistill[{extra}]'")


def _memory() -> Row:
    found = memory()
    return (
        Row("memory", UNUSED, "not known")
        if found is None
        else Row("memory", OK, f"{_gb(found.free)} free of {_gb(found.total)}")
    )


def _disk(name: str, folder: Path, purpose: str) -> Row:
    usage = shutil.disk_usage(folder)
    found = f"{_gb(usage.free)} free of {_gb(usage.total)}"
    return Row(name, OK, found) if usage.free >= LEAST_DISK else Row(name, MISSING, found, f"free some: {purpose}")


def _hub() -> Row:
    """Whether the hub answers, asked once for `HUB_SECONDS` at most."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return Row("hub", UNUSED, f"offline by HF_HUB_OFFLINE; cached models are in {constants.HF_HUB_CACHE}")
    answers: list[str] = []

    def ask() -> None:
        request = urllib.request.Request(constants.ENDPOINT, method="HEAD")
        try:
            urllib.request.urlopen(request, timeout=HUB_SECONDS).close()
            answers.append("")
        except urllib.error.HTTPError as error:
            answers.append("" if error.code < 500 else f"it answers {error.code}")
        except (OSError, ValueError) as error:
            answers.append(_line(getattr(error, "reason", error)))

    thread = threading.Thread(target=ask, daemon=True)  # looking up its name has no time limit of its own
    thread.start()
    thread.join(HUB_SECONDS)
    said = answers[0] if answers else f"no answer in {HUB_SECONDS:g} s"
    if not said:
        return Row("hub", OK, f"{constants.ENDPOINT} answers")
    do = "name folders in the place of ids, and set HF_HUB_OFFLINE=1 to go without waiting"
    return Row("hub", MISSING, f"{constants.ENDPOINT}: {said}", do)


def _gb(size: int) -> str:
    return f"{size / 10**9:.1f} GB"
