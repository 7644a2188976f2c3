"""Why a run ends early: errors of one line, and the exit codes of the processes that raise them."""

import os
import signal
import sys

PEER_LOST = 76  # exit code of a process that only stopped because another one had


class RunError(RuntimeError):
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


def print_error(error: ValueError | RunError) -> int:
    """Print an error in one line, unless another process does or has; returns the exit code of a failed rank."""
    silent = isinstance(error, Stopped) or (isinstance(error, AgreedError) and os.environ.get("RANK", "0") != "0")
    if not silent:
        print(f"cdistill: error: {error}", file=sys.stderr, flush=True)
    return getattr(error, "exit_code", 1)
