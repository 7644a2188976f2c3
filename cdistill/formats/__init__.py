"""Checkpoints as other projects publish them: read into transformers' classes, and written as those projects read them."""
