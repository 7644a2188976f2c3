"""What a run says of itself as it goes on: the bar, metrics.jsonl, TensorBoard, and the trackers of transformers."""

import json
import math
import resource
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainingArguments

from cdistill.errors import InputError
from cdistill.runtime import pulse
from cdistill.runtime.json_lines import read_lines, say_damaged, write_lines
from cdistill.train.run_folder import METRICS
from cdistill.train.terms import OF_SEVERAL, TERMS

LENGTHS = ("reply_tokens", "replies_ended")  # of stages whose student answers
OF_TEACHERS = tuple(f"{name}/" for name in OF_SEVERAL)  # by the names of several
TENSORBOARD = "tensorboard"  # written by `RunLog`, one folder for each stage


def check_trackers(names: Sequence[str]) -> None:
    """Raise ValueError unless transformers knows every tracker and its package is installed."""
    from transformers.integrations import integration_utils

    known, there = integration_utils.INTEGRATION_TO_CALLBACK, integration_utils.get_available_reporting_integrations()
    for name in names:
        if name not in known:
            raise InputError(f"report_to must name trackers of transformers ({', '.join(known)}), got {name!r}")
        if name not in there:
            raise InputError(f"report_to: {name} is not installed: pip install {name.replace('_', '-')}")


class RunLog(TrainerCallback):
    """Progress bar, metrics.jsonl and TensorBoard of one stage, on the first process only.

    Args:
        output: the run's folder.
        label: folder name of the stage, such as ``2-dft``.
        stage: name of its section.
        per_step: samples of a global batch.
        steps: of the stage.
        tensorboard: whether to write TensorBoard's files.
    """

    def __init__(
        self, output: Path, label: str, stage: str, *, per_step: int, steps: int, tensorboard: bool = True
    ) -> None:
        self.output, self.label, self.stage = output, label, stage
        self.per_step, self.steps, self.tensorboard = per_step, steps, tensorboard
        self._board: Any = None
        self._open = ExitStack()
        self.last: dict[str, Any] = {}

    def rewind(self, step: int) -> None:
        """Drop what was logged of this stage after ``step``, the one that training goes on from."""
        path = self.output / METRICS
        if not path.is_file():
            if step:
                print(f"{path} is missing: what was logged up to step {step:,} of {self.label} is lost", flush=True)
            return
        found, damaged = read_lines(path, "stage", "step")
        say_damaged(path, damaged)
        kept = [entry for entry in found if entry["stage"] != self.stage or _whole(entry["step"]) <= step]
        for entry in kept:
            if entry["stage"] == self.stage and "loss" in entry:
                self.last = entry
        write_lines(path, kept)

    def on_train_begin(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        """Open the files."""
        if not state.is_world_process_zero:
            return
        import time

        from tqdm import tqdm

        self._clock = time.perf_counter
        self._start = self._clock() - self.last.get("elapsed_s", 0.0)
        self._last_step, self._last_time = state.global_step, self._clock()
        self._metrics = self._open.enter_context((self.output / METRICS).open("a", encoding="utf-8"))
        if self.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._open.enter_context(_silent_writer())
            self._board = SummaryWriter(str(self.output / TENSORBOARD / self.label), purge_step=state.global_step + 1)
            self._open.callback(self._board.close)
        self._bar = tqdm(total=self.steps, initial=state.global_step, desc=self.label, unit="step", mininterval=1.0)
        self._open.callback(self._bar.close)

    def on_step_end(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        """Move the bar; the last step is always logged."""
        pulse.beat()
        if state.is_world_process_zero:
            self._bar.update()
        if state.global_step == state.max_steps:
            control.should_log = True

    def on_log(self, args: TrainingArguments, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Write one line of metrics; what was measured of the student has been written."""
        if not state.is_world_process_zero or "loss" not in logs:
            return
        now, step = self._clock(), state.global_step
        seconds = max(now - self._last_time, 1e-9)
        rate = (step - self._last_step) * self.per_step / seconds
        self._last_step, self._last_time = step, now
        entry: dict[str, Any] = {
            "stage": self.stage,
            "step": step,
            "samples": step * self.per_step,
            "loss": logs["loss"],
        }
        terms = TERMS.values()
        entry |= {term.name: logs.get(term.name) for term in terms if term.is_column}
        others = [term.name for term in terms if term.is_logged and not term.is_column]
        entry |= {name: logs[name] for name in others if name in logs}
        entry |= {name: value for name, value in logs.items() if name.startswith(OF_TEACHERS)}
        entry |= {name: logs[name] for name in LENGTHS if name in logs}
        for name in (name for term in terms for name in term.details):
            if values := [logs[f"{name}/{i}"] for i in range(len(logs)) if f"{name}/{i}" in logs]:
                entry[name] = values
        entry |= {"skipped": logs["skipped"], "learning_rate": logs["learning_rate"]}
        if logs.get("grad_norm") is not None:
            entry["grad_norm"] = float(logs["grad_norm"])
        entry |= {"samples_per_s": rate, "tokens_per_s": logs["tokens"] / seconds, "elapsed_s": now - self._start}
        entry |= {"memory_mb": _memory(), "processes": args.world_size}
        self._write(entry)
        for name, value in entry.items():
            for i, each in enumerate(value if isinstance(value, list) else ()):
                self._show(f"{name}/{i}", each, step)
            self._show(name, value, step)
        shown = {name: f"{entry[name]:.4f}" for name in ("loss", *TERMS) if entry.get(name) is not None}
        self._bar.set_postfix(shown, refresh=False)
        self.last = entry

    def measured(self, name: str, step: int, values: Mapping[str, float]) -> None:
        """Write what was measured of the student after a step, in a line of its own; on the first process."""
        entry = {"stage": self.stage, "step": step, "samples": step * self.per_step, name: dict(values)}
        self._write(entry)
        for key, value in values.items():
            self._show(f"{name}/{key}", value, step)

    def _write(self, entry: dict[str, Any]) -> None:
        self._metrics.write(json.dumps(entry) + "\n")
        self._metrics.flush()

    def _show(self, name: str, value: Any, step: int) -> None:
        if self._board is not None and isinstance(value, float):
            self._board.add_scalar(name, value, step)

    def on_train_end(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        """Close what `on_train_begin` opened."""
        self.close()

    def close(self) -> None:
        """Close bar and files; harmless when they are closed or were never opened."""
        self._open.close()


@contextmanager
def _silent_writer() -> Iterator[None]:
    """TensorBoard's thread says nothing of a file that it cannot write: the next call of its writer raises the same error."""
    before = threading.excepthook

    def is_writer(thread: threading.Thread | None) -> bool:
        return type(thread).__module__.startswith("tensorboard.")

    threading.excepthook = lambda failed: None if is_writer(failed.thread) else before(failed)
    try:
        yield
    finally:
        for thread in filter(is_writer, threading.enumerate()):
            thread.join(1.0)  # it may be about to say it
        threading.excepthook = before


def _memory() -> float:
    """The most memory, in MB, that this process has had: of a GPU where there is one, else of the machine."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e6
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6


def _whole(step: Any) -> float:
    """A step of a log; what is none is beyond all."""
    return step if isinstance(step, int) else math.inf
