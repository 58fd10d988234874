"""The weights themselves, where ``tiers`` says that they are: reads, places, hands out and forgets them."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from api.engine.books import Begun, Moves, NeverFits, State, Turn
from api.engine.executor import Cancelled
from api.engine.parts import HostPart, Loader, PartSpec
from api.engine.spent import Rate, Spent, measuring
from api.engine.tiers import Tiers
from api.errors import ApiError
from api.schema.generation import ModelRef
from api.schema.messages import Held, Memory

log = logging.getLogger("api.engine")

_TICK = 0.2
"""Seconds after which one who waits for another looks again, whatever it was told."""

Run = Callable[..., Any]


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


class ModelCache:
    """Keeps models until their bytes are needed for another. What is leased stays.

    Reads happen in the thread of whoever needs them, beside running jobs, and once, however many need the same part;
    modules are made on the device's thread. Everything may be called from any thread.

    Args:
        tiers: the books.
        loader: moves the weights.
        on_device: runs a function on the device's thread.
        exclusively: the same, while nothing else runs; also takes ``cancelled``, which is asked while it waits.
        freed: called after an eviction, when the device's memory can be given back.
    """

    def __init__(
        self, tiers: Tiers, loader: Loader, on_device: Run, exclusively: Run, freed: Callable[[], None]
    ) -> None:
        self.tiers = tiers
        self.loader = loader
        self._on_device = on_device
        self._exclusively = exclusively
        self._freed = freed
        self._host: dict[str, HostPart] = {}
        self._modules: dict[str, nn.Module] = {}
        self._models: dict[str, Any] = {}
        """Assembled."""
        self._building = threading.Lock()
        self.rates = {"read": Rate(), "copy": Rate()}
        self._known: dict[str, tuple[ModelRef, Sequence[PartSpec]]] = {}

    def __contains__(self, ref: ModelRef) -> bool:
        with self.tiers.lock:
            return ref.key in self._models and self.tiers.resident(ref.key)

    def refs(self) -> dict[str, ModelRef]:
        """Every model of which something is in memory, by key."""
        with self.tiers.lock:
            present = self.tiers.models()
            self._known = {key: known for key, known in self._known.items() if key in present}
            return {key: ref for key, (ref, _) in self._known.items()}

    def parts(self, ref: ModelRef) -> Sequence[PartSpec]:
        """A model's parts.

        Raises:
            ApiError: MODEL_BROKEN.
        """
        with self.tiers.lock:
            known = self._known.get(ref.key)
        return known[1] if known else self.loader.parts(ref)

    # --- leases ---

    def hold(self, ref: ModelRef) -> Any | None:
        """Lease the model if it is on the device."""
        with self.tiers.lock:
            return self._models[ref.key] if ref.key in self._models and self.tiers.hold(ref.key) else None

    def reserve(
        self, ref: ModelRef, specs: Sequence[PartSpec], wanted: Sequence[str] = (), *, evict: bool = True
    ) -> Reservation | None:
        """Lease a model and make room for it; at once, whatever there is to be moved then.

        Args:
            ref: which model.
            specs: its ``parts``.
            wanted: keys of models that others will ask for, the next one first.
            evict: whether others may be evicted.

        Returns:
            To be given to ``complete``. None when there is no room beside the models that are leased.

        Raises:
            ApiError: OUT_OF_MEMORY: there never will be.
        """
        with self.tiers.lock:
            if self.hold(ref) is not None:
                return Reservation(ref, specs, None)
            self._know(ref, specs)
            try:
                begun = self.tiers.begin(ref.key, wanted, evict=evict)
            except NeverFits as fault:
                raise never_fits(ref, fault) from fault
            if begun is None:
                return None
            onto = {key: self._modules[old] for key, old in begun.onto.items()}
            reservation = Reservation(ref, specs, begun, onto)
            self._forget(begun.moves)
        if len(begun.moves.device) > len(onto):
            self._freed()
        return reservation

    def complete(self, reservation: Reservation, cancelled: Callable[[], bool] = lambda: False) -> Any | None:
        """Bring a reserved model onto the device.

        Args:
            reservation: as ``reserve`` gave it.
            cancelled: asked while it waits; what is being read by then is read to its end, for whoever wants it next.

        Returns:
            The model. None when another one was bringing a part of it and could not: reserve it again.

        Raises:
            ApiError: MODEL_BROKEN, OUT_OF_MEMORY.
            torch.OutOfMemoryError, MemoryError: there is less room than was thought. Nothing is held then.
            Cancelled: ``cancelled`` said so.
        """
        ref, begun = reservation.ref, reservation.begun
        if begun is None:
            return self._models[ref.key]
        try:
            self._bring(reservation, begun, cancelled)
            if not self._await_others(ref, cancelled):
                self._give_up(reservation, begun)
                return None
            model = self._assembled(reservation, cancelled)
        except BaseException:
            self._give_up(reservation, begun)
            raise
        if begun.copy:
            log.info("loaded %s: %.1f MB", ref.key, sum(spec.bytes for spec in reservation.specs) / 1e6)
        return model

    def lease(self, ref: ModelRef) -> Any | None:
        """Reserve and complete; None when there is no room beside the models that are leased."""
        model = None
        while model is None:
            if (reservation := self.reserve(ref, self.parts(ref))) is None:
                return None
            model = self.complete(reservation)
        return model

    def release(self, ref: ModelRef) -> None:
        """A lease is over."""
        with self.tiers.lock:
            self._forget(self.tiers.release(ref.key))

    # --- what is asked for from outside ---

    def stage(self, ref: ModelRef, ahead_of: Collection[str] = (), *, by_library: bool = False) -> bool:
        """Bring a model into the host's memory ahead of its use; whether all of it is there.

        Args:
            ref: which model.
            ahead_of: keys of models that are wanted sooner: it takes no room from them.
            by_library: also read what only the libraries can read, while every job is parked.

        Raises:
            ApiError: MODEL_BROKEN.
            MemoryError: there is less room than was thought.
        """
        specs = self.parts(ref)
        if sum(spec.bytes for spec in specs) > self.tiers.host_limit:
            return False
        for spec in specs:
            part = self.tiers.part(spec.key)
            if (part and part.device is State.HELD) or (spec.by_library and not by_library):
                continue
            if self._read(ref, specs, spec, {*ahead_of, ref.key}) is None:  # nor from its own other parts
                return False
        return self.tiers.warm(ref.key)

    def load_host(self, ref: ModelRef, *, pin: bool = False) -> bool:
        """Bring a model into the host's memory because it was asked for, also what the device has; whether it is there.

        Raises:
            ApiError: MODEL_BROKEN.
            MemoryError: there is less room than was thought.
        """
        specs = self.parts(ref)
        if sum(spec.bytes for spec in specs) > self.tiers.host_limit:
            return False
        with self.tiers.lock:
            self._know(ref, specs)
            self.tiers.lease(ref.key)
        try:
            for _ in range(3):  # a copy of what the device has may leave while the next one is read
                if any(self._read(ref, specs, spec, {ref.key}) is None for spec in specs):
                    return False
                with self.tiers.lock:
                    if self.tiers.in_host(ref.key):
                        if pin:
                            self.tiers.pin(ref.key, "host")
                        return True
            return False
        finally:
            self.release(ref)

    def keep(self, ref: ModelRef) -> None:
        """Forget that a model was to leave when its jobs are done."""
        with self.tiers.lock:
            self.tiers.lease(ref.key)
            self._forget(self.tiers.release(ref.key))

    def pin(self, ref: ModelRef, tier: str | None) -> None:
        """Keep a model in a tier, ``device`` or ``host``."""
        self.tiers.pin(ref.key, tier)

    def unload(self, key: str, to: str = "disk") -> None:
        """Have a model leave the device, and with ``to="disk"`` the host's memory; once its jobs are done."""
        with self.tiers.lock:
            moves = self._forget(self.tiers.drop(key, to))
        if moves.device:
            self._freed()

    def clear_idle(self) -> bool:
        """Have everything leave the device that nobody leases or pins; whether there was anything."""
        with self.tiers.lock:
            moves = self._forget(self.tiers.clear_idle())
        self._freed()
        return bool(moves.device)

    def expire(self, idle: float) -> None:
        """Have models leave the device that nobody has used for so many seconds."""
        with self.tiers.lock:
            moves = self._forget(self.tiers.expire(time.monotonic() - idle))
        if moves.device:
            self._freed()

    def held(self) -> dict[str, Held]:
        """Every model of which something is in memory, by key, least recently used first."""
        to_unix = time.time() - time.monotonic()
        with self.tiers.lock:
            refs, found = self.refs(), {}
            for key, model in self.tiers.models().items():
                device, host = self.tiers.model_bytes(key)
                tier = "device" if self.tiers.resident(key) else "host" if self.tiers.warm(key) else "disk"
                used = to_unix + model.used
                found[key] = Held(refs[key], tier, device, host, model.leases, model.pin or "", used)
            return found

    def memory(self) -> Memory:
        """Bytes in each tier, shared parts counted once."""
        tiers = self.tiers
        with tiers.lock:
            return Memory(tiers.device_bytes, tiers.device_limit, tiers.peak, tiers.host_bytes, tiers.host_limit)

    def sizes(self) -> dict[str, int]:
        """Bytes on the device by model key, least recently used first."""
        with self.tiers.lock:
            return {key: self.tiers.model_bytes(key)[0] for key in self.tiers.models() if self.tiers.resident(key)}

    def missing(self, ref: ModelRef) -> tuple[str, int, int, int]:
        """Where a model is, its bytes, and how many of them are to be read and to be copied to the device.

        Raises:
            ApiError: MODEL_BROKEN; OUT_OF_MEMORY: it never fits.
        """
        specs = {spec.key: spec for spec in self.parts(ref)}.values()
        with self.tiers.lock:
            try:
                self.tiers.check_possible(list(specs))
            except NeverFits as fault:
                raise never_fits(ref, fault) from fault
            known = [(spec.bytes, self.tiers.part(spec.key)) for spec in specs]
            copy = sum(size for size, part in known if part is None or part.device is not State.HELD)
            read = sum(size for size, part in known if part is None or State.HELD not in (part.host, part.device))
        return "disk" if read else "host" if copy else "device", sum(size for size, _ in known), read, copy

    # --- moving ---

    def _know(self, ref: ModelRef, specs: Sequence[PartSpec]) -> None:
        self._known[ref.key] = (ref, specs)
        self.tiers.know(ref.key, specs)

    def _bring(self, reservation: Reservation, begun: Begun, cancelled: Callable[[], bool]) -> None:
        """Place each part as soon as it is in the host's memory, while the next one is read.

        Not in an order that is settled before: a part that came by another way holds its room until it is placed, and
        the others may need that room.
        """
        specs = {spec.key: spec for spec in reservation.specs}
        came = deque[tuple[PartSpec, HostPart] | BaseException]()
        stop, changed = threading.Event(), self.tiers.changed

        def read_all() -> None:
            missing = [specs[key] for key in begun.copy]
            try:
                while missing:
                    began = time.perf_counter()
                    if (found := self._next(reservation, missing, stop.is_set)) is None:
                        return
                    host = self._taken(*found)
                    _add(reservation.seconds, "read", began)
                    missing.remove(found[0])
                    with changed:
                        came.append((found[0], host))
                        changed.notify_all()
            except BaseException as fault:
                with changed:
                    came.append(fault)
                    changed.notify_all()

        reader = threading.Thread(target=read_all, name="read", daemon=True)
        reader.start()
        try:
            for _ in begun.copy:
                with changed:
                    while not came:
                        if cancelled():
                            raise Cancelled
                        changed.wait(_TICK)
                    one = came.popleft()
                if isinstance(one, BaseException):
                    raise one
                self._place(reservation, *one, cancelled)
        finally:
            stop.set()
            while reader.is_alive() and not cancelled():
                reader.join(_TICK)

    def _next(
        self, reservation: Reservation, missing: Sequence[PartSpec], over: Callable[[], bool]
    ) -> tuple[PartSpec, Turn] | None:
        """Whichever of the missing parts is there, or else can be read now; None: ``over`` said so."""
        with self.tiers.changed:
            while not over():
                for spec in sorted(missing, key=lambda spec: not self._is_in_host(spec.key)):
                    turn = self._turn(reservation.ref, reservation.specs, spec, None)
                    if turn in (Turn.HELD, Turn.READ):
                        return spec, turn
                self.tiers.changed.wait(_TICK)
        return None

    def _is_in_host(self, key: str) -> bool:
        part = self.tiers.part(key)
        return part is not None and part.host is State.HELD

    def _place(self, reservation: Reservation, spec: PartSpec, host: HostPart, cancelled: Callable[[], bool]) -> None:
        onto = reservation.onto.pop(spec.key, None)

        def place() -> nn.Module:
            with measuring(Spent()) as spent:
                module = self.loader.place(spec, host, onto)
            reservation.seconds["build"] += spent.build
            reservation.seconds["copy"] += spent.copy
            self.rates["copy"].note(spec.bytes, spent.copy)
            return module

        module = self._exclusively(place, cancelled) if spec.by_library else self._on_device(place)
        with self.tiers.lock:
            self._modules[spec.key] = module
            self.tiers.placed(spec.key)

    def _await_others(self, ref: ModelRef, cancelled: Callable[[], bool]) -> bool:
        """Wait for the parts that others bring; whether all came."""
        with self.tiers.changed:
            while not self.tiers.resident(ref.key):
                if not self.tiers.coming(ref.key):
                    return False
                if cancelled():
                    raise Cancelled
                self.tiers.changed.wait(_TICK)
            return True

    def _assembled(self, reservation: Reservation, cancelled: Callable[[], bool]) -> Any:
        ref, specs = reservation.ref, reservation.specs
        with self._building:
            with self.tiers.lock:
                if ref.key in self._models:
                    return self._models[ref.key]
                modules = {spec.name: self._modules[spec.key] for spec in specs}
            began = time.perf_counter()

            def build() -> Any:
                return self.loader.assemble(ref, modules)

            model = self._exclusively(build, cancelled) if any(spec.by_library for spec in specs) else build()
            _add(reservation.seconds, "build", began)
            with self.tiers.lock:
                self._models[ref.key] = model
            return model

    def _read(
        self, ref: ModelRef, specs: Sequence[PartSpec], spec: PartSpec, ahead_of: Collection[str]
    ) -> HostPart | None:
        """A part in the host's memory, read ahead by this thread or another; None: there is no room."""
        with self.tiers.changed:
            while (turn := self._turn(ref, specs, spec, ahead_of)) is Turn.BUSY:
                self.tiers.changed.wait(_TICK)
        return None if turn is Turn.FULL else self._taken(spec, turn)

    def _turn(self, ref: ModelRef, specs: Sequence[PartSpec], spec: PartSpec, ahead_of: Collection[str] | None) -> Turn:
        """What to do about a part that is to be in the host's memory; the lock is held."""
        self._know(ref, specs)
        try:
            turn, moves = self.tiers.begin_read(spec.key, ahead_of)
        except NeverFits as fault:
            raise never_fits(ref, fault) from fault
        self._forget(moves)
        return turn

    def _taken(self, spec: PartSpec, turn: Turn) -> HostPart:
        """A part that is in the host's memory, or whose turn it is to be read."""
        if turn is Turn.HELD:
            return self._host[spec.key]
        began = time.perf_counter()
        try:
            host: HostPart = (
                self._exclusively(lambda: self.loader.read(spec)) if spec.by_library else self.loader.read(spec)
            )
        except BaseException:
            with self.tiers.lock:
                self.tiers.read_failed(spec.key)
            raise
        self.rates["read"].note(spec.bytes, time.perf_counter() - began)
        with self.tiers.lock:
            self._host[spec.key] = host
            self.tiers.read_done(spec.key)
        return host

    def _give_up(self, reservation: Reservation, begun: Begun) -> None:
        reservation.onto.clear()  # whoever still knows the reservation is not to keep what has left the device
        with self.tiers.lock:
            self._forget(self.tiers.abort(begun))

    def _forget(self, moves: Moves) -> Moves:
        """Let go of what left a tier, and of the models that were made of it."""
        for key in moves.host:
            self._host.pop(key, None)
        for key in moves.device:
            self._modules.pop(key, None)
        if moves.device:
            left = set(moves.device)
            for key in [key for key in self._models if left & {spec.key for spec in self._specs(key)}]:
                del self._models[key]
                log.info("evicted %s", key)
        return moves

    def _specs(self, key: str) -> Sequence[PartSpec]:
        return self._known[key][1] if key in self._known else ()


def _add(seconds: dict[str, float], name: str, began: float) -> None:
    seconds[name] += time.perf_counter() - began


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
