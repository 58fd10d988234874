"""What every training stage shares: a folder that a stopped run resumes from, progress, a log."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


class Run:
    """One training run in one folder.

    Args:
        folder: where checkpoints, cached data, the log and sample grids go.
        seed: everything that is drawn at random follows from it.
    """

    def __init__(self, folder: Path, seed: int) -> None:
        self.folder = folder
        self.seed = seed
        folder.mkdir(parents=True, exist_ok=True)
        self._log = (folder / "log.jsonl").open("a", encoding="utf-8")
        self._cpu = time.process_time()

    def log(self, **fields: Any) -> None:
        """Append one line to the log, with the processor seconds that this process has used."""
        record = {**fields, "cpu_s": round(time.process_time() - self._cpu)}
        self._log.write(json.dumps(record) + "\n")
        self._log.flush()

    def generator(self, *stream: int) -> torch.Generator:
        """A generator that depends on the seed and ``stream`` only, so a resumed run draws the same."""
        generator = torch.Generator()
        state = self.seed
        for number in stream:
            state = (state * 1_000_003 + number + 17) % (2**63 - 1)
        return generator.manual_seed(state)

    def load(self, name: str) -> dict[str, Any] | None:
        """The checkpoint of a stage, or ``None`` when it has not begun."""
        path = self.folder / f"{name}.pt"
        if not path.exists():
            return None
        return torch.load(path, map_location=DEVICE, weights_only=True)

    def save(self, name: str, state: dict[str, Any]) -> None:
        """Write a checkpoint whole or not at all."""
        part = self.folder / f"{name}.pt.part"
        torch.save(state, part)
        part.replace(self.folder / f"{name}.pt")


class Progress:
    """A progress bar on a terminal, a line every so often elsewhere."""

    def __init__(self, stage: str, total: int, start: int = 0) -> None:
        self.stage, self.total, self.start = stage, total, start
        self.began = self.printed = time.monotonic()
        self.live = sys.stderr.isatty()

    def step(self, done: int, **figures: float) -> None:
        """Show that ``done`` of the steps are done."""
        now = time.monotonic()
        if done < self.total and now - self.printed < (0.5 if self.live else 30):
            return
        self.printed = now
        rate = (done - self.start) / max(now - self.began, 1e-9)
        left = (self.total - done) / max(rate, 1e-9)
        shown = "  ".join(f"{name} {value:.4f}" for name, value in figures.items())
        bar = "#" * (30 * done // self.total)
        text = f"{self.stage:<14} [{bar:<30}] {done}/{self.total}  {left / 60:5.1f} min left  {shown}"
        print(f"\r{text}" if self.live else text, end="" if self.live and done < self.total else "\n")
        sys.stdout.flush()
