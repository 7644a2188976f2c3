"""Files and folders that are written whole or not at all, and folders that have one owner."""

import os
import signal
import stat
import subprocess
import sys
import threading
import time
from contextlib import suppress

import pytest

from cdistill import files
from cdistill.files import building, disk_full, entries, owned, remove_unfinished, write_text, writing
from cdistill.runtime.checkpoints import saving
from cdistill.runtime.errors import RunError

PRECIOUS = "precious"


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def run(code, *words, **options):
    return subprocess.Popen(
        [sys.executable, "-I", "-c", code, *map(str, words)], stdout=subprocess.PIPE, text=True, **options
    )


def killed(code, *words):
    """Run code until it has printed a line, and kill it."""
    process = run(code, *words, stdin=subprocess.PIPE)
    assert process.stdout.readline()
    process.kill()
    process.wait()
    process.stdout.close()
    process.stdin.close()


def test_a_file_is_there_whole_or_as_it_was(tmp_path):
    path = tmp_path / "name.json"
    write_text(path, "old")
    with pytest.raises(RuntimeError), writing(path) as file:
        file.write(b"half of the n")
        file.flush()
        raise RuntimeError
    assert path.read_text() == "old" and names(tmp_path) == ["name.json"]
    path.chmod(0o640)
    write_text(path, "n\u00e9w")
    assert path.read_text(encoding="utf-8") == "n\u00e9w" and names(tmp_path) == ["name.json"]
    assert stat.S_IMODE(path.stat().st_mode) == 0o640


def test_new_files_have_the_usual_rights(tmp_path):
    plain = tmp_path / "plain"
    plain.touch()
    write_text(tmp_path / "ours", "text")
    assert (tmp_path / "ours").stat().st_mode == plain.stat().st_mode


def test_a_link_stays_and_what_it_points_to_is_written(tmp_path):
    (tmp_path / "far").mkdir()
    link, real = tmp_path / "link", tmp_path / "far" / "real"
    link.symlink_to(real)
    write_text(link, "text")
    assert link.is_symlink() and real.read_text() == "text" and names(tmp_path / "far") == ["real"]


def test_what_is_no_file_is_written_to(tmp_path):
    pipe, got = tmp_path / "pipe", []
    os.mkfifo(pipe)
    reader = threading.Thread(target=lambda: got.append(pipe.read_text()))
    reader.start()
    write_text(pipe, "text")
    reader.join()
    assert got == ["text"] and stat.S_ISFIFO(pipe.stat().st_mode)
    write_text("/dev/null", "text")


@pytest.mark.parametrize("make", [writing, building])
def test_nothing_that_has_a_name_like_ours_is_touched(tmp_path, make):
    victim = tmp_path / "victim"
    victim.write_text(PRECIOUS)
    for name in ("out.part", ".out.part", "out.tmp", f".out{files.MARK}link", ".out.1.part"):
        (tmp_path / name).symlink_to(victim)
    (tmp_path / "folder.part").mkdir()
    (tmp_path / "folder.part" / "thesis").write_text(PRECIOUS)
    before = names(tmp_path)
    for name in ("out", "folder"):
        with make(tmp_path / name) as new:
            if make is building:
                (new / "file").write_text("text")
    assert victim.read_text() == (tmp_path / "folder.part" / "thesis").read_text() == PRECIOUS
    assert names(tmp_path) == sorted([*before, "out", "folder"])


@pytest.mark.parametrize(
    ("target", "error"),
    [("folder", IsADirectoryError), ("file/below", NotADirectoryError), ("none/below", FileNotFoundError)],
)
def test_files_that_cannot_be(tmp_path, target, error):
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text(PRECIOUS)
    with pytest.raises(error):
        write_text(tmp_path / target, "text")
    assert names(tmp_path) == ["file", "folder"] and (tmp_path / "file").read_text() == PRECIOUS


def test_a_folder_is_there_whole_or_not_at_all(tmp_path):
    with pytest.raises(RuntimeError), building(tmp_path / "out") as new:
        (new / "file").write_text("half")
        raise RuntimeError
    assert names(tmp_path) == []
    (tmp_path / "out").mkdir()  # an empty one may be filled
    with building(tmp_path / "out") as new:
        (new / "file").write_text("text")
    assert names(tmp_path) == ["out"] and names(tmp_path / "out") == ["file"]
    with pytest.raises(OSError), building(tmp_path / "out") as new:
        (new / "other").write_text("text")
    assert names(tmp_path) == ["out"] and names(tmp_path / "out") == ["file"]


KILLED = """
import sys; sys.path.insert(0, sys.argv[1])
from pathlib import Path
from cdistill import files
with getattr(files, sys.argv[2])(Path(sys.argv[3])) as new:
    if sys.argv[2] == "building":
        (new / "file").write_text("half")
    print("begun", flush=True)
    sys.stdin.read()
"""
ROOT = os.path.dirname(os.path.dirname(os.path.abspath(files.__file__)))


