"""``python -m cdistill.reproduce.worker FOLDER``: trains the run whose job lies in a folder, and examines the student."""

import json
import sys
import time
from pathlib import Path
from typing import Any

from cdistill.files import write_text
from cdistill.runtime.errors import RunError, print_error, telling_lack_of_memory
from cdistill.runtime.launch import die_with_parent
from cdistill.train import run
from cdistill.train.run_folder import read_recipe

JOB, RESULT, WEIGHTS = "job.json", "result.json", "run"


def perform(folder: Path) -> dict[str, Any]:
    """Train the recipe in a folder, or go on with it, and examine the student; returns what the record keeps of it.

    A part is not examined, a model that is there already not trained.
    """
    from cdistill.eval.builtin_task import Exam, knows_the_task
    from cdistill.eval.builtin_words import in_own_words
    from cdistill.eval.loading import fingerprint, load_questioner
    from cdistill.models.load import load_for_evaluation, resolve_folder

    recipe, job = read_recipe(folder), json.loads((folder / JOB).read_text(encoding="utf-8"))
    final = job["model"] or run(recipe, resume=(folder / WEIGHTS / "recipe.yaml").is_file())
    accuracy = None
    if job["exam"] is not None:
        student = load_for_evaluation(str(final), "student")
        exam, folder = Exam(**job["exam"]), resolve_folder(str(final), "student")
        processor = load_questioner([folder], student.config, usual=True)
        knows = knows_the_task(student, getattr(processor, "tokenizer", processor))
        accuracy = rounded(
            exam.evaluate_both(student, job["title"]) if knows else in_own_words(exam, student, processor, job["title"])
        )
    model = fingerprint([resolve_folder(str(final), "student")]) if accuracy is None else None
    return {"accuracy": accuracy, "model": model, "cpu_seconds": round(time.process_time(), 1)}


def rounded(both: dict[str, Any]) -> dict[str, Any]:
    """Accuracies by way, family and sub-type, to six digits; the exam's other facts stand in the record."""
    families = ("recognition", "compositional")
    return {
        way: {family: {name: round(value, 6) for name, value in tables[family].items()} for family in families}
        for way, tables in both.items()
    }


def main() -> int:
    """Do the job; returns the exit code."""
    die_with_parent()
    folder = Path(sys.argv[1])
    try:
        with telling_lack_of_memory():
            write_text(folder / RESULT, json.dumps(perform(folder)) + "\n")
    except (ValueError, OSError, RunError) as error:
        return print_error(error)
    return 0


if __name__ == "__main__":
    sys.exit(main())
