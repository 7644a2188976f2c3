"""Students as OpenVINO's models, made by optimum-intel in an environment of its own."""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from dataclasses import replace
from pathlib import Path

from cdistill.errors import InputError
from cdistill.files import building
from cdistill.models.export import Exported, check_output, export
from cdistill.models.folder import one_line
from cdistill.models.load import load_config, resolve_folder
from cdistill.serving import to_openvino

WEIGHTS = ("fp32", "fp16", "int8", "int4")
KINDS = ("llava", "cdistill_taf_llava")


def export_openvino(model: str | Path, output: str | Path, *, python: str | Path, weights: str = "fp32") -> Exported:
    """Write a LLaVA or a TAF student as the folder that optimum-intel's ``OVModelForVisualCausalLM`` loads, atomically.

    Its greedy replies are compared with the model's before the folder gets its name, except with weights of fewer bits.

    Args:
        model: as `cdistill.models.export.export` takes it.
        output: a folder that does not exist or is empty.
        python: that of an environment with optimum-intel, which needs an older transformers than cdistill does.
        weights: ``fp32``, ``fp16``, ``int8`` or ``int4``.

    Raises:
        ValueError: the model is of another family, that Python has no optimum-intel or could not convert the model, replies
            differ, or as `export` raises it.
    """
    output = Path(os.path.abspath(output))
    if weights not in WEIGHTS:
        raise InputError(f"weights must be one of {', '.join(WEIGHTS)}, got {weights!r}")
    check_output(output)
    kind = load_config(resolve_folder(str(model), "model"), "model").model_type
    if kind not in KINDS:
        raise InputError(
            f"model: {kind} models are for optimum-cli, which reads what `cdistill export` writes; this is for LLaVAs"
        )
    _check_python(python)
    with tempfile.TemporaryDirectory() as name:
        made = export(model, Path(name) / "student", code=True)
        output.parent.mkdir(parents=True, exist_ok=True)
        with building(output) as part:
            found = _run(python, made.folder, part, weights)
            if found["same"] < found["asked"] and weights in ("fp32", "fp16"):
                raise InputError(
                    f"output: OpenVINO's model replies otherwise than the model to one of {found['asked']} questions or more"
                )
    checked = f"OpenVINO {found['openvino']} gives the same reply to {found['same']} of {found['asked']} questions"
    remarks = tuple(remark for remark in made.remarks if not remark.startswith("--code"))
    return replace(
        made, folder=output, model_class="OVModelForVisualCausalLM", dtype=weights, checked=checked, remarks=remarks
    )


def _check_python(python: str | Path) -> None:
    command = [str(python), "-c", "import importlib.util as i, sys; sys.exit(i.find_spec('optimum.intel') is None)"]
    try:
        ended = subprocess.run(command, capture_output=True)
    except OSError as error:
        raise InputError(f"python: {python} cannot be run ({error.strerror})") from None
    if ended.returncode != 0:
        raise InputError(
            f"python: {python} has no optimum-intel, which needs an older transformers than cdistill, and so an environment: "
            "python -m venv ov && ov/bin/pip install 'optimum-intel[openvino]'"
        )


def _run(python: str | Path, folder: Path, output: Path, weights: str) -> dict[str, int]:
    with tempfile.TemporaryDirectory() as modules:  # code of folders is kept there
        ended = subprocess.run(
            [str(python), "-P", to_openvino.__file__, str(folder), str(output), weights],
            capture_output=True,
            text=True,
            env={**os.environ, "HF_MODULES_CACHE": modules},
        )
    if ended.returncode != 0:
        said = [line for line in ended.stderr.splitlines() if line.strip()]
        last = said[-1] if said else f"exit status {ended.returncode}"
        raise InputError(f"output: optimum-intel could not write the model: {one_line(RuntimeError(last))}")
    found: dict[str, int] = json.loads(ended.stdout.splitlines()[-1])
    return found
