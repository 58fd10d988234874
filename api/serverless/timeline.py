"""What the start took, all of it on one line of time, so that one sees what ran beside what."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from api.service.workers import Worker


log = logging.getLogger("api.serverless")

_STARTED = 19
"""Field of /proc/self/stat behind the name: ticks from the start of the machine to that of the process; see proc(5)."""


class Timeline:
    """Phases by their beginning and end.

    ``time.perf_counter`` is one clock for all processes of a machine (CLOCK_MONOTONIC), so what a worker tells of
    itself stands on the same line.

    Attributes:
        process_began: when this process did.
        phases: beginning and end of each, by name.
    """

    def __init__(self) -> None:
        ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[_STARTED])
        age = time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
        self.process_began = time.perf_counter() - age
        self.phases: dict[str, tuple[float, float]] = {}

    def note(self, name: str, began: float) -> None:
        """A phase that began then ends now."""
        self.phases[name] = began, time.perf_counter()

    def line(self, workers: Sequence[Worker]) -> str:
        """Every phase, in seconds from the start of this process, in the order in which they began."""
        first = min((worker.info for worker in workers if worker.info), key=lambda info: info.ready_ms, default=None)
        phases = {**self.phases, **(first.phases if first else {})}
        return ", ".join(
            f"{name} {began - self.process_began:.2f}–{ended - self.process_began:.2f}"
            for name, (began, ended) in sorted(phases.items(), key=lambda item: item[1])
        )

    def tell(self, workers: Sequence[Worker]) -> None:
        """Log it: a worker is ready."""
        now = time.perf_counter() - self.process_began
        log.info("ready for jobs after %.2f s: %s (seconds from the start of the process)", now, self.line(workers))
