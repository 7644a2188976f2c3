"""``python -m cdistill.train.worker ACTION PATH``: one of the processes that `cdistill.runtime.launch` starts.

``train OUTPUT`` runs the recipe that the parent process has checked and written to the output folder, ``cache RECIPE`` makes
its share of a teacher's cache by the recipe of a YAML file.
"""

import sys
from pathlib import Path

from cdistill.runtime.errors import RunError, print_error, telling_lack_of_memory
from cdistill.runtime.launch import die_with_parent


def main() -> int:
    """Do what the command line says; returns the exit code."""
    die_with_parent()
    action, path = sys.argv[1], Path(sys.argv[2])
    try:
        with telling_lack_of_memory():
            _act(action, path)
    except (ValueError, OSError, RunError) as error:
        return print_error(error)
    return 0


def _act(action: str, path: Path) -> None:
    if action == "train":
        from cdistill.train.run_folder import read_recipe
        from cdistill.train.stages import run_stages

        run_stages(read_recipe(path), resume=True)
    else:
        from cdistill.train.cache_writer import write_cache
        from cdistill.train.recipes import load_recipe

        write_cache(load_recipe(path))


if __name__ == "__main__":
    sys.exit(main())
