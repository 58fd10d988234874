"""Who goes next, of those who wait for a model: as few switches as a bound on waiting allows.

Jobs whose model is in memory go before those that need a switch. A job that a later one has gone before may be passed
for so long and no longer; from then on nobody who came later begins before it. So a job begins at most that bound, and
the rest of what had begun, later than in the order of arrival, and a steady stream for one model starves no other. The
clock starts when a job is first passed, not when it comes: in a queue that is longer than the bound all would be
overdue, and the order that of arrival, which is the one with the most switches.
"""

from __future__ import annotations

import math
import time
from collections import OrderedDict
from collections.abc import Callable, Hashable
from itertools import islice
from typing import Generic, TypeVar

T = TypeVar("T", bound=Hashable)

_FAR = 1024
"""How far down the line is looked for one who needs no switch."""


class Order(Generic[T]):
    """Those who wait, in the order in which they came.

    Args:
        longest: seconds for which one may be passed by others; 0: never, the order is that of arrival.
        clock: seconds, monotonic.
    """

    def __init__(self, longest: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._longest = longest
        self._clock = clock
        self._numbers: OrderedDict[T, int] = OrderedDict()
        self._deadlines: dict[T, float] = {}
        self._overdue: dict[T, float] = {}
        self._last = self._first = 0

    def __len__(self) -> int:
        return len(self._numbers)

    def __contains__(self, one: T) -> bool:
        return one in self._numbers

    def waiting(self, most: int | None = None) -> list[T]:
        """Those who wait, first come first.

        Args:
            most: how many of them.
        """
        return list(islice(self._numbers, most))

    def join(self, one: T, deadline: float = math.inf, overdue: float = math.inf, *, first: bool = False) -> None:
        """Stand in line, at its end or before all others.

        Args:
            one: who waits.
            deadline: when its waiting is in vain, by ``clock``: it is passed for no more than half of what is left.
            overdue: until when it may be passed, by ``clock``, where that is known from another line.
            first: it was in line before and comes back.
        """
        if first:
            self._first -= 1
        else:
            self._last += 1
        self._numbers[one] = self._first if first else self._last
        self._numbers.move_to_end(one, last=not first)
        self._deadlines[one] = deadline
        if overdue < math.inf or self._longest <= 0:
            self._overdue[one] = min(overdue, self._clock() if self._longest <= 0 else math.inf)

    def leave(self, one: T) -> None:
        """No longer wait; nothing happens if it does not."""
        for table in (self._numbers, self._deadlines, self._overdue):
            table.pop(one, None)

    def overdue_at(self, one: T) -> float:
        """Until when it may be passed, by ``clock``; infinite while nobody has."""
        return self._overdue.get(one, math.inf)

    def overdue(self, one: T) -> bool:
        """Whether it has been passed for as long as may be."""
        return self._clock() >= self.overdue_at(one)

    def advance(self, ready: Callable[[T], bool], go: Callable[[T], bool]) -> list[T]:
        """Let everyone go who can.

        Args:
            ready: whether one needs no switch.
            go: tries to let one go; whether it could. What it knows of ``one`` is dropped after that, not before.

        Returns:
            Those who went; they are no longer in line.
        """
        barrier, gone = math.inf, list[T]()

        def rank(one: T) -> tuple[int, int]:
            return 0 if self.overdue(one) else 1 if ready(one) else 2, self._numbers[one]

        for one in sorted(self.waiting(_FAR), key=rank):
            number = self._numbers[one]
            if number > barrier:
                continue
            if go(one):
                gone.append(one)
                self._pass(number)
                self.leave(one)
            elif self.overdue(one):
                barrier = min(barrier, number)
        return gone

    def _pass(self, number: int) -> None:
        """Whoever came before that number has been passed."""
        now = self._clock()
        for one, own in self._numbers.items():
            if own >= number:
                return
            if one not in self._overdue:
                self._overdue[one] = now + min(self._longest, max(0.0, self._deadlines[one] - now) / 2)
