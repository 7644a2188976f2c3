"""Samples that cannot be used: they are left out, counted and reported at the end of a stage; too many end the run."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainingArguments

from cdistill.data.dataset import BAD, BadSample
from cdistill.runtime.collectives import first_process, gathered, gathered_objects
from cdistill.runtime.errors import BadDataError
from cdistill.runtime.json_lines import read_lines, say_damaged, write_lines

FILE = "bad_samples.jsonl"


class BadSamples(TrainerCallback):
    """Follows the bad samples that batches tell of; each counts once, however often its turn comes and in whichever process.

    Args:
        limit: bad samples of a stage that are put up with, over all processes.
        output: the run's folder, where `FILE` lists them.
        label: the stage in messages, such as ``2-dft``.
    """

    def __init__(self, limit: int, output: Path, label: str) -> None:
        self.limit, self.path, self.label = limit, output / FILE, label
        self.found: dict[str, BadSample] = {}  # of all processes, by place
        self._new: list[BadSample] = []  # of this process, since the last step

    def take(self, batch: dict[str, Any]) -> dict[str, Any]:
        """A batch without what it tells of bad samples, which is noted."""
        self._new += [bad for bad in batch.pop(BAD, ()) if bad.place not in self.found]
        return batch

    def on_step_end(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        """Raises BadDataError on all processes after the same step."""
        if any(gathered(len(self._new))):
            self.found |= {bad.place: bad for share in gathered_objects(self._new) for bad in share}
            self._new = []
        total = len(self.found)
        if total > self.limit:
            self.report()
            raise BadDataError(
                f"{self.label}, step {state.global_step}: {total} bad samples, more than max_bad_samples {self.limit}; "
                f"they are listed in {self.path}: `cdistill data check` finds all, --fix leaves them out"
            )

    def report(self) -> None:
        """Tell on the first process how many there were and write them to the file."""
        found = sorted(self.found.values())
        if not first_process() or not (found or self.path.is_file()):
            return
        known, damaged = read_lines(self.path, "stage")
        say_damaged(self.path, damaged)
        # an earlier attempt at the stage may have read another set
        kept = [entry for entry in known if entry["stage"] != self.label]
        write_lines(self.path, kept + [{"stage": self.label, **bad._asdict()} for bad in found])
        if not found:
            return
        reasons = ", ".join(f"{count} {reason}" for reason, count in Counter(bad.reason for bad in found).most_common())
        noun = "sample" if len(found) == 1 else "samples"
        print(f"{self.label}: {len(found)} bad {noun} left out ({reasons}) -> {self.path}", flush=True)

    def state_dict(self) -> list[list[str]]:
        """What a checkpoint needs."""
        return [list(bad) for bad in self.found.values()]

    def load_state_dict(self, state: list[list[str]]) -> None:
        """Go on from `state_dict`."""
        self.found = {bad.place: bad for bad in (BadSample(*fields) for fields in state)}
