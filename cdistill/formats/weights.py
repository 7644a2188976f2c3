"""The weights of a checkpoint, by name and read when they are asked for: safetensors or pickled, one file or several."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from cdistill.errors import InputError
from cdistill.models.folder import INDEX, WEIGHTS, one_line, read_json, weight_files

PICKLED, PICKLED_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
SHARD_BYTES = 5_000_000_000
NAMED = 3  # names that a message gives


class Weights:
    """Tensors of some files by name.

    Attributes:
        shapes: of every weight.

    Raises:
        ValueError: a file is corrupt, holds anything but tensors, or a weight is in two of them; begins with ``key``.
    """

    def __init__(self, paths: Sequence[Path], key: str) -> None:
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._readers: dict[str, Callable[[], Tensor]] = {}
        for path in paths:
            shapes, readers = (_open if path.suffix == ".safetensors" else _unpickle)(path, key)
            twice = sorted(shapes.keys() & self.shapes.keys())
            if twice:
                raise InputError(f"{key}: {path} is corrupt ({twice[0]} is in another file, too)")
            self.shapes |= shapes
            self._readers |= readers

    def __getitem__(self, name: str) -> Tensor:
        return self._readers[name]()

    def rename(self, new: Callable[[str], str]) -> None:
        """Call every weight by another name."""
        self.shapes = {new(name): shape for name, shape in self.shapes.items()}
        self._readers = {new(name): reader for name, reader in self._readers.items()}

    def take(self, other: Mapping[str, Tensor]) -> None:
        """Add tensors that are in memory, in place of those of the same names."""
        for name, tensor in other.items():
            self.shapes[name] = tuple(tensor.shape)
            self._readers[name] = lambda kept=tensor: kept  # type: ignore[misc]

    def drop(self, names: Iterable[str]) -> None:
        """Forget some weights."""
        for name in names:
            del self.shapes[name], self._readers[name]


def has_weights(folder: Path) -> bool:
    """Whether a folder holds the weights of a whole model."""
    return any((folder / name).is_file() for name in (WEIGHTS, INDEX, PICKLED, PICKLED_INDEX))


def weights_in(folder: Path, key: str) -> Weights:
    """The weights of the model in a folder: safetensors if there are any, else what torch.save wrote.

    Raises:
        ValueError: there are none, or one that an index names is missing; a file is corrupt (`Weights`).
    """
    safe, pickled = [folder / WEIGHTS, folder / INDEX], [folder / PICKLED, folder / PICKLED_INDEX]
    if any(path.is_file() for path in safe):
        paths, index = weight_files(folder, key), safe[1]
    elif pickled[0].is_file():
        paths, index = [pickled[0]], pickled[1]
    elif pickled[1].is_file():
        paths, index = _indexed(pickled[1], key), pickled[1]
    else:
        raise InputError(f"{key}: {folder} holds no weights: neither {WEIGHTS} nor {PICKLED}, nor the index of either")
    weights = Weights(paths, key)
    if len(paths) > 1:
        lost = sorted(read_json(index, key)["weight_map"].keys() - weights.shapes.keys())
        if lost:
            raise InputError(f"{key}: {counted(lost, 'weight')} that {index} names {_are(lost)} in no file")
    return weights


def counted(names: Sequence[str], what: str) -> str:
    """Some names and how many there are, for one line."""
    shown = ", ".join(names[:NAMED]) + (", ..." if len(names) > NAMED else "")
    return f"{len(names)} {what}{'s' * (len(names) > 1)} ({shown})"


def _are(names: Sequence[str]) -> str:
    return "are" if len(names) > 1 else "is"


def write(weights: Mapping[str, Callable[[], Tensor]], folder: Path, key: str, most: int = SHARD_BYTES) -> None:
    """Write weights as safetensors of at most so many bytes a file, under the names that transformers gives them.

    Raises:
        ValueError: one is not finite; begins with ``key``. OSError, SafetensorError: the files cannot be written.
    """
    held: dict[str, Tensor] = {}
    files: dict[str, int] = {}
    count, room, total = 1, most, 0
    for name, read in weights.items():
        tensor = read()
        _require_finite(name, tensor, key)
        size = tensor.numel() * tensor.element_size()
        if held and size > room:
            save_file(held, folder / f"part-{count}", metadata={"format": "pt"})
            held, count, room = {}, count + 1, most
        room, total = room - size, total + size
        held[name] = tensor.detach().clone(memory_format=torch.contiguous_format)
        files[name] = count
    save_file(held, folder / f"part-{count}", metadata={"format": "pt"})
    called = {i: WEIGHTS if count == 1 else f"model-{i:05}-of-{count:05}.safetensors" for i in range(1, count + 1)}
    for i, name in called.items():
        (folder / f"part-{i}").rename(folder / name)
    if count > 1:
        index = {"metadata": {"total_size": total}, "weight_map": {name: called[i] for name, i in files.items()}}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _require_finite(name: str, tensor: Tensor, key: str) -> None:
    if tensor.is_floating_point() and tensor.element_size() > 1 and tensor.numel():
        low, high = map(float, tensor.aminmax())  # with a NaN both are NaN
        if not (abs(low) < float("inf") and abs(high) < float("inf")):
            raise InputError(f"{key}: {name} holds NaN or inf")


def _open(path: Path, key: str) -> tuple[dict[str, tuple[int, ...]], dict[str, Callable[[], Tensor]]]:
    try:
        file = safe_open(path, framework="pt")
        names = list(file.keys())
        shapes = {name: tuple(file.get_slice(name).get_shape()) for name in names}
    except (SafetensorError, OSError) as error:
        raise InputError(f"{key}: {path} is corrupt ({one_line(error)})") from None
    return shapes, {name: lambda name=name: file.get_tensor(name) for name in names}  # type: ignore[misc]


def _unpickle(path: Path, key: str) -> tuple[dict[str, tuple[int, ...]], dict[str, Callable[[], Tensor]]]:
    try:
        found: Any = torch.load(path, map_location="cpu", weights_only=True, mmap=_is_zip(path))
    except OSError as error:
        raise InputError(f"{key}: {path} cannot be read ({error.strerror or one_line(error)})") from None
    except Exception as error:  # torch raises all kinds of them over files that are no pickles of tensors
        more = isinstance(error, pickle.UnpicklingError)
        said = "it holds more than tensors, or torch.save has not written it" if more else one_line(error)[:200]
        raise InputError(f"{key}: {path} is corrupt ({said})") from None
    if not isinstance(found, Mapping) or not all(isinstance(value, Tensor) for value in found.values()):
        raise InputError(f"{key}: {path} is corrupt (it must hold tensors by name)")
    tensors = {str(name): value for name, value in found.items()}
    shapes = {name: tuple(value.shape) for name, value in tensors.items()}
    return shapes, {name: lambda value=value: value for name, value in tensors.items()}  # type: ignore[misc]


def _is_zip(path: Path) -> bool:
    """Whether torch.save wrote a file since 1.6, which can be mapped into memory."""
    with path.open("rb") as file:
        return file.read(2) == b"PK"


def _indexed(index: Path, key: str) -> list[Path]:
    """The pickled files that an index names. Raises ValueError for one that is missing or lies elsewhere."""
    names = read_json(index, key).get("weight_map")
    if not isinstance(names, dict) or not names or not all(isinstance(name, str) for name in names.values()):
        raise InputError(f"{key}: {index} is corrupt (weight_map must say which file holds which weight)")
    paths = [index.parent / name for name in sorted(set(names.values()))]
    for path in paths:
        if path.parent != index.parent or path.suffix != ".bin":
            raise InputError(f"{key}: {index} is corrupt ({path.name!r:.80} is no pickled file of its folder)")
        if not path.is_file():
            raise InputError(f"{key}: {path} is missing")
    return paths
