"""Why a run ends early: errors of one line, and the exit codes of the processes that raise them."""

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from cdistill.errors import CdistillError, InputError

LONGEST = 700  # characters of a line about an error
PEER_LOST = 76  # exit code of a process that only stopped because another one had


class Mistakes(InputError):
    """Several mistakes of the user, each on a line of the message."""


class RunError(CdistillError, RuntimeError):
    """A run ended early for a reason that one line tells."""

    exit_code = 1


class ProcessError(RunError):
    """One of several processes failed."""


class AgreedError(RunError):
    """All processes end for the same reason; the first one tells it."""


class NonFiniteError(AgreedError):
    """Too many steps in a row had a loss or gradient that is not finite."""


class BadDataError(AgreedError):
    """Too many samples of a data set could not be used."""


class PeerLostError(ProcessError):
    """This process is well, but another one that it works with is gone."""

    exit_code = PEER_LOST


class Stopped(RunError):
    """SIGTERM or SIGINT stopped the run; the first process has printed where it goes on."""

    def __init__(self, number: int) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}; go on with --resume")
        self.exit_code = 128 + number


def is_lack_of_memory(error: BaseException) -> bool:
    """Whether it is what Python or torch says where there is no memory left, of a GPU or of the machine."""
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or "can't allocate memory" in str(error)
    )


@contextmanager
def telling_lack_of_memory() -> Iterator[None]:
    """Raise RunError for a lack of memory."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_lack_of_memory(error):
            raise
        raise RunError(f"out of memory: {line_of(error)} (`cdistill plan` says what a run needs)") from error


def print_error(error: ValueError | OSError | RunError) -> int:
    """Print an error in one line (`Mistakes` in a line for each), unless another process does or has.

    Returns the exit code of a failed rank.
    """
    silent = isinstance(error, Stopped) or (isinstance(error, AgreedError) and os.environ.get("RANK", "0") != "0")
    if not silent:
        lines = (
            map(line_of, map(InputError, str(error).split("\n"))) if isinstance(error, Mistakes) else [line_of(error)]
        )
        with suppress(OSError):  # nobody can read it
            print("\n".join(f"cdistill: error: {line}" for line in lines), file=sys.stderr, flush=True)
    return getattr(error, "exit_code", 1)


def line_of(error: BaseException) -> str:
    """What an error says in one line that a terminal can show: an OSError its path first, nothing but printable characters."""
    text = str(error)
    if isinstance(error, OSError) and error.strerror:
        paths = [os.fsdecode(path) for path in (error.filename, error.filename2) if isinstance(path, str | bytes)]
        text = ": ".join([" -> ".join(paths), error.strerror] if paths else [error.strerror])
    text = printable(" ".join(text.split())) or type(error).__name__
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 3]}..."


def printable(text: str) -> str:
    """A text of a file, or about one, without what would move the cursor or change colours: escapes in its place."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "backslashreplace").decode() for c in text)
