"""The books of the host tier that all workers of a container share: which part is there, who has it, who is next.

No clock, no socket, no memory: ``host_keeper`` has those. Every method returns what is to be done about it, in order.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Answer:
    """A claim is ``granted``, to be made again ``later``, or ``refused``."""

    worker: int
    id: int
    what: str


@dataclass(frozen=True)
class Opened:
    """A worker gets the memory of a part, to read into it unless the part is ``there``."""

    worker: int
    id: int
    name: str
    there: bool


@dataclass(frozen=True)
class Freed:
    """The memory of a part is not used any more, also if the part has not left: it was half read."""

    name: str


@dataclass(frozen=True)
class Ask:
    """A worker is to let so many bytes go."""

    worker: int
    size: int


@dataclass(frozen=True)
class Paused:
    """A worker is to begin with nothing new, or may again."""

    worker: int
    on: bool


Step = Answer | Opened | Freed | Ask | Paused


@dataclass(eq=False)
class _Part:
    """A part for which there is room.

    Attributes:
        holders: how often each worker has it.
        there: it is whole.
        reader: the worker that reads it.
        waiting: who waits for that, and the number of the question.
    """

    name: str
    bytes: int
    holders: Counter[int] = field(default_factory=Counter)
    there: bool = False
    reader: int | None = None
    waiting: deque[tuple[int, int]] = field(default_factory=deque)


@dataclass(frozen=True)
class _Claim:
    worker: int
    id: int
    sizes: Mapping[str, int]


class HostTier:
    """The books.

    A part takes its bytes once, however many workers have it. What nobody has is kept for who comes next, and leaves
    for others, least recently used first. A claim is granted as a whole, so that no two workers ever wait for each
    other with half a model each. One claim waits at most: for it the others are asked to let go of what no job
    uses, one after the other; where that does not do, they are paused until their jobs are done. What is claimed
    meanwhile by others is claimed again later, and those who were sent away take turns.

    Args:
        limit: bytes that all parts may take together.

    Attributes:
        bytes: that they take now, those on their way included.
    """

    def __init__(self, limit: int = 0) -> None:
        self.limit = limit
        self.bytes = 0
        self._parts: dict[str, _Part] = {}
        """Of those that nobody has, the least recently used first."""
        self._workers: dict[int, None] = {}
        self._head: _Claim | None = None
        self._asked: deque[int] = deque()
        """Whom to ask still to let go, in this round."""
        self._next: deque[int] = deque()
        """Workers that were sent away, and whose turn comes, the first one's now."""
        self._late = False
        """Whose turn it is has had some time to come."""
        self._paused: set[int] = set()

    @property
    def held(self) -> int:
        """Bytes of parts that somebody has."""
        return sum(part.bytes for part in self._parts.values() if part.holders)

    @property
    def waits(self) -> bool:
        """Whether ``tick`` is to be called."""
        return self._head is not None or bool(self._next)

    def join(self, worker: int) -> None:
        """A worker is there."""
        self._workers[worker] = None

    # --- room ---

    def claim(self, worker: int, id: int, sizes: Mapping[str, int], *, wait: bool) -> list[Step]:
        """A worker needs room for parts; see ``schema.host_tier.Claim``."""
        claim = _Claim(worker, id, sizes)
        if sum(sizes.values()) > self.limit:
            return [Answer(worker, id, "refused")]
        if all(name in self._parts and self._parts[name].holders for name in sizes):
            return self._grant(claim)  # it takes no room from anybody
        if self._head is None and (steps := self._granted(claim)) is not None:
            return steps + self._passed(worker)
        if not wait:
            return [Answer(worker, id, "refused")]
        if self._head is not None or (self._next and self._next[0] != worker):
            if worker not in self._next:
                self._next.append(worker)
            return [*self._pause(worker), Answer(worker, id, "later")]
        if self._next:
            self._next.popleft()
        self._head, self._asked = claim, self._round(worker)
        return self.went()

    def withdraw(self, worker: int, id: int) -> list[Step]:
        """A claim that waits is given up; nothing is said about one that does not."""
        head = self._head
        if head is None or (head.worker, head.id) != (worker, id):
            return []
        self._head = None
        return [Answer(worker, id, "later"), *self._turn()]

    def release(self, worker: int, name: str) -> list[Step]:
        """A worker needs a part once less."""
        part = self._parts.get(name)
        if part is None or not part.holders[worker]:
            return []
        part.holders[worker] -= 1
        steps = list[Step]()
        if not part.holders[worker]:
            del part.holders[worker]
            steps += self._left(part, worker)
        return steps + self._served()

    def clear(self) -> list[Step]:
        """Nothing is kept that nobody has."""
        return [step for part in list(self._kept()) for step in self._drop(part)]

    # --- reading ---

    def open(self, worker: int, id: int, name: str) -> list[Step]:
        """A worker wants the memory of a part that it has claimed; it gets it when nobody else is reading the part."""
        part = self._parts.get(name)
        if part is None or not part.holders[worker]:
            return [Answer(worker, id, "refused")]
        if part.there:
            return [Opened(worker, id, name, there=True)]
        part.waiting.append((worker, id))
        return self._read_next(part)

    def read(self, worker: int, name: str, *, well: bool) -> list[Step]:
        """A worker has read a part, or could not."""
        part = self._parts.get(name)
        if part is None or part.reader != worker:
            return []
        part.reader = None
        if not well:
            return [Freed(name), *self._read_next(part)]
        part.there = True
        waited, part.waiting = part.waiting, deque()
        return [Opened(other, id, name, there=True) for other, id in waited]

    def _read_next(self, part: _Part) -> list[Step]:
        if part.reader is not None or not part.waiting:
            return []
        worker, id = part.waiting.popleft()
        part.reader = worker
        return [Opened(worker, id, part.name, there=False)]

    # --- who makes room ---

    def went(self) -> list[Step]:
        """A worker has let go of what it could: the next one is asked."""
        while self._head and self._asked:
            worker = self._asked.popleft()
            if worker in self._workers:
                return [Ask(worker, self._short(self._head))]
        return []

    def tick(self) -> list[Step]:
        """Some time has passed: who is asked may have more to let go by now, and whose turn it is may not come."""
        if self._head:
            mine = self._head.worker
            steps = [] if self._asked else self._pause(*(worker for worker in self._workers if worker != mine))
            self._asked = self._asked or self._round(mine)
            return steps + self.went()
        if self._next and self._late:
            self._next.popleft()
            return self._turn()
        self._late = True
        return []

    def died(self, worker: int) -> list[Step]:
        """A worker is gone, with all that it had; what it was reading is not there."""
        self._workers.pop(worker, None)
        self._paused.discard(worker)
        if worker in self._next:
            self._next.remove(worker)
        steps = list[Step]()
        for part in list(self._parts.values()):
            part.waiting = deque(entry for entry in part.waiting if entry[0] != worker)
            if part.holders.pop(worker, 0):
                steps += self._left(part, worker)
        if self._head and self._head.worker == worker:
            self._head = None
            return steps + self._turn()
        return steps + self._served()

    def _round(self, mine: int) -> deque[int]:
        """Whom to ask: first who needs it, then those who have most."""
        others = [worker for worker in self._workers if worker != mine]

        def has(worker: int) -> int:
            return sum(part.bytes for part in self._parts.values() if part.holders[worker])

        return deque([mine, *sorted(others, key=has, reverse=True)])

    def _pause(self, *workers: int) -> list[Step]:
        new = [worker for worker in workers if worker not in self._paused]
        self._paused.update(new)
        return [Paused(worker, on=True) for worker in new]

    def _resume(self) -> list[Step]:
        paused, self._paused = sorted(self._paused), set()
        return [Paused(worker, on=False) for worker in paused]

    def _turn(self) -> list[Step]:
        """Nobody waits at the head any more, or whose turn it was has not come: all may go on, the next one first."""
        self._late = False
        return self._resume()

    def _passed(self, worker: int) -> list[Step]:
        """A worker got what it wanted: it is another one's turn."""
        if self._next and self._next[0] == worker:
            self._next.popleft()
            return self._turn()
        return []

    def _served(self) -> list[Step]:
        """Whether there is room by now for the one that waits."""
        if self._head is None or (steps := self._granted(self._head)) is None:
            return []
        self._head = None
        return steps + self._turn()

    # --- parts ---

    def _short(self, claim: _Claim) -> int:
        """Bytes that are to be let go for a claim, beyond what nobody has."""
        return sum(self._new(claim).values()) + self.held + self._revived(claim) - self.limit

    def _new(self, claim: _Claim) -> dict[str, int]:
        return {name: size for name, size in claim.sizes.items() if name not in self._parts}

    def _revived(self, claim: _Claim) -> int:
        """Bytes of parts that are there, and nobody has yet."""
        parts = (self._parts[name] for name in claim.sizes if name in self._parts)
        return sum(part.bytes for part in parts if not part.holders)

    def _granted(self, claim: _Claim) -> list[Step] | None:
        """Grant a claim if there is room."""
        return self._grant(claim) if self._short(claim) <= 0 else None

    def _grant(self, claim: _Claim) -> list[Step]:
        new, steps = self._new(claim), list[Step]()
        for part in list(self._kept()):
            if self.bytes + sum(new.values()) <= self.limit:
                break
            if part.name not in claim.sizes:
                steps += self._drop(part)
        for name, size in new.items():
            self._parts[name] = _Part(name, size)
            self.bytes += size
        for name in claim.sizes:
            self._parts[name].holders[claim.worker] += 1
        return [*steps, Answer(claim.worker, claim.id, "granted")]

    def _kept(self) -> Iterator[_Part]:
        return (part for part in self._parts.values() if not part.holders)

    def _left(self, part: _Part, worker: int) -> list[Step]:
        """A worker does not have a part any more."""
        steps = list[Step]()
        if part.reader == worker:
            part.reader = None
            steps += [Freed(part.name), *self._read_next(part)]
        if not part.holders:
            if not part.there:
                steps += self._drop(part)
            else:
                self._parts[part.name] = self._parts.pop(part.name)
        return steps

    def _drop(self, part: _Part) -> list[Step]:
        del self._parts[part.name]
        self.bytes -= part.bytes
        return [Freed(part.name)]
