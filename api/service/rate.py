"""A rate: so many a minute, which may come at once.

A token bucket in one number, the time at which it is full again (the generic cell rate algorithm, ITU-T I.371).
"""

from __future__ import annotations

_MINUTE = 60.0


class Rate:
    """How often something may happen.

    Args:
        a_minute: how often in a minute; as many may come at once.
    """

    def __init__(self, a_minute: int) -> None:
        self._each = _MINUTE / a_minute

    def wait(self, full_at: float, now: float) -> float:
        """Seconds until the next one may come; 0 for now.

        Args:
            full_at: what ``taken`` gave the last time, 0 before the first.
            now: seconds on the same clock.
        """
        return max(0.0, full_at - now + self._each - _MINUTE)

    def taken(self, full_at: float, now: float) -> float:
        """Take one: what to remember."""
        return max(full_at, now) + self._each
