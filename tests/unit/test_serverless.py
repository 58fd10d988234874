"""The RunPod handler's own decisions, with stand-ins for the service; the real SDK's list of jobs."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import time
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from runpod.serverless.modules.worker_state import JobsProgress

from api.cli.main import main
from api.cli.start import takes_jobs
from api.errors import ApiError
from api.schema.generation import GenerationResult
from api.schema.messages import Phase, Preview, Progress
from api.serverless import updates
from api.serverless.handler import Handler
from api.serverless.hosting import Hosted
from api.serverless.run import _alone, run
from api.serverless.timeline import Timeline
from api.serverless.updates import Updates
from api.service.service import Service
from api.service.webhooks import Webhooks
from api.service.workers import Worker
from api.settings import Settings
from tests.running import ROOT


def worker(slots: int | None = 4, *, ready: bool = True, defunct: bool = False) -> types.SimpleNamespace:
    info = types.SimpleNamespace(slots=slots) if slots is not None else None
    return types.SimpleNamespace(info=info, ready=ready, defunct=defunct)


class Job(NamedTuple):
    """What was admitted."""

    id: str
    request: types.SimpleNamespace
    destinations: tuple[Any, ...] = ()
    options: Any = types.MappingProxyType({})


class Stage:
    """A service whose jobs end when they are told to, on the loop of the test."""

    def __init__(self, *workers: types.SimpleNamespace, **environ: str) -> None:
        self.settings = Settings.from_env({"DRAIN_TIMEOUT": "5", **environ})
        self.dispatcher = types.SimpleNamespace(workers=list(workers) or [worker()], state="READY")
        self.asked: dict[str, Any] = {}
        self.outcome: dict[str, asyncio.Future[GenerationResult]] = {}
        self.cancelled: list[str] = []
        self.destinations: dict[str, list[str]] = {}
        self.service = self
        self.told: list[dict[str, Any]] = []
        self.webhooks = Webhooks(self.settings)
        self.webhooks.put = self._put  # type: ignore[method-assign]

    def _put(self, url: str, body: bytes, *, job: str, **_: Any) -> asyncio.Future[None]:
        self.told.append({"url": url, "job": job, **json.loads(body)})
        stored = asyncio.get_running_loop().create_future()
        stored.set_result(None)
        return stored

    def run(self, what: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(what, asyncio.get_running_loop())

    async def admit(self, job_id: str, model_inputs: Any, call_inputs: Any, on_event: Any) -> Job:
        if "preview" in call_inputs and on_event is None:
            raise ApiError("INVALID_INPUTS", "Previews are events.", field="callInputs.preview")
        self.asked[job_id] = model_inputs, call_inputs
        return Job(job_id, types.SimpleNamespace(images=2, image_format="PNG"))

    def submit(self, job: Job, on_event: Any) -> str:
        on_event and on_event(Phase(job.id, "inference", "start"))
        self.outcome[job.id] = asyncio.get_running_loop().create_future()
        self.destinations[job.id] = [destination.url for destination in job.destinations]
        return job.id

    async def finish(self, job_id: str, *, from_start: bool, on_upload: Any) -> GenerationResult:
        try:
            return await self.outcome[job_id]
        except asyncio.CancelledError:
            self.cancelled.append(job_id)
            raise


RESULT = GenerationResult([b"png"], {"modelInputs": {"seed": 7}}, {}, 0.0)


class Sdk:
    """What of the SDK matters here: a job is listed from before the handler runs it until its result was sent."""

    def __init__(self, handler: Handler) -> None:
        self.handler = handler

    def begin(self, job_id: str, input: Any) -> asyncio.Task[Any]:
        JobsProgress().add({"id": job_id, "input": input})
        return asyncio.get_running_loop().create_task(self.handler.handle({"id": job_id, "input": input}))

    def sent(self, *job_ids: str) -> None:
        for job_id in job_ids:
            JobsProgress().remove(job_id)


@pytest.fixture(autouse=True)
def as_it_was(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv("RUNPOD_WEBHOOK_POST_STREAM", raising=False)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    signal.signal(signal.SIGTERM, lambda *_: None)
    yield
    for number, handle in handlers.items():
        signal.signal(number, handle)
    JobsProgress().clear()


async def until(condition: Callable[[], Any]) -> None:
    async with asyncio.timeout(20):
        while not condition():
            await asyncio.sleep(0.005)


def ended(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The statuses that the process was ended with."""
    statuses: list[int] = []
    monkeypatch.setattr("api.serverless.drain.sys.exit", statuses.append)
    return statuses


