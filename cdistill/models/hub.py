"""Models of the Hugging Face hub by their names: fetched once, kept in the hub's cache, of one commit for a whole run."""

from __future__ import annotations

import re
from pathlib import Path

from cdistill.errors import InputError
from cdistill.models.folder import one_line

# What a model is read from: weights as data alone, never pickles, nor code.
FILES = ("*.json", "*.jinja", "*.model", "*.txt", "*.tiktoken")
WEIGHTS = "*.safetensors"
_NAME = re.compile(r"(?P<id>[\w.-]+/[\w.-]+)(@(?P<revision>[\w./-]+))?")


def is_hub_name(reference: str) -> bool:
    """Whether a reference, which is no folder, may name a model of the hub: ``OWNER/NAME`` or ``OWNER/NAME@REVISION``."""
    return _NAME.fullmatch(reference) is not None and not Path(reference).exists()


def snapshot(reference: str, key: str, *, weights: bool = True) -> Path:
    """Folder of a model of the hub; what is in the hub's cache is not fetched again, and offline nothing is.

    Args:
        reference: ``OWNER/NAME``, with ``@`` and a branch, tag or commit for another revision than the newest.
        key: begins messages.
        weights: whether they are needed, too.

    Raises:
        ValueError: in one line that says what to do, if the hub does not give it.
    """
    from huggingface_hub import errors, snapshot_download

    name, revision = _parts(reference)
    patterns = [*FILES, WEIGHTS] if weights else list(FILES)
    said = f"{key}: there is no folder {reference!r}, and the hub"
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=patterns))
    except errors.GatedRepoError:
        reason = f"gives {name} to those who have accepted its terms: do so at its page, then `hf auth login`"
    except errors.RepositoryNotFoundError:
        reason = f"knows no model {name}, or shows it to its owner alone: correct the name, or `hf auth login`"
    except errors.RevisionNotFoundError:
        reason = f"knows {name}, but no revision {revision!r}"
    except errors.LocalEntryNotFoundError:
        reason = "is not to be asked (offline, or out of reach), and its cache lacks it: correct the folder, or fetch it first"
    except OSError as error:  # of the disk, and of the network
        reason = f"cannot be asked: {one_line(error)[:200]}"
    except Exception as error:  # of httpx and of the hub
        reason = f"does not give it: {one_line(error)[:200]}"
    raise InputError(f"{said} {reason}") from None


def pinned(reference: str, key: str, recorded: str | None = None) -> str:
    """A reference with the commit that it stands for now, or did where a run has ``recorded`` it; folders stay as they are.

    Raises ValueError as `snapshot`.
    """
    if not is_hub_name(reference):
        return reference
    name, revision = _parts(reference)
    if revision is None and recorded is not None and is_hub_name(recorded) and _parts(recorded)[0] == name:
        return recorded
    return f"{name}@{snapshot(reference, key).name}"


def _parts(reference: str) -> tuple[str, str | None]:
    found = _NAME.fullmatch(reference)
    assert found is not None
    return found["id"], found["revision"]
