"""Runs of `cdistill train` and `eval` and their ranks in forks (`forks.py`), killed where a plan says. A plan is a mapping:

- ``call``: dotted name of a function (``torch.save``); its ``nth`` call with ``match`` in its arguments kills the process,
  before it does anything, or with ``half`` after it has done half of its work (a file cut in two, a folder half removed);
- ``step``: ``[stage, n]`` sends ``signal`` after that step, or with ``bytes`` lets no file grow larger from then on, as on a
  full disk; ``seconds`` sends the signal after that time;
- ``set``: ``[module, name, value]`` sets a constant;
- ``spoil``: ``[stage, n]`` makes the loss of the step after the n-th NaN;
- ``rank``: the rank it is for, otherwise each; -1 is the process that starts the others.
"""

import importlib
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

from forks import Fork, leave


class ForkedPopen:
    """What `cdistill.runtime.launch` uses of subprocess.Popen, for a rank that is forked."""

    plan: dict
    real = subprocess.Popen

    def __init__(self, command, *, env, start_new_session):
        worker = command[-3]
        assert start_new_session and worker in ("cdistill.train.worker", "cdistill.eval.worker")
        self.returncode = None
        self.pid = os.fork()
        if not self.pid:
            os.setsid()
            for number in (signal.SIGTERM, signal.SIGINT):  # as after an exec
                signal.signal(number, signal.SIG_DFL)
            subprocess.Popen = self.real
            os.environ.clear()
            os.environ.update(env)
            sys.argv = ["worker", *command[-2:]]
            carry_out(self.plan, int(env["RANK"]))
            leave(importlib.import_module(worker).main)

    def poll(self):
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode

    def wait(self):
        while self.poll() is None:
            time.sleep(0.01)
        return self.returncode

    def send_signal(self, number):
        os.kill(self.pid, number)

    def kill(self):
        os.kill(self.pid, signal.SIGKILL)


def carry_out(plan, rank):
    """Arrange for what a plan says to happen in this process."""
    if plan.get("rank", rank) != rank:
        return
    number = getattr(signal, plan.get("signal", "SIGKILL"))
    if "call" in plan:
        module, name = plan["call"].rsplit(".", 1)
        die_in(
            importlib.import_module(module), name, plan.get("match", ""), plan.get("nth", 1), plan.get("half", False)
        )
    if "step" in plan and rank != -1:
        stage, last = plan["step"]
        from cdistill.runtime.stop import StopCallback

        before = StopCallback.on_step_end

        def on_step_end(self, args, state, control, **kwargs):
            if stage in args.output_dir and state.global_step == last:
                if "bytes" in plan:
                    resource.setrlimit(resource.RLIMIT_FSIZE, (plan["bytes"], plan["bytes"]))
                else:
                    os.kill(os.getpid(), number)
            return before(self, args, state, control, **kwargs)

        StopCallback.on_step_end = on_step_end
    if "set" in plan:
        module, name, value = plan["set"]
        setattr(importlib.import_module(module), name, value)
    if "spoil" in plan:
        stage, step = plan["spoil"]
        from cdistill.train.trainer import DistillTrainer

        compute_loss = DistillTrainer.compute_loss

        def spoilt(self, *args, **kwargs):
            loss = compute_loss(self, *args, **kwargs)
            return loss * float("nan") if stage in self.args.output_dir and self.state.global_step == step else loss

        DistillTrainer.compute_loss = spoilt
    if "seconds" in plan:
        timer = threading.Timer(plan["seconds"], os.kill, (os.getpid(), number))
        timer.daemon = True
        timer.start()


def die_in(module, name, match, nth, half):
    original, calls = getattr(module, name), []

    def replaced(*args, **kwargs):
        calls.extend([1] if match in str(args) else [])
        if len(calls) != nth or match not in str(args):
            return original(*args, **kwargs)
        if half and name == "rmtree":
            for path in [p for p in sorted(Path(args[0]).rglob("*")) if p.is_file()][1::2]:
                path.unlink()
        elif half:
            original(*args, **kwargs)
            path = Path(args[1])
            os.truncate(path, path.stat().st_size // 2)
        os.kill(os.getpid(), signal.SIGKILL)

    setattr(module, name, replaced)


def command(*arguments, plan=None):
    """Exit code (negative for a signal) and output of a command of cdistill."""
    fork = Fork("survive_runs:carry_out_command", list(map(str, arguments)), plan or {})
    return fork.wait(), fork.text()[0]


def carry_out_command(arguments, plan):
    from cdistill import cli
    from cdistill.runtime import launch

    ForkedPopen.plan = plan
    several = "processes=2" in arguments or "--processes" in arguments
    if several:
        launch.subprocess.Popen = ForkedPopen
    carry_out(plan, -1 if several else 0)
    return cli.main(arguments)