async def test_it_takes_as_many_jobs_as_all_workers_have_slots() -> None:
    stage = Stage(worker(4), worker(None, ready=False), worker(4, defunct=True), MAX_CONCURRENCY="3")
    handler = Handler(stage)  # type: ignore[arg-type]
    assert handler.capacity(1) == 7
    JobsProgress().add({"id": "x"})
    assert handler.capacity(7) == 7, "a number that changes makes the SDK wait until nothing runs"


async def test_a_result_an_error_and_a_job_that_is_stopped() -> None:
    stage = Stage()
    handler = Handler(stage)  # type: ignore[arg-type]
    sdk = Sdk(handler)
    good, bad = sdk.begin("good", {"prompt": "x", "seed": 7}), sdk.begin("bad", {"prompt": "x", "steps": 3})
    stopped, blind = sdk.begin("stopped", {"prompt": "x"}), sdk.begin("blind", {"prompt": "x", "preview": 3})
    await until(lambda: len(stage.outcome) == 3)
    stage.outcome["good"].set_result(RESULT)
    stage.outcome["bad"].set_exception(ApiError("UNKNOWN_INPUT", "No.", field="modelInputs.steps"))
    stopped.cancel()
    output = await good
    assert (output["image"], output["seed"]) == ("cG5n", 7)
    assert await bad == {"error": "UNKNOWN_INPUT: input.steps: No."}
    assert "Previews" in (await blind)["error"]
    with pytest.raises(asyncio.CancelledError):
        await stopped
    await until(lambda: stage.cancelled == ["stopped"])
    assert stage.asked["good"] == ({"prompt": "x", "seed": 7}, {})


async def test_an_output_that_the_platform_does_not_take_is_an_error_that_says_what_to_do() -> None:
    stage = Stage()
    sdk = Sdk(Handler(stage))  # type: ignore[arg-type]
    tasks = [sdk.begin(job_id, {"prompt": "x"}) for job_id in ("one", "sync-two")]
    await until(lambda: len(stage.outcome) == 2)
    large = GenerationResult([bytes(9 * 2**20)], {"modelInputs": {"seed": 7}}, {}, 0.0)
    for outcome in stage.outcome.values():
        outcome.set_result(large)
    assert (await tasks[0])["error"].startswith("LIMIT_EXCEEDED")
    assert "s3Config" in (await tasks[0])["error"]
    assert "image" in await tasks[1], "runsync takes 20 MB"


async def test_images_go_to_the_bucket_of_the_job() -> None:
    stage = Stage(ALLOW_PRIVATE_URLS="1")
    handler = Handler(stage)  # type: ignore[arg-type]
    keys = {"accessId": "id", "accessSecret": "secret", "bucketName": "b", "endpointUrl": "http://127.0.0.1:9"}
    task = asyncio.create_task(handler.handle({"id": "job", "input": {"prompt": "x"}, "s3Config": keys}))
    await until(lambda: stage.outcome)
    assert [url.partition("?")[0].rstrip("/") for url in stage.destinations["job"]] == [
        f"http://127.0.0.1:9/b/job/{number}.png" for number in range(2)
    ]
    stage.outcome["job"].set_result(RESULT)
    await task
    refused = await handler.handle({"id": "bad", "input": {"prompt": "x"}, "s3Config": {**keys, "bucketName": ""}})
    assert refused["error"].startswith("MISSING_INPUT: s3Config.bucketName")
    assert "secret" not in refused["error"]


