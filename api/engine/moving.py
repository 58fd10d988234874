"""A model's way to the device: each part is placed as soon as the host has it, while the next one is read."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from api.engine.books import Begun
from api.engine.calls import Cancelled
from api.engine.host import TICK, HostParts
from api.engine.offload import Offloaded
from api.engine.parts import HostPart, Loader, PartSpec, Run
from api.engine.spent import SPANS, Rate, Spent, measuring
from api.engine.tally import Tally
from api.engine.tiers import Tiers
from api.schema.generation import ModelRef


@dataclass(eq=False)
class Reservation:
    """A leased model that may not be in memory yet, and the room for it.

    Attributes:
        ref: which model.
        specs: its parts.
        begun: what has to be done; None: it is there.
        onto: modules whose place parts take over, by the key of the part that comes.
        seconds: that it took, by ``read``, ``build`` and ``copy``.
    """

    ref: ModelRef
    specs: Sequence[PartSpec]
    begun: Begun | None
    onto: dict[str, nn.Module] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=lambda: {"read": 0.0, "build": 0.0, "copy": 0.0})

    def spent(self, on: str, began: float) -> None:
        """What began then (``time.perf_counter``) is over."""
        self.seconds[on] += time.perf_counter() - began
        SPANS.note(on, began)


class Mover:
    """Brings what was reserved.

    Args:
        tiers: the books.
        host: the parts in the host's memory.
        loader: places.
        on_device: runs a function on the device's thread; also takes ``cancelled``, which is asked while it waits.
        exclusively: the same, while nothing else runs.
        arrived: told the key of each part that is on the device, and its module, on whichever thread brings it; of an
            offloaded model its own key, and its modules by name.
        tally: counts what is copied.

    Attributes:
        rate: how fast parts are copied to the device.
    """

    def __init__(
        self,
        tiers: Tiers,
        host: HostParts,
        loader: Loader,
        on_device: Run,
        exclusively: Run,
        arrived: Callable[[str, Any], None],
        tally: Tally,
    ) -> None:
        self._tally = tally
        self._tiers = tiers
        self._host = host
        self._loader = loader
        self._on_device = on_device
        self._exclusively = exclusively
        self._arrived = arrived
        self.rate = Rate()

    def bring(self, reservation: Reservation, cancelled: Callable[[], bool]) -> bool:
        """Place what is missing, and wait for what others bring; whether all came.

        Not in an order that is settled before: a part that came by another way holds its room until it is placed, and
        the others may need that room.

        Raises:
            ApiError, torch.OutOfMemoryError, MemoryError: as those who read and place raise them.
            Cancelled: ``cancelled`` said so. What is being read by then is read to its end.
        """
        if reservation.begun is None:
            return True
        if cancelled():
            raise Cancelled
        for spec in reservation.specs:
            if spec.key in reservation.onto:
                self._loader.vacate(spec, reservation.onto[spec.key])
        taken = self._host.absent(self._staying(reservation, reservation.begun))
        if not self._host.take(taken, cancelled):
            return False
        try:
            if isinstance(ref := reservation.ref, Offloaded):
                return self._offload(ref, reservation, reservation.begun, cancelled) and self._await_others(
                    ref, cancelled
                )
            return self._place_all(reservation, reservation.begun, cancelled)
        finally:
            self._host.give_back(taken)

    def _staying(self, reservation: Reservation, begun: Begun) -> list[PartSpec]:
        """What a model needs in the host's memory all at once: where it is offloaded, or computed there."""
        keys = begun.read if isinstance(reservation.ref, Offloaded) else begun.copy if self._tiers.shared else ()
        return [spec for spec in reservation.specs if spec.key in keys]

    def _place_all(self, reservation: Reservation, begun: Begun, cancelled: Callable[[], bool]) -> bool:
        came = deque[tuple[PartSpec, HostPart] | BaseException]()
        stop, changed = threading.Event(), self._tiers.changed

        def read() -> None:
            try:
                self._read_all(reservation, came, stop.is_set)
            except BaseException as fault:
                with changed:
                    came.append(fault)
                    changed.notify_all()

        reader = threading.Thread(target=read, name="read", daemon=True)
        reader.start()
        try:
            for _ in begun.copy:
                with changed:
                    while not came:
                        if cancelled():
                            raise Cancelled
                        changed.wait(TICK)
                    one = came.popleft()
                if isinstance(one, BaseException):
                    raise one
                self._place(reservation, *one, cancelled)
        finally:
            stop.set()
            while reader.is_alive() and not cancelled():
                reader.join(TICK)
        return self._await_others(reservation.ref, cancelled)

    def _read_all(
        self, reservation: Reservation, came: deque[tuple[PartSpec, HostPart] | BaseException], over: Callable[[], bool]
    ) -> None:
        specs = {spec.key: spec for spec in reservation.specs}
        missing = [specs[key] for key in reservation.begun.copy] if reservation.begun else []
        while missing:
            began = time.perf_counter()
            if (found := self._host.next(reservation.ref, reservation.specs, missing, over)) is None:
                return
            reservation.spent("read", began)
            missing.remove(found[0])
            with self._tiers.changed:
                came.append(found)
                self._tiers.changed.notify_all()

    def _place(self, reservation: Reservation, spec: PartSpec, host: HostPart, cancelled: Callable[[], bool]) -> None:
        onto = reservation.onto.pop(spec.key, None)

        def place() -> nn.Module:
            with measuring(Spent()) as spent:
                module = self._loader.place(spec, host, onto)
            reservation.seconds["build"] += spent.build
            reservation.seconds["copy"] += spent.copy
            self.rate.note(spec.bytes, spent.copy)
            self._tally.moved("copy", spec.bytes, spent.copy)
            return module

        run = self._exclusively if spec.by_library else self._on_device
        self._arrived(spec.key, run(place, cancelled))

    def _offload(self, ref: Offloaded, reservation: Reservation, begun: Begun, cancelled: Callable[[], bool]) -> bool:
        """Read what has room in the host's memory for it, and make the model once all of it is there.

        Returns:
            Whether all of it came.
        """
        specs = reservation.specs
        for spec in {spec.key: spec for spec in specs if spec.key in begun.read}.values():
            if cancelled():
                raise Cancelled
            began = time.perf_counter()
            if not self._host.bring(ref, specs, spec, None, cancelled):
                return False
            reservation.spent("read", began)
        with self._tiers.changed:
            while begun.copy and not self._tiers.in_host(ref.key):
                if not self._tiers.coming(ref.key):
                    return False
                if cancelled():
                    raise Cancelled
                self._tiers.changed.wait(TICK)
        if begun.copy:  # else another makes it
            hosts, began = self._host.of(specs), time.perf_counter()
            made = self._on_device(lambda: self._loader.offloading.make(specs, hosts, ref.mode), cancelled)
            reservation.spent("build", began)
            self._arrived(ref.key, made)
        return True

    def _await_others(self, ref: ModelRef, cancelled: Callable[[], bool]) -> bool:
        with self._tiers.changed:
            while not self._tiers.resident(ref.key):
                if not self._tiers.coming(ref.key):
                    return False
                if cancelled():
                    raise Cancelled
                self._tiers.changed.wait(TICK)
            return True
