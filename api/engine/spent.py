"""What loading a model spends its time on."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass


@dataclass
class Spent:
    """Seconds that loading took, by what they were spent on.

    Attributes:
        read: files to host memory.
        build: configurations, headers, modules, tokenizers, the pipeline.
        copy: host memory to the device.
    """

    read: float = 0.0
    build: float = 0.0
    copy: float = 0.0


_SPENT: ContextVar[Spent | None] = ContextVar("spent", default=None)


@contextlib.contextmanager
def measuring(spent: Spent) -> Iterator[Spent]:
    """Add up in ``spent`` what this thread's loading takes within the block."""
    token = _SPENT.set(spent)
    try:
        yield spent
    finally:
        _SPENT.reset(token)


@contextlib.contextmanager
def spending(on: str) -> Iterator[None]:
    """Count the time within the block as spent on ``read``, ``build`` or ``copy``, where somebody is measuring."""
    spent, began = _SPENT.get(), time.perf_counter()
    try:
        yield
    finally:
        if spent is not None:
            setattr(spent, on, getattr(spent, on) + time.perf_counter() - began)
