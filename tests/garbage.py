"""Garbage collections that leave out what has been imported, which stays: they were a quarter of a training's time."""

import gc
import sys

_frozen = 0  # modules, when it was last looked


def freeze_imports() -> None:
    """Leave out of later collections what is there, if modules have come since the last call: many come with a first run."""
    global _frozen
    if len(sys.modules) > _frozen:
        _frozen = len(sys.modules)
        gc.collect()
        gc.freeze()
