"""The books of the host tier that workers share: whatever they ask for, in whichever order, and whoever dies."""

from __future__ import annotations

import random

from hypothesis import given, settings
from hypothesis import strategies as st

from api.service.host_tier import Answer, Ask, Freed, HostTier, Opened, Paused, Step

LIMIT = 100
SIZES = {"a": 10, "b": 25, "c": 30, "d": 45, "e": 60, "f": 5, "g": 20}
MODELS = [("a", "b"), ("a", "c"), ("a", "d"), ("e", "f"), ("e", "b", "f"), ("c", "d", "g"), ("g",)]
WORKERS = (1, 2, 3)


class Played:
    """A worker: jobs that claim a model, read it, run, and leave it; what no job uses stays until it is let go."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.claims: dict[int, tuple[str, ...]] = {}
        self.opened: dict[int, str] = {}
        self.reading: set[str] = set()
        self.idle: list[str] = []
        """What it holds for no job; a name for each time that it was claimed."""
        self.used: list[str] = []
        self.paused = False
        self.waits: int | None = None
        """Its one claim that may wait."""


class Container:
    """Plays the workers of a container, and checks the books after every step.

    Args:
        seed: of what they do.
    """

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.tier = HostTier(LIMIT)
        self.workers: dict[int, Played] = {}
        self.ids = 0
        self.memory: dict[str, str] = {}
        """What the keeper has, by name: ``half`` while it is read, ``whole`` then."""
        self.withdraws = False
        for number in WORKERS:
            self.workers[number] = Played(number)
            self.tier.join(number)

    def do(self, steps: list[Step]) -> None:
        """What the keeper does, and the workers at once."""
        for step in steps:
            match step:
                case Freed(name):
                    self.memory.pop(name, None)
                case Answer(number, id, what):
                    worker = self.workers[number]
                    names = worker.claims.pop(id)
                    worker.waits = None if worker.waits == id else worker.waits
                    if what == "granted":
                        worker.used += names
                    elif what == "later":
                        assert worker.paused or self.withdraws  # else it would ask again and again
                case Opened(number, id, name, there):
                    worker = self.workers[number]
                    assert worker.opened.pop(id) == name
                    if there:
                        assert self.memory[name] == "whole"
                    else:
                        assert self.memory.get(name) is None
                        self.memory[name] = "half"
                        worker.reading.add(name)
                case Ask(number, size):
                    assert size > 0
                    self.let_go(self.workers[number], size)
                    self.do(self.tier.went())
                case Paused(number, on):
                    self.workers[number].paused = on

    def let_go(self, worker: Played, size: int) -> None:
        while worker.idle and size > 0:
            name = worker.idle.pop(0)
            size -= SIZES[name]
            self.do(self.tier.release(worker.number, name))

    # --- what workers do ---

    def step(self) -> None:
        """Some worker does something."""
        worker = self.workers[self.rng.choice(WORKERS)]
        actions = [
            self.claim,
            self.claim,
            self.open,
            self.open,
            self.open,
            self.finish,
            self.finish,
            self.end,
            self.end,
        ]
        rare = [self.withdraw, self.evict, self.die, self.tick, self.tick, self.clear]
        self.rng.choice(actions if self.rng.random() < 0.9 else rare)(worker)

    def claim(self, worker: Played) -> None:
        wait = self.rng.random() < 0.7
        if wait and (worker.waits is not None or worker.paused):
            return
        self.ids += 1
        worker.claims[self.ids] = model = self.rng.choice(MODELS)
        if wait:
            worker.waits = self.ids
        self.do(self.tier.claim(worker.number, self.ids, {name: SIZES[name] for name in model}, wait=wait))

    def withdraw(self, worker: Played) -> None:
        if (waits := worker.waits) is not None:
            self.withdraws = True
            self.do(self.tier.withdraw(worker.number, waits))
            self.withdraws = False
            assert worker.waits is None

    def open(self, worker: Played) -> None:
        held = [name for name in worker.used if name not in worker.reading and name not in worker.opened.values()]
        if held:
            self.ids += 1
            worker.opened[self.ids] = name = self.rng.choice(held)
            self.do(self.tier.open(worker.number, self.ids, name))

    def finish(self, worker: Played) -> None:
        if worker.reading:
            self.read(worker, self.rng.choice(sorted(worker.reading)), self.rng.random() < 0.8)

    def read(self, worker: Played, name: str, well: bool) -> None:
        worker.reading.discard(name)
        if well:
            self.memory[name] = "whole"
        self.do(self.tier.read(worker.number, name, well=well))
        if not well:
            worker.used.remove(name)
            self.do(self.tier.release(worker.number, name))

    def end(self, worker: Played) -> None:
        """A job is over: what it used is idle."""
        busy = worker.reading | set(worker.opened.values())
        if free := [name for name in worker.used if name not in busy]:
            worker.used.remove(name := self.rng.choice(free))
            worker.idle.append(name)

    def evict(self, worker: Played) -> None:
        self.let_go(worker, self.rng.randint(1, 50))

    def die(self, worker: Played) -> None:
        self.workers[worker.number] = Played(worker.number)
        self.do(self.tier.died(worker.number))
        self.tier.join(worker.number)

    def tick(self, worker: Played) -> None:
        self.do(self.tier.tick())

    def clear(self, worker: Played) -> None:
        self.do(self.tier.clear())

    # --- what holds always ---

    def check(self) -> None:
        held = {name for worker in self.workers.values() for name in (*worker.used, *worker.idle)}
        assert sum(SIZES[name] for name in held) == self.tier.held <= self.tier.bytes <= LIMIT
        whole = {name for name, state in self.memory.items() if state == "whole"}
        assert sum(SIZES[name] for name in held | whole) == self.tier.bytes
        reading = [name for worker in self.workers.values() for name in worker.reading]
        assert len(reading) == len(set(reading)), "two read one part"
        assert {name for name, state in self.memory.items() if state == "half"} == set(reading)

    def settle(self) -> None:
        """No starvation, no deadlock: reads end, jobs end, and nobody needs to do more."""
        for _ in range(20):
            for worker in self.workers.values():
                for name in sorted(worker.reading):
                    self.read(worker, name, well=True)
                opened = set(worker.opened.values())
                worker.idle += [name for name in worker.used if name not in opened]
                worker.used = [name for name in worker.used if name in opened]
            self.do(self.tier.tick())
            self.check()
        assert not any(worker.claims or worker.opened for worker in self.workers.values())
        assert not self.tier.waits
        assert not any(worker.paused for worker in self.workers.values())


@given(st.integers(0, 2**32))
@settings(max_examples=80)
def test_the_books_hold_whatever_workers_do(seed: int) -> None:
    container = Container(seed)
    for number in range(300):
        container.step()
        container.check()
        if number % 100 == 99:
            container.settle()


def granted(steps: list[Step]) -> list[int]:
    return [step.worker for step in steps if isinstance(step, Answer) and step.what == "granted"]


def test_equal_parts_take_their_bytes_once() -> None:
    tier = HostTier(100)
    for worker in (1, 2):
        tier.join(worker)
        assert granted(tier.claim(worker, worker, {"a": 60}, wait=False)) == [worker]
    assert tier.bytes == tier.held == 60


def test_what_nobody_has_is_kept_and_leaves_least_recently_used_first() -> None:
    tier = HostTier(100)
    tier.join(1)
    for number, name in enumerate("ab"):
        tier.claim(1, number, {name: 40}, wait=False)
        tier.open(1, 10 + number, name)
        tier.read(1, name, well=True)
    for name in "ba":
        tier.release(1, name)
    assert (tier.held, tier.bytes) == (0, 80)
    assert tier.claim(1, 3, {"c": 60}, wait=False) == [Freed("b"), Answer(1, 3, "granted")]


def test_two_workers_that_want_all_of_it_take_turns() -> None:
    tier = HostTier(100)
    for worker in (1, 2):
        tier.join(worker)
    assert granted(tier.claim(1, 1, {"a": 80}, wait=True)) == [1]
    assert tier.claim(2, 2, {"b": 80}, wait=True) == [Ask(2, 60)]
    assert tier.went() == [Ask(1, 60)]
    assert tier.went() == []
    assert tier.tick() == [Paused(1, on=True), Ask(2, 60)]
    # one that comes meanwhile is sent away, and is the next
    assert tier.claim(1, 3, {"c": 80}, wait=True) == [Answer(1, 3, "later")]
    steps = tier.release(1, "a")
    assert granted(steps) == [2] and Paused(1, on=False) in steps
    assert tier.claim(1, 4, {"c": 80}, wait=True) == [Ask(1, 60)]


def test_who_was_sent_away_goes_before_others() -> None:
    tier = HostTier(100)
    for worker in (1, 2, 3):
        tier.join(worker)
    tier.claim(1, 1, {"a": 80}, wait=True)
    tier.claim(2, 2, {"b": 80}, wait=True)
    assert Answer(3, 3, "later") in tier.claim(3, 3, {"c": 80}, wait=True)
    tier.release(1, "a")
    assert tier.claim(1, 4, {"a": 80}, wait=True) == [Paused(1, on=True), Answer(1, 4, "later")]
    assert tier.claim(3, 5, {"c": 80}, wait=True) == [Ask(3, 60)]


def test_one_who_does_not_come_back_keeps_nobody_waiting() -> None:
    tier = HostTier(100)
    for worker in (1, 2, 3):
        tier.join(worker)
    tier.claim(1, 1, {"a": 80}, wait=True)
    tier.claim(2, 2, {"b": 80}, wait=True)
    tier.claim(3, 3, {"c": 80}, wait=True)
    tier.release(1, "a")
    assert Answer(1, 4, "later") in tier.claim(1, 4, {"a": 80}, wait=True)
    tier.tick()
    assert Paused(1, on=False) in tier.tick()
    assert tier.claim(1, 5, {"a": 80}, wait=True) == [Ask(1, 60)]


def test_a_part_that_was_half_read_is_read_again_by_another() -> None:
    tier = HostTier(100)
    for worker in (1, 2):
        tier.join(worker)
        tier.claim(worker, worker, {"a": 60}, wait=False)
    assert tier.open(1, 3, "a") == [Opened(1, 3, "a", there=False)]
    assert tier.open(2, 4, "a") == []
    assert tier.died(1) == [Freed("a"), Opened(2, 4, "a", there=False)]
    assert tier.read(2, "a", well=True) == []
    assert tier.held == 60


def test_what_is_larger_than_all_is_refused() -> None:
    tier = HostTier(100)
    tier.join(1)
    assert tier.claim(1, 1, {"a": 60, "b": 60}, wait=True) == [Answer(1, 1, "refused")]
