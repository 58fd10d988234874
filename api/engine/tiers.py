"""Which part of which model is where: the books of the device's memory and of the host's, without the weights.

A part is absent, on its way, or held, in each of the two tiers; what is on its way has its bytes reserved. Every move
is begun, and then either done or given up, so that a fault on the way leaves the books right. A model is a set of
parts; a part of several models is counted once. The moves themselves are the cache's.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence

from api.engine.books import Begun, Model, Moves, NeverFits, Part, Piece, State, Turn


class Tiers:
    """The books. May be used from any thread; ``changed`` is notified whenever they change.

    Args:
        device_limit: bytes that parts may take on the device; a single larger model is still tried, when nothing else
            is there.
        host_limit: the same for the host's memory.
        shared: the device computes in the host's memory. A part on the device is then bound to its host copy, which
            stays as long.
        capacity: bytes that the device has at all; None if that is not known.
        clock: seconds, monotonic.

    Attributes:
        peak: most bytes that were ever on the device.
        version: goes up with every change.
    """

    def __init__(
        self,
        device_limit: int,
        host_limit: int,
        *,
        shared: bool,
        capacity: int | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.device_limit = min(device_limit, host_limit) if shared else device_limit
        self.host_limit = host_limit
        self.shared = shared
        self.lock = threading.RLock()
        self.changed = threading.Condition(self.lock)
        self.peak = self.version = 0
        self._capacity = capacity
        self._clock = clock
        self._parts: dict[str, Part] = {}
        self._models: dict[str, Model] = {}

    # --- asking ---

    @property
    def device_bytes(self) -> int:
        """On the device, or on their way there."""
        with self.lock:
            return _sum(part for part in self._parts.values() if part.device is not State.ABSENT)

    @property
    def host_bytes(self) -> int:
        """In the host's memory, or on their way there."""
        with self.lock:
            return _sum(part for part in self._parts.values() if part.host is not State.ABSENT)

    def part(self, key: str) -> Part | None:
        """A part's entry; to be read only."""
        return self._parts.get(key)

    def models(self) -> dict[str, Model]:
        """Every model that has something in memory, least recently used first; to be read only."""
        with self.lock:
            return dict(sorted(self._models.items(), key=lambda item: item[1].used))

    def model_bytes(self, model: str) -> tuple[int, int]:
        """Bytes of a model on the device and in the host's memory; shared parts are counted for each."""
        with self.lock:
            parts = [self._parts[key] for key in self._models[model].parts] if model in self._models else []
            return (
                _sum(part for part in parts if part.device is State.HELD),
                _sum(part for part in parts if part.host is State.HELD),
            )

    def resident(self, model: str) -> bool:
        """Whether all of a model is on the device."""
        with self.lock:
            known = self._models.get(model)
            return known is not None and all(self._parts[key].device is State.HELD for key in known.parts)

    def coming(self, model: str) -> bool:
        """Whether all of a model is on the device, or on its way."""
        with self.lock:
            known = self._models.get(model)
            return known is not None and all(self._parts[key].device is not State.ABSENT for key in known.parts)

    def warm(self, model: str) -> bool:
        """Whether nothing of a model would have to be read."""
        with self.lock:
            known = self._models.get(model)
            return known is not None and all(_is_warm(self._parts[key]) for key in known.parts)

    # --- knowing, using ---

    def know(self, model: str, pieces: Sequence[Piece]) -> None:
        """Enter a model in the books; it leaves them when nothing of it is in memory and nobody holds it."""
        with self.lock:
            if model in self._models:
                return
            self._models[model] = Model(tuple(dict.fromkeys(piece.key for piece in pieces)))
            for piece in pieces:
                part = self._parts.setdefault(piece.key, Part(piece.key, piece.architecture, piece.bytes))
                part.models.add(model)

    def hold(self, model: str) -> bool:
        """Lease a model if it is on the device."""
        with self.lock:
            if not self.resident(model):
                return False
            self._lease(model)
            return True

    def release(self, model: str) -> Moves:
        """A lease is over."""
        with self.lock:
            known = self._models[model]
            assert known.leases > 0
            known.leases -= 1
            self._touch(model)
            moves = Moves()
            if known.leaving and not known.leases:
                leaving, known.leaving = known.leaving, None
                moves = self.drop(model, leaving)
            self._settled()
            return moves

    def pin(self, model: str, tier: str | None) -> None:
        """Keep a model in a tier, ``device`` or ``host``, whatever else is needed; None to let it go again."""
        with self.lock:
            if model in self._models:
                self._models[model].pin = tier
                if tier:
                    self._models[model].leaving = None
                self._settled()

    def lease(self, model: str) -> None:
        """Lease a model that is known, wherever it is. That it was to leave when its jobs are done is forgotten."""
        with self.lock:
            self._models[model].leaving = None
            self._lease(model)

    def in_host(self, model: str) -> bool:
        """Whether all of a model is in the host's memory."""
        with self.lock:
            return all(self._parts[key].host is State.HELD for key in self._models[model].parts)

    # --- onto the device ---

    def begin(self, model: str, wanted: Sequence[str] = (), *, evict: bool = True) -> Begun | None:
        """Lease a model and reserve what it takes, after evicting what has to go.

        Args:
            model: that is known.
            wanted: models that others will ask for, the next one first: they are evicted last.
            evict: whether others may be evicted at all.

        Returns:
            None when it fits only once leases have ended.

        Raises:
            NeverFits: not even then.
        """
        with self.lock:
            mine = [self._parts[key] for key in self._models[model].parts]
            self._check_possible(mine)
            missing = [part for part in mine if part.device is State.ABSENT]
            found = self._plan(model, mine, missing, wanted, evict)
            if found is None:
                return None
            off_device, off_host = found
            copy = sorted(missing, key=lambda part: part.host is not State.HELD)
            begun = Begun(
                model,
                tuple(part.key for part in copy),
                _take_over(missing, off_device),
                self._forget(off_device, off_host),
            )
            for part in missing:
                part.device, part.owner = State.COMING, begun
                if self.shared and part.host is State.ABSENT:
                    part.host = State.COMING
            self._lease(model)
            self.peak = max(self.peak, self.device_bytes)
            self._settled()
            return begun

    def placed(self, key: str) -> None:
        """A part is on the device."""
        with self.lock:
            part = self._parts[key]
            assert part.device is State.COMING
            part.device, part.owner = State.HELD, None
            self._settled()

    def abort(self, begun: Begun) -> Moves:
        """What was begun is given up, with its lease; what is there already stays."""
        with self.lock:
            for key in begun.copy:
                part = self._parts[key]
                if part.owner is begun:
                    part.device, part.owner = State.ABSENT, None
                    if part.host is State.COMING and not part.reader:
                        part.host = State.ABSENT
            return self.release(begun.model)

    # --- into the host's memory ---

    def begin_read(self, key: str, ahead_of: Collection[str] | None = None) -> tuple[Turn, Moves]:
        """Reserve the host's memory for a part.

        Args:
            key: of a part that is known.
            ahead_of: it is read ahead, and makes room only of what nobody leases and none of these models has;
                None: a model that is leased needs it.

        Raises:
            NeverFits: there is no room, and no lease that would end.
        """
        with self.lock:
            part = self._parts[key]
            if part.host is State.HELD:
                return Turn.HELD, Moves()
            if part.host is State.COMING:
                turn, part.reader = (Turn.BUSY if part.reader else Turn.READ), True
                return turn, Moves()
            gone, short = list[Part](), self.host_bytes + part.bytes - self.host_limit
            for other in self._droppable((), ahead_of):
                if short <= 0:
                    break
                gone.append(other)
                short -= other.bytes
            if short > 0:
                left = [p for p in self._parts.values() if p.host is not State.ABSENT and p not in gone]
                if left:
                    if ahead_of is None and all(self._is_fixed(p) for p in left):
                        raise NeverFits(part.bytes, self.host_limit, _sum(left), "host")
                    return Turn.FULL, Moves()
                if ahead_of is not None:
                    return Turn.FULL, Moves()
            moves = self._forget((), gone)
            part.host, part.reader = State.COMING, True
            self._settled()
            return Turn.READ, moves

    def read_done(self, key: str) -> None:
        """A part is in the host's memory."""
        with self.lock:
            part = self._parts[key]
            assert part.host is State.COMING
            part.host, part.reader = State.HELD, False
            part.used = max(part.used, self._clock())
            for model in part.models:
                self._models[model].used = max(self._models[model].used, part.used)
            self._settled()

    def read_failed(self, key: str) -> None:
        """A part could not be read. Where it was promised to one who copies it, the promise stays."""
        with self.lock:
            part = self._parts[key]
            part.reader = False
            if not (self.shared and part.device is State.COMING):
                part.host = State.ABSENT
            self._prune()
            self._settled()

    # --- away ---

    def drop(self, model: str, to: str = "disk") -> Moves:
        """Have a model leave the device, and with ``to="disk"`` the host's memory; parts that others use stay.

        It is unpinned. A model that is leased goes when its last lease ends.
        """
        with self.lock:
            known = self._models.get(model)
            if known is None:
                return Moves()
            known.pin = None
            if known.leases:
                known.leaving = to
                self._settled()
                return Moves()
            off_device = self._exclusive(model, lambda other: other.pin == "device" or self._is_resident(other))
            off_device = [part for part in off_device if part.device is State.HELD]
            off_host = list[Part]()
            if to == "disk":
                off_host = self._exclusive(
                    model, lambda other: other.pin is not None or all(_is_warm(self._parts[k]) for k in other.parts)
                )
                stays = (State.HELD, State.COMING) if self.shared else (State.COMING,)
                off_host = [p for p in off_host if p.host is State.HELD and (p in off_device or p.device not in stays)]
            moves = self._forget(off_device, off_host)
            self._settled()
            return moves

    def expire(self, before: float) -> Moves:
        """Have models leave the device that nobody has used since then."""
        with self.lock:
            old = [key for key, m in self._models.items() if m.used < before and not m.leases and m.pin != "device"]
            moves = [self.drop_device(key) for key in old if self.model_bytes(key)[0]]
            return Moves(tuple(key for m in moves for key in m.device))

    def drop_device(self, model: str) -> Moves:
        """Have an idle model leave the device; its pin to the host's memory stays."""
        pin = self._models[model].pin
        moves = self.drop(model, "host")
        self.pin(model, pin)
        return moves

    def clear_idle(self) -> Moves:
        """Have everything leave the device that nobody leases or pins, and memory where the device is the host's."""
        with self.lock:
            off_device = list(self._evictable(None, (), ()))
            off_host = list(self._droppable(off_device, None)) if self.shared else []
            moves = self._forget(off_device, off_host)
            self._settled()
            return moves

    # --- the rules ---

    def _plan(
        self, model: str, mine: list[Part], missing: list[Part], wanted: Sequence[str], evict: bool
    ) -> tuple[list[Part], list[Part]] | None:
        """What has to leave the device and the host's memory for a model; None: it has to wait."""
        off_device, off_host = list[Part](), list[Part]()
        victims = self._evictable(model, mine, wanted) if evict else iter(())
        short = _sum(missing) and self.device_bytes + _sum(missing) - self.device_limit
        while short > 0 and (victim := next(victims, None)):
            off_device.append(victim)
            short -= victim.bytes
        if short > 0 and self._others(mine, off_device, "device"):
            return None
        if not self.shared:
            return off_device, off_host
        to_read = [part for part in missing if part.host is State.ABSENT]
        short = _sum(to_read) and self.host_bytes + _sum(to_read) - self.host_limit
        while short > 0:
            droppable = self._droppable(off_device, None) if evict else iter(())
            drop = next((p for p in droppable if p not in off_host and p not in mine), None)
            if drop:
                off_host.append(drop)
                short -= drop.bytes
            elif victim := next(victims, None):
                off_device.append(victim)
            else:
                break
        if short > 0 and self._others(mine, off_host, "host"):
            return None
        return off_device, off_host

    def check_possible(self, pieces: Sequence[Piece]) -> None:
        """Whether there would be room for a model of these parts, if all leases ended.

        Raises:
            NeverFits: there would not.
        """
        with self.lock:
            mine = [self._parts.get(piece.key) or Part(piece.key, piece.architecture, piece.bytes) for piece in pieces]
            self._check_possible(mine)

    def _check_possible(self, mine: list[Part]) -> None:
        needed = _sum(mine)
        if self._capacity is not None and needed > self._capacity:
            raise NeverFits(needed, self._capacity, 0, "device")
        others = [part for part in self._parts.values() if part not in mine and self._pinned(part)]
        pinned = _sum(p for p in others if p.device is not State.ABSENT and self._pinned(p, "device"))
        if pinned and needed + pinned > self.device_limit:
            raise NeverFits(needed, self.device_limit, pinned, "device")
        pinned = _sum(part for part in others if part.host is not State.ABSENT)
        if self.shared and pinned and needed + pinned > self.host_limit:
            raise NeverFits(needed, self.host_limit, pinned, "host")

    def _evictable(self, model: str | None, mine: Collection[Part], wanted: Sequence[str]) -> Iterator[Part]:
        """Parts that may leave the device, in the order in which they should.

        First what belongs to no whole model, then the parts of one model after the other that no other one has: those
        that nobody wants, least recently used first, then those that are wanted last.
        """
        kept = {part.key for part in mine}
        for known in self._models.values():
            if known.leases or known.pin == "device":
                kept.update(known.parts)
        held = [part for part in self._parts.values() if part.device is State.HELD and part.key not in kept]
        ranks = {key: -rank for rank, key in enumerate(wanted)}
        staying = {key for key in self._models if key != model and self.resident(key)}
        order = sorted(staying, key=lambda key: (key in ranks, ranks.get(key, 0), self._models[key].used))
        for gone in [None, *order]:
            staying.discard(gone or "")
            for part in sorted(held, key=lambda part: part.used):
                if not part.models & staying:
                    held.remove(part)
                    yield part

    def _droppable(self, off_device: Collection[Part], ahead_of: Collection[str] | None) -> Iterator[Part]:
        """Parts that may leave the host's memory, least recently used first.

        Args:
            off_device: parts that are about to leave the device.
            ahead_of: see ``begin_read``.
        """
        for part in sorted(self._parts.values(), key=lambda part: part.used):
            if part.host is not State.HELD or part.device is State.COMING or self._pinned(part, "host"):
                continue
            leased = any(self._models[model].leases for model in part.models)
            if part.device is State.HELD and part not in off_device:
                if self.shared or (ahead_of is not None and leased):
                    continue
            elif leased or self._pinned(part):
                continue
            if ahead_of is None or not part.models & set(ahead_of):
                yield part

    def _pinned(self, part: Part, tier: str | None = None) -> bool:
        pins = {self._models[model].pin for model in part.models} - {None}
        return tier in pins if tier else bool(pins)

    def _is_fixed(self, part: Part) -> bool:
        return self._pinned(part) and part.host is State.HELD and part.device is not State.COMING

    def _others(self, mine: Collection[Part], gone: Collection[Part], tier: str) -> bool:
        """Whether a tier would still hold something else."""
        return any(
            getattr(part, tier) is not State.ABSENT and part not in mine and part not in gone
            for part in self._parts.values()
        )

    def _is_resident(self, model: Model) -> bool:
        return all(self._parts[key].device is State.HELD for key in model.parts)

    def _exclusive(self, model: str, needs: Callable[[Model], bool]) -> list[Part]:
        """Parts of a model that no other one needs, besides those that are leased."""
        others = [known for key, known in self._models.items() if key != model and (known.leases or needs(known))]
        taken = {key for known in others for key in known.parts}
        return [self._parts[key] for key in self._models[model].parts if key not in taken]

    def _lease(self, model: str) -> None:
        self._models[model].leases += 1
        self._touch(model)

    def _touch(self, model: str) -> None:
        known = self._models[model]
        known.used = self._clock()
        for key in known.parts:
            self._parts[key].used = known.used

    def _forget(self, off_device: Collection[Part], off_host: Collection[Part]) -> Moves:
        for part in off_device:
            part.device = State.ABSENT
        for part in off_host:
            part.host = State.ABSENT
        return Moves(tuple(part.key for part in off_device), tuple(part.key for part in off_host))

    def _prune(self) -> None:
        """Strike out models of which nothing is left, and parts of no model."""
        for key, known in list(self._models.items()):
            parts = [self._parts[part] for part in known.parts]
            if not known.leases and all(part.host is part.device is State.ABSENT for part in parts):
                del self._models[key]
                for part in parts:
                    part.models.discard(key)
        for key in [key for key, part in self._parts.items() if not part.models]:
            del self._parts[key]

    def _settled(self) -> None:
        self._prune()
        self.version += 1
        self.changed.notify_all()


def _is_warm(part: Part) -> bool:
    return State.HELD in (part.host, part.device)


def _sum(parts: Iterable[Part]) -> int:
    return sum(part.bytes for part in parts)


def _take_over(missing: Iterable[Part], leaving: Iterable[Part]) -> dict[str, str]:
    """Which of those that come take the place of which that leave."""
    free, onto = list(leaving), dict[str, str]()
    for part in missing:
        if same := next((other for other in free if other.architecture == part.architecture), None):
            free.remove(same)
            onto[part.key] = same.key
    return onto
