"""Parts of files that were looked through once, refused when the file is no longer the same; and which names are allowed."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from cdistill.errors import InputError

_ODD = re.compile(r"[\x00-\x1f\x7f\ud800-\udfff\\]")


@dataclass(frozen=True, slots=True)
class KnownFile:
    """A file as it was when its index was made. Nothing is held open: copies in other processes cost nothing."""

    path: Path
    size: int
    changed: int

    @classmethod
    def of(cls, path: Path) -> KnownFile:
        """Raises ValueError where there is no file."""
        if not path.is_file():
            raise InputError(f"no such file: {path}")
        status = path.stat()
        return cls(path, status.st_size, status.st_mtime_ns)

    def read(self, offset: int, length: int) -> bytes:
        """``length`` bytes from ``offset`` on. Raises ValueError if the file has changed since its index was made."""
        handle = os.open(self.path, os.O_RDONLY)
        try:
            status = os.fstat(handle)
            if (status.st_size, status.st_mtime_ns) != (self.size, self.changed):
                raise InputError(f"{self.path} was changed while it was in use; start anew")
            parts = []
            while length > 0:
                parts.append(os.pread(handle, length, offset))
                if not parts[-1]:
                    raise InputError(f"{self.path} ends before byte {offset + length}")
                offset += len(parts[-1])
                length -= len(parts[-1])
            return b"".join(parts)
        finally:
            os.close(handle)


def is_odd(name: str) -> bool:
    """Whether a name within a data set holds backslashes, control characters or what is no UTF-8."""
    return _ODD.search(name) is not None


def leaves_folder(name: str) -> bool:
    """Whether a name with ``/`` leads, as it is written, out of the folder that it starts from."""
    return name.startswith("/") or name[1:2] == ":" or ".." in name.split("/")
