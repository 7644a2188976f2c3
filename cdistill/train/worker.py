"""``python -m cdistill.train.worker OUTPUT``: one of the processes that `cdistill.train.launch` starts."""

import sys
from pathlib import Path

from cdistill.train.launch import RunError, die_with_parent, tell


def main() -> int:
    """Run the recipe that the parent process has checked and written to the output folder; returns the exit code."""
    die_with_parent()
    from cdistill.train.stages import read_recipe, run_stages

    output = Path(sys.argv[1])
    try:
        run_stages(read_recipe(output), output, resume=True)
    except (ValueError, RunError) as error:
        return tell(error)
    return 0


if __name__ == "__main__":
    sys.exit(main())
