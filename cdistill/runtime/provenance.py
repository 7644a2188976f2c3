"""Where a result comes from: versions, the commit of the source, the machine."""

import os
import platform
import shutil
import subprocess
from importlib.metadata import version
from pathlib import Path
from typing import Any

from cdistill import __version__

PACKAGES = ("torch", "transformers", "deepspeed")


def provenance() -> dict[str, Any]:
    """Versions of the package and of what it trains with, the commit, and the machine."""
    return {
        "versions": {"cdistill": __version__, "python": platform.python_version()} | {p: version(p) for p in PACKAGES},
        "commit": commit(),
        "machine": f"{platform.machine()}, {len(os.sched_getaffinity(0))} CPU cores",
    }


def commit() -> str | None:
    """Commit of the source checkout the package runs from, if it is one."""
    root = Path(__file__).parents[2]
    if shutil.which("git") is None or not (root / ".git").exists():
        return None
    done = subprocess.run(["git", "-C", str(root), "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else None
