"""``cdistill eval presets``: what to download for each benchmark, where it goes, and on what terms."""

from __future__ import annotations

import argparse
from pathlib import Path

from cdistill.data.presets import aligned
from cdistill.errors import InputError
from cdistill.eval import benchmarks

SHOWN = 5  # images that are not good


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what the command takes."""
    parser.add_argument("task", nargs="?", help="a benchmark or a group (default: a table of all)")


def main(options: argparse.Namespace) -> int:
    """Print a table of all benchmarks, or all that is known of some."""
    if options.task is None:
        rows = [
            (name, f"{_entries(name):,}" if _entries(name) else "?", benchmarks.get(name).title)
            for name in benchmarks.NAMES
        ]
        print("\n".join(aligned([("task", "entries", "benchmark"), *rows])))
        for group, names in benchmarks.GROUPS.items():
            print(f"{group}: {', '.join(names)}")
        print("cdistill eval presets TASK says what to download for it")
        return 0
    for line in (line for name in benchmarks.names(options.task) for line in describe(name)):
        print(line)
    return 0


def describe(name: str) -> list[str]:
    """What there is to know before a benchmark is downloaded."""
    benchmark = benchmarks.get(name)
    counts = ", ".join(f"{subtype} {count:,}" for subtype, count in benchmark.counts.items())
    entries = f"{_entries(name):,} entries ({counts})" if _entries(name) else "entries: not published"
    downloads = benchmark.download.split("; ")
    return [
        f"{name}: {benchmark.title}",
        f"  licence: {benchmark.licence}",
        f"  {entries}",
        *(f"  {each}" for each in downloads),
    ]


def check(name: str, data: Path, images: Path | None) -> int:
    """Print how many questions and images of a benchmark are there, as `cdistill data check --preset` does; open them all.

    Returns:
        1 if an image is missing or cannot be read, or a sub-type has not its published number of entries, else 0.
    """
    from tqdm import tqdm

    from cdistill.data.samples import BadSampleError
    from cdistill.eval.pictures import Pictures

    benchmark = benchmarks.get(name)
    if not data.is_dir():
        raise InputError(f"{data}: is no folder; that of the files of {name} is checked")
    questions = benchmark.questions(data)
    remarks = benchmark.remarks(questions)
    pictures = Pictures([*([] if images is None else [images]), data, data / "images"])
    names = list(dict.fromkeys(image for question in questions for image in question.images))
    lacking: dict[str, str] = {}
    for image in tqdm(names, unit=" images", disable=None):
        try:
            pictures.open(image)
        except BadSampleError as error:
            lacking[image] = str(error)
    print(
        f"{name}: {len(questions):,} questions about {len(names):,} images, {len(names) - len(lacking):,} of them good"
    )
    for line in (*remarks, *list(lacking.values())[:SHOWN]):
        print(line)
    if len(lacking) > SHOWN:
        print(f"and {len(lacking) - SHOWN:,} more images")
    return int(bool(lacking or remarks))


def _entries(name: str) -> int:
    return sum(benchmarks.get(name).counts.values())
