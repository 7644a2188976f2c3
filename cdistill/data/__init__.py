"""Data sets in files: reading them, checking them, and encoding their samples for a model."""

from cdistill.data.registry import register_reader

__all__ = ["register_reader"]
