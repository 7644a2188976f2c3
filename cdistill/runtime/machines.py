"""What the machines of one run must have in common, checked before the first step; nothing on one machine."""

import os
import socket
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

from cdistill.errors import InputError
from cdistill.files import MARK
from cdistill.runtime.collectives import gathered, gathered_objects, on_first_process
from cdistill.runtime.errors import RunError

SEEN_SECONDS = 30.0  # network file systems show a new file to other machines after a while
_POLL_SECONDS = 0.1
NAMED = 3  # machines in a message


def require_common_folder(folder: Path, key: str) -> None:
    """Raise ValueError on all processes unless all see the folder of the first one; processes call it together.

    Args:
        folder: exists on the first process, which may write there.
        key: of the recipe, begins the message, which names the machines.
    """
    with ExitStack() as at_end:

        def mark() -> tuple[str, str]:
            file = at_end.enter_context(tempfile.NamedTemporaryFile(dir=folder, prefix=f".machines{MARK}"))
            return Path(file.name).name, f"{folder.absolute()} on {socket.gethostname()}"

        name, theirs = on_first_process(mark)
        seen = _appears(folder / name)
        told = gathered_objects(None if seen else f"{folder.absolute()} on {socket.gethostname()}")
    others = [f"{text} (process {rank})" for rank, text in enumerate(told) if text is not None]
    if others:
        raise InputError(
            f"{key}: {_listed(others)} is not the folder of process 0, {theirs}: name a folder that all machines share, "
            "by its whole path"
        )


def several_machines() -> bool:
    """Whether the processes of the run are on more than one machine; all call it."""
    return any(gathered(int(_first_elsewhere())))


def on_other_machines(check: Callable[[], object]) -> None:
    """Check something on the first process of each machine beside the first machine.

    All processes call it, and each raises a ValueError for what any of these has found, with its machine's name.
    """
    said = None
    if _first_elsewhere():
        try:
            check()
        except (ValueError, OSError, RunError) as error:
            said = f"{error} (on {socket.gethostname()}, process {os.environ['RANK']})"
    errors = [text for text in gathered_objects(said) if text is not None]
    if errors:
        raise InputError(errors[0])


def _first_elsewhere() -> bool:
    """Whether this is the first process of another machine than the first one's."""
    return os.environ.get("LOCAL_RANK") == "0" and os.environ.get("RANK", "0") != "0"


def _appears(path: Path) -> bool:
    """Whether a file that another process has made is to be seen here; reading the folder renews what is known of it."""
    deadline = time.monotonic() + SEEN_SECONDS
    while not path.exists():
        if not path.parent.is_dir() or time.monotonic() > deadline:
            return False
        time.sleep(_POLL_SECONDS)
        if path.parent.is_dir():
            os.listdir(path.parent)
    return True


def _listed(texts: list[str]) -> str:
    return ", ".join(texts[:NAMED]) + (f" and {len(texts) - NAMED} more" if len(texts) > NAMED else "")
