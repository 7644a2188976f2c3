"""Folders that say what they hold: a manifest with size and CRC-32 of every file, written last, and what it is checked by.

Whatever this package has published is opened through `verify`: what is loaded is what was written, or the difference is said.
Folders by others have no manifest and are taken as they are.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from tqdm import tqdm

from cdistill.errors import InputError

COMPLETE = "complete"  # the manifest; without it a folder that this package has made is partial
BLOCK = 1 << 24
# Suffixes that loaders look for.
LOADED = (".json", ".safetensors", ".bin", ".pt", ".pth", ".jinja", ".model", ".txt", ".tiktoken", ".py")
SAID_FROM = 1_000_000_000  # bytes whose check has a bar
_verified: dict[Path, Any] = {}  # folders that this process has checked: names, sizes and times of their files


def verify(folder: Path, what: str, *, needed: bool = False) -> None:
    """Raise ValueError unless a folder with a manifest holds what it lists, and nothing else that would be loaded.

    Of several processes that open it together the first checks; a process checks a folder again only where a file's size or
    time has changed.

    Args:
        folder: with a manifest or without.
        what: begins the message, as ``output`` or ``teacher``.
        needed: it must have one.
    """
    if not (folder / COMPLETE).is_file():
        if needed:
            raise InputError(
                f"{what}: {folder} is damaged (its list of files, {COMPLETE}, is missing): put it back, or delete the folder"
            )
        return
    if os.environ.get("RANK", "0") != "0":
        return
    place, now = folder.resolve(), looks(folder)
    if _verified.get(place) == now:
        return
    reason = damage(folder)
    if reason is not None:
        raise InputError(f"{what}: {folder} is damaged ({reason}): put it back, or make it again")
    _verified[place] = now


def looks(folder: Path) -> Any:
    """Names, sizes and times of a folder's files, which are others where one has changed. Raises OSError."""
    found = ((path.name, path.stat()) for path in folder.iterdir() if path.exists())
    return sorted((name, status.st_size, status.st_mtime_ns, status.st_ino) for name, status in found)


def damage(folder: Path) -> str | None:
    """What is wrong with the files that a folder's manifest lists, or with others that would be loaded; or None."""
    try:
        files = read_manifest(folder)["files"].items()
        listed = {name for name, _ in files}
        for path in sorted(path for path in folder.rglob("*") if path.suffix in LOADED):
            name = str(path.relative_to(folder))
            if name not in listed:
                return f"{name} is not in its list of files, {COMPLETE}"
        for name, (size, _) in files:
            if not (folder / name).is_file():
                return f"{name} is missing"
            if (folder / name).stat().st_size != size:
                return f"{name} has {(folder / name).stat().st_size:,} of {size:,} bytes"
        paths = [folder / name for name, _ in files]
        total = sum(size for _, (size, _) in files)
        with tqdm(
            total=total,
            desc=f"checking {folder.name}",
            unit="B",
            unit_scale=True,
            disable=total < SAID_FROM,
            leave=False,
        ) as bar:

            def summed(path: Path) -> int:
                return checksum(path, bar.update)

            sums = for_each(summed, paths)
        return next(
            (f"{name} has changed" for (name, (_, crc)), now in zip(files, sums, strict=True) if now != crc), None
        )
    except OSError as error:
        return f"{error.filename} cannot be read ({error.strerror})"
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return f"its manifest, the file {COMPLETE}, cannot be read"


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a folder; raises ValueError or what reading it raises if it is none."""
    manifest = json.loads((folder / COMPLETE).read_text(encoding="utf-8"))
    if not isinstance(manifest, dict):
        raise InputError("not a mapping")
    return manifest


def stored(path: Path) -> tuple[int, int]:
    """Size and CRC-32 of a file, once it is on the disk."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
    return path.stat().st_size, checksum(path)


def checksum(path: Path, progress: Callable[[int], object] = lambda read: None) -> int:
    """CRC-32 of a file; ``progress`` is told the bytes that have been read."""
    crc = 0
    with path.open("rb") as file:
        while block := file.read(BLOCK):
            crc = zlib.crc32(block, crc)
            progress(len(block))
    return crc


def for_each(action: Callable[[Path], Any], paths: Sequence[Path]) -> list[Any]:
    """What an action gives for each of some files, several at a time."""
    with ThreadPoolExecutor(4) as pool:  # CRC-32 releases the interpreter
        return list(pool.map(action, paths))
