"""Which part of which model is where: the books of the device's memory and of the host's, without the weights.

A part is absent, on its way, or held, in each of the two tiers; what is on its way has its bytes reserved. Every move
is begun, and then either done or given up, so that a fault on the way leaves the books right. A model is a set of
parts; a part of several models is counted once. What leaves for what is ``eviction``'s to say, and the moves themselves
are the cache's.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Collection, Sequence

from api.engine import eviction
from api.engine.books import Begun, Books, Model, Moves, Part, Piece, State, Turn, total
from api.engine.eviction import Leaving


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
        paused: nothing new is leased: another worker needs the host's memory.
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
        self.lock = threading.RLock()
        self.changed = threading.Condition(self.lock)
        self.peak = self.version = 0
        self.paused = False
        self._clock = clock
        self._books = Books(min(device_limit, host_limit) if shared else device_limit, host_limit, shared, capacity)

    # --- asking ---

    @property
    def device_limit(self) -> int:
        """Bytes that parts may take on the device."""
        return self._books.device_limit

    @property
    def host_limit(self) -> int:
        """Bytes that they may take in the host's memory."""
        return self._books.host_limit

    @property
    def shared(self) -> bool:
        """Whether the device computes in the host's memory."""
        return self._books.shared

    @property
    def device_bytes(self) -> int:
        """On the device, or on their way there."""
        with self.lock:
            return self._books.device_bytes

    @property
    def host_bytes(self) -> int:
        """In the host's memory, or on their way there."""
        with self.lock:
            return self._books.host_bytes

    def part(self, key: str) -> Part | None:
        """A part's entry; to be read only."""
        return self._books.parts.get(key)

    def models(self) -> dict[str, Model]:
        """Every model that has something in memory, least recently used first; to be read only."""
        with self.lock:
            return dict(sorted(self._books.models.items(), key=lambda item: item[1].used))

    def model_bytes(self, model: str) -> tuple[int, int]:
        """Bytes of a model on the device and in the host's memory; shared parts are counted for each."""
        with self.lock:
            if model not in self._books.models:
                return 0, 0
            return (
                total(part for part in self._books.of(model) if part.device is State.HELD),
                total(part for part in self._books.weights(model) if part.host is State.HELD),
            )

    def resident(self, model: str) -> bool:
        """Whether a model can run: all of it is on the device, or where an offloaded one has it."""
        with self.lock:
            return model in self._books.models and self._books.is_resident(model)

    def coming(self, model: str) -> bool:
        """Whether a model can run, or what it lacks is on its way."""
        with self.lock:
            return (
                model in self._books.models
                and all(part.device is not State.ABSENT for part in self._books.of(model))
                and all(part.host is not State.ABSENT for part in self._books.offloaded(model))
            )

    def warm(self, model: str) -> bool:
        """Whether nothing of a model would have to be read."""
        with self.lock:
            return model in self._books.models and self._books.is_warm(model)

    def in_host(self, model: str) -> bool:
        """Whether all of a model is in the host's memory."""
        with self.lock:
            return all(part.host is State.HELD for part in self._books.weights(model))

    def check_possible(self, pieces: Sequence[Piece], in_host: Sequence[Piece] = ()) -> None:
        """Whether there would be room for a model of these parts, if all leases ended; see ``know``.

        Raises:
            NeverFits: there would not.
        """
        with self.lock:
            known = self._books.parts
            mine, below = (
                [known.get(piece.key) or Part(piece.key, piece.architecture, piece.bytes) for piece in some]
                for some in (pieces, in_host)
            )
            eviction.check_possible(self._books, mine, below)

    # --- knowing, using ---

    def know(self, model: str, pieces: Sequence[Piece], in_host: Sequence[Piece] = (), full: str | None = None) -> None:
        """Enter a model in the books; it leaves them when nothing of it is in memory and nobody holds it.

        Args:
            model: its key.
            pieces: what is on the device where it runs.
            in_host: of an offloaded model: what is in the host's memory then. ``pieces`` is its room on the device.
            full: of an offloaded model: the key of the same one held as it is.
        """
        with self.lock:
            if known := self._books.models.get(model):
                known.left = None
                return
            keys, below = (tuple(dict.fromkeys(piece.key for piece in some)) for some in (pieces, in_host))
            self._books.models[model] = Model(keys, below, full)
            for piece in (*pieces, *in_host):
                self._books.parts.setdefault(piece.key, Part(piece.key, piece.architecture, piece.bytes))
            for part in self._books.of(model):
                part.models.add(model)
            for part in self._books.offloaded(model):
                part.offloaded.add(model)

    def consists_of(self, model: str, pieces: Sequence[Piece]) -> bool:
        """Whether a model is in the books with these parts."""
        with self.lock:
            known = self._books.models.get(model)
            return known is not None and set(known.in_host or known.parts) == {piece.key for piece in pieces}

    def renew(self, model: str, pieces: Sequence[Piece], in_host: Sequence[Piece] = ()) -> Moves | None:
        """Have a model consist of other parts, and keep its pin; what was its own alone leaves; see ``know``.

        Returns:
            None while it is leased, or a part of its own is on its way: it is as it was.
        """
        with self.lock:
            known, parts = self._books.models[model], [*self._books.of(model), *self._books.offloaded(model)]
            own = [part for part in parts if part.models | part.offloaded == {model}]
            if known.leases or any(State.COMING in (part.device, part.host) for part in own):
                return None
            pin, moves = known.pin, self.drop(model)
            if self._books.models.pop(model, None):  # others have what is left of it
                for part in parts:
                    part.models.discard(model)
                    part.offloaded.discard(model)
                self._settled()
            self.know(model, pieces, in_host, known.full)
            self._books.models[model].pin = pin
            return moves

    def hold(self, model: str) -> bool:
        """Lease a model if it can run."""
        with self.lock:
            if self.paused or not self.resident(model):
                return False
            self._lease(model)
            return True

    def release(self, model: str) -> Moves:
        """A lease is over."""
        with self.lock:
            known = self._books.models[model]
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
            if model in self._books.models:
                self._books.models[model].pin = tier
                if tier:
                    self._books.models[model].leaving = None
                self._settled()

    def lease(self, model: str) -> None:
        """Lease a model that is known, wherever it is. That it was to leave when its jobs are done is forgotten."""
        with self.lock:
            self._books.models[model].leaving = None
            self._lease(model)

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
            if self.paused:
                return None
            missing = [part for part in self._books.of(model) if part.device is State.ABSENT]
            leaving = eviction.for_model(self._books, model, missing, wanted, evict=evict)
            if leaving is None:
                return None
            copy = sorted(missing, key=lambda part: part.host is not State.HELD)
            to_read = [part for part in self._books.offloaded(model) if part.host is State.ABSENT]
            begun = Begun(
                model,
                tuple(part.key for part in copy),
                eviction.take_over(missing, leaving.device),
                self._forget(leaving),
                tuple(part.key for part in to_read),
            )
            for part in to_read:
                part.host, part.promise = State.COMING, begun
            for part in missing:
                part.device, part.owner = State.COMING, begun
                if self._books.shared and part.host is State.ABSENT:
                    part.host = State.COMING
            self._lease(model)
            self.peak = max(self.peak, self.device_bytes)
            self._settled()
            return begun

    def placed(self, key: str) -> None:
        """A part is on the device."""
        with self.lock:
            part = self._books.parts[key]
            assert part.device is State.COMING
            part.device, part.owner = State.HELD, None
            self._settled()

    def abort(self, begun: Begun) -> Moves:
        """What was begun is given up, with its lease; what is there already stays."""
        with self.lock:
            for key in begun.copy:
                part = self._books.parts[key]
                if part.owner is begun:
                    part.device, part.owner = State.ABSENT, None
                    if part.host is State.COMING and not part.reader:
                        part.host = State.ABSENT
            for key in begun.read:
                part = self._books.parts[key]
                if part.promise is begun:
                    part.promise = None
                    part.host = part.host if part.reader else State.ABSENT
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
            part = self._books.parts[key]
            if part.host is State.HELD:
                return Turn.HELD, Moves()
            if part.host is State.COMING:
                turn, part.reader = (Turn.BUSY if part.reader else Turn.READ), True
                return turn, Moves()
            if self.paused and ahead_of is not None:
                return Turn.FULL, Moves()
            if (leaving := eviction.for_reading(self._books, part, ahead_of)) is None:
                return Turn.FULL, Moves()
            moves = self._forget(leaving)
            part.host, part.reader = State.COMING, True
            self._settled()
            return Turn.READ, moves

    def read_done(self, key: str) -> Moves:
        """A part is in the host's memory; what leaves are models that were sent away while it was read."""
        with self.lock:
            part = self._books.parts[key]
            assert part.host is State.COMING
            part.host, part.reader, part.promise = State.HELD, False, None
            part.used = max(part.used, self._clock())
            for model in part.models | part.offloaded:
                self._books.models[model].used = max(self._books.models[model].used, part.used)
            moves = self._leave_late(part)
            self._settled()
            return moves

    def read_failed(self, key: str) -> Moves:
        """A part could not be read; else as ``read_done``. Its promise to one who copies it stays."""
        with self.lock:
            part = self._books.parts[key]
            part.reader = False
            if not part.promise and not (self._books.shared and part.device is State.COMING):
                part.host = State.ABSENT
            moves = self._leave_late(part)
            self._settled()
            return moves

    # --- away ---

    def drop(self, model: str, to: str = "disk") -> Moves:
        """Have a model leave the device, and with ``to="disk"`` the host's memory; parts that others use stay.

        It is unpinned. A model that is leased goes when its last lease ends, a part that is being read when
        it is there.
        """
        with self.lock:
            known = self._books.models.get(model)
            if known is None:
                return Moves()
            known.pin = None
            if known.leases:
                known.leaving = to
                self._settled()
                return Moves()
            if to == "disk" and any(part.host is State.COMING for part in self._books.weights(model)):
                known.leaving = to
            known.left = "disk" if "disk" in (to, known.left) else to
            moves = self._forget(eviction.of_model(self._books, model, to))
            self._settled()
            return moves

    def expire(self, before: float) -> Moves:
        """Have models leave the device that nobody has used since then."""
        with self.lock:
            old = [
                key for key, m in self._books.models.items() if m.used < before and not m.leases and m.pin != "device"
            ]
            moves = [self.drop_device(key) for key in old if self.model_bytes(key)[0]]
            return Moves(tuple(key for m in moves for key in m.device))

    def drop_device(self, model: str) -> Moves:
        """Have an idle model leave the device; its pin to the host's memory stays."""
        pin = self._books.models[model].pin
        moves = self.drop(model, "host")
        self.pin(model, pin)
        return moves

    def clear_idle(self) -> Moves:
        """Have everything leave the device that nobody leases or pins, and memory where the device is the host's."""
        with self.lock:
            moves = self._forget(eviction.of_idle(self._books))
            self._settled()
            return moves

    def let_go(self, size: int) -> Moves:
        """Have so many bytes leave the host's memory, as far as nobody leases or pins them: another worker needs it."""
        with self.lock:
            moves = self._forget(eviction.letting_go(self._books, size))
            self._settled()
            return moves

    def pause(self, paused: bool) -> None:
        """Lease nothing new, or do so again."""
        with self.lock:
            self.paused = paused
            self._settled()

    # --- entries ---

    def _leave_late(self, part: Part) -> Moves:
        moves = list[Moves]()
        for model in part.models | part.offloaded:
            known = self._books.models.get(model)
            if known and known.leaving and not known.leases:
                to, known.leaving = known.leaving, None
                moves.append(self.drop(model, to))
        return Moves(tuple(key for m in moves for key in m.device), tuple(key for m in moves for key in m.host))

    def _lease(self, model: str) -> None:
        known = self._books.models[model]
        if not known.leases:  # it is wanted again
            known.leaving = None
        known.left = None
        known.leases += 1
        self._touch(model)

    def _touch(self, model: str) -> None:
        known = self._books.models[model]
        known.used = self._clock()
        for part in (*self._books.of(model), *self._books.offloaded(model)):
            part.used = known.used

    def _forget(self, leaving: Leaving) -> Moves:
        # what was made of the host's copy of a part goes with it
        rooms = (room for part in leaving.host for model in part.offloaded for room in self._books.of(model))
        off_device = [*leaving.device, *(room for room in rooms if room.device is State.HELD)]
        for part in off_device:
            part.device = State.ABSENT
        for part in leaving.host:
            part.host = State.ABSENT
        return Moves(tuple(dict.fromkeys(part.key for part in off_device)), tuple(part.key for part in leaving.host))

    def _prune(self) -> None:
        """Strike out models of which nothing is left, and parts of no model."""
        for key, known in list(self._books.models.items()):
            parts = [*self._books.of(key), *self._books.offloaded(key)]
            if not known.leases and all(part.host is part.device is State.ABSENT for part in parts):
                del self._books.models[key]
                for part in parts:
                    part.models.discard(key)
                    part.offloaded.discard(key)
        for key in [key for key, part in self._books.parts.items() if not part.models and not part.offloaded]:
            del self._books.parts[key]

    def _settled(self) -> None:
        self._prune()
        self.version += 1
        self.changed.notify_all()
