"""The models themselves, where ``tiers`` says that they are: hands them out and forgets them."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from typing import Any

from torch import nn

from api.engine.books import Begun, Moves, NeverFits, State, total
from api.engine.calls import Cancelled
from api.engine.common_host import Rooms
from api.engine.host import TICK, HostParts, never_fits
from api.engine.known import Known
from api.engine.moving import Mover, Reservation
from api.engine.offload import Offloaded
from api.engine.parts import Loader, PartSpec, Run
from api.engine.tally import Tally
from api.engine.tiers import Tiers
from api.schema.generation import ModelRef
from api.schema.messages import Held, Memory

log = logging.getLogger("api.engine")


class ModelCache:
    """Keeps models until their bytes are needed for another. What is leased stays.

    Reads happen in the thread of whoever needs them, beside running jobs, and once, however many need the same part;
    modules are made on the device's thread. Everything may be called from any thread.

    Args:
        tiers: the books.
        loader: moves the weights.
        on_device: runs a function on the device's thread; also takes ``cancelled``, which is asked while it waits.
        exclusively: the same, while nothing else runs.
        freed: called after evictions, when the device's memory can be given back, and never under the books' lock.
        tally: counts what is moved.
    """

    def __init__(
        self,
        tiers: Tiers,
        loader: Loader,
        on_device: Run,
        exclusively: Run,
        freed: Callable[[], None],
        tally: Tally | None = None,
    ) -> None:
        self.tally = tally or Tally()
        self.tiers = tiers
        self.loader = loader
        self._exclusively = exclusively
        self._freed = freed
        self._known = Known(tiers, loader)
        self._host = HostParts(tiers, self._known, loader, exclusively, self._forget, self.tally)
        self._mover = Mover(tiers, self._host, loader, on_device, exclusively, self._arrived, self.tally)
        self._modules: dict[str, Any] = {}
        """By key of the part; of an offloaded model by its own key, a dictionary of them."""
        self._models: dict[str, Any] = {}
        """Assembled."""
        self._owed = False
        """Something has left the device since ``freed`` was called."""
        self._unloaded = False
        """Memory of the host is wanted back, not only for other parts."""
        self._building = threading.Lock()
        self.on_clear: Callable[[], bool] = lambda: False
        """Forgets what else the device holds for jobs to come; whether there was anything."""
        self.on_leave: Callable[[nn.Module], None] = lambda module: None
        """Told each module that leaves the device, or whose place another part takes over."""
        self.rates = {"read": self._host.rate, "copy": self._mover.rate}

    def __contains__(self, ref: ModelRef) -> bool:
        with self.tiers.lock:
            return ref.key in self._models and self.tiers.resident(ref.key)

    def refs(self) -> dict[str, ModelRef]:
        """Every model of which something is in memory, by key."""
        return self._known.refs()

    @property
    def rooms(self) -> Rooms | None:
        """Where the host's memory is shared with other workers: the room that this one has there."""
        return self._host.rooms

    @rooms.setter
    def rooms(self, rooms: Rooms) -> None:
        self._host.rooms = rooms

    def parts(self, ref: ModelRef) -> Sequence[PartSpec]:
        """A model's parts, as its files are now.

        Raises:
            ApiError: MODEL_BROKEN.
        """
        return self._known.parts(ref)

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
            To be given to ``complete``. None when there is no room beside the models that are leased, or jobs still
            have the model as it was before its files were replaced.

        Raises:
            ApiError: OUT_OF_MEMORY: there never will be.
        """
        with self.tiers.lock:
            if (entered := self._entered(ref, specs)) is None:
                return None
            specs = entered
            if self.hold(ref) is not None:
                return Reservation(ref, specs, None)
            try:
                begun = self.tiers.begin(ref.key, wanted, evict=evict)
            except NeverFits as fault:
                raise never_fits(ref, fault) from fault
            if begun is None:
                return None
            onto = {key: self._modules[old] for key, old in begun.onto.items()}
            owed, reservation = self._owed, Reservation(ref, specs, begun, onto)
            self._forget(begun.moves)
            self._owed = owed or len(begun.moves.device) > len(onto)  # what is taken over is not free
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
        source, started = self._source(begun), time.perf_counter()
        try:
            self.give_back()
            if not self._mover.bring(reservation, cancelled):
                self._give_up(reservation, begun)
                return None
            model = self._assembled(reservation, cancelled)
        except BaseException:
            self._give_up(reservation, begun)
            raise
        if begun.copy:
            self.tally.load(source, time.perf_counter() - started)
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
        """A lease is over. What leaves with it is free when its holder has forgotten the model: then ``give_back``."""
        with self.tiers.lock:
            if self._forget(self.tiers.release(ref.key)).host:
                self._unloaded = True

    def give_back(self) -> None:
        """Give the memory back of what has left the device, if anything has. Not under the books' lock."""
        with self.tiers.lock:
            owed, self._owed = self._owed, False
            unloaded, self._unloaded = self._unloaded, False
        if unloaded:
            self.loader.release()
        if owed:
            self._freed()

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
        parts = self.parts(ref)
        with self.tiers.lock:
            specs = self._entered(ref, parts)
        self.give_back()
        if specs is None:
            return False

        def is_left_out(spec: PartSpec) -> bool:
            part = self.tiers.part(spec.key)
            there = part is not None and part.device is State.HELD and not isinstance(ref, Offloaded)
            return there or (spec.by_library and not by_library)

        wanted = (spec for spec in specs if not is_left_out(spec))
        return self._bring_to_host(ref, specs, wanted, ahead_of) and self.tiers.warm(ref.key)

    def load_host(self, ref: ModelRef, *, pin: bool = False, cancelled: Callable[[], bool] = lambda: False) -> bool:
        """Bring a model into the host's memory because it was asked for, also what the device has; whether it is there.

        Args:
            ref: which model.
            pin: keep it there.
            cancelled: asked while it waits, and before each part is read.

        Raises:
            ApiError: MODEL_BROKEN.
            Cancelled: ``cancelled`` said so.
            MemoryError: there is less room than was thought.
        """
        while (there := self._load_host(ref, pin, cancelled)) is None:
            if cancelled():
                raise Cancelled
            time.sleep(TICK)
        return there

    def _load_host(self, ref: ModelRef, pin: bool, cancelled: Callable[[], bool]) -> bool | None:
        """``load_host`` once; None: it is another worker's turn."""
        specs = self.parts(ref)
        with self.tiers.changed:
            while (entered := self._entered(ref, specs)) is None:
                if cancelled():
                    raise Cancelled
                self.tiers.changed.wait(TICK)
            self.tiers.lease(ref.key)

        def wanted() -> Iterator[PartSpec]:
            for spec in entered:
                if cancelled():
                    raise Cancelled
                yield spec

        taken = self._host.absent(entered)
        try:
            if not self._host.take(taken, cancelled):
                return None
            for _ in range(3):  # a copy of what the device has may leave while the next one is read
                if not self._bring_to_host(ref, entered, wanted()):
                    return None if self.tiers.paused else False
                with self.tiers.lock:
                    if self.tiers.in_host(ref.key):
                        if pin:
                            self.tiers.pin(ref.key, "host")
                        return True
            return False
        finally:
            self._host.give_back(taken)
            self.release(ref)
            self.give_back()

    def keep(self, ref: ModelRef) -> None:
        """Forget that a model was to leave when its jobs are done."""
        with self.tiers.lock:
            self.tiers.lease(ref.key)
            self._forget(self.tiers.release(ref.key))
        self.give_back()

    def pin(self, ref: ModelRef, tier: str | None) -> None:
        """Keep a model in a tier, ``device`` or ``host``."""
        self.tiers.pin(ref.key, tier)

    def unload(self, key: str, to: str = "disk") -> None:
        """Have a model leave the device, and with ``to="disk"`` the host's memory; once its jobs are done."""
        with self.tiers.lock:
            ways = [each for each, ref in self.refs().items() if isinstance(ref, Offloaded) and ref.full == key]
            for each in (*ways, key):
                if self._forget(self.tiers.drop(each, to)).host:
                    self._unloaded = True
        self.give_back()

    def clear_idle(self) -> bool:
        """Have everything leave the device that nobody leases or pins; whether there was anything."""
        cleared = self.on_clear()
        with self.tiers.lock:
            moves = self._forget(self.tiers.clear_idle())
            self._owed = self._unloaded = True  # memory is short: what is kept for parts to come goes as well
        self.give_back()
        return bool(moves.device) or cleared

    def let_go(self, size: int) -> bool:
        """Have so many bytes leave the host's memory that no job uses; whether anything did."""
        with self.tiers.lock:
            moves = self._forget(self.tiers.let_go(size))
        self.give_back()
        return bool(moves)

    def pause(self, paused: bool) -> None:
        """Begin with nothing new: another worker needs the host's memory; or do so again."""
        self.tiers.pause(paused)

    def expire(self, idle: float) -> None:
        """Have models leave the device that nobody has used for so many seconds."""
        with self.tiers.lock:
            self._forget(self.tiers.expire(time.monotonic() - idle))
        self.give_back()

    def held(self) -> dict[str, Held]:
        """Every model of which something is in memory, by key, least recently used first."""
        to_unix = time.time() - time.monotonic()
        with self.tiers.lock:
            refs, found = self.refs(), dict[str, Held]()
            for key, model in self.tiers.models().items():
                device, host = self.tiers.model_bytes(key)
                tier = "device" if self.tiers.resident(key) else "host" if self.tiers.warm(key) else "disk"
                used = to_unix + model.used
                ref = refs[key]
                if isinstance(ref, Offloaded):
                    ref, tier = ref.plain, "host" if self.tiers.warm(key) else "disk"
                one = Held(ref, tier, device, host, model.leases, model.pin or "", used)
                found[ref.key] = _together(found.pop(ref.key), one) if ref.key in found else one
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
        offloaded = isinstance(ref, Offloaded)  # it is copied for every request, from the host's memory
        self.check_possible(ref)
        with self.tiers.lock:
            known = [(spec.bytes, self.tiers.part(spec.key)) for spec in specs]
            there = [(size, part.host if part else None, part.device if part else None) for size, part in known]
            copy = sum(size for size, _, device in there if offloaded or device is not State.HELD)
            read = sum(
                size for size, host, device in there if State.HELD not in ((host,) if offloaded else (host, device))
            )
        return "disk" if read else "host" if copy else "device", sum(size for size, _ in known), read, copy

    def device_bytes(self, ref: ModelRef) -> int:
        """What a model takes on the device where it runs.

        Raises:
            ApiError: MODEL_BROKEN.
        """
        return total(self._known.pieces(ref, self.parts(ref))[0])

    def check_possible(self, ref: ModelRef, *, within_limit: bool = False) -> None:
        """Whether there would be room for a model if all leases ended.

        Args:
            ref: which model.
            within_limit: in the device's budget, also where nothing else is there.

        Raises:
            ApiError: MODEL_BROKEN; OUT_OF_MEMORY: there would not.
        """
        on_device, in_host = self._known.pieces(ref, self.parts(ref))
        try:
            self.tiers.check_possible(on_device, in_host)
            if within_limit and (needed := total(on_device)) > self.tiers.device_limit:
                raise NeverFits(needed, self.tiers.device_limit, 0, "device")
        except NeverFits as fault:
            raise never_fits(ref, fault) from fault

    # --- moving ---

    def _entered(self, ref: ModelRef, specs: Sequence[PartSpec]) -> Sequence[PartSpec] | None:
        """Enter a model in the books; the parts that it has there; the lock is held.

        Returns:
            None when its files were replaced, and what it was made of before is still in use.
        """
        if self._known.enter(ref, specs):
            return specs
        if current := self._known.current(ref):
            return current  # these parts are those of before
        if (moves := self._known.renew(ref, specs)) is None:
            return None
        log.info("%s is read anew: its files were replaced", ref.key)
        self._models.pop(ref.key, None)
        self._forget(moves)
        return specs

    def _bring_to_host(
        self, ref: ModelRef, specs: Sequence[PartSpec], wanted: Iterable[PartSpec], ahead_of: Collection[str] = ()
    ) -> bool:
        """Have parts of a model in the host's memory, at the cost of none of its others; whether there was room."""
        if sum(spec.bytes for spec in specs) > self.tiers.host_limit:
            return False
        return all(self._host.bring(ref, specs, spec, {*ahead_of, ref.key}) for spec in wanted)

    def _source(self, begun: Begun) -> str:
        """Where a model comes from: the host's memory where all is there that it lacks."""
        with self.tiers.lock:
            parts = [self.tiers.part(key) for key in begun.read or begun.copy if key != begun.model]
        return "host" if all(part and part.host is State.HELD for part in parts) else "disk"

    def _arrived(self, key: str, module: Any) -> None:
        with self.tiers.lock:
            self._modules[key] = module
            self.tiers.placed(key)

    def _assembled(self, reservation: Reservation, cancelled: Callable[[], bool]) -> Any:
        ref, specs = reservation.ref, reservation.specs
        with self._building:
            with self.tiers.lock:
                if ref.key in self._models:
                    return self._models[ref.key]
                made = self._modules.get(ref.key)  # an offloaded model's, all at once
                modules = made or {spec.name: self._modules[spec.key] for spec in specs}
            began = time.perf_counter()

            def build() -> Any:
                return self.loader.assemble(ref, modules)

            model = self._exclusively(build, cancelled) if any(spec.by_library for spec in specs) else build()
            reservation.spent("build", began)
            with self.tiers.lock:
                self._models[ref.key] = model
            return model

    def _give_up(self, reservation: Reservation, begun: Begun) -> None:
        with self.tiers.lock:
            self._owed = True  # what was to be taken over is free now
            self._forget(self.tiers.abort(begun))
        reservation.onto.clear()  # whoever still knows the reservation is not to keep what has left the device
        self.give_back()

    def _forget(self, moves: Moves) -> Moves:
        """Let go of what left a tier, and of the models that were made of it."""
        self.tally.evicted("device", len(moves.device))
        self.tally.evicted("host", len(moves.host))
        self._host.forget(moves.host)
        for key in moves.device:
            left = self._modules.pop(key, None)
            for module in left.values() if isinstance(left, dict) else [left]:
                if module is not None:
                    self.on_leave(module)
        if moves.device:
            self._owed = True
            keys = set(moves.device)
            for key in [key for key in self._models if keys & self._known.keys(key)]:
                del self._models[key]
                log.info("evicted %s", key)
        return moves


def _together(one: Held, other: Held) -> Held:
    """A model that is held in two ways."""
    tier = min(one.tier, other.tier, key=("device", "host", "disk").index)
    leases, used = one.leases + other.leases, max(one.used, other.used)
    device, host = one.device + other.device, max(one.host, other.host)
    return Held(one.ref, tier, device, host, leases, one.pin or other.pin, used)
