"""How long a module call takes by its number of rows, and up to how many a bigger batch pays."""

from __future__ import annotations

from collections import deque

MOST_ROWS = 64
_PAYS = 0.07
"""By which power of its size a batch must give more rows a second than the best smaller one: 5 % for twice the rows,
and as much less for less. A fixed step would keep sizes out that lie close to each other, each a little better."""
_SAMPLES = 5
_ENOUGH = 3
_GUESS = 0.02
_LOOK_AGAIN = 200
"""Calls after which a batch size that did not pay is tried again: the device may have had other work then."""


class Curve:
    """Measured for one kind of call: one module, one shape.

    Attributes:
        limit: rows that a batch may have.
        cap: rows that fit in memory, as far as is known.
    """

    def __init__(self) -> None:
        self.limit = MOST_ROWS
        self.cap = MOST_ROWS
        self._times: dict[int, deque[float]] = {}
        self._since_look = 0

    def note(self, rows: int, seconds: float) -> None:
        """A call of so many rows took so long."""
        self._times.setdefault(rows, deque(maxlen=_SAMPLES)).append(seconds)
        self._since_look += 1
        if self._since_look >= _LOOK_AGAIN:
            self._since_look = 0
            self._times = {rows: self._times[rows]}
        self.limit = min(self.cap, self._paying())

    def lower_cap(self, rows: int) -> None:
        """More rows than this do not fit in memory."""
        self.cap = max(1, min(self.cap, rows))
        self.limit = min(self.limit, self.cap)

    def seconds(self, rows: int) -> float:
        """What a call of so many rows should take."""
        if not self._times:
            return _GUESS
        nearest = min(self._times, key=lambda known: abs(known - rows))
        return self._median(nearest) * max(1.0, rows / nearest)

    def _paying(self) -> int:
        """The largest size that is faster than every smaller one; no bound if that is the largest that was tried.

        Not the first that is not: one size that was measured in a bad moment would keep all larger ones away.
        """
        best, paying, largest = 0.0, 1, 0
        for rows in sorted(self._times):
            if len(self._times[rows]) < _ENOUGH:
                continue
            # the fastest of a few: what else a machine does makes calls slower, never faster
            largest, speed = rows, rows / min(self._times[rows])
            if speed >= best * (rows / paying) ** _PAYS:
                best, paying = speed, rows
        return paying if paying < largest else MOST_ROWS

    def _median(self, rows: int) -> float:
        ordered = sorted(self._times[rows])
        return ordered[len(ordered) // 2]
