"""A process that hangs while others wait: who it is, where it is, and that nobody is told of who only works long."""

import json
import os
import sys
import time
from dataclasses import replace

import pytest
import torch.distributed as dist
from builtin_models import make_recipe, save_base, save_teacher

from cdistill.runtime import launch, pulse
from cdistill.runtime.errors import ProcessError
from cdistill.train import run

BACKWARD = [["/x/torch/autograd/graph.py", "graph.py:1 in backward"], ["/x/trainer.py", "trainer.py:2 in step"]]
READING = [["/x/dataset.py", "dataset.py:7 in read"], ["/x/trainer.py", "trainer.py:2 in step"]]


@pytest.fixture
def clock(monkeypatch):
    """Seconds that pass when the test says so."""

    class Clock:
        now = 1000.0

        def monotonic(self):
            return self.now

        def sleep(self, seconds):
            raise AssertionError

    found = Clock()
    monkeypatch.setattr(pulse, "time", found)
    return found


class Ranks:
    """Two processes as they tell of themselves."""

    def __init__(self, clock, limit=100.0):
        self.store, self.clock = dist.HashStore(), clock
        self.watch = pulse.Watch(self.store, 2, limit)
        self.beats = [0, 0]

    def say(self, *tells):
        """A second passes; a process that is None says nothing."""
        self.clock.now += 1
        for rank, (still, stack) in enumerate(tell or (None, None) for tell in tells):
            if still is not None:
                self.beats[rank] += 1
                said = {"beats": self.beats[rank], "still": still, "host": "here", "pid": os.getpid(), "stack": stack}
                self.store.set(f"pulse/{rank}", json.dumps(said))
        return self.watch.stuck()


def test_one_that_hangs_in_python_is_told_with_its_stack(clock):
    ranks = Ranks(clock)
    assert ranks.say((50.0, BACKWARD), (50.0, READING)) is None
    line = ranks.say((101.0, BACKWARD), (101.0, READING))
    assert line.startswith(
        f"process 1 of 2 (process {os.getpid()} on here) has made no step for 101 s while others wait: it is at "
    )
    assert "dataset.py:7 in read < trainer.py:2 in step" in line


@pytest.mark.parametrize("stacks", [(BACKWARD, BACKWARD), (READING, READING)])
def test_nobody_is_told_where_nobody_can_be_known_or_all_work(clock, stacks):
    ranks = Ranks(clock)
    for still in (99.0, 101.0, 500.0):
        assert ranks.say((still, stacks[0]), (still, stacks[1])) is None


def test_one_that_does_not_run_is_told_sooner(clock):
    ranks = Ranks(clock)
    assert ranks.say((0.0, []), (0.0, [])) is None
    for second in range(1, 61):
        assert ranks.say((float(second), BACKWARD), None) is None
    line = ranks.say((61.0, BACKWARD), None)
    assert line.startswith("process 1 of 2") and "it does not run (" in line


def test_those_who_have_not_begun_and_no_limit(clock):
    assert Ranks(clock).say(None, None) is None
    ranks = Ranks(clock, limit=0)
    assert ranks.say((1e6, BACKWARD), (1e6, READING)) is None


def test_a_process_tells_of_itself(monkeypatch):
    monkeypatch.setattr(pulse, "BEAT_SECONDS", 0.02)
    told = []

    class Store:
        def set(self, key, value):
            assert key == "pulse/3"
            if len(told) >= 1000:
                raise RuntimeError("the store is gone")  # its thread ends with the first that it cannot tell
            told.append(value)

    own = pulse.Pulse(Store(), 3)

    def said():
        time.sleep(0.1)
        return json.loads(told[-1])

    assert said()["still"] == 0.0, "no step is waited for before the first"
    own.beat()
    waiting = said()
    assert waiting["still"] > 0.02 and waiting["pid"] == os.getpid()
    assert any("test_a_process_tells_of_itself" in text for _, text in waiting["stack"])
    with own.paused():
        assert said()["still"] == 0.0
    own.end()
    assert said()["still"] == 0.0
    told += [""] * 1000


STOPS = """
import os, signal
import torch.distributed as dist
from cdistill.runtime import launch, pulse
launch.init_process_group()
pulse.beat()
dist.barrier()
if os.environ["RANK"] == "1":
    os.kill(os.getpid(), signal.SIGSTOP)
dist.barrier()
"""


def test_a_stopped_process_ends_the_run_in_one_line(tmp_path, monkeypatch):
    path = tmp_path / "stops.py"
    path.write_text(STOPS)
    monkeypatch.delenv("MASTER_PORT", raising=False)
    program = (sys.executable, str(path))
    with pytest.raises(ProcessError, match=r"process 1 of 2 \(process \d+ on .*it does not run \(T \(stopped\)\)"):
        launch.start_processes(2, "train", tmp_path, program, max_stuck_seconds=2)


def test_a_run_watches_its_processes_and_each_step_is_a_beat(tmp_path, monkeypatch):
    save_teacher(tmp_path / "teacher")
    save_base(tmp_path / "base")
    recipe = make_recipe(tmp_path / "run", tmp_path, stages=["sft"], processes=2, max_stuck_seconds=7)
    watched, beats = [], []
    monkeypatch.setattr(launch, "start_processes", lambda *_, max_stuck_seconds: watched.append(max_stuck_seconds))
    monkeypatch.setattr(pulse, "beat", lambda: beats.append(1))
    run(recipe)
    assert watched == [7]
    run(replace(recipe, output=str(tmp_path / "alone"), processes=1))
    assert len(beats) == 3
