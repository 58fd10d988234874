"""How many bytes models may take in each tier: settings, and what was measured at the start.

Sources: Linux ``Documentation/admin-guide/cgroup-v2.rst`` and ``cgroup-v1/memory.rst``, proc_meminfo(5).
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

log = logging.getLogger("api.engine")

_SHARE = 0.5
"""Of the memory there is; the rest is for activations, images, the page cache and everyone else."""
_FREE_SHARE = 0.8
"""Of what others leave."""
DEVICE_SHARE = 0.75
"""Of a GPU's memory that is free at the start; the rest is for activations."""
_UNLIMITED = 2**60
"""cgroup v1 says "no limit" with a number about as large as it can."""


@dataclass(frozen=True)
class Memory:
    """What there is, in bytes.

    Attributes:
        total: that this container may use at most.
        free: of that, what nobody uses.
    """

    total: int
    free: int


@dataclass(frozen=True)
class Budgets:
    """Bytes that models may take.

    Attributes:
        device: on the device.
        host: in the host's memory.
        shared: the device computes in the host's memory.
        capacity: that the device has at all.
        strict: ``device`` was set, and not only measured.
    """

    device: int
    host: int
    shared: bool
    capacity: int | None = None
    strict: bool = False


Limit = int | float | None
"""A setting: bytes, a share, or nothing."""


def budgets(
    vram_limit: Limit, ram_limit: Limit, gpu: Memory | None, host: Memory, workers: int = 1, *, settled: bool = False
) -> Budgets:
    """The budgets of one worker.

    Args:
        vram_limit: VRAM_LIMIT.
        ram_limit: RAM_LIMIT, for all workers together.
        gpu: the device's memory; None for a CPU.
        host: the memory of the container.
        workers: how many share the host's memory, each with a part of its own.
        settled: ``ram_limit`` are the bytes of all workers together, whatever of it others have taken already.
    """
    if settled:
        assert isinstance(ram_limit, int)
        ram = ram_limit
    else:
        default = min(int(host.total * _SHARE), int(host.free * _FREE_SHARE))
        ram = _limit("RAM_LIMIT", ram_limit, host, default) // workers
    if gpu is None:
        vram = min(ram, _limit("VRAM_LIMIT", vram_limit, host, ram))
        return Budgets(vram, ram, shared=True, capacity=host.total)
    vram = _limit("VRAM_LIMIT", vram_limit, gpu, int(gpu.free * DEVICE_SHARE))
    return Budgets(vram, ram, shared=False, capacity=gpu.total, strict=vram_limit is not None)


def _limit(name: str, wanted: Limit, memory: Memory, default: int) -> int:
    if wanted is None:
        return default
    asked = int(wanted * memory.total) if isinstance(wanted, float) else wanted
    if asked > memory.free:
        log.warning("%s asks for %.2f GB, of which %.2f are free: they are all", name, asked / 1e9, memory.free / 1e9)
    return min(asked, memory.free)


def host_memory(root: Path = Path("/")) -> Memory:
    """The memory of this container: of the machine, within the limits of the control groups that this process is in.

    Args:
        root: where ``proc`` and ``sys`` are.
    """
    info = {}
    for line in (root / "proc/meminfo").read_text().splitlines():
        name, _, rest = line.partition(":")
        info[name] = int(rest.split()[0]) * 1024
    total, free = info["MemTotal"], info.get("MemAvailable", info["MemTotal"])
    for limit, used in _groups(root):
        total, free = min(total, limit), min(free, max(0, limit - used))
    return Memory(total, free)


def _groups(root: Path) -> list[tuple[int, int]]:
    """Limit and unreclaimable usage of every control group that bounds this process, in bytes."""
    found = []
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        lines = []
    mounted = root / "sys/fs/cgroup"
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if not controllers:
            top, limit, usage, cache = mounted, "memory.max", "memory.current", "inactive_file"
        elif "memory" in controllers.split(","):
            top, limit, usage = mounted / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes"
            cache = "total_inactive_file"
        else:
            continue
        # in a container the path may be the host's, and its own group stands at the top
        folder = top / path.lstrip("/")
        while True:
            if (bound := _number(folder / limit)) is not None and bound < _UNLIMITED:
                used = (_number(folder / usage) or 0) - _field(folder / "memory.stat", cache)
                found.append((bound, max(0, used)))
            if folder == top:
                break
            folder = folder.parent
    return found


def _number(file: Path) -> int | None:
    try:
        return int(file.read_text())
    except (OSError, ValueError):  # "max"
        return None


def _field(file: Path, name: str) -> int:
    try:
        lines = file.read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.split()[0] == name), 0)
