"""Where results go, and what they say of where, when and with what they were made."""

import json
import os
import platform
import re
import subprocess
from datetime import UTC, datetime
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

import cdistill

ROOT = Path(__file__).parent.parent


def processor() -> str:
    try:
        with open("/proc/cpuinfo") as lines:
            return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (FileNotFoundError, StopIteration):
        return platform.processor() or platform.machine()


def name_of(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else processor()


def cpu_environment() -> dict[str, Any]:
    """Processor, number of cores, load before the measurement, and versions."""
    return {
        "processor": processor(),
        "cores": os.cpu_count(),
        "load_average": os.getloadavg()[0],
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def _output(*command: str) -> str | None:
    try:
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    except (FileNotFoundError, subprocess.CalledProcessError):
        return None


def version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def environment(device: torch.device) -> dict[str, Any]:
    """Where, when and with what the results were made."""
    cuda = device.type == "cuda"
    changes = _output("git", "status", "--porcelain", "--untracked-files=no")
    driver = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") if cuda else None
    packages = ("triton", "flash-attn", "flash-attn-3", "flash-attn-4", "liger-kernel")
    return {
        "device": name_of(device),
        "compiled": find_spec("cdistill._C") is not None,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_average": os.getloadavg()[0],
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": _output("git", "rev-parse", "HEAD") or os.environ.get("CDISTILL_COMMIT"),
        "uncommitted_changes": None if changes is None else bool(changes),
        "versions": {
            "python": platform.python_version(),
            "cdistill": ("checkout" if Path(cdistill.__file__).is_relative_to(ROOT) else version("cdistill")),
            "torch": torch.__version__,
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version() if cuda else None,
            "driver": driver.splitlines()[0] if driver else None,
            **{name: version(name) for name in packages if version(name)},
        },
    }


def results_folder() -> Path:
    """benchmarks/results, or what CDISTILL_RESULTS says."""
    return Path(os.environ.get("CDISTILL_RESULTS") or ROOT / "benchmarks/results")


def slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


class ResultsFile:
    """results.json of one device, written anew whenever something is added, so that a cut-off run leaves its results."""

    def __init__(self, path: Path, data: dict[str, Any]):
        self.path, self.data = path, data

    @classmethod
    def new(cls, folder: Path, device: torch.device) -> "ResultsFile":
        data = environment(device)
        return cls(folder / slug(data["device"]) / "results.json", data)

    @classmethod
    def read(cls, path: Path) -> "ResultsFile":
        return cls(path, json.loads(path.read_text()))

    def add(self, section: str, found: Any) -> None:
        """Put ``found`` into a section; lists and dictionaries grow."""
        if isinstance(found, list):
            self.data.setdefault(section, []).extend(found)
        elif isinstance(found, dict):
            self.data.setdefault(section, {}).update(found)
        else:
            self.data[section] = found
        self.path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = self.path.with_suffix(".part")
        unfinished.write_text(json.dumps(self.data, indent=1) + "\n")
        unfinished.replace(self.path)
