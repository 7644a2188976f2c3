"""Checkpoints of TinyLLaVA Factory, with a connector of two layers."""

from __future__ import annotations

from cdistill.formats.nested import read_nested
from cdistill.formats.source import Given, Source


def read(given: Given) -> Source:
    """A checkpoint of the whole model. Raises ValueError for fields that cannot be expressed."""
    return read_nested(given, "tinyllava")
