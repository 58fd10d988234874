"""Who is sent to next: a line for each job and receiver, and for each receiver how it is doing. No clock, no network.

- Of one line, one event is on its way at a time, and the next one goes when that has arrived or was given up: so the
  order of a job's events is kept.
- An event that did not arrive waits for a random time that grows, "full jitter" of
  https://aws.amazon.com/blogs/architecture/exponential-backoff-and-jitter/.
- A host that was down a few times in a row gets one at a time, and these ever more rarely: it keeps nobody else
  waiting, and the tries of the events behind are not used up. The first one that arrives ends that.
"""

from __future__ import annotations

import heapq
from bisect import insort
from collections.abc import Callable, Iterator
from urllib.parse import urlsplit

import msgspec

_FIRST, _LONGEST = 1.0, 300.0
"""Seconds: the longest pause after the first try, and after any."""
_LONGEST_OF_RECEIVER = 60.0
_IN_A_ROW = 5
"""So many that did not arrive, one after the other: the receiver is in trouble."""
_TOGETHER = 16
"""Events on their way to one receiver at once."""


class Waiting(msgspec.Struct, kw_only=True):
    """An event that has not arrived.

    Attributes:
        number: counts up in the order of the events.
        id: as the receiver is told it.
        url: the receiver.
        job: whose event it is.
        created: seconds since the epoch.
        due: when it may be sent.
        tries: how often it was sent.
    """

    number: int
    id: str
    url: str
    job: str
    created: float
    due: float = 0.0
    tries: int = 0


def backoff(failures: int, longest: float, draw: Callable[[float, float], float]) -> float:
    """Seconds until the next try.

    Args:
        failures: how many there were, from 1.
        longest: seconds.
        draw: a number between two, as ``random.uniform``.
    """
    return draw(0.0, min(longest, _FIRST * 2.0 ** min(failures - 1, 60)))


class _Line:
    def __init__(self) -> None:
        self.events: list[Waiting] = []
        self.sending: Waiting | None = None


class _Receiver:
    def __init__(self) -> None:
        self.lines: dict[str, _Line] = {}
        self.heap: list[tuple[float, int, str]] = []
        """(due, number, job) of events that are the first of their line, and of some that are not any more."""
        self.sending = self.waiting = self.failures = 0
        self.not_before = 0.0

    @property
    def in_trouble(self) -> bool:
        return self.failures >= _IN_A_ROW

    def offer(self, job: str) -> None:
        """Let the first of a line be taken."""
        line = self.lines.get(job)
        if line and line.events and line.sending is None:
            first = line.events[0]
            heapq.heappush(self.heap, (first.due, first.number, job))

    def first(self) -> Waiting | None:
        """The one that is due first, of those that are first in their line."""
        while self.heap:
            due, number, job = self.heap[0]
            line = self.lines.get(job)
            if line and line.sending is None and line.events:
                first = line.events[0]
                if (first.due, first.number) == (due, number):
                    return first
            heapq.heappop(self.heap)
        return None

    def opens(self) -> float | None:
        """When the next one may be taken; None: not before something else happens."""
        if self.sending >= (1 if self.in_trouble else _TOGETHER) or (first := self.first()) is None:
            return None
        return max(first.due, self.not_before)


