"""What memory this machine has."""

from pathlib import Path
from typing import NamedTuple


class Memory(NamedTuple):
    """Bytes."""

    free: int
    total: int


def memory() -> Memory | None:
    """Memory of the machine, or of the container that this process is in; None where Linux does not tell."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        values = {line.partition(":")[0]: int(line.split()[1]) * 1024 for line in lines}
        free, total = values["MemAvailable"], values["MemTotal"]
    except (OSError, KeyError, ValueError, IndexError):
        return None
    try:
        limit, used = (int(Path(f"/sys/fs/cgroup/memory.{name}").read_text()) for name in ("max", "current"))
    except (OSError, ValueError):  # no limit
        return Memory(free, total)
    return Memory(min(free, max(limit - used, 0)), min(total, limit))
