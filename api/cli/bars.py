"""Shows transfers: a bar per phase on a terminal, else a line when a phase begins and one when it ends."""

from __future__ import annotations

import os
import sys
import time
from types import TracebackType
from typing import TYPE_CHECKING, Self

from api.cli.text import amount

if TYPE_CHECKING:
    from tqdm import tqdm

_VERBS = {"download": "Downloading", "extract": "Unpacking", "convert": "Converting", "upload": "Uploading"}


class _Phase:
    def __init__(self, name: str, done: int, total: int | None) -> None:
        self.name, self.done, self.total = _VERBS.get(name, name), done, total
        self.began = time.monotonic()
        self.over = False
        self.bar: tqdm[None] | None = None


class Bars:
    """A context, and what ``api.models.manifest.OnProgress`` is; one thread at a time."""

    def __init__(self) -> None:
        self._phases: dict[str, _Phase] = {}
        self._terminal = sys.stderr.isatty()
        self._waits = False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, fault: BaseException | None, trace: TracebackType | None
    ) -> None:
        for phase in self._phases.values():
            if phase.bar is not None:
                phase.bar.close()
            elif not phase.over and fault is None:
                self._end(phase)
            elif not phase.over:
                _say(f"{phase.name} stopped at {_of(phase)}.")

    def __call__(self, phase: str, done: int, total: int | None) -> None:
        """Take a report: phase, bytes done, bytes in all or None."""
        known = self._phases.get(phase)
        if known is None:
            known = self._phases[phase] = _Phase(phase, done, total)
            self._begin(known)
        known.done, known.total = done, total
        if known.bar is not None:
            known.bar.total = total
            known.bar.update(done - known.bar.n)
        elif not known.over and total is not None and done >= total:
            self._end(known)

    def waiting(self) -> None:
        """Say once that another process is at it."""
        if not self._waits:
            self._waits = True
            _say("Another process is installing the same model; waiting for it …")

    def _begin(self, phase: _Phase) -> None:
        if self._terminal:
            from tqdm import tqdm

            # some containers have a terminal that knows no size
            known = os.get_terminal_size(sys.stderr.fileno()).columns > 0
            phase.bar = tqdm(
                desc=phase.name,
                total=phase.total,
                initial=phase.done,
                unit="B",
                unit_scale=True,
                dynamic_ncols=known,
                ncols=None if known else 80,
                nrows=None if known else 24,
                file=sys.stderr,
            )
        else:
            _say(f"{phase.name} {amount(phase.total)} …" if phase.total is not None else f"{phase.name} …")

    def _end(self, phase: _Phase) -> None:
        phase.over = True
        # no rate: what an earlier attempt left was not moved now, and nothing says how much that is
        _say(f"{phase.name} done: {amount(phase.done)} in {time.monotonic() - phase.began:.1f} s.")


def _of(phase: _Phase) -> str:
    return amount(phase.done) + (f" of {amount(phase.total)}" if phase.total is not None else "")


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
