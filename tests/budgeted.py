"""An allocator with a budget, for a CPU: it counts what tensors take, and says no as a GPU does."""

from __future__ import annotations

import contextlib
import random
import threading
import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from api.engine.generate import Engine


class Allocator:
    """Counts the storages that operations make, in the threads that are told to.

    Attributes:
        live: bytes there are now.
        peak: most that ever were since it was set to 0.
        budget: bytes beyond which there are none; None: as many as wanted.
        chance: that an allocation fails, whatever there is.
        refused: allocations that failed.
    """

    def __init__(self, seed: int = 0) -> None:
        self.live = self.peak = self.refused = 0
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
            weakref.finalize(storage, self._gone, size)

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
