"""One thread per device, through which all module calls of all running jobs go, several of them as one.

A job's thread hands a call over and waits. The device's thread takes the call of the job that has had least of the
device so far, adds what may be merged with it (``merging``), has them made as one (``runs``), and gives each job its
rows. So jobs share the device step by step: a short one that comes behind a long one waits for one call of it, not for
all.

Order after L. Kleinrock, least attained service ("Queueing Systems", vol. 2, 1976), with a bound on waiting.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch

from api.engine.calls import Call, Cancelled, Ticket
from api.engine.compiled.graphs import Graphs
from api.engine.peaks import Peaks
from api.engine.runs import Runs
from api.engine.stopwatch import CpuStopwatch, Stopwatch
from api.engine.tally import Tally

_PATIENCE = 0.5
"""Share of a call's own time that is waited, at most, for jobs that are between two steps."""
_GAPS = 4
"""How many times longer than usual a job may take between two calls before it is no longer waited for."""
_GAP = 0.005
"""Seconds that a job is thought to take between two calls before that was measured."""
_LONGEST_WAIT = 1.0
"""Seconds after which a call goes first, however much of the device its job has had."""


_here = threading.local()


class Executor:
    """Runs module calls on one device.

    Args:
        threads: for the computations of a CPU; None: as torch has it.
        stopwatch: of the device; a CPU's without one.
        peaks: learns how much memory calls take.
        tally: counts calls.
        graphs: make some of the calls.
    """

    def __init__(
        self,
        threads: int | None = None,
        stopwatch: Stopwatch | None = None,
        peaks: Peaks | None = None,
        tally: Tally | None = None,
        graphs: Graphs | None = None,
    ) -> None:
        self._peaks = peaks or Peaks()
        self._threads = threads
        self._stopwatch = stopwatch or CpuStopwatch()
        self._changed = threading.Condition()
        self._tickets: set[Ticket] = set()
        self._calls: list[Call] = []
        self._alone: list[Call] = []
        self._exclusive = False
        self._runs = Runs(self._stopwatch, self._peaks, self._waiting, tally or Tally(), graphs)
        self._closed = False
        self.calls = 0
        """Module calls that were asked for."""
        self._thread = threading.Thread(target=self._serve, name="device", daemon=True)
        self._thread.start()

    @property
    def runs(self) -> int:
        """Module calls that were made: several that are merged are one."""
        return self._runs.count

    @property
    def since(self) -> float | None:
        """When the call that the device is at began (``time.monotonic``); None while it is idle."""
        return self._stopwatch.since

    @contextlib.contextmanager
    def job(self, ticket: Ticket) -> Iterator[Ticket]:
        """Be a running job in this thread. A job that has just begun waits while something runs exclusively.

        On a CPU the thread keeps one core from then on, for the small things between two calls.

        Raises:
            Cancelled: the job is to stop, or the executor is closed.
        """
        if self._threads is not None and not getattr(_here, "is_small", False):
            # once for each thread: every such call throws away the primitives that oneDNN has prepared for all
            torch.set_num_threads(1)
            _here.is_small = True
        with self._changed:
            self._changed.wait_for(lambda: self._is_over(ticket) or (not self._alone and not self._exclusive))
            if self._is_over(ticket):
                raise Cancelled
            ticket.resumed = time.monotonic()
            self._tickets.add(ticket)
        try:
            yield ticket
        finally:
            with self._changed:
                self._tickets.discard(ticket)
                self._changed.notify_all()

    def run(self, ticket: Ticket, function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """Have a module's method called on the device's thread, perhaps together with others.

        Raises:
            Cancelled: the job is to stop.
            Exception: what the call raises.
        """
        if ticket.cancelled():
            raise Cancelled
        call = Call(ticket, function, args, kwargs)
        with self._changed:
            if self._closed:  # nobody would ever take it
                raise Cancelled
            self.calls += 1
            if ticket.last is not None:
                between = call.since - ticket.resumed
                ticket.gap = between if not ticket.gap else 0.7 * ticket.gap + 0.3 * between
            ticket.parked, ticket.last = True, call.kind
            self._calls.append(call)
            self._changed.notify_all()
        return self._await(call)

    def exclusively(self, function: Callable[[], Any], cancelled: Callable[[], bool] = lambda: False) -> Any:
        """Run something on the device's thread while every job is parked, and none begins.

        For what patches torch process-wide while it runs, such as loading a model. Not from within a job, which
        would wait for itself.

        Args:
            function: what to run.
            cancelled: asked while it waits.

        Raises:
            Cancelled: ``cancelled`` said so before it began, or the executor is closed.
            Exception: what it raises.
        """
        call = Call(Ticket(cancelled), function, (), {})
        with self._changed:
            if self._is_over(call.ticket):
                raise Cancelled
            self._alone.append(call)
            self._changed.notify_all()
        return self._await(call)

    def on_device(self, function: Callable[[], Any], cancelled: Callable[[], bool] = lambda: False) -> Any:
        """Run something on the device's thread, between two calls of the jobs: none of them is parked for it.

        Args:
            function: what to run.
            cancelled: asked while it waits.

        Raises:
            Cancelled: ``cancelled`` said so before it began, or the executor is closed.
            Exception: what it raises.
        """
        call = Call(Ticket(cancelled), function, (), {})
        with self._changed:
            if self._is_over(call.ticket):
                raise Cancelled
            self._calls.append(call)
            self._changed.notify_all()
        return self._await(call)

    @property
    def astray(self) -> float | None:
        """When the job that is longest between two calls made its last (``time.monotonic``); None if there is none."""
        with self._changed:
            between = [ticket.resumed for ticket in self._tickets if ticket.resumed and not ticket.parked]
        return min(between, default=None)

    def _waiting(self) -> frozenset[Ticket]:
        """The running jobs where each of them waits for a call, so that none computes in its own thread; else none."""
        with self._changed:
            return frozenset(self._tickets if all(ticket.parked for ticket in self._tickets) else ())

    def close(self) -> None:
        """End the thread; what waits is cancelled."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._thread.join(10)

    def wake(self) -> None:
        """A job was cancelled: let it leave if it waits, also while the device is at a call of another."""
        with self._changed:
            self._drop_cancelled()
            self._changed.notify_all()

    def _is_over(self, ticket: Ticket) -> bool:
        return self._closed or ticket.cancelled()

    def _await(self, call: Call) -> Any:
        call.done.wait()
        if call.error is None:
            return call.result
        error, call.error = call.error, None
        try:
            raise error
        finally:
            # its traceback knows this frame, and that of the call: in a circle, all that the job holds would live on
            del error

    def _serve(self) -> None:
        if self._threads is not None:
            torch.set_num_threads(self._threads)
        with torch.no_grad():
            while batch := self._next():
                self._runs.make(batch)
                self._hand_back(batch)
                del batch  # what a job no longer needs is not to live until the next call

    def _hand_back(self, batch: list[Call]) -> None:
        now = time.monotonic()
        with self._changed:
            for call in batch:
                call.ticket.parked, call.ticket.resumed = False, now
                if isinstance(call.error, torch.OutOfMemoryError):
                    call.ticket.short_at = getattr(call.function, "__name__", "")
            if self._exclusive:
                self._exclusive = False
                self._changed.notify_all()  # jobs that wait to begin
        for call in batch:
            call.done.set()

    def _next(self) -> list[Call] | None:
        """The calls to run now; waits for them. None when it is over."""
        with self._changed:
            while True:
                self._stopwatch.catch_up()
                self._drop_cancelled()
                if self._closed:  # and none of the calls is left
                    return None
                timeout: float | None = None
                if self._alone:
                    if all(ticket.parked for ticket in self._tickets):
                        self._exclusive = True
                        return [self._alone.pop(0)]
                    if (own := self._of_no_job()) is not None:
                        return [own]
                elif self._calls:
                    batch, timeout = self._choose(time.monotonic())
                    if timeout is None:
                        for call in batch:
                            self._calls.remove(call)
                        return batch
                self._changed.wait(timeout)

    def _of_no_job(self) -> Call | None:
        """What is to be run by ``on_device``, if anything is: a job may wait for it, and is not parked meanwhile."""
        found = next((call for call in self._calls if call.ticket not in self._tickets), None)
        if found is not None:
            self._calls.remove(found)
        return found

    def _drop_cancelled(self) -> None:
        for call in [call for call in self._calls + self._alone if self._is_over(call.ticket)]:
            (self._calls if call in self._calls else self._alone).remove(call)
            call.ticket.parked = False
            call.error = Cancelled()
            call.done.set()

    def _choose(self, now: float) -> tuple[list[Call], float | None]:
        """The batch to run, and how long to wait for others to come first or join it: None to run it at once."""
        first = min(self._calls, key=lambda call: _place(call, now))
        curve = self._runs.curve(first)
        batch, rows, limit = [first], first.rows, curve.limit
        if not self._runs.is_single(first):
            others = [call for call in self._calls if call is not first and call.kind == first.kind]
            if others:  # what does not fit in memory now is not tried
                limit = min(limit, self._peaks.rows(first.ticket.about, first.owner, first.name) or limit)
            for call in sorted(others, key=lambda call: call.since):
                if rows + call.rows <= limit:
                    batch.append(call)
                    rows += call.rows
        patience = _PATIENCE * curve.seconds(rows)
        joins = rows < limit and not self._runs.is_single(first)
        until = max((self._back_by(ticket, first, joins, patience) for ticket in self._tickets), default=0.0)
        return batch, until - now if until > now else None

    def _back_by(self, ticket: Ticket, first: Call, joins: bool, patience: float) -> float:
        """Until when a job that is between two steps is waited for: it may join the call, or goes before it."""
        if ticket.parked:
            return 0.0
        may_join = joins and ticket.last in (None, first.kind)  # of one that has only begun, nobody knows
        if not may_join and ticket.attained >= first.ticket.attained:
            return 0.0
        return ticket.resumed + min(patience, _GAPS * (ticket.gap or _GAP))


def _place(call: Call, now: float) -> tuple[float, float, float]:
    """Where in line a call stands: those that waited too long by age, then those of the jobs that have had least."""
    if now - call.since >= _LONGEST_WAIT:
        return 0.0, call.since, 0.0
    return 1.0, call.ticket.attained, call.since
