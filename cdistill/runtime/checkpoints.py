"""Checkpoints that survive: a complete one says so in a manifest of its files, which is written last."""

import errno
import json
import os
import shutil
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch.distributed as dist
from safetensors import SafetensorError

from cdistill.runtime.errors import RunError

COMPLETE = "complete"  # the manifest: JSON with size and CRC-32 of every file; without it a folder is partial
DAMAGED = ".damaged"
PREFIX = "checkpoint-"
KEPT = 2  # complete checkpoints of a stage
BLOCK = 1 << 24
DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def checkpoint_step(folder: Path) -> int:
    """Step at which a checkpoint was written."""
    return int(folder.name.removeprefix(PREFIX))


def seal(folder: Path, **facts: Any) -> None:
    """Bring the files of a folder to the disk and write its manifest, which also holds ``facts``.

    Where several processes have written the folder, all of them must call it: each reads a share of the files.
    """
    several = dist.is_initialized() and dist.get_world_size() > 1
    rank, world = (dist.get_rank(), dist.get_world_size()) if several else (0, 1)
    if several:
        dist.barrier()
    names = sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file() and p.name != COMPLETE)
    mine = names[rank::world]
    entries = dict(zip(mine, _for_each(stored, [folder / name for name in mine]), strict=True))
    if several:
        shares: list[Any] = [None] * world
        dist.all_gather_object(shares, entries)
        entries = {name: entry for share in shares for name, entry in share.items()}
    if rank == 0:
        for path in (folder, *(p for p in folder.rglob("*") if p.is_dir())):
            _sync_folder(path)
        manifest = json.dumps({**facts, "files": {name: entries[name] for name in names}}, indent=1) + "\n"
        write_atomically(folder / COMPLETE, manifest)
    if several:
        dist.barrier()


def damage(folder: Path) -> str | None:
    """What is wrong with the files that a folder's manifest lists, or None."""
    try:
        files = read_manifest(folder)["files"].items()
        for name, (size, _) in files:
            if not (folder / name).is_file():
                return f"{name} is missing"
            if (folder / name).stat().st_size != size:
                return f"{name} has {(folder / name).stat().st_size:,} of {size:,} bytes"
        sums = _for_each(checksum, [folder / name for name, _ in files])
        return next(
            (f"{name} has changed" for (name, (_, crc)), now in zip(files, sums, strict=True) if now != crc), None
        )
    except OSError as error:
        return f"{error.filename} cannot be read ({error.strerror})"
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"its manifest, the file {COMPLETE}, cannot be read"


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a folder; raises ValueError or what reading it raises if it is none."""
    manifest = json.loads((folder / COMPLETE).read_text(encoding="utf-8"))
    if not isinstance(manifest, dict):
        raise ValueError("not a mapping")
    return manifest


def choose(parent: Path, *, processes: int) -> Path | None:
    """The newest undamaged checkpoint of a stage, or None; one process calls it before any other reads the folder.

    Partial ones are removed; damaged ones are reported in one line each and put aside. Raises ValueError if the checkpoint
    was written by another number of processes.
    """
    folders = [f for f in parent.glob(f"{PREFIX}*") if not f.name.endswith(DAMAGED)]
    for folder in folders:
        if not (folder / COMPLETE).exists():
            shutil.rmtree(folder)
    for folder in sorted((f for f in folders if f.exists()), key=_order, reverse=True):
        reason = damage(folder)
        if reason is None:
            written_by = read_manifest(folder).get("processes")
            if written_by != processes:
                raise ValueError(
                    f"output: {folder} was written by {written_by} processes and this run has {processes}: resume with "
                    f"{written_by}, or delete {parent} to start the stage again"
                )
            return folder
        print(f"{folder} is damaged and skipped: {reason}", flush=True)
        aside = folder.with_name(folder.name + DAMAGED)
        if aside.exists():
            shutil.rmtree(aside)
        folder.replace(aside)
    return None


def rotate(parent: Path) -> None:
    """Remove all but the newest complete checkpoints. A kill in between leaves folders that are plainly partial."""
    folders = sorted(parent.glob(f"{PREFIX}*"), key=_order, reverse=True)
    complete = [f for f in folders if (f / COMPLETE).is_file() and not f.name.endswith(DAMAGED)]
    for folder in folders:
        if folder not in complete[:KEPT]:
            remove(folder)


def remove(folder: Path) -> None:
    """Remove a checkpoint, its manifest first; harmless if there is none."""
    (folder / COMPLETE).unlink(missing_ok=True)
    if folder.exists():
        shutil.rmtree(folder)


def write_atomically(path: Path, text: str) -> None:
    """Write a file so that after a crash either the old or the whole new one is there."""
    part = path.with_name(f"{path.name}.part")
    with part.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)
    _sync_folder(path.parent)


def publish(part: Path, folder: Path) -> None:
    """Give a sealed folder its name."""
    os.replace(part, folder)
    _sync_folder(folder.parent)


@contextmanager
def saving(path: Path, needed: int, *, advice: str = "go on with --resume when there is room") -> Iterator[None]:
    """Turn a full disk into a RunError of one line that names the path and the ``needed`` bytes; a folder is removed."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        if isinstance(error, RunError) or not disk_full(error):
            raise
        alone = not (dist.is_initialized() and dist.get_world_size() > 1)  # else others may be writing still
        if alone and path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        free = 0
        with suppress(OSError):
            free = shutil.disk_usage(next(p for p in (path, *path.parents) if p.exists())).free
        raise RunError(
            f"{path} could not be saved ({' '.join(str(error).split())[:120]}): it needs about {needed / 1e6:,.1f} MB, "
            f"{free / 1e6:,.1f} MB are free on its disk; {advice}"
        ) from None


def disk_full(error: BaseException) -> bool:
    """Whether a file could not be written for want of room; torch and safetensors hide the error number in the text."""
    if isinstance(error, OSError):
        return error.errno in DISK_FULL
    text = str(error)
    hidden = any(f"(os error {number})" in text for number in DISK_FULL)
    return hidden or "PytorchStreamWriter failed" in text or "inline_container.cc" in text


def _order(folder: Path) -> int:
    name = folder.name.removeprefix(PREFIX).removesuffix(DAMAGED)
    return int(name) if name.isdigit() else -1


def stored(path: Path) -> tuple[int, int]:
    """Size and CRC-32 of a file, once it is on the disk."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
    return path.stat().st_size, checksum(path)


def checksum(path: Path) -> int:
    """CRC-32 of a file."""
    crc = 0
    with path.open("rb") as file:
        while block := file.read(BLOCK):
            crc = zlib.crc32(block, crc)
    return crc


def _for_each(action: Any, paths: list[Path]) -> list[Any]:
    with ThreadPoolExecutor(4) as pool:  # CRC-32 releases the interpreter
        return list(pool.map(action, paths))


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
