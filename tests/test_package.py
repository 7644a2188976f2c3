"""What is installed and shipped: wheel and sdist have every file, and the package works out of reach of its sources."""

import importlib
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
# What git has and a source distribution does without.
NOT_SHIPPED = {".gitignore"}

# Commands of an installed package that read what it ships: recipes, models, tables, templates, kernels' tiles.
SMALL = [
    f"stage.{stage}.{key}=2"
    for stage in ("dpt", "dft", "sft")
    for key in ("samples", "global_batch_size", "micro_batch_size")
]
COMMANDS = [
    ["doctor", "--json"],
    ["recipes", "show", "demo-sft"],
    ["eval", "builtin:teacher", "--n", "2"],
    ["train", "demo-sft", *SMALL, "output=run"],
    ["report", "run", "--output", "run.html"],
    ["export", "run", "student"],
    ["reproduce", "table2", "--output", "kept", "--report"],
]
PROGRAM = """
import sys
import cdistill, cdistill._C, cdistill.kernels._launch
from cdistill.cli import main
for module in (cdistill, cdistill._C, cdistill.kernels._launch):
    print("from", module.__file__, file=sys.stderr)
for words in {commands!r}:
    status = main(words)
    print(words, status, file=sys.stderr)
"""


def setup_py(*words):
    done = subprocess.run(
        [sys.executable, "setup.py", "-q", *map(str, words)], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """Where pip has put the wheel, with the module that was compiled for this checkout."""
    build, dist, folder = (tmp_path_factory.mktemp(name) for name in ("build", "dist", "wheel"))
    compiled = Path(importlib.import_module("cdistill._C").__file__)
    (build / "cdistill").mkdir()
    os.utime(
        shutil.copy(compiled, build / "cdistill")
    )  # newer than its sources, which are therefore not compiled again
    setup_py("build", "--build-base", build, "--build-lib", build, "bdist_wheel", "--dist-dir", dist, "--skip-build")
    (wheel,) = dist.iterdir()
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-compile", "--no-index"]
    subprocess.run([*pip, "--target", folder, wheel], check=True)
    return folder


def tracked():
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    return {name for name in listed.splitlines() if (ROOT / name).exists()}


def test_a_wheel_has_every_file_of_the_package(tree):
    held = {str(path.relative_to(tree)) for path in tree.rglob("*") if path.is_file()}
    ours = {f"cdistill/{name}" if name.startswith("kernels/") else name for name in tracked()}
    compiled = f"cdistill/_C{sysconfig.get_config_var('EXT_SUFFIX')}"
    assert {name for name in held if name.startswith("cdistill/")} == {
        compiled,
        *(name for name in ours if name.startswith("cdistill/")),
    }


def test_a_source_distribution_has_what_git_has_and_nothing_else(tmp_path):
    setup_py("sdist", "--dist-dir", tmp_path)
    (path,) = tmp_path.iterdir()
    with tarfile.open(path) as archive:
        held = {name.partition("/")[2] for name in archive.getnames() if archive.getmember(name).isfile()}
    made = {name for name in held if name in ("PKG-INFO", "setup.cfg") or name.startswith("cdistill.egg-info/")}
    assert held - made == tracked() - NOT_SHIPPED


def test_commands_work_from_an_installed_wheel(tree, tmp_path):
    """Without a compiler, or any other program, in the path."""
    (tmp_path / "kept").mkdir()
    for path in (ROOT / "benchmarks/results/reproduce").glob("*.json"):
        shutil.copy(path, tmp_path / "kept")
    done = subprocess.run(
        [sys.executable, "-P", "-c", PROGRAM.format(commands=COMMANDS)],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(tree), "HOME": str(tmp_path), "PATH": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    said = done.stderr.splitlines()
    loaded = [line.removeprefix("from ") for line in said if line.startswith("from ")]
    assert len(loaded) == 3 and all(path.startswith(str(tree)) for path in loaded), done.stderr
    for words in COMMANDS:
        assert f"{words} 0" in said, done.stderr


def test_entry_points_name_what_is_there():
    """lmms-eval and vLLM find these by name; neither is installed here."""
    with (ROOT / "pyproject.toml").open("rb") as file:
        groups = tomllib.load(file)["project"]["entry-points"]
    for points in groups.values():
        for target in points.values():
            module, _, name = target.partition(":")
            assert callable(getattr(importlib.import_module(module), name))
