"""Runs of `cdistill train` that are forked from one process with everything imported, and killed where a plan says.

``python survive_runs.py`` reads one request (JSON) a line and answers with one line: a run is a process of its own, and
so is each of its ranks, but starting one takes no imports. A plan is a mapping:

- ``call``: dotted name of a function (``torch.save``); its ``nth`` call with ``match`` in its arguments kills the process,
  before it does anything, or with ``half`` after it has done half of its work (a file cut in two, a folder half removed);
- ``step``: ``[stage, n]`` sends ``signal`` after that step, or with ``bytes`` lets no file grow larger from then on, as on a
  full disk; ``seconds`` sends the signal after that time;
- ``spoil``: ``[stage, n]`` makes the loss of the step after the n-th NaN;
- ``rank``: the rank it is for, otherwise each; -1 is the process that starts the others.
"""

import importlib
import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

HANGS = 200  # seconds, for a run that takes 1 or 2
ROOT = Path(__file__).parent.parent


class Forks:
    """The forking process, seen from the tests."""

    def __init__(self):
        path = os.pathsep.join((str(ROOT), str(ROOT / "tests")))
        env = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT, env=env
        )

    def train(self, recipe, *options, plan=None):
        """Exit code (negative for a signal) and output of one run of a recipe file."""
        arguments = ["train", str(recipe), *options]
        self.process.stdin.write(json.dumps({"arguments": arguments, "plan": plan or {}}) + "\n")
        self.process.stdin.flush()
        answer = json.loads(self.process.stdout.readline())
        return answer["code"], answer["output"]

    def close(self):
        self.process.stdin.close()
        self.process.wait()


class ForkedPopen:
    """What `cdistill.runtime.launch` uses of subprocess.Popen, for a rank that is forked."""

    plan: dict
    real = subprocess.Popen

    def __init__(self, command, *, env, start_new_session):
        assert start_new_session and command[-3:-1] == ["cdistill.train.worker", "train"]
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
            from cdistill.train import worker

            carry_out(self.plan, int(env["RANK"]))
            leave(worker.main)

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


def leave(main):
    """Run a function and end the process with its result, as a fresh one would."""
    code = 70
    try:
        code = main()
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


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


def train(arguments, plan):
    import torch

    from cdistill import cli
    from cdistill.runtime import launch

    torch.set_num_threads(1)
    ForkedPopen.plan = plan
    several = "processes=2" in arguments
    if several:
        launch.subprocess.Popen = ForkedPopen
    carry_out(plan, -1 if several else 0)
    return cli.main(arguments)


def wait(pid):
    """Status of a child, which is killed if it hangs."""
    deadline = time.monotonic() + HANGS
    while True:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return status
        if time.monotonic() > deadline:
            os.kill(pid, signal.SIGKILL)
        time.sleep(0.01)


def serve():
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    import gc

    import deepspeed
    import torch._dynamo
    import torch.utils.tensorboard
    import tqdm.auto

    import cdistill.ops
    import cdistill.train.stages
    import cdistill.train.worker

    assert all((deepspeed, torch, tqdm, cdistill))
    gc.collect()
    gc.freeze()  # a run collects garbage several times, and need not look through all modules
    for line in sys.stdin:
        request = json.loads(line)
        with tempfile.TemporaryFile("w+") as output:
            pid = os.fork()
            if not pid:
                os.dup2(output.fileno(), 1)
                os.dup2(output.fileno(), 2)
                os.setsid()
                leave(lambda request=request: train(**request))
            status = wait(pid)
            output.seek(0)
            answer = {"code": os.waitstatus_to_exitcode(status), "output": output.read()}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    serve()
