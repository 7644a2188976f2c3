"""Processes that start in a moment: forked from one that has imported everything, for all workers of a session of tests.

`Fork` runs a function of a module in a process of its own, `python` what a command line of Python runs; both have an
environment and a folder of their own, and no memory of other tests. pytest-xdist's workers are forks as well (`AS_PYTHON`).
The server is started by the first process that asks (``python forks.py``), and ends with the session. What must see imports
happen starts Python itself.
"""

import contextlib
import ctypes
import fcntl
import importlib
import os
import runpy
import select
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from multiprocessing import current_process, reduction
from multiprocessing.connection import Connection
from pathlib import Path

ROOT = Path(__file__).parent.parent
HANGS = 200  # seconds, for what takes a few
SESSION = "CDISTILL_TESTS_FORKS"  # names the folder of the server's socket in the environment
AS_PYTHON = shlex.join([sys.executable, "-S", __file__, "as-python"])  # a fork as an interpreter, for ``-c`` and a text
ENVIRONMENT = {
    "DS_ACCELERATOR": "cpu",
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
}


def begin_session() -> None:
    """Name the folder that workers started from here on share."""
    os.environ[SESSION] = tempfile.mkdtemp(prefix="cdistill-")


def end_session() -> None:
    """Remove it, which ends the server."""
    shutil.rmtree(os.environ.pop(SESSION), ignore_errors=True)


class Fork:
    """A process that runs ``module:function`` with arguments, and exits with what it returns.

    With ``serves`` the function has a connection to `connection` as its first argument.
    """

    def __init__(self, function, *arguments, env=None, cwd=None, serves=False, merged=True):
        self.output = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115
        self.errors = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115
        where = [f"/proc/{os.getpid()}/fd/{file.fileno()}" for file in (self.output, self.errors)]
        self.connection = _connect()
        self.connection.send(
            {
                "function": function,
                "arguments": arguments,
                "env": dict(os.environ if env is None else env),
                "cwd": str(cwd or os.getcwd()),
                "files": [where[0], where[0] if merged else where[1]],
                "serves": serves,
                "key": bytes(current_process().authkey),  # tensors are sent through shared memory
            }
        )
        try:
            self.pid = self.connection.recv()
        except (EOFError, ConnectionError) as error:
            said = (Path(os.environ[SESSION]) / "log").read_text()
            raise RuntimeError(f"the server of forks has died: {said[-2000:]}") from error
        self.returncode = None

    def wait(self, timeout=HANGS):
        """The exit code, negative for a signal; a process that hangs is killed."""
        if self.returncode is None:
            if not self.connection.poll(timeout):
                self.kill()
            self.returncode = self.connection.recv()
        return self.returncode

    def send_signal(self, number):
        os.kill(self.pid, number)

    def kill(self):
        self.send_signal(signal.SIGKILL)

    def text(self):
        """What it has written so far: output, and errors unless they are merged with it."""
        texts = []
        for file in (self.output, self.errors):
            file.seek(0)
            texts.append(file.read())
        return texts


def python(*command, env=None, cwd=None):
    """As subprocess.run([sys.executable, *command], capture_output=True, text=True), for -m and -c."""
    fork = Fork("forks:run_command", list(map(str, command)), env=env, cwd=cwd, merged=False)
    code = fork.wait()
    return subprocess.CompletedProcess(command, code, *fork.text())


def run_command(command):
    """In the fork: a module's or a text's run as ``__main__``."""
    encoding, _, errors = os.environ.get("PYTHONIOENCODING", "").partition(":")  # read when a process starts
    for stream in (sys.stdout, sys.stderr) if encoding else ():
        stream.reconfigure(encoding=encoding, errors="backslashreplace" if stream is sys.stderr else errors or "strict")
    kind, what, *arguments = command
    sys.argv = [what if kind == "-m" else kind, *arguments]
    try:
        if kind == "-m":
            runpy.run_module(what, run_name="__main__", alter_sys=True)
        else:
            exec(compile(what, "<string>", "exec"), {"__name__": "__main__"})
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    return 0


def become_python(command):
    """Have a fork with the streams of this process carry out a command; the exit code is that of the fork."""
    connection = _connect()
    request = {"function": "forks:run_command", "arguments": [command], "env": dict(os.environ), "cwd": os.getcwd()}
    connection.send(request | {"files": [], "streams": 3, "serves": False, "key": bytes(current_process().authkey)})
    for stream in range(3):
        reduction.send_handle(connection, stream, None)
    connection.recv()  # its id
    return connection.recv()


def leave(function, *arguments):
    """Run a function and end the process with its result, as a fresh one would."""
    code = 70
    try:
        code = function(*arguments)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code or 0)


def _connect():
    folder = Path(os.environ[SESSION])
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "socket").exists():
            path = os.pathsep.join((str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")))
            environment = {**os.environ, **ENVIRONMENT, "PYTHONPATH": path}
            with (folder / "log").open("w") as log:
                subprocess.Popen(
                    [sys.executable, __file__, str(folder)],
                    env=environment,
                    cwd=ROOT,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    start_new_session=True,
                )
            while not (folder / "socket").exists():
                time.sleep(0.01)
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(str(folder / "socket"))
    return Connection(connection.detach())


def _serve(folder):
    server = socket.socket(socket.AF_UNIX)
    server.bind(f"{folder}/starting")
    server.listen(64)
    os.rename(f"{folder}/starting", f"{folder}/socket")
    import fork_imports

    assert fork_imports
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for those who watch
    server.settimeout(1)
    while os.path.exists(folder):
        try:
            connection = server.accept()[0]
        except TimeoutError:
            continue
        connection.setblocking(True)
        if not os.fork():
            server.close()
            _watch(Connection(connection.detach()))
        connection.close()


def _watch(connection):
    """Fork what is asked for, and tell how it ends; it ends with who asked for it."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    request = connection.recv()
    streams = [reduction.recv_handle(connection) for _ in range(request.get("streams", 0))]
    pid = os.fork()
    if not pid:
        os.setsid()
        for number, stream in enumerate(streams):
            os.dup2(stream, number)
        leave(_become, request, connection)
    for stream in streams:
        os.close(stream)
    connection.send(pid)
    if request["serves"]:
        connection.close()
    else:
        end = os.pidfd_open(pid)
        if end not in select.select([end, connection], [], [])[0]:
            os.kill(pid, signal.SIGKILL)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    if not connection.closed:
        with contextlib.suppress(OSError):
            connection.send(code)
    os._exit(0)


def _become(request, connection):
    """Carry out a request in the process that is for it."""
    if not request["serves"]:
        connection.close()
    for number, path in enumerate(request["files"], 1):
        file = os.open(path, os.O_WRONLY | os.O_APPEND)
        os.dup2(file, number)
        os.close(file)
    os.environ.clear()
    os.environ.update(request["env"])
    os.chdir(request["cwd"])
    current_process().authkey = request["key"]
    sys.path[:0] = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    if "MALLOC_MMAP_THRESHOLD_" in os.environ:  # which the allocator reads when a process starts
        ctypes.CDLL(None).mallopt(-3, int(os.environ["MALLOC_MMAP_THRESHOLD_"]))
    module, name = request["function"].split(":")
    arguments = ([connection] if request["serves"] else []) + list(request["arguments"])
    return getattr(importlib.import_module(module), name)(*arguments)


if __name__ == "__main__":
    sys.modules["forks"] = sys.modules["__main__"]
    if sys.argv[1] == "as-python":
        sys.exit(become_python(sys.argv[-2:]))
    _serve(sys.argv[1])
