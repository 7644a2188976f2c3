"""Our benchmarks as tasks of lmms-eval, and our models in it; the harness lives in an environment of its own (`make eval-env`).

The names of tasks are ours with ``cd_`` before them. Their questions are read from the benchmarks' own files, in folders that
two variables of the environment name: see `cdistill.eval.lmms_eval.utils`.
"""

from typing import Any


def manifest() -> Any:
    """What the entry point ``lmms_eval.models`` gives: the model ``cdistill``, a chat model."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest("cdistill", chat_class_path="cdistill.eval.lmms_eval.model.CDistill")
