"""Where students look as their teacher does: similarity of attention by layer, head and set (paper figures 2 and 9)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from cdistill.attention.data import Set
from cdistill.attention.measurement import Measured, measure
from cdistill.attention.models import Models
from cdistill.eval.statistics import bootstrapped_means
from cdistill.vat import attention_layers

OF_TEACHER = ("mass", "entropy")
OF_STUDENTS = ("visual", "text", "mass", "entropy", "visual_understanding", "text_understanding")


def similarity(models: Models, sets: Sequence[Set], batch_size: int | None) -> dict[str, Any]:
    """What the file holds under ``sets``: of every set and model each quantity with its interval, and students' differences."""
    return {"sets": [_of_set(models, each, measure(models, each, batch_size)) for each in sets]}


def describe(of: Set, measured: Measured) -> dict[str, Any]:
    """A set in a file."""
    return {
        "name": of.name,
        "group": of.group,
        "samples": len(measured.questions),
        "units": len(set(measured.units)),
        "left_out": measured.left_out,
    }


def _of_set(models: Models, of: Set, measured: Measured) -> dict[str, Any]:
    quantities = []
    for i, loaded in enumerate(models.loaded):
        meeting = models.alignments[i - 1] if i else None
        for name in OF_STUDENTS if i else OF_TEACHER:
            values = measured.stacked(i, name)
            mean, low, high = bootstrapped_means(values, measured.units)
            layers = list(attention_layers(loaded.model))
            if name.endswith("_understanding") and meeting is not None:
                layers = [match.student for match in meeting.understanding]
            quantities.append(
                {
                    "model": loaded.name,
                    "role": "student" if i else "teacher",
                    "place": max(0, i - 1),
                    "quantity": name,
                    "layers": layers,
                    "mean": mean[:, 0],
                    "low": low[:, 0],
                    "high": high[:, 0],
                    "heads": mean[:, 1:].tolist() if mean.shape[1] > 1 else None,
                }
            )
    return describe(of, measured) | {"quantities": quantities, "averages": _averages(models, measured)}


def _averages(models: Models, measured: Measured) -> list[dict[str, Any]]:
    """Of each student the means over the layers of the middle, and how they differ from the first student's."""
    result = []
    for name in ("visual_understanding", "text_understanding"):
        by_sample = [measured.stacked(i + 1, name).mean((1, 2)) for i in range(len(models.students))]
        columns = np.stack([*by_sample, *(values - by_sample[0] for values in by_sample)], 1)
        mean, low, high = bootstrapped_means(columns, measured.units)
        n = len(by_sample)
        for i, student in enumerate(models.names):
            entry: dict[str, Any] = {"model": student, "place": i, "quantity": name}
            entry |= {"mean": mean[i], "low": low[i], "high": high[i]}
            if i:
                entry["difference"] = {
                    "to": models.names[0],
                    "mean": mean[n + i],
                    "low": low[n + i],
                    "high": high[n + i],
                }
            result.append(entry)
    return result


def table(result: dict[str, Any]) -> list[str]:
    """The averages as lines of text."""
    lines = []
    for of in result["sets"]:
        lines.append(f"{of['name']}: {of['samples']:,} samples about {of['units']:,} images or groups")
        for entry in of["averages"]:
            what = "image" if entry["quantity"].startswith("visual") else "text"
            line = f"  {what:<6}{entry['mean']:.3f} [{entry['low']:.3f}, {entry['high']:.3f}]  {entry['model']}"
            if "difference" in entry:
                d = entry["difference"]
                line += f"  ({d['mean']:+.3f} [{d['low']:+.3f}, {d['high']:+.3f}] to {d['to']})"
            lines.append(line)
    lines.append("cosine of student's and teacher's attention in the middle layers, mean over samples, 95 % interval")
    unlike = {s for s, n in zip((m["name"] for m in result["students"]), _counts(result), strict=True) if n}
    if unlike:
        lines.append(f"no single heads of {', '.join(sorted(unlike))}: another number of heads than the teacher's")
    return lines


def _counts(result: dict[str, Any]) -> list[bool]:
    return [student["heads"] != result["teacher"]["heads"] for student in result["students"]]
