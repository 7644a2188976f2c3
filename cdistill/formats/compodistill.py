"""Checkpoints that the authors of CompoDistill have released: a teacher, and students with and without its adapter.

The vision tower is a whole SigLIP; ``patch`` drops the first of its positions, which is a patch, so that 728 of 729 are left.
"""

from __future__ import annotations

from cdistill.formats.nested import read_nested
from cdistill.formats.source import Given, Source
from cdistill.models.taf import TAFLlavaConfig


def read(given: Given) -> Source:
    """A released checkpoint. Raises ValueError for fields that cannot be expressed."""
    if not (given.values.get("post_connector_use") and given.values.get("connector_hidden_size")):
        return read_nested(given, "compodistill")
    width = given.whole("connector_hidden_size", "it must be the width of the teacher")
    return read_nested(
        given, "compodistill student", TAFLlavaConfig, teacher_hidden_size=width, taf_activation="linear"
    )
