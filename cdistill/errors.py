"""What cdistill raises: one base, so that ``except cdistill.CdistillError`` catches all of it and nothing else."""


class CdistillError(Exception):
    """Base of the errors that cdistill raises, each with a message of one line (`Mistakes`: a line for each)."""


class InputError(CdistillError, ValueError):
    """What cdistill was given cannot be right: the message names the argument or key, the reason and what to do."""
