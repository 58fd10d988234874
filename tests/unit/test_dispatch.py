"""The queue and its workers, with stand-ins for the worker processes."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import msgspec
import pytest

from api.errors import ApiError
from api.schema.generation import Code, GenerationRequest, GenerationResult, Inversion, Lora, ModelRef
from api.schema.messages import Computed, Done, Failed, FromWorker, Held, Loaded, Memory, Ready
from api.service.blame import Blame
from api.service.dispatch import Dispatcher
from api.service.jobs import Job, JobState
from api.service.service import Service
from api.service.usage import Usage
from api.service.workers import Worker
from api.settings import Settings


def a_job(name: str, model: str = "a", prompt: str | None = None) -> Job:
    request = GenerationRequest(
        id=name, request_id=name, model=ref_of(model), pipeline="P", scheduler="S", inputs={"prompt": prompt or name},
        pictures={}, seed=1, images=1, image_format="PNG", image_quality=95, attention="sdpa", safety_checker=True,
        meta={},
    )  # fmt: skip
    return Job(request)


def ref_of(model: str) -> ModelRef:
    return ModelRef(model, "r", "fp32", f"/{model}")


class Pool:
    """A dispatcher whose workers are played by the test."""

    def __init__(self, count: int = 1, slots: int = 1, **environ: str) -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("MAX_CONCURRENCY", str(slots))
            for name, value in environ.items():
                patch.setenv(name, value)
            self.settings = Settings.from_env()
        self.dispatcher = Dispatcher(self.settings, ("cpu",) * count)
        self.workers = self.dispatcher.workers
        self.slots = slots
        for worker in self.workers:
            self.ready(worker)

    def ready(self, worker: Worker) -> None:
        worker._write = lambda data: None  # type: ignore[method-assign]
        self.says(worker, Ready("cpu", "a CPU", {}, 2, 1, self.slots))

    def says(self, worker: Worker, message: FromWorker) -> None:
        worker._receive(message)
        if worker._alarm:
            worker._alarm.cancel()

    def done(self, worker: Worker, job: Job, **timings: int) -> None:
        self.says(worker, Done(job.id, GenerationResult([b""], {}, timings, 0.0)))

    def dies(self, worker: Worker, *, crashed: bool = False) -> None:
        """It dies, and comes back."""
        worker.crashed = crashed
        worker._writer = None
        worker._ended()
        self.ready(worker)

    def submit(self, *jobs: Job) -> None:
        for job in jobs:
            self.dispatcher.submit(job)

    def running(self) -> list[set[str]]:
        return [set(worker.running) for worker in self.workers]


async def until(condition: Callable[[], Any], seconds: float = 20) -> None:
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.005)


def error_of(job: Job) -> ApiError:
    error = job._outcome.exception()
    assert isinstance(error, ApiError)
    return error


def service_of(pool: Pool) -> Service:
    service = object.__new__(Service)
    service.settings, service.dispatcher = pool.settings, pool.dispatcher
    service.usage = Usage(pool.settings.state_dir)
    return service


async def test_a_job_for_later_is_timed_while_it_runs_and_a_request_from_the_start() -> None:
    pool = Pool(slots=1, REQUEST_TIMEOUT="0.4")
    (worker,) = pool.workers
    service, first, later, request = service_of(pool), a_job("first"), a_job("later"), a_job("request")
    pool.submit(first, later, request)
    ends = [asyncio.create_task(service.finish(job, from_start=job is later)) for job in (later, request)]
    await asyncio.sleep(0.6)
    assert (later.state, request.state) == (JobState.IN_QUEUE, JobState.TIMED_OUT)
    pool.done(worker, first)
    assert later.id in worker.running
    began = later.started
    for end in ends:
        with pytest.raises(ApiError, match="REQUEST_TIMEOUT"):
            await asyncio.wait_for(end, 20)
    assert later.state == JobState.TIMED_OUT
    assert began is not None
    assert asyncio.get_running_loop().time() >= began + 0.4


async def test_jobs_of_a_worker_that_died_run_alone_in_their_old_order() -> None:
    pool = Pool(slots=4)
    (worker,) = pool.workers
    jobs = [a_job(str(number)) for number in range(6)]
    pool.submit(*jobs)
    pool.dies(worker)
    for job in jobs[:4]:
        assert worker.running == {job.id}
        pool.says(worker, Computed(job.id))
        assert not worker.running  # nobody beside it until it is over
        pool.done(worker, job)
        assert job.state == JobState.COMPLETED
    assert worker.running == {"4", "5"}


@pytest.mark.parametrize(("crashed", "deaths"), [(True, 2), (False, 3)])
async def test_a_crash_alone_is_blamed_at_once_and_a_kill_from_outside_gets_one_more_try(
    crashed: bool, deaths: int
) -> None:
    pool = Pool(slots=4)
    (worker,) = pool.workers
    killer, other, copies = a_job("killer", prompt="x"), a_job("other"), [a_job(f"copy {n}", prompt="x") for n in "ab"]
    pool.submit(killer, other, *copies)
    for death in range(deaths):
        assert killer.state == JobState.IN_PROGRESS, death
        pool.dies(worker, crashed=crashed)
    for job in (killer, *copies):  # the copies need not kill it as often again
        assert (job.state, error_of(job).code) == (JobState.FAILED, "JOB_KILLED_WORKER")
    assert worker.running == {"other"}
    pool.done(worker, other)
    assert other.state == JobState.COMPLETED
    with pytest.raises(ApiError) as refused:
        pool.submit(a_job("again", prompt="x"))
    assert refused.value.code == "JOB_KILLED_WORKER"


async def test_who_is_only_being_encoded_is_not_blamed_for_the_next_ones_death() -> None:
    pool = Pool(slots=4)
    (worker,) = pool.workers
    innocent, killer = a_job("innocent"), a_job("killer")
    pool.submit(innocent)
    pool.says(worker, Computed("innocent"))
    pool.submit(killer)
    pool.dies(worker, crashed=True)
    assert worker.running == {"innocent"}
    assert innocent.lone_deaths == 0
    pool.says(worker, Computed("innocent"))
    assert not worker.running
    pool.done(worker, innocent)
    assert worker.running == {"killer"}
    pool.dies(worker, crashed=True)
    assert (innocent.state, error_of(killer).code) == (JobState.COMPLETED, "JOB_KILLED_WORKER")


async def test_a_lone_job_waits_until_nothing_is_encoded() -> None:
    pool = Pool(slots=4)
    (worker,) = pool.workers
    first, lone = a_job("first"), a_job("lone")
    pool.submit(first)
    pool.says(worker, Computed("first"))
    lone.alone = True
    pool.submit(lone)
    assert not worker.running
    pool.done(worker, first)
    assert worker.running == {"lone"}


def test_a_refusal_says_how_long_it_lasts() -> None:
    now = 100.0

    async def judged() -> tuple[Blame, Job]:
        job = a_job("x")
        job.alone = True
        return Blame(lambda: now), job

    blame, job = asyncio.run(judged())
    assert blame.refusal(job) is None
    assert (error := blame.verdict(job, crashed=True))
    assert error.retry_after == 600
    now = 250.5
    assert (error := blame.refusal(job))
    assert error.retry_after == 450
    now = 701.0
    assert blame.refusal(job) is None


def has(pool: Pool, worker: Worker, *models: str) -> None:
    held = {ref_of(model).key: Held(ref_of(model), "device", 1, 1, 0, "", 0.0) for model in models}
    pool.says(worker, Loaded(held, Memory(1, 2, 1, 1, 2)))


def looks(pool: Pool, *, after: float) -> None:
    """The time comes at which the line is looked at once more."""
    assert pool.dispatcher._look_again
    began = pool.dispatcher._placing._clock()
    pool.dispatcher._placing._clock = lambda: began + after
    pool.dispatcher._feed()


async def test_a_job_waits_for_the_worker_that_has_its_model_and_others_go_on() -> None:
    pool = Pool(count=2)
    warm, cold = pool.workers
    has(pool, warm, "a")
    first, second, other = a_job("first"), a_job("second"), a_job("other", "b")
    pool.submit(first, second, other)
    assert pool.running() == [{"first"}, {"other"}]
    assert second.state == JobState.IN_QUEUE
    pool.done(cold, other)
    assert pool.running() == [{"first"}, set()]
    pool.done(warm, first)
    assert pool.running() == [{"second"}, set()]


async def test_it_waits_no_longer_than_its_model_takes_to_load() -> None:
    pool = Pool(count=2)
    warm = pool.workers[0]
    pool.submit(a_job("measured"))
    pool.done(warm, pool.dispatcher._jobs["measured"], loadModel=4000)
    has(pool, warm, "a")
    pool.submit(a_job("first"), a_job("second"))
    looks(pool, after=3.9)
    assert pool.running() == [{"first"}, set()]
    looks(pool, after=0.2)
    assert pool.running() == [{"first"}, {"second"}]


async def test_the_line_is_looked_at_again_by_itself() -> None:
    pool = Pool(count=2)
    pool.dispatcher._seconds = 0.01
    has(pool, pool.workers[0], "a")
    pool.dispatcher._placing.note(ref_of("a").key, 0.2)
    pool.submit(a_job("first"), a_job("second"))
    assert pool.running() == [{"first"}, set()]
    await until(lambda: pool.running() == [{"first"}, {"second"}])


async def test_who_has_been_passed_for_as_long_as_may_be_waits_for_no_worker_and_stops_none() -> None:
    pool = Pool(count=2, slots=2, MAX_SWITCH_WAIT="0.2")
    has(pool, pool.workers[0], "a")
    has(pool, pool.workers[1], "b")
    pool.dispatcher._placing.note(ref_of("a").key, 1000.0)
    pool.submit(a_job("1"), a_job("2"), a_job("held"), a_job("other", "b"))
    assert pool.running() == [{"1", "2"}, {"other"}]  # the other one has passed it
    await until(lambda: pool.running() == [{"1", "2"}, {"other", "held"}])  # by itself


async def test_the_order_of_arrival_leaves_no_worker_idle() -> None:
    pool = Pool(count=2, MAX_SWITCH_WAIT="0")
    has(pool, pool.workers[0], "a")
    pool.submit(a_job("1"), a_job("2"))
    assert pool.running() == [{"1"}, {"2"}]


async def test_where_loading_is_quicker_than_waiting_nobody_waits() -> None:
    pool = Pool(count=2)
    has(pool, pool.workers[0], "a")
    pool.dispatcher._placing.note(ref_of("a").key, 1.0)  # a job takes two
    pool.submit(a_job("first"), a_job("second"))
    assert pool.running() == [{"first"}, {"second"}]


async def test_of_a_long_line_some_go_where_the_model_has_to_be_loaded() -> None:
    pool = Pool(count=2)
    has(pool, pool.workers[0], "a")
    pool.dispatcher._placing.note(ref_of("a").key, 5.0)
    pool.submit(*(a_job(str(number)) for number in range(5)))
    # of those behind the first, two have their turn within five seconds, the next has not
    assert pool.running() == [{"0"}, {"3"}]


async def test_a_burst_for_a_cold_model_loads_it_once() -> None:
    pool = Pool(count=3, slots=2)
    pool.submit(*(a_job(str(number)) for number in range(4)), a_job("other", "b"))
    loading = next(worker for worker in pool.workers if "0" in worker.running)
    assert loading.running == {"0", "1"}
    assert sorted(len(worker.running) for worker in pool.workers) == [0, 1, 2]
    pool.dies(loading)  # nobody has the model then: nobody is waited for
    assert sum(len(worker.running) for worker in pool.workers) == 3


async def test_with_one_worker_nobody_waits() -> None:
    pool = Pool(slots=2)
    has(pool, pool.workers[0], "b")
    pool.submit(a_job("first"), a_job("second", "b"))
    assert pool.running() == [{"first", "second"}]


def refused(pool: Pool) -> ApiError:
    with pytest.raises(ApiError) as full:
        pool.submit(a_job("one more"))
    assert full.value.code == "QUEUE_FULL"
    return full.value


async def test_who_is_looked_at_while_a_slot_is_free_does_not_fill_the_queue() -> None:
    pool = Pool(MAX_QUEUE="2")
    pool.dispatcher.expected = 2
    pool.dispatcher.check_room()  # one of them gets the slot
    pool.dispatcher.expected = 3
    with pytest.raises(ApiError, match="2 requests are waiting"):
        pool.dispatcher.check_room()


async def test_retry_after_is_when_the_line_should_be_gone_also_while_a_worker_starts_again() -> None:
    pool = Pool(slots=4, MAX_QUEUE="8")
    (worker,) = pool.workers
    pool.submit(*(a_job(str(number)) for number in range(12)))
    assert refused(pool).retry_after == 4  # 8 wait, 4 at once, 2 s each
    worker._ended()
    assert refused(pool).retry_after == 6  # 12 wait


async def test_what_a_job_takes_is_what_it_holds_its_slot_for() -> None:
    pool = Pool(slots=2, MAX_QUEUE="2")
    (worker,) = pool.workers
    computed, failed = jobs = [a_job("computed"), a_job("failed")]
    pool.submit(*jobs, a_job("3"), a_job("4"))
    assert refused(pool).retry_after == 2
    now = asyncio.get_running_loop().time()
    computed.started = failed.started = now - 22.0
    pool.says(worker, Computed("computed"))
    assert 6 <= pool.dispatcher._seconds < 7
    computed.started = now - 1000.0  # its images were encoded until now
    pool.done(worker, computed)
    assert 6 <= pool.dispatcher._seconds < 7
    pool.says(worker, Failed("failed", "PIPELINE_ERROR", "x", {}, ""))
    assert 9 <= pool.dispatcher._seconds < 10


async def test_the_volume_keeps_what_is_pinned_and_may_lose_what_is_only_in_memory() -> None:
    pool = Pool(count=2)
    held = {
        ref_of(model).key: Held(ref_of(model), "host", 1, 1, 0, pin, 0.0) for model, pin in (("a", "host"), ("b", ""))
    }
    pool.says(pool.workers[1], Loaded(held, Memory(1, 2, 1, 1, 2)))
    assert pool.dispatcher.folders() == {"a"}


async def test_the_volume_keeps_the_adapters_of_jobs() -> None:
    pool = Pool()
    job = a_job("1")
    loras, inversions = (
        (Lora("l", "/v/lora@1/adapter.safetensors", "0", 1.0),),
        (Inversion("i", "/v/word@2/a.s", "1", "w"),),
    )
    job.request = msgspec.structs.replace(job.request, loras=loras, inversions=inversions)
    pool.submit(job)
    assert pool.dispatcher.folders() == {"a", "lora@1", "word@2"}


@pytest.mark.parametrize(
    "other",
    [
        {"method": "img2img"},
        {"code": Code("/p.py", "0", "P")},
        {"prompt_syntax": "compel"},
        {"offload": "model"},
        {"loras": (Lora("l", "/v/lora@1/a.safetensors", "0", 1.0),)},
    ],
)
async def test_what_is_run_in_another_way_is_not_blamed_for_a_death(other: dict[str, Any]) -> None:
    one, again = a_job("1", prompt="p"), a_job("2", prompt="p")
    assert one.fingerprint == again.fingerprint
    another = Job(msgspec.structs.replace(again.request, **other))
    assert another.fingerprint != one.fingerprint


@pytest.mark.parametrize("shares", [True, False])
async def test_what_lies_in_memory_that_workers_share_is_as_near_to_all(shares: bool) -> None:
    pool = Pool(count=2, slots=2)
    if not shares:
        pool.dispatcher.keeper = None
    one = pool.workers[0]
    held = {
        ref_of("a").key: Held(ref_of("a"), "host", 0, 1, 0, "", 0.0),
        ref_of("b").key: Held(ref_of("b"), "device", 1, 1, 0, "", 0.0),
    }
    pool.says(one, Loaded(held, Memory(1, 2, 1, 1, 2)))
    pool.submit(a_job("busy", "b"), a_job("job"))
    assert pool.running() == ([{"busy"}, {"job"}] if shares else [{"busy", "job"}, set()])
