"""Those who wait in this process for a model, and the one place where a model is given out."""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from api.engine.cache import ModelCache
from api.engine.calls import Cancelled
from api.engine.moving import Reservation
from api.engine.parts import PartSpec
from api.errors import ApiError
from api.order import Order
from api.schema.generation import ModelRef

log = logging.getLogger("api.engine")

_TICK = 0.2
"""Seconds between two looks whether one who waits was cancelled, where nobody says so."""


@dataclass(eq=False)
class _Waiter:
    ref: ModelRef
    specs: Sequence[PartSpec]
    reservation: Reservation | None = None
    fault: ApiError | None = None


class Line:
    """Gives models out: in the order of ``Order``, as far as there is room.

    Args:
        cache: of the models.
        longest_wait: seconds for which one may be passed by others.

    Attributes:
        on_change: called when somebody waits, or a lease ended.
        wanted: models that will be asked for by jobs that are not here yet, the next one first.
        soon: models that jobs which run will ask for next.
    """

    def __init__(self, cache: ModelCache, longest_wait: float) -> None:
        self._cache = cache
        self._changed = cache.tiers.changed
        self._order: Order[_Waiter] = Order(longest_wait)
        self.on_change: Callable[[], None] = lambda: None
        self.wanted: Sequence[ModelRef] = ()
        self.soon: list[ModelRef] = []

    def wishes(self) -> list[ModelRef]:
        """The models that are waited for, and those that will be; the next one first."""
        with self._changed:
            refs = [waiter.ref for waiter in self._order.waiting()] + self.soon + list(self.wanted)
            return list({ref.key: ref for ref in refs}.values())

    @contextlib.contextmanager
    def expecting(self, refs: Sequence[ModelRef]) -> Iterator[None]:
        """Say which models the caller will ask for next: they are read ahead, and evicted late."""
        with self._changed:
            self.soon += refs
        self.on_change()
        try:
            yield
        finally:
            with self._changed:
                for ref in refs:
                    self.soon.remove(ref)

    @contextlib.contextmanager
    def lease(
        self,
        ref: ModelRef,
        cancelled: Callable[[], bool],
        deadline: float = math.inf,
        overdue: float = math.inf,
        on_load: Callable[[Reservation], None] = lambda reservation: None,
    ) -> Iterator[Any]:
        """Hold a model; waits until it is there.

        Args:
            ref: which model.
            cancelled: asked while it waits or loads, and whenever ``wake`` is called.
            deadline: when waiting is in vain, ``time.monotonic``.
            overdue: until when others may go before it.
            on_load: called when there is room, and something is to be brought there now.

        Raises:
            Cancelled: ``cancelled`` said so.
            ApiError: MODEL_BROKEN, OUT_OF_MEMORY.
        """
        model, first = None, None
        specs = self._cache.parts(ref)
        while model is None:
            reservation = self._wait(_Waiter(ref, specs), cancelled, deadline, overdue)
            if reservation.begun:
                on_load(reservation)
            try:
                model = self._cache.complete(reservation, cancelled)
                continue
            except (torch.OutOfMemoryError, MemoryError) as fault:
                second = fault.with_traceback(None)  # which knows the modules that were on their way
            # past the handler: until it ends, the fault and all that it knows of live
            self._cache.tally.shortage("reload")
            self._cache.clear_idle()
            if first:
                raise out_of_memory(second) from second
            log.warning("out of memory: idle models are evicted and %s is loaded once more", ref.model_id)
            first = second
        try:
            yield model
        finally:
            self._cache.release(ref)
            self.on_change()

    def wake(self) -> None:
        """Have everyone look whether they were cancelled."""
        with self._changed:
            self._changed.notify_all()

    def _wait(self, waiter: _Waiter, cancelled: Callable[[], bool], deadline: float, overdue: float) -> Reservation:
        with self._changed:
            self._order.join(waiter, deadline, overdue)
            told = False
            try:
                while True:
                    if waiter.reservation is None and waiter.fault is None:
                        if cancelled():
                            raise Cancelled
                        self._advance()
                    if waiter.fault:
                        raise waiter.fault
                    if waiter.reservation:
                        return waiter.reservation
                    if not told:
                        told = True
                        self.on_change()
                    self._changed.wait(_TICK)
            finally:
                self._order.leave(waiter)

    def _advance(self) -> None:
        tiers = self._cache.tiers
        wishes = [ref.key for ref in self.wishes()]

        def go(waiter: _Waiter) -> bool:
            others = [key for key in wishes if key != waiter.ref.key]
            try:
                waiter.reservation = self._cache.reserve(waiter.ref, waiter.specs, others)
            except ApiError as fault:
                waiter.fault = fault
                return True
            return waiter.reservation is not None

        if self._order.advance(lambda waiter: tiers.coming(waiter.ref.key), go):
            self._changed.notify_all()


def out_of_memory(fault: BaseException) -> ApiError:
    """What a client is told."""
    return ApiError("OUT_OF_MEMORY", f"Does not fit in memory; ask for fewer or smaller images. {str(fault)[:200]}")
