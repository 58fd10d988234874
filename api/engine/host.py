"""The weights in the host's memory: read in the thread of whoever needs them, once, however many do."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable, Sequence

from api.engine.books import Moves, NeverFits, State, Turn
from api.engine.common_host import Rooms
from api.engine.known import Known
from api.engine.parts import HostPart, Loader, PartSpec, Run
from api.engine.spent import Rate
from api.engine.tally import Tally
from api.engine.tiers import Tiers
from api.errors import ApiError
from api.schema.generation import ModelRef

TICK = 0.2
"""Seconds after which one who waits for another looks again, whatever it was told."""


class HostParts:
    """Parts in the host's memory, where ``tiers`` says that they are.

    Args:
        tiers: the books.
        known: what the models consist of.
        loader: reads.
        exclusively: runs a function on the device's thread, while nothing else runs.
        left: told of what left a tier because a part came; the books' lock is held.
        tally: counts what is read.

    Attributes:
        rate: how fast parts are read.
        rooms: where the host's memory is shared with other workers: the room that this one has there.
    """

    def __init__(
        self,
        tiers: Tiers,
        known: Known,
        loader: Loader,
        exclusively: Run,
        left: Callable[[Moves], object],
        tally: Tally,
    ) -> None:
        self._tally = tally
        self._tiers = tiers
        self._known = known
        self._loader = loader
        self._exclusively = exclusively
        self._left = left
        self._parts: dict[str, HostPart] = {}
        self.rooms: Rooms | None = None
        self.rate = Rate()

    def bring(
        self,
        ref: ModelRef,
        specs: Sequence[PartSpec],
        spec: PartSpec,
        ahead_of: Collection[str] | None,
        over: Callable[[], bool] = lambda: False,
    ) -> bool:
        """Have a part read, here or by another thread that is at it; whether there was room, and it was not over.

        Args:
            ref: the model that it is for.
            specs: its parts.
            spec: one of them.
            ahead_of: keys of models from which it takes no room; None: the model is leased.
            over: asked while it waits.

        Raises:
            ApiError: MODEL_BROKEN.
            MemoryError: there is less room than was thought.
        """
        with self._tiers.changed:
            while (turn := self._turn(ref, specs, spec, ahead_of)) is Turn.BUSY:
                if over():
                    return False
                self._tiers.changed.wait(TICK)
        if turn is Turn.READ:
            return self._read(spec, ahead_of is None, over) is not None
        return turn is not Turn.FULL

    def next(
        self, ref: ModelRef, specs: Sequence[PartSpec], missing: Sequence[PartSpec], over: Callable[[], bool]
    ) -> tuple[PartSpec, HostPart] | None:
        """Whichever part of a model that is leased is there, or else can be read now; waits for it.

        Args:
            ref: the model.
            specs: its parts.
            missing: those of them to choose from.
            over: asked while it waits.

        Returns:
            None when ``over`` said so.

        Raises:
            ApiError: MODEL_BROKEN; OUT_OF_MEMORY: there never will be room.
            MemoryError: there is less room than was thought.
        """
        while not over():
            with self._tiers.changed:
                if (found := self._choose(ref, specs, missing)) is None:
                    self._tiers.changed.wait(TICK)
            if found:
                spec, there = found
                if host := there or self._read(spec, True, over):
                    return spec, host
        return None

    def of(self, specs: Sequence[PartSpec]) -> dict[str, HostPart]:
        """The weights of parts that are there, by key."""
        with self._tiers.lock:
            return {spec.key: self._parts[spec.key] for spec in specs}

    def absent(self, specs: Sequence[PartSpec]) -> list[PartSpec]:
        """Those of some parts that are not here, each once."""
        with self._tiers.lock:
            return [spec for spec in {spec.key: spec for spec in specs}.values() if not self._is_there(spec.key)]

    def take(self, specs: Sequence[PartSpec], over: Callable[[], bool]) -> bool:
        """Have the room for parts that a job is about to have read, before the first one is; see ``Rooms.take``.

        Two jobs of two workers that each had room for half of their models would wait for each other.
        """
        return self.rooms is None or self.rooms.take(specs, wait=True, over=over)

    def give_back(self, specs: Sequence[PartSpec]) -> None:
        """These are not about to be read any more."""
        if self.rooms:
            self.rooms.give_back(specs)

    def forget(self, keys: Iterable[str]) -> None:
        """These have left the host's memory."""
        for key in keys:
            self._parts.pop(key, None)

    def _choose(
        self, ref: ModelRef, specs: Sequence[PartSpec], missing: Sequence[PartSpec]
    ) -> tuple[PartSpec, HostPart | None] | None:
        """A part that is here, else one without its weights: it is to be read; the lock is held."""
        for spec in sorted(missing, key=lambda spec: not self._is_there(spec.key)):
            turn = self._turn(ref, specs, spec, None)
            if turn in (Turn.HELD, Turn.READ):
                return spec, self._parts[spec.key] if turn is Turn.HELD else None
        return None

    def _is_there(self, key: str) -> bool:
        part = self._tiers.part(key)
        return part is not None and part.host is State.HELD

    def _turn(self, ref: ModelRef, specs: Sequence[PartSpec], spec: PartSpec, ahead_of: Collection[str] | None) -> Turn:
        """What to do about a part that is to be here; the lock is held."""
        if not self._known.enter(ref, specs):
            return Turn.FULL  # its files were replaced, and what it was made of is still in use
        try:
            turn, moves = self._tiers.begin_read(spec.key, ahead_of)
        except NeverFits as fault:
            raise never_fits(ref, fault) from fault
        self._left(moves)
        return turn

    def _read(self, spec: PartSpec, wait: bool, over: Callable[[], bool]) -> HostPart | None:
        """Read a part whose turn it is; None where other workers have the room, see ``Rooms.need``."""
        try:
            has_room = self.rooms is None or self.rooms.need(spec, wait=wait, over=over)
            began = time.perf_counter()
            if not has_room:
                with self._tiers.lock:
                    self._left(self._tiers.read_failed(spec.key))
                return None
            host: HostPart = (
                self._exclusively(lambda: self._loader.read(spec)) if spec.by_library else self._loader.read(spec)
            )
        except BaseException:
            with self._tiers.lock:
                self._left(self._tiers.read_failed(spec.key))
            raise
        took = time.perf_counter() - began
        if host.read:
            self.rate.note(spec.bytes, took)
        self._tally.moved("read" if host.read else "share", spec.bytes, took)
        with self._tiers.lock:
            self._parts[spec.key] = host
            self._left(self._tiers.read_done(spec.key))
        return host


def never_fits(ref: ModelRef, fault: NeverFits) -> ApiError:
    """What a client is told."""
    what = "the device's memory" if fault.tier == "device" else "the memory of the host"
    pinned = f", of which {fault.pinned / 1e9:.2f} GB are pinned by other models" if fault.pinned else ""
    message = (
        f"{ref.model_id} takes {fault.needed / 1e9:.2f} GB; {what} has {fault.limit / 1e9:.2f} GB for models{pinned}. "
        + ("Unload one of them, or ask" if fault.pinned else "Ask")
        + " for a smaller MODEL_PRECISION."
    )
    return ApiError("OUT_OF_MEMORY", message, field="callInputs.MODEL_ID", requested=ref.model_id)
