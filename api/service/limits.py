"""How much each key may ask for: jobs a minute, and jobs that wait or run."""

from __future__ import annotations

import contextlib
import math
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence

from api.errors import ApiError
from api.service.rate import Rate
from api.settings import Settings, SettingsError

_SOON = 2
"""Seconds after which a job may be over."""


class Limits:
    """Counts the jobs of each key.

    Args:
        settings: KEY_RATE_LIMIT and KEY_CONCURRENCY.
        names: of the keys there are. Requests without a key are not limited.
        now: seconds.

    Raises:
        SettingsError: a limit is set for a key that there is not.
    """

    def __init__(self, settings: Settings, names: Sequence[str], now: Callable[[], float] = time.monotonic) -> None:
        rates = _each("KEY_RATE_LIMIT", settings.key_rate_limit, names)
        self._rates = {name: (Rate(limit), limit) for name, limit in rates.items()}
        self._most = _each("KEY_CONCURRENCY", settings.key_concurrency, names)
        self._now = now
        self._full_at: dict[str, float] = {}
        self._open: Counter[str] = Counter()

    def of(self, owner: str) -> dict[str, int | None]:
        """What a key may, and what it has: for people."""
        rate = self._rates.get(owner)
        return {
            "jobsPerMinute": rate[1] if rate else None,
            "concurrency": self._most.get(owner),
            "jobs": self._open[owner],
        }

    def take(self, owner: str) -> None:
        """Begin a job; whoever does calls ``release`` when it is over.

        Raises:
            ApiError: TOO_MANY_JOBS, RATE_LIMITED.
        """
        if owner in self._most and self._open[owner] >= self._most[owner]:
            message = f'The key "{owner}" has {self._open[owner]} jobs that wait or run, as many as it may.'
            raise ApiError("TOO_MANY_JOBS", message, retry_after=_SOON)
        if owner in self._rates:
            (rate, limit), full_at, now = self._rates[owner], self._full_at.get(owner, 0.0), self._now()
            if wait := rate.wait(full_at, now):
                message = f'The key "{owner}" may begin {limit} jobs a minute.'
                raise ApiError("RATE_LIMITED", message, retry_after=math.ceil(wait))
            self._full_at[owner] = rate.taken(full_at, now)
        self._open[owner] += 1

    def count(self, owner: str) -> None:
        """As ``take``, of a job that was begun before and is not refused any more."""
        self._open[owner] += 1

    def release(self, owner: str) -> None:
        """A job is over."""
        self._open[owner] -= 1

    @contextlib.contextmanager
    def job(self, owner: str) -> Iterator[None]:
        """``take``, and ``release`` at the end."""
        self.take(owner)
        try:
            yield
        finally:
            self.release(owner)


def _each(variable: str, limits: Mapping[str, int], names: Sequence[str]) -> dict[str, int]:
    """The limit of each key that has one; "" stands for those that are not named."""
    if unknown := set(limits) - {"", *names}:
        there = ", ".join(names) or "no keys"
        raise SettingsError(f"{variable}: there is no key {', '.join(sorted(unknown))} in API_KEYS, but {there}")
    found = {name: limits.get(name, limits.get("", 0)) for name in names}
    return {name: limit for name, limit in found.items() if limit}