async def test_webhooks_are_told_of_a_job_as_they_are_of_a_request() -> None:
    stage = Stage(SEND_URL="http://127.0.0.1:9/server")
    sdk = Sdk(Handler(stage))  # type: ignore[arg-type]
    hook = {"SEND_URL": "https://example.com/hook", "startRequestId": "order-7", "preview": 3}
    tasks = [sdk.begin("good", {"prompt": "x", **hook}), sdk.begin("bad", {"prompt": "x"}), sdk.begin("refused", {})]
    await until(lambda: len(stage.outcome) == 2)
    stage.outcome["good"].set_result(RESULT)
    stage.outcome["bad"].set_exception(ApiError("OUT_OF_MEMORY", "No."))
    assert (await tasks[0])["seed"] == 7
    assert (await tasks[1])["error"].startswith("OUT_OF_MEMORY")
    assert (await tasks[2])["error"].startswith("MISSING_INPUT")
    told = [(event["job"], event["status"], event["payload"]["startRequestId"]) for event in stage.told]
    assert told == [("good", "start", "order-7"), ("bad", "start", None), ("bad", "error", None)]
    assert [event["url"] for event in stage.told] == ["https://example.com/hook", *["http://127.0.0.1:9/server"] * 2]
    assert stage.told[0]["payload"]["jobId"] == "good"


def begun(monkeypatch: pytest.MonkeyPatch, folder: Path, **environ: str) -> Service:
    """The service as it is when it is to be started."""
    hosts: list[Hosted] = []
    monkeypatch.setattr("api.serverless.run.spawn", lambda *_: object())
    monkeypatch.setattr(Hosted, "start", lambda self: hosts.append(self) or sys.exit(3))
    with pytest.raises(SystemExit):
        run(Settings.from_env({"DEVICES": "cpu,cpu", "STATE_DIR": str(folder), **environ}))
    return hosts[0].service


def test_a_device_that_is_named_twice_has_two_processes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    first, second = begun(monkeypatch, tmp_path).dispatcher.workers
    assert first.spawned is not second.spawned