class Lines:
    """All events that have not arrived.

    Args:
        draw: a number between two, as ``random.uniform``.
    """

    def __init__(self, draw: Callable[[float, float], float]) -> None:
        self._draw = draw
        self._receivers: dict[str, _Receiver] = {}

    def add(self, event: Waiting) -> None:
        """Stand in line, by ``number``."""
        receiver = self._receivers.setdefault(_name(event.url), _Receiver())
        key = _key(event)
        line = receiver.lines.setdefault(key, _Line())
        insort(line.events, event, key=lambda other: other.number)
        receiver.waiting += 1
        receiver.offer(key)

    def take(self, now: float) -> Waiting | None:
        """One that is to be sent now; receivers take turns."""
        for name, receiver in self._receivers.items():
            opens = receiver.opens()
            if opens is not None and opens <= now:
                event = receiver.first()
                assert event is not None
                receiver.lines[_key(event)].sending = event
                receiver.sending += 1
                self._receivers[name] = self._receivers.pop(name)  # last in turn
                return event
        return None

    def opens(self) -> float | None:
        """When the next one may be taken; None: not before something else happens."""
        return min((at for r in self._receivers.values() if (at := r.opens()) is not None), default=None)

    def arrived(self, event: Waiting, now: float) -> None:
        """One that was taken has arrived."""
        receiver = self._receivers[_name(event.url)]
        was_in_trouble, receiver.failures, receiver.not_before = receiver.in_trouble, 0, 0.0
        if was_in_trouble:
            for key, line in receiver.lines.items():
                if line.events and line.sending is None:
                    line.events[0].due = min(line.events[0].due, now)
                    receiver.offer(key)
        self._leave(event, receiver)

    def failed(self, event: Waiting, now: float, at_least: float = 0.0, *, is_down: bool = True) -> float:
        """One that was taken has not arrived: it stays first in its line.

        Args:
            event: with its ``tries`` counted.
            now: seconds since the epoch.
            at_least: seconds that the receiver asked for.
            is_down: others would not arrive there either.

        Returns:
            When it is due again.
        """
        receiver = self._receivers[_name(event.url)]
        if is_down:
            self._note_failure(receiver, now, at_least)
        key = _key(event)
        event.due = now + max(at_least, backoff(event.tries, _LONGEST, self._draw))
        receiver.lines[key].sending = None
        receiver.sending -= 1
        receiver.offer(key)
        return event.due

    def given_up(self, event: Waiting, now: float, *, is_down: bool = True) -> None:
        """One that was taken is not sent any more.

        Args:
            event: which.
            now: seconds since the epoch.
            is_down: as for ``failed``.
        """
        receiver = self._receivers[_name(event.url)]
        if is_down:
            self._note_failure(receiver, now, 0.0)
        self._leave(event, receiver)

    def hurry(self, webhook_id: str, now: float) -> bool:
        """Have one that waits be due now, if it is here."""
        for receiver in self._receivers.values():
            for key, line in receiver.lines.items():
                for event in line.events:
                    if event.id == webhook_id:
                        event.due, receiver.not_before = min(event.due, now), 0.0
                        receiver.offer(key)
                        return True
        return False

    def older(self, than: float) -> list[Waiting]:
        """Take out those that wait for longer, and are not on their way."""
        found: list[Waiting] = []
        for name, receiver in list(self._receivers.items()):
            for key, line in list(receiver.lines.items()):
                old = [event for event in line.events if event.created < than and event is not line.sending]
                for event in old:
                    line.events.remove(event)
                receiver.waiting -= len(old)
                found += old
                if old:
                    receiver.offer(key)
                    self._forget(name, key)
        return found

    def waiting(self, url: str) -> int:
        """How many wait for a receiver."""
        receiver = self._receivers.get(_name(url))
        return receiver.waiting if receiver else 0

    def total(self) -> int:
        """How many wait, for all receivers."""
        return sum(receiver.waiting for receiver in self._receivers.values())

    def behind(self, url: str, job: str) -> int:
        """How many of one job wait."""
        receiver = self._receivers.get(_name(url))
        line = receiver.lines.get(f"{job} {url}") if receiver else None
        return len(line.events) if line else 0

    def __iter__(self) -> Iterator[Waiting]:
        for receiver in self._receivers.values():
            for line in receiver.lines.values():
                yield from line.events

    def _note_failure(self, receiver: _Receiver, now: float, at_least: float) -> None:
        receiver.failures += 1
        if receiver.in_trouble:
            pause = backoff(receiver.failures - _IN_A_ROW + 1, _LONGEST_OF_RECEIVER, self._draw)
            receiver.not_before = now + max(pause, at_least)

    def _leave(self, event: Waiting, receiver: _Receiver) -> None:
        key = _key(event)
        line = receiver.lines[key]
        line.sending = None
        line.events.remove(event)
        receiver.sending -= 1
        receiver.waiting -= 1
        receiver.offer(key)
        self._forget(_name(event.url), key)

    def _forget(self, name: str, key: str) -> None:
        receiver = self._receivers[name]
        if not receiver.lines[key].events:
            del receiver.lines[key]
        if not receiver.lines:
            del self._receivers[name]


def _name(url: str) -> str:
    """The receiver that an address belongs to: what follows its host may differ from job to job."""
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc}"


def _key(event: Waiting) -> str:
    return f"{event.job} {event.url}"
