"""The dispatcher with a stand-in for the worker: who gets the slot, and what is read ahead."""

from __future__ import annotations

import itertools
from typing import Any

from api.errors import ApiError
from api.schema.generation import GenerationRequest, GenerationResult, ModelRef
from api.schema.messages import Done, Due, Held, Ready, Stage, parse_to_worker
from api.service.dispatch import Dispatcher
from api.service.jobs import Job
from api.service.workers import Worker
from api.settings import Settings

_numbers = itertools.count()


def ref(name: str) -> ModelRef:
    return ModelRef(name, "1", "fp32", f"/{name}")


def job(model: str) -> Job:
    number = str(next(_numbers))
    request = GenerationRequest(
        number, number, ref(model), "", "", {}, {}, 0, 1, "PNG", 95, "sdpa", True, {}
    )  # fmt: skip
    return Job(request, patience=600)


class Standin:
    """A worker with so many slots, whose messages are kept."""

    def __init__(self, slots: int, **settings: Any) -> None:
        self.dispatcher = Dispatcher(Settings.from_env({}, **settings), ("cpu",))
        (self.worker,) = self.dispatcher.workers
        self.sent: list[Any] = []
        self.worker._write = lambda data: self.sent.append(parse_to_worker(data[4:]))
        self.worker.info, self.worker.ready = Ready("cpu", "", {}, 0, 0, slots), True
        self.jobs: dict[str, Job] = {}

    def has(self, **tiers: str) -> None:
        self.worker.models = {ref(n).key: Held(ref(n), tier, 1, 1, 0, "", 0.0) for n, tier in tiers.items()}

    def submit(self, *models: str) -> None:
        for model in models:
            new = job(model)
            self.jobs[new.id] = new
            self.dispatcher.submit(new)

    @property
    def running(self) -> str:
        return "".join(sorted(self.jobs[id].request.model.model_id for id in self.worker.running))

    def finish(self) -> None:
        done = min(self.worker.running)
        self.worker._on_message(self.worker, Done(done, GenerationResult([], {}, {}, 0.0)))

    @property
    def staged(self) -> list[str]:
        return ["".join(r.model_id for r in message.models) for message in self.sent if isinstance(message, Stage)]


def complete(job: Job, result: Any) -> None:
    job.state = type(job.state).COMPLETED


async def test_with_one_slot_jobs_of_the_resident_model_go_first_and_the_others_are_read_ahead(monkeypatch) -> None:
    monkeypatch.setattr(Job, "complete", complete)
    it = Standin(1)
    it.has(a="device")
    it.submit("b")
    assert it.running == "b"
    it.submit("c", "a", "b", "a")
    assert it.staged == ["c", "ca", "cab"]
    seen = []
    for _ in range(4):
        it.finish()
        seen.append(it.running)
    assert seen == ["a", "a", "c", "b"]
    assert it.staged[-1] == ""


async def test_what_a_job_was_passed_here_counts_in_the_workers_line(monkeypatch) -> None:
    monkeypatch.setattr(Job, "complete", complete)
    it = Standin(1, max_switch_wait=50.0)
    it.has(a="device")
    it.submit("a", "b", "a")
    it.finish()
    it.finish()
    due = [message for message in it.sent if isinstance(message, Due)]
    assert [d.id for d in due] == list(it.jobs)[:1] + list(it.jobs)[2:] + list(it.jobs)[1:2]
    assert due[1].overdue == float("inf")
    passed = it.jobs[due[2].id]
    assert passed.created <= due[2].overdue - 50 <= passed.created + 5
    assert due[2].deadline == passed.deadline == passed.created + 600


async def test_with_no_bound_to_wait_it_is_the_order_of_arrival(monkeypatch) -> None:
    monkeypatch.setattr(Job, "complete", complete)
    it = Standin(1, max_switch_wait=0.0)
    it.has(a="device")
    it.submit("b", "c", "a", "b")
    seen = [it.running]
    for _ in range(3):
        it.finish()
        seen.append(it.running)
    assert seen == ["b", "c", "a", "b"]


async def test_each_model_is_read_ahead_by_one_worker_the_one_that_has_it() -> None:
    it = Standin(0)
    other = Worker("cpu", 60, lambda *_: None, lambda *_: None)
    sent: list[Any] = []
    other._write = lambda data: sent.append(parse_to_worker(data[4:]))
    other.info, other.ready = Ready("cpu", "", {}, 0, 0, 0), True
    it.dispatcher.workers.append(other)
    other.models = {ref("x").key: Held(ref("x"), "host", 0, 1, 0, "", 0.0)}
    names = ["x", *"abcdefgh"]
    it.submit(*names)
    mine, theirs = it.staged[-1], "".join(r.model_id for r in sent[-1].models)
    assert theirs[0] == "x"
    assert sorted(mine + theirs) == sorted(names)
    assert mine
    assert len(theirs) > 1


async def test_the_model_of_a_job_that_was_cancelled_is_no_longer_read_ahead() -> None:
    it = Standin(1)
    it.submit("a", "b", "c")
    assert it.staged[-1] == "bc"
    it.dispatcher.cancel(list(it.jobs.values())[1], ApiError("CANCELLED", "The client went away."))
    assert it.staged[-1] == "c"


async def test_a_job_that_was_cancelled_while_it_waited_to_run_alone_keeps_nobody_waiting() -> None:
    it = Standin(2)
    it.submit("a")
    lone = job("b")
    lone.alone = True
    it.dispatcher.submit(lone)
    it.submit("c")
    assert it.running == "a"
    it.dispatcher.cancel(lone, ApiError("CANCELLED", "The client went away."))
    assert it.running == "ac"
