"""One thread per device, through which all module calls of all running jobs go, several of them as one.

A job's thread hands a call over and waits. The device's thread takes the call of the job that has had least of the
device so far, adds what may be merged with it (``merging``), runs them once, and gives each job its rows. So jobs share
the device step by step: a short one that comes behind a long one waits for one call of it, not for all.

Order after L. Kleinrock, least attained service ("Queueing Systems", vol. 2, 1976), with a bound on waiting.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch

from api.engine.curve import Curve
from api.engine.merging import CannotSplit, Mergeable, analyse, merge, rejoin, split, take
from api.engine.stopwatch import CpuStopwatch, Stopwatch

log = logging.getLogger("api.engine")

_PATIENCE = 0.5
"""Share of a call's own time that is waited, at most, for jobs that are between two steps."""
_GAPS = 4
"""How many times longer than usual a job may take between two calls before it is no longer waited for."""
_GAP = 0.005
"""Seconds that a job is thought to take between two calls before that was measured."""
_CURVES = 1024
"""Kinds of call that are remembered: shapes and scales are the clients' choice, and modules come and go."""
_LONGEST_WAIT = 1.0
"""Seconds after which a call goes first, however much of the device its job has had."""


class Cancelled(Exception):
    """Raised in a job's thread, at its next call, when the job is to stop."""


_here = threading.local()


class Ticket:
    """A running job, as the executor knows it.

    Args:
        cancelled: asked before every call, and while one waits.

    Attributes:
        attained: seconds of the device that it has had.
        short_at: the method of a module in which memory ended for it; empty: in none.
    """

    def __init__(self, cancelled: Callable[[], bool] = lambda: False) -> None:
        self.cancelled = cancelled
        self.attained = 0.0
        self.short_at = ""
        self.parked = False
        self.last: Any = None
        """Kind of its last call: it is expected to make another one."""
        self.resumed = 0.0
        """When it began, or got its last result."""
        self.gap = 0.0
        """Seconds that it usually takes from one result to the next call."""


class _Call:
    __slots__ = (
        "args",
        "done",
        "error",
        "function",
        "kind",
        "kwargs",
        "mergeable",
        "owner",
        "result",
        "since",
        "ticket",
    )

    def __init__(self, ticket: Ticket, function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]):
        module = getattr(function, "__self__", None)
        self.ticket, self.function, self.args, self.kwargs = ticket, function, args, kwargs
        self.owner = type(module).__name__
        # what is no module's method has no rows, and may hold a model's weights: nothing is to be remembered of it
        self.mergeable: Mergeable | None = None if module is None else analyse(function, self.owner, args, kwargs)
        # the module itself, not its name: two models of one class are two
        self.kind = (id(module), getattr(function, "__name__", ""), self.mergeable.key if self.mergeable else id(self))
        self.since = time.monotonic()
        self.done = threading.Event()
        self.result: Any = None
        self.error: BaseException | None = None

    @property
    def rows(self) -> int:
        return self.mergeable.rows if self.mergeable else 1


