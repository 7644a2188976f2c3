"""What the example has reached, in one small file: where from, how far each run is, what each model has answered."""

from __future__ import annotations

import json
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from cdistill.runtime.provenance import provenance

PACKAGES = ("gguf", "onnx", "onnxruntime", "xllamacpp")


def write_summary(folder: Path, target: Path) -> None:
    """Write what the runs and results in a folder say."""
    names = sorted(path.parent.name for path in folder.glob("*/metrics.jsonl"))
    content = {
        **_made_by(),
        "parts": _json(folder / "parts/checks.json"),
        "runs": {name: _stages(folder / name / "metrics.jsonl") for name in names},
        "results": {path.name: _answers(path) for path in sorted((folder / "results").glob("*"))},
    }
    part = target.with_suffix(".part")
    part.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    part.rename(target)


def _made_by() -> dict[str, Any]:
    made = provenance()
    for package in PACKAGES:
        try:
            made["versions"][package] = version(package)
        except PackageNotFoundError:
            made["versions"][package] = None
    made["processor"] = next(
        (line.split(":")[1].strip() for line in _lines(Path("/proc/cpuinfo")) if line.startswith("model name")),
        platform.machine(),
    )
    return {"command": "python examples/real/real.py --wheels WHEELS --folder FOLDER", **made}


def _stages(metrics: Path) -> list[dict[str, Any]]:
    """The last line of each stage: samples seen, losses, seconds."""
    last: dict[str, dict[str, Any]] = {}
    for line in _lines(metrics):
        entry = json.loads(line)
        last[entry["stage"]] = {key: entry[key] for key in ("stage", "step", "samples", "ar", "kd", "vat", "elapsed_s")}
    return list(last.values())


def _answers(folder: Path) -> dict[str, Any]:
    """Accuracies in % and standard errors of both benchmarks, as far as they are there."""
    found = {}
    for path in (folder / "sugarcrepe.json", folder / "vqav2.json"):
        if path.is_file():
            values = _json(path)
            shown = [name for name in values["metrics"] if "_first" not in name]
            found[path.stem] = {name: [values["metrics"][name], values["standard_errors"][name]] for name in shown}
    return found


def _json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def _lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
