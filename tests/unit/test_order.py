"""Who goes next: few switches, and nobody passed for longer than the bound. With a clock of its own."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from itertools import pairwise

import pytest

from api.order import Order


@dataclass(eq=False)
class Job:
    model: str
    number: int
    came: float
    seconds: float = 0.3
    deadline: float = math.inf
    began: float = -1.0


class Machine:
    """One device with room for one model, that runs one job at a time."""

    def __init__(self, longest: float, switch: float = 2.0) -> None:
        self.now, self.switch = 0.0, switch
        self.order: Order[Job] = Order(longest, lambda: self.now)
        self.resident, self.switches, self.done = "", 0, list[Job]()

    def run(self, jobs: list[Job]) -> None:
        coming = sorted(jobs, key=lambda job: (job.came, job.number))
        while coming or len(self.order):
            while coming and coming[0].came <= self.now:
                job = coming.pop(0)
                self.order.join(job, job.deadline)
            free = [True]

            def go(job: Job, free: list[bool] = free) -> bool:
                return bool(free) and (free.pop() and (self.begin(job) or True))

            if not self.order.advance(lambda job: job.model == self.resident, go):
                self.now = coming[0].came
                continue
            self.now += self.done[-1].seconds

    def begin(self, job: Job) -> None:
        if job.model != self.resident:
            self.switches, self.resident = self.switches + 1, job.model
            self.now += self.switch
        job.began = self.now
        self.done.append(job)


def alternating(count: int = 40, gap: float = 0.0) -> list[Job]:
    return [Job("AB"[number % 2], number, number * gap) for number in range(count)]


@pytest.mark.parametrize("longest", [1.0, 3.0, 10.0])
@pytest.mark.parametrize("gap", [0.0, 0.3])
def test_forty_alternating_jobs_switch_a_quarter_as_often_at_most(longest: float, gap: float) -> None:
    plain, ours = Machine(0.0), Machine(longest)
    plain.run(alternating(gap=gap))
    ours.run(alternating(gap=gap))
    assert [job.number for job in plain.done] == list(range(40))
    assert plain.switches == 40
    assert ours.switches <= 10
    # none begins later than in the order of arrival by more than the bound, one job and one switch
    by_number = {job.number: job for job in plain.done}
    late = [job.began - by_number[job.number].began for job in ours.done]
    assert max(late) <= longest + 0.3 + 2.0
    assert ours.done[-1].began < plain.done[-1].began


def test_with_room_in_time_no_job_waits_longer_than_the_bound_and_one_job() -> None:
    """Jobs come more slowly than they are done: what they wait is for being passed."""
    rng = random.Random(0)
    came, jobs = 0.0, []
    for number in range(400):
        came += rng.expovariate(1.5)
        jobs.append(Job(rng.choice("AAAB"), number, came, seconds=0.3))
    machine = Machine(4.0, switch=0.2)
    machine.run(jobs)
    assert max(job.began - job.came for job in machine.done) <= 4.0 + 0.3 + 0.2 + 2.0
    assert machine.switches < sum(a.model != b.model for a, b in pairwise(jobs))


def test_a_steady_stream_for_one_model_does_not_starve_another() -> None:
    stream = [Job("A", number, number * 0.3) for number in range(1, 400)]
    lonely = Job("B", 0, 0.4)
    machine = Machine(5.0, switch=1.0)
    machine.run([*stream, lonely])
    assert lonely.began - lonely.came <= 5.0 + 2 * 0.3 + 2 * 1.0
    assert machine.switches == 3


def test_without_a_bound_it_would() -> None:
    stream = [Job("A", number, number * 0.3) for number in range(1, 400)]
    lonely = Job("B", 0, 0.4)
    machine = Machine(math.inf, switch=1.0)
    machine.run([*stream, lonely])
    assert machine.done[-1] is lonely


def test_a_deadline_makes_the_bound_shorter() -> None:
    clock = [0.0]
    order: Order[str] = Order(10, lambda: clock[0])
    order.join("b", deadline=6.0)
    order.join("a")
    assert order.advance(lambda one: one == "a", lambda one: one == "a") == ["a"]
    clock[0] = 2.9
    assert not order.overdue("b")
    clock[0] = 3.0
    assert order.overdue("b")


def test_nobody_who_came_later_goes_before_one_that_is_overdue() -> None:
    clock = [0.0]
    order: Order[str] = Order(1, lambda: clock[0])
    order.join("early")
    order.join("big", overdue=0.5)
    order.join("late")
    clock[0] = 0.6
    asked = []

    def go(one: str) -> bool:
        asked.append(one)
        return one != "big"

    assert order.advance(lambda one: True, go) == ["early"]
    assert asked == ["big", "early"]
    assert order.waiting() == ["big", "late"]


def test_one_that_was_in_line_before_comes_back_at_its_head() -> None:
    order: Order[str] = Order(1)
    for name in "ab":
        order.join(name)
    order.join("c", first=True)
    order.join("d", first=True)
    assert order.waiting() == ["d", "c", "a", "b"]
    order.leave("a")
    order.leave("a")
    assert order.waiting(3) == ["d", "c", "b"]