class Executor:
    """Runs module calls on one device.

    Args:
        threads: for the computations of a CPU; None: as torch has it.
        stopwatch: of the device; a CPU's without one.
    """

    def __init__(self, threads: int | None = None, stopwatch: Stopwatch | None = None) -> None:
        self._threads = threads
        self._stopwatch = stopwatch or CpuStopwatch()
        self._changed = threading.Condition()
        self._tickets: set[Ticket] = set()
        self._calls: list[_Call] = []
        self._alone: list[_Call] = []
        self._exclusive = False
        self._curves: dict[Any, Curve] = {}
        self._singly: set[tuple[str, str]] = set()
        self._closed = False
        self.calls = self.runs = 0
        """Module calls that were asked for, and those that were made."""
        self._thread = threading.Thread(target=self._serve, name="device", daemon=True)
        self._thread.start()

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
        call = _Call(ticket, function, args, kwargs)
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
        call = _Call(Ticket(cancelled), function, (), {})
        with self._changed:
            if self._is_over(call.ticket):
                raise Cancelled
            self._alone.append(call)
            self._changed.notify_all()
        return self._await(call)

    def on_device(self, function: Callable[[], Any]) -> Any:
        """Run something on the device's thread, between two calls of the jobs: none of them is parked for it.

        Raises:
            Cancelled: the executor is closed.
            Exception: what it raises.
        """
        call = _Call(Ticket(), function, (), {})
        with self._changed:
            if self._closed:
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

    def close(self) -> None:
        """End the thread; what waits is cancelled."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._thread.join(10)

    def wake(self) -> None:
        """A job was cancelled: let it leave if it waits."""
        with self._changed:
            self._changed.notify_all()

    def _is_over(self, ticket: Ticket) -> bool:
        return self._closed or ticket.cancelled()

    def _await(self, call: _Call) -> Any:
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
                self._run(batch)
                self._hand_back(batch)
                del batch  # what a job no longer needs is not to live until the next call

    def _hand_back(self, batch: list[_Call]) -> None:
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

    def _next(self) -> list[_Call] | None:
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
                elif self._calls:
                    batch, timeout = self._choose(time.monotonic())
                    if timeout is None:
                        for call in batch:
                            self._calls.remove(call)
                        return batch
                self._changed.wait(timeout)

    def _drop_cancelled(self) -> None:
        for call in [call for call in self._calls + self._alone if self._is_over(call.ticket)]:
            (self._calls if call in self._calls else self._alone).remove(call)
            call.ticket.parked = False
            call.error = Cancelled()
            call.done.set()

    def _choose(self, now: float) -> tuple[list[_Call], float | None]:
        """The batch to run, and how long to wait for others to come first or join it: None to run it at once."""
        first = min(self._calls, key=lambda call: _place(call, now))
        curve = self._curve(first)
        batch, rows = [first], first.rows
        if not self._runs_alone(first):
            for call in sorted(self._calls, key=lambda call: call.since):
                if call is not first and call.kind == first.kind and rows + call.rows <= curve.limit:
                    batch.append(call)
                    rows += call.rows
        patience = _PATIENCE * curve.seconds(rows)
        joins = rows < curve.limit and not self._runs_alone(first)
        until = max((self._back_by(ticket, first, joins, patience) for ticket in self._tickets), default=0.0)
        return batch, until - now if until > now else None

    def _curve(self, call: _Call) -> Curve:
        """What is known of calls of this kind; of one that runs alone whatever happens, nothing is kept."""
        if call.mergeable is None:
            return Curve()
        curve = self._curves.pop(call.kind, None) or Curve()
        self._curves[call.kind] = curve  # the one that was used last stands last
        if len(self._curves) > _CURVES:
            del self._curves[next(iter(self._curves))]
        return curve

    def _back_by(self, ticket: Ticket, first: _Call, joins: bool, patience: float) -> float:
        """Until when a job that is between two steps is waited for: it may join the call, or goes before it."""
        if ticket.parked:
            return 0.0
        may_join = joins and ticket.last in (None, first.kind)  # of one that has only begun, nobody knows
        if not may_join and ticket.attained >= first.ticket.attained:
            return 0.0
        return ticket.resumed + min(patience, _GAPS * (ticket.gap or _GAP))

    def _runs_alone(self, call: _Call) -> bool:
        return call.mergeable is None or (call.owner, call.function.__name__) in self._singly

    def _run(self, batch: list[_Call]) -> None:
        if len(batch) > 1 and self._run_merged(batch):
            return
        for call in batch:
            self._run_alone(call)

    def _run_merged(self, batch: list[_Call]) -> bool:
        """Make one call of several; whether that went well."""
        name = f"{batch[0].owner}.{batch[0].function.__name__}"
        calls = [call.mergeable for call in batch if call.mergeable is not None]
        counts = [call.rows for call in calls]
        try:
            output = self._timed(batch, lambda: batch[0].function(**merge(calls)))
            for call, result in zip(batch, split(output, counts), strict=True):
                call.result = result
            return True
        except CannotSplit as fault:
            log.info("%s runs unmerged: it returns %s", name, fault)
            self._singly.add((batch[0].owner, batch[0].function.__name__))
        except torch.OutOfMemoryError:
            self._curve(batch[0]).lower_cap(sum(counts) // 2)
            log.warning("out of memory with %d rows of %s: smaller batches from now on", sum(counts), name)
        except Exception as fault:  # one of them may be to blame: each is told its own
            log.info("a merged call failed (%s): each part is run alone", type(fault).__name__)
        return False

    def _run_alone(self, call: _Call) -> None:
        if call.mergeable is None or call.rows <= self._curve(call).cap:
            try:
                call.result = self._timed([call], lambda: call.function(*call.args, **call.kwargs))
                return
            except torch.OutOfMemoryError as fault:
                call.error = fault.with_traceback(None)  # which knows everything that the failed call had allocated
            except BaseException as fault:
                call.error = fault
                return
        # past the handler: until it ends, the fault and all that it knows of live
        if call.mergeable is not None and call.rows > 1:
            self._run_in_halves(call, call.mergeable)

    def _run_in_halves(self, call: _Call, whole: Mergeable) -> None:
        """A call of more rows than fit at once; the last resort before it fails."""
        self._curve(call).lower_cap(max(1, call.rows // 2))
        try:
            call.result = rejoin(self._halves(call, whole))
            call.error = None
        except torch.OutOfMemoryError as fault:
            call.error = fault.with_traceback(None)
        except BaseException as fault:
            call.error = fault

    def _halves(self, call: _Call, whole: Mergeable) -> list[Any]:
        middle = whole.rows // 2
        parts: list[Any] = []
        for half in (take(whole, 0, middle), take(whole, middle, whole.rows)):
            if half.rows == 1:
                parts.append(self._part(call, half))
            elif (part := self._fitting(call, half)) is not None:
                parts.append(part)
            else:
                parts += self._halves(call, half)
        return parts

    def _fitting(self, call: _Call, part: Mergeable) -> Any:
        """What a part of a call returns, or None where it does not fit either."""
        try:
            return self._part(call, part)
        except torch.OutOfMemoryError:
            self._curve(call).lower_cap(max(1, part.rows // 2))
            return None

    def _part(self, call: _Call, part: Mergeable) -> Any:
        return self._timed([call], lambda: call.function(**part.arguments), part.rows)

    def _timed(self, batch: list[_Call], function: Callable[[], Any], rows: int | None = None) -> Any:
        """Make a call for these jobs, and note how long the device was at it."""
        self.runs += 1
        counts = [call.rows if rows is None else rows for call in batch]
        tickets = [call.ticket for call in batch]
        curve = self._curve(batch[0])

        def note(seconds: float) -> None:
            curve.note(sum(counts), seconds)
            for ticket, count in zip(tickets, counts, strict=True):
                ticket.attained += seconds * count / sum(counts)

        return self._stopwatch.time(function, note)


def _place(call: _Call, now: float) -> tuple[float, float, float]:
    """Where in line a call stands: those that waited too long by age, then those of the jobs that have had least."""
    if now - call.since >= _LONGEST_WAIT:
        return 0.0, call.since, 0.0
    return 1.0, call.ticket.attained, call.since
