"""Data sets in files: reading them, checking them, and encoding their samples for a model."""
