"""``python -m cdistill.train.worker OUTPUT``: one of the processes that `cdistill.train.launch` starts."""

import sys
from pathlib import Path


def main() -> None:
    """Run the recipe that the parent process has checked and written to the output folder."""
    from cdistill.train.stages import read_recipe, run_stages

    output = Path(sys.argv[1])
    run_stages(read_recipe(output), output, resume=True)


if __name__ == "__main__":
    main()
