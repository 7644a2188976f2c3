"""``python -m cdistill.eval.worker run OPTIONS``: one of the processes that share an evaluation, with options from a file."""

import os
import sys
from pathlib import Path

from cdistill.eval import run
from cdistill.runtime.errors import RunError, print_error, telling_lack_of_memory
from cdistill.runtime.launch import die_with_parent


def main() -> int:
    """Do this process's share; returns the exit code."""
    die_with_parent()
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    try:
        with telling_lack_of_memory():
            return run.main(run.options_of(Path(sys.argv[2])))
    except (ValueError, OSError, RunError) as error:
        return print_error(error)


if __name__ == "__main__":
    sys.exit(main())
