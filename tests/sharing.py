"""Workers of one container that share the host's memory, played by engines of one process."""

from __future__ import annotations

import contextlib
import gc
import os
import re
import socket
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from safetensors.torch import load_file, save_file

from api.engine.budgets import Budgets
from api.engine.device import Device
from api.engine.generate import Engine
from api.schema.generation import ModelRef
from api.service.host_keeper import HostKeeper
from api.worker.host_link import HostLink
from tests.budgeted import Apart
from tests.generating import a_request
from tests.tiny import save_tiny


def cast_model(folder: Path, seed: int) -> ModelRef:
    """A tiny model whose files are in half precision: on a CPU it is cast, so that it is not pages of its files."""
    save_tiny(folder, seed)
    for path in folder.glob("*/*.safetensors"):
        weights = {name: t.half() if t.is_floating_point() else t for name, t in load_file(path).items()}
        save_file(weights, path, {"format": "pt"})
    return ModelRef(f"tiny/{seed}", "main", "fp32", str(folder))


def draw(engine: Engine, model: ModelRef, name: str = "job") -> np.ndarray:
    """An image of 64 x 64, which depends on the model alone."""
    request = a_request(
        name,
        model,
        "StableDiffusionPipeline",
        "DDIMScheduler",
        {"prompt": "a dog", "num_inference_steps": 2, "width": 64, "height": 64},
    )
    return engine.generate(request).images[0]


class Sharing:
    """A container.

    Args:
        limit: RAM_LIMIT.
        shared: its workers compute in the host's memory; else each has memory of its own, as a GPU has.
        patience: seconds that a claim waits.
    """

    def __init__(self, limit: int, *, shared: bool = True, patience: float = 60) -> None:
        self.limit = limit
        self.keeper = HostKeeper()
        self.keeper.start()
        self._shared = shared
        self._patience = patience
        self.engines: list[Engine] = []
        self.links: list[HostLink] = []

    def link(self) -> HostLink:
        """A worker's end."""
        link = HostLink(self.keeper.connect(), self._patience)
        assert link.settle(self.limit) == self.limit
        self.links.append(link)
        return link

    def worker(self) -> Engine:
        """A worker."""
        device = Device("cpu") if self._shared else Apart()
        engine = Engine(
            device, Budgets(2**30 if not self._shared else self.limit, self.limit, self._shared), tier=self.link()
        )
        self.engines.append(engine)
        return engine

    def kill(self, engine: Engine) -> None:
        """Have a worker die: the keeper hears nothing of it but the end of its socket."""
        number = self.engines.index(engine)
        self.links[number]._sock.shutdown(socket.SHUT_RDWR)
        engine.close()

    def mappings(self) -> list[list[str]]:
        """Of each part that is there: the permissions of its mappings, in all workers."""
        there = {str(os.fstat(number).st_ino) for number in self.keeper._memory.values()}
        return [found for inode, found in memories().items() if inode in there]

    def close(self) -> None:
        for engine in self.engines:
            engine.close()
        self.keeper.stop()
        self.engines.clear()
        gc.collect()


@contextlib.contextmanager
def sharing(limit: int, *, shared: bool = True, patience: float = 60) -> Iterator[Sharing]:
    """A container, which ends."""
    container = Sharing(limit, shared=shared, patience=patience)
    try:
        yield container
    finally:
        container.close()


def memories() -> dict[str, list[str]]:
    """The shared memory that is mapped here, by inode: the permissions of each mapping."""
    found: dict[str, list[str]] = {}
    for line in Path("/proc/self/maps").read_text().splitlines():
        if match := re.match(r"\S+ (\S+) \S+ \S+ (\d+) +/memfd:host-tier", line):
            found.setdefault(match[2], []).append(match[1])
    return found
