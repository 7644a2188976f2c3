"""Exported students in OpenVINO: replies, accuracy, speed and size beside transformers, with weights of every format.

`make openvino-env && python -m benchmarks.serve_openvino [MODEL ...]` (by default the built-in teacher) writes each model by
`cdistill export --format openvino`, asks it and transformers (fp32) 350 questions about an image, 25 about two and 25 without
one, greedily, and writes benchmarks/results/serve/openvino.json. It ends with 1 where fp32 does not give every reply.
"""

import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from benchmarks._results import ROOT
from benchmarks._serving import THREADS, ask_elsewhere, by_transformers, compared, conversations, write_rows
from cdistill.models.export import export
from cdistill.models.load import load_model
from cdistill.models.processor import load_processor
from cdistill.serving.openvino import WEIGHTS, export_openvino

PYTHON = ROOT / ".venv-openvino/bin/python"
WORKER = Path(__file__).with_name("_openvino_worker.py")


def rows(reference: str, scratch: Path) -> list[dict[str, Any]]:
    """A model in OpenVINO, with weights of every format."""
    plain = export(reference, scratch / "plain").folder
    model, processor = load_model(plain).eval(), load_processor(plain, "model")
    asked, answers = conversations()
    expected = by_transformers(model, processor, asked)
    found = []
    for weights in WEIGHTS:
        folder = export_openvino(reference, scratch / weights, python=PYTHON, weights=weights).folder
        answer = ask_elsewhere(PYTHON, WORKER, folder, asked, scratch)
        row = {
            "model": reference,
            "engine": f"OpenVINO {answer['version']}",
            "format": f"openvino, {weights}",
            **compared(answer, expected, answers, processor),
            "bytes": sum(path.stat().st_size for path in folder.glob("*.bin")),
        }
        print(row, flush=True)
        found.append(row)
    return found


def main() -> int:
    """Serve them, and write the table."""
    if not PYTHON.exists():
        print("benchmarks.serve_openvino needs optimum-intel: make openvino-env", file=sys.stderr)
        return 2
    torch.set_num_threads(THREADS)
    found = []
    for reference in sys.argv[1:] or ["builtin:teacher"]:
        with tempfile.TemporaryDirectory() as name:
            found += rows(reference, Path(name))
    write_rows("openvino.json", found)
    return int(any(row["same_replies"] < row["conversations"] for row in found if row["format"].endswith("fp32")))


if __name__ == "__main__":
    sys.exit(main())
