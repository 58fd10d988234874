"""A call of a module, and the job that makes it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from api.engine.merging import Mergeable, analyse
from api.engine.peaks import About


class Cancelled(Exception):
    """Raised in a job's thread, at its next call, when the job is to stop."""


class Ticket:
    """A running job, as the executor knows it.

    Args:
        cancelled: asked before every call, and while one waits.
        about: what its calls are for, as far as their memory depends on it.

    Attributes:
        attained: seconds of the device that it has had.
        graphs: its calls may be made by CUDA graphs.
        short_at: the method of a module in which memory ended for it; empty: in none.
    """

    def __init__(self, cancelled: Callable[[], bool] = lambda: False, about: About | None = None) -> None:
        self.cancelled = cancelled
        self.about = about
        self.attained = 0.0
        self.graphs = True
        self.short_at = ""
        self.parked = False
        self.last: Any = None
        """Kind of its last call: it is expected to make another one."""
        self.resumed = 0.0
        """When it began, or got its last result."""
        self.gap = 0.0
        """Seconds that it usually takes from one result to the next call."""


class Call:
    """What a job's thread hands over: a function, what it is called with, and what comes of it."""

    __slots__ = (
        "args",
        "done",
        "error",
        "function",
        "kind",
        "kwargs",
        "mergeable",
        "owner",
        "result",
        "since",
        "ticket",
    )

    def __init__(self, ticket: Ticket, function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]):
        module = getattr(function, "__self__", None)
        self.ticket, self.function, self.args, self.kwargs = ticket, function, args, kwargs
        self.owner = type(module).__name__
        # what is no module's method has no rows, and may hold a model's weights: nothing is to be remembered of it
        self.mergeable: Mergeable | None = None if module is None else analyse(function, self.owner, args, kwargs)
        # the module itself, not its name: two models of one class are two
        self.kind = (id(module), getattr(function, "__name__", ""), self.mergeable.key if self.mergeable else id(self))
        self.since = time.monotonic()
        self.done = threading.Event()
        self.result: Any = None
        self.error: BaseException | None = None

    @property
    def name(self) -> str:
        """Of the method."""
        return getattr(self.function, "__name__", "")

    @property
    def title(self) -> str:
        """Its module's class and the method; empty: it is no module's."""
        return "" if getattr(self.function, "__self__", None) is None else f"{self.owner}.{self.name}"

    @property
    def rows(self) -> int:
        """How many rows of a batch it is."""
        return self.mergeable.rows if self.mergeable else 1
