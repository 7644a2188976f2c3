"""``python -m cdistill.train.worker OUTPUT``: one of the processes that `cdistill.train.launch` starts."""

import sys
from pathlib import Path

from cdistill.train.launch import RunError, Stopped, die_with_parent


def main() -> int:
    """Run the recipe that the parent process has checked and written to the output folder; returns the exit code."""
    die_with_parent()
    from cdistill.train.stages import read_recipe, run_stages

    output = Path(sys.argv[1])
    try:
        run_stages(read_recipe(output), output, resume=True)
    except (ValueError, RunError) as error:
        if not isinstance(error, Stopped):
            print(f"cdistill: error: {error}", file=sys.stderr, flush=True)
        return getattr(error, "exit_code", 1)
    return 0


if __name__ == "__main__":
    sys.exit(main())
