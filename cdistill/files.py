"""Files and folders that are written whole or not at all, beside what is the user's, and folders that have one owner.

Everything the package writes goes through here. What is not finished has a name of its own, `.NAME.cdistill-XXXXXXXX`, made
for it alone beside the target, so that nothing that lies there is touched; what a killed process leaves of it is known by a
lock that the kernel has dropped, and removed by the next that writes there.
"""

from __future__ import annotations

import errno
import fcntl
import os
import secrets
import shutil
import socket
import stat
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from cdistill.errors import InputError

MARK = ".cdistill-"  # in the names of what is being written
DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
LOCK = ".cdistill.lock"  # file that holds the lock of a folder
WAIT_SECONDS = 6.0  # processes that read samples notice within 5 that the run which started them has been killed
_POLL_SECONDS = 0.05


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 file so that after a crash either the old or the whole new one is there. Raises OSError."""
    with writing(path) as file:
        file.write(text.encode("utf-8"))


@contextmanager
def writing(path: Path) -> Iterator[IO[bytes]]:
    """A file to be written, which gets its name when the block ends well and is gone when it does not.

    A link at ``path`` stays: what it points to is written. What is no regular file (a terminal, a pipe) is written to directly.

    Raises:
        OSError: it cannot be written; IsADirectoryError where a folder has the name.
    """
    target = Path(os.path.realpath(path))
    with suppress(FileNotFoundError):
        mode = target.stat().st_mode
        if stat.S_ISDIR(mode):
            raise IsADirectoryError(21, "Is a directory", str(path))
        if not stat.S_ISREG(mode):
            with open(target, "wb") as file:
                yield file
            return
    part, descriptor = _begun(target, _new_file)
    try:
        with open(descriptor, "wb") as file:
            _remove_dead(target)
            yield file
            file.flush()
            os.fsync(file.fileno())
            with suppress(FileNotFoundError):
                os.fchmod(file.fileno(), stat.S_IMODE(target.stat().st_mode))
            os.replace(part, target)
        sync_folder(target.parent)
    finally:
        part.unlink(missing_ok=True)


@contextmanager
def building(folder: Path) -> Iterator[Path]:
    """A folder to be filled, which gets its name when the block ends well and is gone when it does not.

    Raises:
        OSError: it cannot be made, or something has its name at the end (an empty folder does not count).
    """
    target = Path(os.path.realpath(folder))
    with scratch(target) as part:
        yield part
        os.rename(part, target)  # unlike replace of a file, refuses a folder that is not empty
        sync_folder(target.parent)


@contextmanager
def scratch(target: Path) -> Iterator[Path]:
    """A folder beside a target for what others write, gone when the block ends. Raises OSError."""
    part, descriptor = _begun(target, _new_folder)
    try:
        _remove_dead(target)
        yield part
    finally:
        os.close(descriptor)
        shutil.rmtree(part, ignore_errors=True)


@contextmanager
def owned(folder: Path, what: str = "output", *, wait: float | None = None) -> Iterator[None]:
    """Keep other processes out of a folder until the block ends; the kernel lets go of it when this process is killed.

    Args:
        folder: exists. A file `LOCK` in it says whose it is.
        what: names the folder in messages.
        wait: seconds for another owner to end, by default `WAIT_SECONDS`.

    Raises:
        ValueError: another process has it, named by its number and its machine.
        OSError: the folder cannot be written to.
    """
    path, deadline = folder / LOCK, time.monotonic() + (WAIT_SECONDS if wait is None else wait)
    while (descriptor := _try_to_own(path, folder, what)) is None:
        if time.monotonic() > deadline:
            raise InputError(
                f"{what} {folder} is in use by another run ({_owner(path)}): wait for its end, or choose another folder"
            )
        time.sleep(_POLL_SECONDS)
    try:
        yield
    finally:
        # The file goes first: whoever waits for it sees that it has no name any more, and makes a new one. Then the lock, as
        # processes that read samples have copies of the descriptor.
        path.unlink(missing_ok=True)
        with suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_UN)
        os.close(descriptor)


def is_owned(folder: Path) -> bool:
    """Whether a process has a folder, on whatever machine that its file system has locks for. Raises OSError."""
    try:
        descriptor = os.open(folder / LOCK, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # there are no locks
        return True
    finally:
        os.close(descriptor)
    return False


def entries(folder: Path) -> list[Path]:
    """What lies in a folder, without the lock and without what is being written or was left of it."""
    return [path for path in folder.iterdir() if path.name != LOCK and MARK not in path.name]


def remove_unfinished(folder: Path) -> None:
    """Remove what killed processes have left in a folder that this one owns."""
    for path in folder.glob(f".*{MARK}*"):
        _remove_if_dead(path)


def disk_full(error: BaseException) -> bool:
    """Whether a file could not be written for want of room; torch, safetensors and tokenizers say so in their texts alone."""
    if isinstance(error, OSError):
        return error.errno in DISK_FULL
    text = str(error)
    hidden = any(f"(os error {number})" in text for number in DISK_FULL)
    return hidden or any(
        words in text for words in ("PytorchStreamWriter failed", "inline_container.cc", "iostream error")
    )


def sync_folder(folder: Path) -> None:
    """Bring the names in a folder to the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _begun(target: Path, make: Callable[[Path], int]) -> tuple[Path, int]:
    """Something new under a name that nothing has, and its descriptor, which holds a lock while it is worked on."""
    while True:
        part = target.with_name(f".{target.name[:200]}{MARK}{secrets.token_hex(4)}")
        descriptor = make(part)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            free = part.exists()
        except (BlockingIOError, FileNotFoundError):
            free = False
        except OSError:  # there are no locks: what is left of a killed process stays
            free = True
        if free:
            return part, descriptor
        os.close(descriptor)  # another process has taken it for what a killed one has left


def _new_file(path: Path) -> int:
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)


def _new_folder(path: Path) -> int:
    path.mkdir()
    return os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)


def _try_to_own(path: Path, folder: Path, what: str) -> int | None:
    """A descriptor with the lock, None where another process has it."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    except OSError as error:
        said = (
            f"{what} {folder}: its file system has no locks ({error.strerror}), so nothing keeps other runs out of it"
        )
        print(said, file=sys.stderr, flush=True)
    try:
        named = os.stat(path, follow_symlinks=False)
    except FileNotFoundError:
        named = None
    if named is None or (named.st_ino, named.st_dev) != _identity(descriptor):
        os.close(descriptor)  # its owner has just let go of it
        return None
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
    return descriptor


def _identity(descriptor: int) -> tuple[int, int]:
    found = os.fstat(descriptor)
    return found.st_ino, found.st_dev


def _owner(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()[:200] or "it does not say which"
    except OSError:
        return "it does not say which"


def _remove_dead(target: Path) -> None:
    """Remove what killed processes have left of earlier attempts at a target."""
    for path in target.parent.glob(_escaped(f".{target.name[:200]}{MARK}") + "*"):
        _remove_if_dead(path)


def _escaped(text: str) -> str:
    return "".join(f"[{c}]" if c in "*?[" else c for c in text)


def _remove_if_dead(path: Path) -> None:
    """Remove a file or folder that nobody has locked."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:  # a link, or gone
        return
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        remove: Any = shutil.rmtree if stat.S_ISDIR(os.fstat(descriptor).st_mode) else os.unlink
        with suppress(FileNotFoundError):
            remove(path)
    except OSError:
        return
    finally:
        os.close(descriptor)
