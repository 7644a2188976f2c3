"""What engines of other environments need of students: what can be told without them is told before anything is written.

The engines themselves are run by `python -m benchmarks.serve_openvino` and `python -m benchmarks.serve_vllm`.
"""

import sys

import pytest
from family_models import build

from cdistill.cli import main
from cdistill.serving.openvino import export_openvino


def refused(capsys, *words):
    assert main(["export", *words]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line.removeprefix("cdistill: error: ")


def test_a_python_that_lacks_the_engine_is_told_before_anything_is_written(tmp_path, capsys):
    openvino = ["builtin:teacher", str(tmp_path / "out"), "--format", "openvino"]
    assert refused(capsys, *openvino).startswith("--python: --format openvino needs the Python of an environment with")
    said = refused(capsys, *openvino, "--python", sys.executable)
    assert (
        said.startswith(f"python: {sys.executable} has no optimum-intel")
        and "pip install 'optimum-intel[openvino]'" in said
    )
    said = refused(capsys, *openvino, "--python", str(tmp_path / "nothing"))
    assert said == f"python: {tmp_path / 'nothing'} cannot be run (No such file or directory)"
    said = refused(capsys, *openvino, "--python", sys.executable, "--quantize", "q8_0")
    assert said == "--quantize: --format openvino has fp32, fp16, int8, int4, not q8_0"
    assert refused(capsys, *openvino, "--check") == "--check: --format openvino does without it"
    assert not list(tmp_path.iterdir())


def test_models_and_outputs_that_do_not_fit(tmp_path):
    build("qwen2_vl", 0).save_pretrained(tmp_path / "qwen")
    with pytest.raises(
        ValueError, match=r"^model: qwen2_vl models are for optimum-cli, which reads what `cdistill export`"
    ):
        export_openvino(tmp_path / "qwen", tmp_path / "out", python=sys.executable)
    with pytest.raises(ValueError, match=r"^weights must be one of fp32, fp16, int8, int4, got 'int2'$"):
        export_openvino("builtin:teacher", tmp_path / "out", python=sys.executable, weights="int2")
    with pytest.raises(ValueError, match=r"qwen exists and is no empty folder$"):
        export_openvino("builtin:teacher", tmp_path / "qwen", python=sys.executable)


def test_a_process_that_cannot_convert_leaves_nothing(tmp_path):
    """Its last line is told; this one has an optimum that is none."""
    package = tmp_path / "site" / "optimum"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "intel.py").touch()
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nPYTHONPATH={tmp_path / "site"} exec {sys.executable} "$@"\n')
    python.chmod(0o755)
    with pytest.raises(
        ValueError, match=r"^output: optimum-intel could not write the model: ModuleNotFoundError: .*optimum\.exporters"
    ):
        export_openvino("builtin:teacher", tmp_path / "out", python=python)
    assert not (tmp_path / "out").exists()