@pytest.mark.parametrize("make", ["writing", "building"])
def test_what_a_killed_process_leaves_is_removed_by_the_next(tmp_path, make):
    target, other = tmp_path / "o[u]t", tmp_path / "o[u]ter"
    for path in (target, other):
        killed(KILLED, ROOT, make, path)
    assert len(names(tmp_path)) == 2 and entries(tmp_path) == []
    living = run(KILLED, ROOT, make, target, stdin=subprocess.PIPE)
    assert living.stdout.readline()
    assert len(names(tmp_path)) == 2  # it has removed its own kind
    with getattr(files, make)(target):
        assert len(names(tmp_path)) == 3  # and one that is alive is left alone
    remove_unfinished(tmp_path)
    assert len(names(tmp_path)) == 2
    living.communicate("")
    assert names(tmp_path) == ["o[u]t"]


def test_many_writers_at_once_leave_one_whole_file(tmp_path):
    path, texts = tmp_path / "file", [str(i) * 200_000 for i in range(8)]

    def write(text):
        for _ in range(10):
            write_text(path, text)

    threads = [threading.Thread(target=write, args=(text,)) for text in texts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert path.read_text() in texts and names(tmp_path) == ["file"]


OWNER = """
import sys; sys.path.insert(0, sys.argv[1])
from pathlib import Path
from cdistill.files import owned
try:
    with owned(Path(sys.argv[2]), wait=float(sys.argv[3])):
        print("mine", flush=True)
        sys.stdin.read()
except ValueError as error:
    print(error, flush=True)
"""


def test_a_folder_has_one_owner_who_is_named(tmp_path):
    first = run(OWNER, ROOT, tmp_path, 0, stdin=subprocess.PIPE)
    assert first.stdout.readline() == "mine\n"
    named = rf"^output .* is in use by another run \(process {first.pid} on "
    with pytest.raises(ValueError, match=named), owned(tmp_path, wait=0.0):
        pass
    assert entries(tmp_path) == []
    first.send_signal(signal.SIGKILL)
    first.wait()
    with owned(tmp_path, wait=0.0):  # the kernel has dropped the lock
        assert (tmp_path / files.LOCK).read_text().startswith(f"process {os.getpid()} on ")
    assert names(tmp_path) == []


def test_whoever_waits_gets_it_when_it_is_free(tmp_path):
    with owned(tmp_path):
        second = run(OWNER, ROOT, tmp_path, 60, stdin=subprocess.PIPE)
        time.sleep(0.3)
        assert second.poll() is None
    assert second.stdout.readline() == "mine\n"
    with pytest.raises(ValueError), owned(tmp_path, wait=0.0):
        pass
    second.communicate("")
    assert names(tmp_path) == []


def test_of_many_that_start_at_once_one_gets_it_at_a_time(tmp_path):
    inside, most, failed = [], [], []

    def enter():
        for _ in range(20):
            with suppress(ValueError), owned(tmp_path, wait=5.0):
                inside.append(1)
                most.append(len(inside))
                time.sleep(0.0005)
                inside.pop()

    def guarded():
        try:
            enter()
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=guarded) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failed == [] and max(most) == 1 and len(most) > 20
    assert names(tmp_path) == []


def test_a_lock_that_is_a_link_is_no_lock(tmp_path):
    (tmp_path / "victim").write_text(PRECIOUS)
    (tmp_path / files.LOCK).symlink_to(tmp_path / "victim")
    with pytest.raises(OSError), owned(tmp_path, wait=0.0):
        pass
    assert (tmp_path / "victim").read_text() == PRECIOUS


def test_a_file_system_without_locks_is_said(tmp_path, monkeypatch, capsys):
    def flock(descriptor, operation):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(files.fcntl, "flock", flock)
    with owned(tmp_path):
        pass
    assert "its file system has no locks (Operation not supported)" in capsys.readouterr().err
    write_text(tmp_path / "file", "text")
    assert names(tmp_path) == ["file"]


@pytest.mark.parametrize(
    ("error", "full"),
    [
        (OSError(28, "No space left on device"), True),
        (OSError(122, "Disk quota exceeded"), True),
        (Exception("No space left on device (os error 28)"), True),  # of tokenizers
        (RuntimeError("basic_ios::clear: iostream error"), True),  # of torch, in a small file
        (RuntimeError("[enforce fail at inline_container.cc:603] . unexpected pos 1"), True),
        (OSError(13, "Permission denied"), False),
        (Exception("No such file (os error 2)"), False),
        (RuntimeError("shapes differ"), False),
    ],
)
def test_full_disks_are_known_by_whoever_says_so(tmp_path, error, full):
    assert disk_full(error) is full
    with pytest.raises(RunError if full else type(error)), saving(tmp_path / "file", 10):
        raise error
