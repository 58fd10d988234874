"""Makes calls on the device: several as one, each alone where that fails, in halves where that does not fit."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any

import torch

from api.engine.calls import Call
from api.engine.compiled.graphs import Graphs
from api.engine.curve import Curve
from api.engine.merging import CannotSplit, Mergeable, merge, rejoin, split, take
from api.engine.peaks import Peaks
from api.engine.stopwatch import Stopwatch
from api.engine.tally import Tally

log = logging.getLogger("api.engine")

_CURVES = 1024
"""Kinds of call that are remembered: shapes and scales are the clients' choice, and modules come and go."""


class Runs:
    """Makes calls, and learns how long they take. For the device's thread alone, as its results are.

    Args:
        stopwatch: of the device.
        peaks: learns how much memory they take.
        waiting: see ``Peaks.measuring``.
        tally: counts them.
        graphs: make some of them; None: none.

    Attributes:
        count: calls that were made, merged ones as one.
    """

    def __init__(
        self,
        stopwatch: Stopwatch,
        peaks: Peaks,
        waiting: Callable[[], object],
        tally: Tally,
        graphs: Graphs | None = None,
    ) -> None:
        self._graphs = graphs
        self._stopwatch = stopwatch
        self._tally = tally
        self._peaks = peaks
        self._waiting = waiting
        self._curves: dict[Any, Curve] = {}
        self._singly: set[tuple[str, str]] = set()
        self._known: set[tuple[str, str]] = set()
        self.count = 0

    def curve(self, call: Call) -> Curve:
        """What is known of calls of this kind; of one that runs alone whatever happens, nothing is kept."""
        if call.mergeable is None:
            return Curve()
        curve = self._curves.pop(call.kind, None) or Curve()
        self._curves[call.kind] = curve  # the one that was used last stands last
        if len(self._curves) > _CURVES:
            del self._curves[next(iter(self._curves))]
        return curve

    def is_single(self, call: Call) -> bool:
        """Whether a call is merged with no other."""
        return call.mergeable is None or (call.owner, call.function.__name__) in self._singly

    def make(self, batch: list[Call]) -> None:
        """Make calls, as one where there are several; what comes of each is in it."""
        if len(batch) > 1 and self._run_merged(batch):
            return
        for call in batch:
            self._run_alone(call)

    def _run_merged(self, batch: list[Call]) -> bool:
        """Make one call of several; whether that went well."""
        name = f"{batch[0].owner}.{batch[0].function.__name__}"
        calls = [call.mergeable for call in batch if call.mergeable is not None]
        counts = [call.rows for call in calls]
        try:
            merged = merge(calls)
            output = self._timed(batch, lambda: batch[0].function(**merged), arguments=merged)
            for call, result in zip(batch, split(output, counts), strict=True):
                call.result = result
            return True
        except CannotSplit as fault:
            log.info("%s runs unmerged: it returns %s", name, fault)
            self._singly.add((batch[0].owner, batch[0].function.__name__))
        except torch.OutOfMemoryError:
            self._tally.shortage("smaller_batch")
            self.curve(batch[0]).lower_cap(sum(counts) // 2)
            log.warning("out of memory with %d rows of %s: smaller batches from now on", sum(counts), name)
        except Exception as fault:  # one of them may be to blame: each is told its own
            log.info("a merged call failed (%s): each part is run alone", type(fault).__name__)
        return False

    def _run_alone(self, call: Call) -> None:
        if call.mergeable is None or call.rows <= self.curve(call).cap:
            try:
                arguments = call.mergeable.arguments if call.mergeable else None
                call.result = self._timed([call], lambda: call.function(*call.args, **call.kwargs), arguments=arguments)
                return
            except torch.OutOfMemoryError as fault:
                call.error = fault.with_traceback(None)  # which knows everything that the failed call had allocated
            except BaseException as fault:
                call.error = fault
                return
        # past the handler: until it ends, the fault and all that it knows of live
        if call.mergeable is not None and call.rows > 1:
            self._run_in_halves(call, call.mergeable)

    def _run_in_halves(self, call: Call, whole: Mergeable) -> None:
        """A call of more rows than fit at once; the last resort before it fails."""
        self._tally.shortage("halves")
        self.curve(call).lower_cap(max(1, call.rows // 2))
        try:
            call.result = rejoin(self._halves(call, whole))
            call.error = None
        except torch.OutOfMemoryError as fault:
            call.error = fault.with_traceback(None)
        except BaseException as fault:
            call.error = fault

    def _halves(self, call: Call, whole: Mergeable) -> list[Any]:
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

    def _fitting(self, call: Call, part: Mergeable) -> Any:
        """What a part of a call returns, or None where it does not fit either."""
        try:
            return self._part(call, part)
        except torch.OutOfMemoryError:
            self.curve(call).lower_cap(max(1, part.rows // 2))
            return None

    def _part(self, call: Call, part: Mergeable) -> Any:
        return self._timed([call], lambda: call.function(**part.arguments), part.rows)

    def _timed(
        self,
        batch: list[Call],
        function: Callable[[], Any],
        rows: int | None = None,
        arguments: Mapping[str, Any] | None = None,
    ) -> Any:
        """Make a call for these jobs, and note how long the device was at it."""
        self.count += 1
        what = batch[0].owner, batch[0].name
        if batch[0].mergeable and what not in self._known:
            # with the time of the log line, it says how long a cold start took to come so far
            self._known.add(what)
            log.info("the first call of %s.%s", *what)
        counts = [call.rows if rows is None else rows for call in batch]
        tickets = [call.ticket for call in batch]
        curve = self.curve(batch[0])
        title = batch[0].title

        def note(seconds: float) -> None:
            curve.note(sum(counts), seconds)
            if title:
                self._tally.call(title, len(batch), sum(counts), seconds)
            for ticket, count in zip(tickets, counts, strict=True):
                ticket.attained += seconds * count / sum(counts)

        if self._graphs and arguments is not None and all(ticket.graphs for ticket in tickets):
            seconds, calm = curve.seconds(sum(counts)), bool(self._waiting())
            planned = self._graphs.plan(batch[0].function, arguments, batch[0].kind, function, seconds, calm)
            if planned:  # what it takes of the memory says nothing of other calls
                return self._stopwatch.time(planned, note)
        with self._peaks.measuring(tickets[0].about, batch[0].owner, batch[0].name, sum(counts), self._waiting):
            return self._stopwatch.time(function, note)
