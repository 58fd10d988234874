"""How worker processes are started. Imports next to nothing: a worker can import torch before the service is there."""

from __future__ import annotations

import asyncio
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

from api.service.host_memory import is_possible, pair
from api.settings import Settings

_ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "PYTHONUNBUFFERED": "1"}
"""A worker reads models from disk and nowhere else."""
PREFERENCES = {
    "OMP_WAIT_POLICY": "PASSIVE",
    "MALLOC_MMAP_THRESHOLD_": str(32 * 2**20),
    "MALLOC_TRIM_THRESHOLD_": str(256 * 2**20),
}
"""What the environment may say otherwise.

Threads that spin at a barrier take the core from the one they wait for: on busy cores a worker became a hundred times
slower, on idle ones nothing is lost. And glibc gives the pages of every large tensor back to the system when it is
freed, and faults them in again for the next (mallopt(3)): kept, the demo model's denoiser makes 160 page faults a call
instead of 4,000 and more, and takes a third of the time in the kernel. An idle worker gives them back.
"""
_LOOK = 0.01


class Spawned:
    """A worker process, and our end of its socket.

    Args:
        process: just started.
        sock: our end.
        tier: the keeper's end of what it is told of the host tier by; None: the worker shares none.
    """

    def __init__(self, process: subprocess.Popen[bytes], sock: socket.socket, tier: socket.socket | None) -> None:
        self._process = process
        self.sock = sock
        self.tier = tier

    @property
    def pid(self) -> int:
        """Its id."""
        return self._process.pid

    @property
    def returncode(self) -> int | None:
        """How it ended, negative for a signal; None while it lives."""
        return self._process.poll()

    def kill(self) -> None:
        """End it."""
        self._process.kill()

    async def wait(self) -> int:
        """Wait for its end. Nobody waits for long: only when its socket was closed."""
        while (code := self.returncode) is None:
            await asyncio.sleep(_LOOK)
        return code


def devices(settings: Settings) -> tuple[str, ...]:
    """The devices to start workers for: DEVICES, or every NVIDIA GPU there is, or the CPU.

    Asks the file system, not torch, which this process must not import.
    """
    if settings.devices:
        return settings.devices
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        count = len([part for part in visible.split(",") if part.strip() not in ("", "-1")])
    else:
        count = sum(bool(re.fullmatch(r"nvidia\d+", entry.name)) for entry in Path("/dev").iterdir())
    return tuple(f"cuda:{index}" for index in range(count)) or ("cpu",)


def command(device: str, number: int, workers: int, tier: int | None = None) -> list[str]:
    """What to start for a device.

    Args:
        device: e.g. ``cuda:0`` or ``cpu``.
        number: the descriptor of its socket.
        workers: how many share the host's memory.
        tier: the descriptor of its socket to the keeper of that; None: each has a part of its own.
    """
    shares = [] if tier is None else ["--host-tier", str(tier)]
    return [sys.executable, "-m", "api.worker", str(number), device, "--workers", str(workers), *shares]


def environment() -> dict[str, str]:
    """A worker's environment."""
    return {**PREFERENCES, **os.environ, **_ENVIRONMENT}


def spawn(device: str, workers: int) -> Spawned:
    """Start a worker's process.

    Args:
        device: e.g. ``cuda:0`` or ``cpu``.
        workers: how many share the host's memory.

    Raises:
        OSError: there are no descriptors, or no memory.
    """
    ours, link = socket.socketpair()
    tier, keeps = pair() if workers > 1 and is_possible() else (None, None)
    theirs = [link, keeps] if keeps else [link]
    try:
        process = subprocess.Popen(
            command(device, link.fileno(), workers, *([keeps.fileno()] if keeps else [])),
            pass_fds=[sock.fileno() for sock in theirs],
            env=environment(),
            stdin=subprocess.DEVNULL,
        )
    except BaseException:
        ours.close()
        if tier:
            tier.close()
        raise
    finally:
        for sock in theirs:
            sock.close()
    return Spawned(process, ours, tier)
