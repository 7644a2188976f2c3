"""Files of results: one JSON object for each analysis in a folder, and the page made of all that are there."""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from cdistill import __version__
from cdistill.attention.models import Models, heads_of
from cdistill.errors import InputError
from cdistill.eval.files import read_text
from cdistill.files import write_text
from cdistill.vat import attention_layers

VERSION = 1
ANALYSES = ("similarity", "confidence", "intervene", "maps")
PAGE = "page.html"


def facts(models: Models) -> dict[str, Any]:
    """What a file says of the models."""

    def of(index: int) -> dict[str, Any]:
        loaded = models.loaded[index]
        said = {"name": loaded.name, "fingerprint": loaded.fingerprint, "dtype": loaded.form}
        return said | {"layers": list(attention_layers(loaded.model)), "heads": heads_of(loaded.model)}

    students = []
    for i, meeting in enumerate(models.alignments):
        matches = {
            "depth": [[match.student, list(match.teachers)] for match in meeting.depth],
            "understanding": [[match.student, list(match.teachers)] for match in meeting.understanding],
            "grouped": meeting.grouped,
        }
        students.append(of(i + 1) | {"matches": matches})
    return {"teacher": of(0), "students": students}


def whole(analysis: str, models: Models, results: Mapping[str, Any]) -> dict[str, Any]:
    """A file's contents."""
    made_by = {"cdistill": __version__} | {name: version(name) for name in ("torch", "transformers")}
    return {"analysis": analysis, "version": VERSION, "made_by": made_by, **facts(models), **results}


def numbers(values: Any) -> Any:
    """Arrays as lists of six digits; what is not a number is None."""
    if isinstance(values, Mapping):
        return {key: numbers(value) for key, value in values.items()}
    if isinstance(values, np.ndarray):
        return numbers(values.tolist())
    if isinstance(values, (list, tuple)):
        return [numbers(value) for value in values]
    if isinstance(values, float):
        return float(f"{values:.6g}") if np.isfinite(values) else None
    return values


def check_folder(folder: Path) -> None:
    """Raise ValueError unless results can be written to a folder and the page made of what is there, in one line."""
    if folder.exists() and not folder.is_dir():
        raise InputError(f"--output: {str(folder)!r} is a file; name a folder")
    read(folder)


def read(folder: Path) -> dict[str, dict[str, Any]]:
    """All results in a folder, by analysis.

    Raises:
        ValueError: a file is not what this version writes.
    """
    found = {}
    for analysis in ANALYSES:
        path = folder / f"{analysis}.json"
        if not path.is_file():
            continue
        try:
            result = json.loads(read_text(path))
            said = result["analysis"], result["version"]
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise InputError(f"{path}: is not what `cdistill analyze` writes ({error!r:.80}); move it away") from None
        if said != (analysis, VERSION):
            raise InputError(
                f"{path}: holds results of {said[0]!r}, version {said[1]}, and this is version {VERSION} of {analysis!r}; run "
                "the analysis again in another folder"
            )
        found[analysis] = result
    return found


def write(folder: Path, result: Mapping[str, Any]) -> list[Path]:
    """Write an analysis and the page of all that the folder holds; the paths."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--output: {folder} cannot be made ({error.strerror})") from None
    path = folder / f"{result['analysis']}.json"
    write_text(path, json.dumps(numbers(dict(result)), indent=1, ensure_ascii=False) + "\n")
    return [path, write_page(folder)]


def write_page(folder: Path) -> Path:
    """Make the page of what a folder holds; its path. ValueError where that is nothing, or of another version."""
    from cdistill.attention.page import page

    found = read(folder)
    if not found:
        raise InputError(f"{folder}: holds no results of `cdistill analyze`")
    write_text(folder / PAGE, page(found, folder))
    return folder / PAGE
