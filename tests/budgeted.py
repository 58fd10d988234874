"""An allocator with a budget, for a CPU: it counts what tensors take, and says no as a GPU does."""

from __future__ import annotations

import contextlib
import random
import threading
import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from api.engine.budgets import Memory
from api.engine.device import Device
from api.engine.generate import Engine
from api.engine.loader import PartLoader
from api.engine.parts import HostPart, PartSpec
from api.engine.reading import BufferPart


class Allocator:
    """Counts the storages that operations make, in the threads that are told to.

    Attributes:
        live: bytes there are now.
        peak, high: most that ever were since it was set to 0.
        budget: bytes beyond which there are none; None: as many as wanted.
        chance: that an allocation fails, whatever there is.
        refused: allocations that failed.
    """

    def __init__(self, seed: int = 0) -> None:
        self.live = self.peak = self.refused = self.high = 0
        self.budget: int | None = None
        self.chance = 0.0
        self._rng = random.Random(seed)
        self._lock = threading.RLock()  # the garbage collector may come by at any time
        self._seen = WeakIdKeyDictionary()

    def note(self, tensor: torch.Tensor) -> None:
        """Count a tensor's storage where it is a new one.

        Raises:
            torch.OutOfMemoryError: it is refused.
        """
        if tensor.is_meta:
            return
        storage = tensor.untyped_storage()
        with self._lock:
            if storage in self._seen:
                return
            size = storage.nbytes()
            if (self.budget is not None and self.live + size > self.budget) or self._rng.random() < self.chance:
                self.refused += 1
                raise torch.OutOfMemoryError(f"Tried to allocate {size} bytes; {self.live} are in use.")
            self._seen[storage] = True
            self.live += size
            self.peak = max(self.peak, self.live)
            self.high = max(self.high, self.live)
            weakref.finalize(storage, self._gone, size)

    def exempt(self, tensor: torch.Tensor) -> None:
        """Never count a tensor's storage: it is not in this memory."""
        with self._lock:
            self._seen[tensor.untyped_storage()] = True

    def _gone(self, size: int) -> None:
        with self._lock:
            self.live -= size

    @contextlib.contextmanager
    def inside(self, engine: Engine) -> Iterator[None]:
        """Count what the device's thread of an engine makes."""
        mode = Counting(self)
        engine.executor.on_device(mode.__enter__)
        try:
            yield
        finally:
            engine.executor.on_device(lambda: mode.__exit__(None, None, None))


class AllocatorMeter:
    """What calls allocate.

    Args:
        allocator: asked.
    """

    def __init__(self, allocator: Allocator) -> None:
        self._allocator = allocator
        self._before = 0

    def begin(self) -> None:
        """A call begins."""
        self._before = self._allocator.high = self._allocator.live

    def end(self) -> int:
        """Bytes at the most since then."""
        return self._allocator.high - self._before

    def free(self) -> int:
        """Bytes that are left."""
        budget = self._allocator.budget
        return 2**60 if budget is None else max(0, budget - self._allocator.live)


class Apart(Device):
    """A CPU that has memory of its own, as a GPU has: everything is copied there.

    Args:
        allocator: of that memory.
    """

    def __init__(self, allocator: Allocator | None = None) -> None:
        super().__init__("cpu")
        self.shares_host = False
        self.allocator = allocator

    def meter(self) -> AllocatorMeter | None:
        """What the allocator counts."""
        return AllocatorMeter(self.allocator) if self.allocator else None

    def memory(self) -> Memory | None:
        """What the allocator gives."""
        if self.allocator is None or self.allocator.budget is None:
            return None
        return Memory(self.allocator.budget, self.allocator.budget - self.allocator.live)


class Outside(PartLoader):
    """Reads into memory that an allocator does not count."""

    def __init__(self, device: Apart) -> None:
        super().__init__(device)
        self._allocator = device.allocator

    def read(self, spec: PartSpec) -> HostPart:
        """As ever."""
        with _disable_current_modes():
            host = super().read(spec)
        if self._allocator is not None:
            for tensor in host.tensors.values():
                self._allocator.exempt(tensor)
            if isinstance(host, BufferPart) and host.flat is not None:
                self._allocator.exempt(host.flat)
        return host


class Counting(TorchDispatchMode):
    """On for the thread that enters it."""

    def __init__(self, allocator: Allocator) -> None:
        super().__init__()
        self._allocator = allocator

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor):
                self._allocator.note(leaf)
        return out