def test_all_jobs_that_it_takes_may_wait_for_a_worker(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    service = begun(monkeypatch, tmp_path, MAX_CONCURRENCY="4", MAX_QUEUE="1")
    service.dispatcher.expected = 7
    service.dispatcher.check_room()


@pytest.mark.parametrize("given", ["{", "5", "{}", '{"prompt": "x"}'])
def test_a_job_in_the_terminal_that_is_none(given: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["runpod", "--test_input", given]) == 2
    assert capsys.readouterr().err.startswith("--test_input ")


async def test_a_fault_is_told_without_what_is_inside() -> None:
    stage = Stage()
    task = Sdk(Handler(stage)).begin("job", {"prompt": "x"})  # type: ignore[arg-type]
    await until(lambda: stage.outcome)
    stage.outcome["job"].set_exception(RuntimeError("secret"))
    assert "INTERNAL_ERROR" in str(await task)
    assert "secret" not in str(await task)


async def test_a_worker_that_is_to_be_replaced_ends_when_the_last_result_was_sent(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    statuses, stage = ended(monkeypatch), Stage()
    handler = Handler(stage)  # type: ignore[arg-type]
    sdk = Sdk(handler)
    assert handler.capacity(1) == 4
    asks, other = sdk.begin("asks", {"prompt": "x", "refresh_worker": True}), sdk.begin("other", {"prompt": "x"})
    await until(lambda: len(stage.outcome) == 2)
    assert "refresh_worker" not in stage.asked["asks"][0]
    stage.outcome["asks"].set_result(RESULT)
    await asks
    assert "refresh_worker" not in handler.config, "the platform would end it with the other one in it"
    assert handler.capacity(4) == 0
    sdk.sent("asks")
    stage.outcome["other"].set_result(RESULT)
    await other
    assert handler.config["refresh_worker"] is True
    await asyncio.sleep(0.2)
    assert statuses == [], "the result was not sent yet"
    sdk.sent("other")
    await until(lambda: statuses == [0])


async def test_with_refresh_worker_one_job_runs_at_a_time() -> None:
    handler = Handler(Stage(REFRESH_WORKER="1"))  # type: ignore[arg-type]
    assert handler.capacity(1) == 1


async def test_an_engine_that_does_not_start_any_more_ends_the_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("api.serverless.handler._LOOK_AFTER", 0.01)
    statuses, stage = ended(monkeypatch), Stage()
    handler = Handler(stage)  # type: ignore[arg-type]
    sdk = Sdk(handler)
    handler.capacity(1)
    task = sdk.begin("job", {"prompt": "x"})
    await until(lambda: stage.outcome)
    stage.dispatcher.state = "DEFUNCT"
    stage.outcome["job"].set_exception(ApiError("NOT_READY", "The workers do not start."))
    assert "NOT_READY" in (await task)["error"]
    assert handler.config["refresh_worker"] is True
    sdk.sent("job")
    await until(lambda: statuses == [1])
    assert handler.drain.status == 1


async def test_an_idle_one_as_well(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("api.serverless.handler._LOOK_AFTER", 0.01)
    statuses, stage = ended(monkeypatch), Stage()
    Handler(stage).capacity(1)  # type: ignore[arg-type]
    stage.dispatcher.state = "DEFUNCT"
    await until(lambda: statuses == [1])


async def test_the_fitness_check_waits_for_the_engine_and_fails_with_it() -> None:
    stage = Stage(worker(ready=False))
    stage.dispatcher.state = "STARTING"
    handler = Handler(stage)  # type: ignore[arg-type]
    check = asyncio.create_task(handler.engine_is_ready())
    await asyncio.sleep(0.05)
    assert not check.done()
    stage.dispatcher.workers[0].ready = True
    await asyncio.wait_for(check, 20)
    stage.dispatcher.workers[0].ready, stage.dispatcher.state = False, "DEFUNCT"
    with pytest.raises(RuntimeError, match="does not start"):
        await handler.engine_is_ready()


async def test_told_to_go_it_leaves_what_was_never_begun_to_others(monkeypatch: pytest.MonkeyPatch) -> None:
    statuses, stage = ended(monkeypatch), Stage(DRAIN_TIMEOUT="0.2")
    handler = Handler(stage)  # type: ignore[arg-type]
    asked: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, _: asked.append(number))
    handler.capacity(1)
    JobsProgress().add({"id": "taken, but never begun"})
    os.kill(os.getpid(), signal.SIGTERM)
    await until(lambda: statuses == [0])
    assert asked == [signal.SIGTERM], "the SDK's own handler is asked as well"
    assert handler.capacity(1) == 0


async def test_one_that_takes_too_long_is_left_to_others(monkeypatch: pytest.MonkeyPatch) -> None:
    statuses, stage = ended(monkeypatch), Stage(DRAIN_TIMEOUT="0.2")
    handler = Handler(stage)  # type: ignore[arg-type]
    handler.capacity(1)
    task = Sdk(handler).begin("long", {"prompt": "x"})
    await until(lambda: stage.outcome)
    os.kill(os.getpid(), signal.SIGTERM)
    await asyncio.sleep(0.05)
    assert statuses == []
    await until(lambda: statuses == [0])
    assert not task.done()
    task.cancel()


class Taker:
    """Where updates go."""

    def __init__(self) -> None:
        self.got: list[dict[str, Any]] = []
        self.open = asyncio.Event()
        self.open.set()

    async def __call__(self, body: dict[str, Any]) -> None:
        await self.open.wait()
        self.got.append(body)


async def test_events_come_all_and_in_order_and_progress_is_the_newest() -> None:
    progress, stream = Taker(), Taker()
    told = Updates("job", progress, stream)
    told(Phase("job", "inference", "start"))
    await until(lambda: progress.got)
    told(Progress("job", 1, 9))
    told(Preview("job", 1, 9, [b"jpeg"]))
    told(Progress("job", 9, 9))
    told(Phase("job", "inference", "done"))
    await asyncio.sleep(0)
    await told.close()
    kinds = [(event["type"], event["status"], event.get("step")) for event in stream.got]
    assert kinds == [
        ("inference", "start", None),
        ("inference", "progress", 1),
        ("inference", "preview", 1),
        ("inference", "progress", 9),
        ("inference", "done", None),
    ]
    assert stream.got[2]["image_base64"] == "anBlZw=="
    assert [update["status"] for update in progress.got] == ["start"], "one a second, and none after the end"


async def test_progress_that_is_being_sent_arrives_before_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(updates, "EVERY", 0.0)
    progress = Taker()
    progress.open.clear()
    told = Updates("job", progress, None)
    told(Progress("job", 1, 9))
    await asyncio.sleep(0.02)
    closing = asyncio.create_task(told.close())
    await asyncio.sleep(0.02)
    assert not closing.done(), "the result would be there before it"
    progress.open.set()
    await closing
    assert [update["step"] for update in progress.got] == [1]
    told(Progress("job", 9, 9))
    await asyncio.sleep(0.02)
    assert len(progress.got) == 1


async def test_a_platform_that_takes_no_updates_keeps_no_job(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(updates, "_LAST_WORDS", 0.05)
    progress, stream = Taker(), Taker()
    stream.open.clear()
    told = Updates("job", progress, stream)
    for _ in range(updates._BEHIND + 10):
        told(Preview("job", 1, 9, [b"jpeg"]))
    await asyncio.sleep(0.02)
    assert len(told._events) <= updates._BEHIND
    await asyncio.wait_for(told.close(), 20)

    async def fails(body: dict[str, Any]) -> None:
        raise OSError("unreachable")

    told = Updates("job", fails, fails)
    told(Phase("job", "inference", "start"))
    await asyncio.sleep(0.02)
    await asyncio.wait_for(told.close(), 20)


def test_a_forked_process_holds_no_socket_to_a_worker_and_dies_by_sigterm() -> None:
    ours, theirs = socket.socketpair()
    signal.signal(signal.SIGTERM, lambda *_: None)
    child = os.fork()
    if child == 0:
        try:
            _alone()
            time.sleep(60)
        finally:
            os._exit(7)
    ours.close()
    theirs.settimeout(20)
    try:
        assert theirs.recv(1) == b"", "the worker would not see that the handler is gone"
    finally:
        os.kill(child, signal.SIGTERM)
        status = os.waitpid(child, 0)[1]
    assert status == signal.SIGTERM


def test_the_processors_name_is_found_without_a_process() -> None:
    code = (
        "import subprocess; from api.serverless.run import _name_the_processor; _name_the_processor();"
        "subprocess.Popen = None;"  # whoever starts one fails
        "from runpod.serverless.utils import rp_debugger; assert isinstance(rp_debugger.PROCESSOR, str)"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_the_image_starts_what_the_platform_wants() -> None:
    take = {"RUNPOD_WEBHOOK_GET_JOB": "https://x/job-take/$ID?y"}
    assert takes_jobs(take)
    assert not takes_jobs({**take, "PORT_HEALTH": "8001"}), "behind the load balancer"
    assert not takes_jobs({"RUNPOD_ENDPOINT_ID": "x", "RUNPOD_POD_ID": "y"})
    assert not takes_jobs({})


def test_the_line_of_the_start_shows_what_ran_beside_what() -> None:
    timeline = Timeline()
    began = timeline.process_began
    timeline.phases = {"sdk": (began + 1, began + 3)}
    info = types.SimpleNamespace(
        ready_ms=5, phases={"torch": (began + 0.5, began + 2.25), "read": (began + 3, began + 4)}
    )
    slow = types.SimpleNamespace(ready_ms=9, phases={"torch": (began, began)})
    workers: list[Worker] = [types.SimpleNamespace(info=one) for one in (None, slow, info)]  # type: ignore[misc]
    assert timeline.line(workers) == "torch 0.50–2.25, sdk 1.00–3.00, read 3.00–4.00"
