"""Checkpoints that survive: a complete one says so in a manifest of its files, which is written last."""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch.distributed as dist

from cdistill.errors import InputError
from cdistill.files import disk_full, sync_folder, write_text
from cdistill.manifest import COMPLETE, damage, for_each, read_manifest, stored
from cdistill.runtime.errors import RunError

DAMAGED = ".damaged"
PREFIX = "checkpoint-"
KEPT = 2  # complete checkpoints of a stage


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
    entries = dict(zip(mine, for_each(stored, [folder / name for name in mine]), strict=True))
    if several:
        shares: list[Any] = [None] * world
        dist.all_gather_object(shares, entries)
        entries = {name: entry for share in shares for name, entry in share.items()}
    if rank == 0:
        for path in (folder, *(p for p in folder.rglob("*") if p.is_dir())):
            sync_folder(path)
        manifest = json.dumps({**facts, "files": {name: entries[name] for name in names}}, indent=1) + "\n"
        write_text(folder / COMPLETE, manifest)
    if several:
        dist.barrier()


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
                raise InputError(
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


def publish(part: Path, folder: Path) -> None:
    """Give a sealed folder its name."""
    os.replace(part, folder)
    sync_folder(folder.parent)


def check_room(output: Path, weights: int) -> None:
    """Raise RunError where a disk has less room than a checkpoint and a result take: at least twice the weights' bytes."""
    there = next(path for path in (output, *output.absolute().parents) if path.exists())
    total, _, free = shutil.disk_usage(there)
    if total and free < 2 * weights:  # 0 in /proc and the like
        raise RunError(
            f"output: {output} needs at least {2 * weights / 1e6:,.1f} MB for a checkpoint and a result, and its disk has "
            f"{free / 1e6:,.1f} MB free: make room, or name another folder"
        )


@contextmanager
def saving(
    path: Path, needed: int, *, called: Path | None = None, advice: str = "go on with --resume when there is room"
) -> Iterator[None]:
    """Turn a full disk into a RunError of one line that names the path, or what it is ``called``, and the ``needed`` bytes; a
    folder is removed."""
    try:
        yield
    except Exception as error:  # torch, safetensors and tokenizers each have their own
        if isinstance(error, RunError) or not disk_full(error):
            raise
        alone = not (dist.is_initialized() and dist.get_world_size() > 1)  # else others may be writing still
        if alone and path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        free = 0
        with suppress(OSError):
            free = shutil.disk_usage(next(p for p in (path, *path.parents) if p.exists())).free
        raise RunError(
            f"{called or path} could not be saved ({' '.join(str(error).split())[:120]}): it needs about "
            f"{needed / 1e6:,.1f} MB, {free / 1e6:,.1f} MB are free on its disk; {advice}"
        ) from None


def _order(folder: Path) -> int:
    name = folder.name.removeprefix(PREFIX).removesuffix(DAMAGED)
    return int(name) if name.isdigit() else -1
