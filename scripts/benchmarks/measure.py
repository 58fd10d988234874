"""Figures, and how they are taken: ours and the baseline in turn, medians."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass
class Figure:
    """One comparison.

    Attributes:
        name: what was measured.
        ours: our median.
        baseline: the baseline's median.
        unit: of both.
        against: what the baseline is.
        ratio: how many times better ours is than the baseline.
        more: further figures, for ``--json`` and the end of the line.
    """

    name: str
    ours: float
    baseline: float
    unit: str
    against: str
    ratio: float
    more: dict[str, Any] = field(default_factory=dict)

    def line(self) -> str:
        """The one line that is printed."""
        rest = "".join(f" {key}={value}" for key, value in self.more.items() if not isinstance(value, list))
        return (
            f"{self.name} ratio={self.ratio:.2f} ours={self.ours:.3f} baseline={self.baseline:.3f} "
            f'unit={self.unit} against="{self.against}"{rest}'
        )

    def as_json(self) -> dict[str, Any]:
        """Everything."""
        return asdict(self)


def milliseconds(call: Callable[[], object]) -> float:
    """How long one call takes."""
    began = time.perf_counter()
    call()
    return (time.perf_counter() - began) * 1000


def interleaved(calls: Sequence[Callable[[], object]], rounds: int, warm_up: int = 3) -> list[list[float]]:
    """Milliseconds of each call, all of them in turn in every round."""
    for _ in range(warm_up):
        for call in calls:
            call()
    times: list[list[float]] = [[] for _ in calls]
    for _ in range(rounds):
        for call, taken in zip(calls, times, strict=True):
            taken.append(milliseconds(call))
    return times


def median(values: list[float]) -> float:
    """The median."""
    return statistics.median(values)
