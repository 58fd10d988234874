"""What RunPod's routes ask of the jobs for later, with stand-ins for the workers."""

from __future__ import annotations

import asyncio
import sqlite3
import types
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, ClassVar

import msgspec
import pytest

from api.errors import ApiError
from api.schema.generation import GenerationResult
from api.service import later as laters
from api.service.acceptance import scoped
from api.service.entries import Terms
from api.service.jobs import JobState
from api.service.later import Later
from api.service.limits import Limits
from api.service.s3_config import read_s3_config
from api.settings import Settings

PROMPT = {"prompt": "x"}
S3 = {"accessId": "A", "accessSecret": "s", "bucketName": "b", "endpointUrl": "http://127.0.0.1:1"}


class Fake:
    """A service whose jobs end when they are told to, one at a time."""

    def __init__(self, settings: Settings) -> None:
        worker = types.SimpleNamespace(ready=True, info=types.SimpleNamespace(slots=1))
        self.dispatcher = types.SimpleNamespace(workers=[worker], expected=0, check_room=lambda: None)
        self.webhooks: Any = types.SimpleNamespace(hook=lambda *_, **__: None)
        self.go = asyncio.Event()
        self.cancelled = 0
        self.ran: list[Any] = []
        self.later = Later(settings, self)  # type: ignore[arg-type]

    async def check(self, *_: Any) -> None: ...

    async def admit(self, _: str, model_inputs: dict[str, Any], *__: Any) -> Any:
        request = types.SimpleNamespace(images=1, image_format="PNG")
        return _Admitted(request, model_inputs)

    def submit(self, admitted: Any, _: Any, owner: str) -> Any:
        self.ran.append(admitted)
        return admitted

    async def finish(self, job: Any, *, from_start: bool, on_upload: Any) -> GenerationResult:
        try:
            await self.go.wait()
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        if "fail" in job.inputs:
            raise ApiError(job.inputs["fail"], "why")
        return GenerationResult([bytes(job.inputs.get("bytes", 3))], {"image_format": "PNG"}, {}, 0.0)


class _Admitted:
    options: ClassVar = {"callback_steps": 2}

    def __init__(self, request: Any, inputs: dict[str, Any], destinations: tuple[Any, ...] = ()) -> None:
        self.request, self.inputs, self.destinations = request, inputs, destinations

    def _replace(self, destinations: tuple[Any, ...]) -> _Admitted:
        return _Admitted(self.request, self.inputs, destinations)


@pytest.fixture
async def fake(tmp_path: Path) -> AsyncIterator[Fake]:
    made = Fake(Settings.from_env({"STATE_DIR": str(tmp_path), "ALLOW_PRIVATE_URLS": "0"}))
    made.later.start()
    yield made
    made.go.set()
    await made.later.stop()


def terms(**more: Any) -> Terms:
    return Terms(**{"endpoint": "e", "owner": "alice", **more})


async def ended(fake: Fake, job_id: str) -> Any:
    return await fake.later.ledger.over(job_id, 20)


async def test_a_job_that_runs_longer_than_its_policy_allows_is_ended(fake: Fake) -> None:
    entry = await fake.later.accept("r", PROMPT, {}, terms=terms(execution_timeout=0.05))
    over = await ended(fake, entry.id)
    assert (over.state, fake.cancelled) == (JobState.TIMED_OUT, 1)
    assert over.error["message"] == "Not done within policy.executionTimeout of 50 ms."
    fake.go.set()
    assert (await fake.later.ledger.get(entry.id)).state == JobState.TIMED_OUT
    await fake.later.retry(over)
    assert (await ended(fake, entry.id)).state == JobState.COMPLETED


async def test_a_job_that_waits_longer_than_its_policy_allows_is_ended(
    fake: Fake, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(laters, "_SWEEP", 0.05)
    await fake.later.accept("r", PROMPT, {}, terms=terms())
    entry = await fake.later.accept("r", PROMPT, {}, terms=terms(ttl=0.1))
    over = await asyncio.wait_for(ended(fake, entry.id), 20)
    assert (over.state, over.started) == (JobState.TIMED_OUT, None)
    assert fake.later.waiting == 0


async def test_a_name_for_a_request_is_of_one_owner_and_endpoint(fake: Fake) -> None:
    async def accept(inputs: dict[str, Any] = PROMPT, **more: Any) -> str:
        return (await fake.later.accept("r", inputs, {}, key="k", terms=terms(**more))).id

    first = await accept()
    assert await accept() == first
    ids = {first, await accept(owner="bob"), await accept(endpoint="f"), await accept(owner="", endpoint="")}
    assert len(ids) == 4
    with pytest.raises(ApiError, match="came with another request"):
        await accept({"prompt": "y"})
    with pytest.raises(ApiError, match="came with another request"):
        await accept(ttl=50.0)
    chosen = await fake.later.accept("r", PROMPT, {}, job_id="mine", terms=terms())
    assert chosen.id == "mine"
    assert (await fake.later.accept("r", PROMPT, {}, job_id="mine", terms=terms())).id == "mine"
    with pytest.raises(ApiError, match="choose another"):
        await fake.later.accept("r", PROMPT, {}, job_id="mine", terms=terms(owner="bob"))
    with pytest.raises(ApiError, match="choose another"):
        await fake.later.accept("r", PROMPT, {}, job_id=first, terms=terms())
    assert fake.later.waiting == fake.dispatcher.expected == 4  # one runs


async def test_who_waits_for_an_end_when_the_server_stops_is_told_the_id(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(laters, "_LAST_WORDS", 0.2)
    fake = Fake(Settings.from_env({"STATE_DIR": str(tmp_path)}))
    fake.later.start()
    entry = await fake.later.accept("r", PROMPT, {}, terms=terms())
    waiting = asyncio.create_task(ended(fake, entry.id))
    await asyncio.sleep(0.1)
    await fake.later.stop()
    told = await asyncio.wait_for(waiting, 5)
    assert (told.id, told.state) == (entry.id, JobState.IN_PROGRESS)


async def test_jobs_are_their_owners(fake: Fake) -> None:
    entry = await fake.later.accept("r", PROMPT, {}, terms=terms())
    ledger = fake.later.ledger
    assert (await ledger.get(entry.id, "alice", "e")).id == entry.id
    for owner, endpoint in (("bob", "e"), ("", "e"), ("alice", "f")):
        with pytest.raises(ApiError) as caught:
            await ledger.get(entry.id, owner, endpoint)
        assert caught.value.code == "NO_SUCH_JOB"
    assert [len(await fake.later.newest(9, owner)) for owner in ("alice", "bob", "")] == [1, 0, 0]


async def test_purging_and_trying_again_count_what_waits(fake: Fake) -> None:
    await fake.later.accept("r", PROMPT, {}, terms=terms())
    failing = await fake.later.accept("r", {"fail": "PIPELINE_ERROR"}, {}, terms=terms())
    others = [await fake.later.accept("r", PROMPT, {}, terms=terms(owner=owner)) for owner in ("alice", "bob")]
    waiting = asyncio.create_task(ended(fake, others[0].id))
    await asyncio.sleep(0.1)
    ends: list[Any] = []
    fake.later.ledger.watch.later_over = lambda *end: ends.append(end)  # type: ignore[method-assign]
    assert await fake.later.purge("e", "alice") == 2
    assert [(state, error.code) for _, state, error in ends] == [("CANCELLED", "CANCELLED")] * 2
    assert (await waiting).state == JobState.CANCELLED
    assert fake.later.waiting == fake.dispatcher.expected == 1
    with pytest.raises(ApiError, match="this one is CANCELLED"):
        await fake.later.retry(await fake.later.ledger.get(failing.id))
    again = await fake.later.accept("r", {"fail": "PIPELINE_ERROR"}, {}, terms=terms())
    fake.go.set()
    over = await ended(fake, again.id)
    assert over.state == JobState.FAILED
    await fake.later.retry(over)
    assert (await ended(fake, again.id)).error == {"code": "PIPELINE_ERROR", "message": "why"}
    assert (await fake.later.counts("e", "alice")).retried == 1
    assert fake.later.waiting == fake.dispatcher.expected == 0


async def test_only_runpods_jobs_have_a_limit(fake: Fake) -> None:
    fake.go.set()
    large = {"bytes": 11 * 2**20}
    native = await fake.later.accept("r", large, {})
    theirs = await fake.later.accept("r", large, {}, terms=terms())
    sync = await fake.later.accept("r", large, {}, terms=terms(sync=True))
    assert (await ended(fake, native.id)).state == JobState.COMPLETED
    over = await ended(fake, theirs.id)
    assert (over.state, over.error["code"]) == (JobState.FAILED, "LIMIT_EXCEEDED")
    assert (await ended(fake, sync.id)).state == JobState.COMPLETED


async def test_addresses_beside_the_inputs_are_looked_at(fake: Fake) -> None:
    more: dict[str, Any]
    for more, field in (
        ({"terms": terms(webhook="http://127.0.0.1:1/x")}, "webhook"),
        ({"terms": terms(), "s3": read_s3_config(S3)}, "s3Config.endpointUrl"),
    ):
        with pytest.raises(ApiError) as caught:
            await fake.later.accept("r", PROMPT, {}, **more)
        assert (caught.value.code, caught.value.field) == ("URL_NOT_ALLOWED", field)
    assert fake.later.waiting == fake.dispatcher.expected == 0


async def test_an_end_reaches_its_webhook_with_the_output(tmp_path: Path) -> None:
    got = asyncio.Queue[dict[str, Any]]()

    class Sender:
        def hook(self, *_: Any, **__: Any) -> None: ...

        async def post(self, url: str, body: bytes, **more: Any) -> None:
            got.put_nowait({"url": url, "body": msgspec.json.decode(body), **more})

    fake = Fake(Settings.from_env({"STATE_DIR": str(tmp_path), "ALLOW_PRIVATE_URLS": "1"}))
    fake.webhooks = Sender()
    fake.later.start()
    entry = await fake.later.accept("r", PROMPT, {}, terms=terms(webhook="http://127.0.0.1:1/x"))
    fake.go.set()
    told = await asyncio.wait_for(got.get(), 20)
    assert {key: told[key] for key in ("url", "job", "kind", "owner")} == {
        "url": "http://127.0.0.1:1/x", "job": entry.id, "kind": "runpod", "owner": "alice",
    }  # fmt: skip
    assert (told["body"]["status"], told["body"]["output"]["image_base64"]) == ("COMPLETED", "AAAA")
    await fake.later.stop()
    assert got.empty()


async def test_those_that_are_tried_again_at_once_find_the_queue_as_full_as_others_do(
    fake: Fake, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake.go.set()
    failing = {"fail": "PIPELINE_ERROR"}
    over = [await ended(fake, (await fake.later.accept("r", failing, {}, terms=terms())).id) for _ in range(3)]
    fake.go.clear()

    def check_room() -> None:
        if fake.dispatcher.expected >= 1:
            raise ApiError("QUEUE_FULL", "full")

    monkeypatch.setattr(fake.dispatcher, "check_room", check_room)
    told = await asyncio.gather(*(fake.later.retry(entry) for entry in over), return_exceptions=True)
    assert [getattr(error, "code", None) for error in told] == [None, "QUEUE_FULL", "QUEUE_FULL"]


async def test_trying_again_says_what_is_in_its_way(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    fake.go.set()
    entry = await fake.later.accept("r", {"fail": "PIPELINE_ERROR"}, {}, terms=terms())
    over = await ended(fake, entry.id)

    def full(*_: Any, **__: Any) -> bool:
        raise sqlite3.OperationalError("database or disk is full")

    with monkeypatch.context() as patch:
        patch.setattr(fake.later._store, "retry", full)
        with pytest.raises(ApiError) as caught:
            await fake.later.retry(over)
    assert caught.value.code == "DISK_FULL"
    fake.go.clear()
    await fake.later.retry(over)
    with pytest.raises(ApiError, match="this one is IN_"):  # not as it was when it was looked at
        await fake.later.retry(over)
    fake.go.set()
    over = await ended(fake, entry.id)
    await fake.later.ledger.call(fake.later._store._db.execute, "DELETE FROM inputs")
    with pytest.raises(ApiError, match="in memory only"):
        await fake.later.retry(over)
    assert fake.later.waiting == fake.dispatcher.expected == 0


def test_no_name_for_a_request_is_anothers() -> None:
    owners, endpoints, names = ("", "a", "id"), ("", "e", "id"), ("k", "id")
    made = [
        scoped(*named, Terms(owner=owner, endpoint=endpoint))
        for owner in owners
        for endpoint in endpoints
        for name in names
        for named in ((name, None), (None, name))
    ]
    assert len(set(made)) == len(made) == 36


async def test_how_long_a_job_waits_is_seen_also_where_it_is_tried_again(
    fake: Fake, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []
    monkeypatch.setattr(fake.later.watch, "accepted", seen.append)
    fake.go.set()
    entry = await fake.later.accept("r", {"fail": "PIPELINE_ERROR"}, {}, terms=terms())
    await fake.later.retry(await ended(fake, entry.id))
    assert seen == [entry.id] * 2


async def test_a_job_that_is_tried_again_counts_for_its_key_until_it_is_over(tmp_path: Path) -> None:
    settings = Settings.from_env({"STATE_DIR": str(tmp_path), "KEY_CONCURRENCY": "1"})
    fake = Fake(settings)
    fake.later = Later(settings, fake, Limits(settings, ("alice",)))  # type: ignore[arg-type]
    fake.later.start()
    fake.go.set()
    entry = await fake.later.accept("r", {"fail": "PIPELINE_ERROR"}, {}, terms=terms())
    for _ in range(2):
        over = await ended(fake, entry.id)
        fake.go.clear()
        await fake.later.retry(over)
        with pytest.raises(ApiError) as caught:
            await fake.later.accept("r", PROMPT, {}, terms=terms())
        assert caught.value.code == "TOO_MANY_JOBS"
        fake.go.set()
    await ended(fake, entry.id)
    assert (await fake.later.accept("r", PROMPT, {}, terms=terms())).state == JobState.IN_QUEUE
    await fake.later.stop()


async def test_a_purge_that_cannot_be_written_says_so_and_cancels_nothing(
    fake: Fake, monkeypatch: pytest.MonkeyPatch
) -> None:
    entries = [await fake.later.accept("r", PROMPT, {}, terms=terms()) for _ in range(3)]

    def full(*_: Any, **__: Any) -> bool:
        raise sqlite3.OperationalError("database or disk is full")

    monkeypatch.setattr(fake.later._store, "_end", full)
    with pytest.raises(ApiError) as caught:
        await fake.later.purge("e", "alice")
    assert caught.value.code == "DISK_FULL"
    monkeypatch.undo()
    fake.go.set()
    assert [(await ended(fake, entry.id)).state for entry in entries] == [JobState.COMPLETED] * 3
    assert fake.later.waiting == fake.dispatcher.expected == 0


async def test_a_receiver_of_events_is_told_of_all_of_a_job(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[Any] = []

    class Hook:
        def __call__(self, event: Any) -> None:
            told.append(event)

        def begin(self, options: Any = None) -> None:
            told.append(options)

        async def stored(self) -> None: ...

    def hook(call_inputs: dict[str, Any], *, job: str, owner: str) -> Hook:
        told.append((job, owner))
        return Hook()

    async def finish(*_: Any, on_upload: Any, **__: Any) -> GenerationResult:
        on_upload("uploaded")
        return GenerationResult([b"x"], {"image_format": "PNG"}, {}, 0.0)

    fake.webhooks.hook = hook
    monkeypatch.setattr(fake, "finish", finish)
    entry = await fake.later.accept("r", PROMPT, {}, terms=terms())
    assert (await ended(fake, entry.id)).state == JobState.COMPLETED
    assert told == [(entry.id, "alice"), None, {"callback_steps": 2}, "uploaded"]


async def test_who_is_told_of_a_job_that_never_ran_belongs_to_its_key(fake: Fake) -> None:
    told: list[Any] = []

    def hook(_: Any, *, job: str, owner: str) -> Any:
        told.append((job, owner))
        return types.SimpleNamespace(begin=lambda: None, fail=lambda error: told.append(error.code))

    await fake.later.accept("r", PROMPT, {}, terms=terms())
    entry = await fake.later.accept("r", PROMPT, {}, terms=terms(owner="bob"))
    while not fake.later._running:
        await asyncio.sleep(0.01)
    fake.webhooks.hook = hook
    await fake.later.cancel(entry.id)
    assert told == [(entry.id, "bob"), "CANCELLED"]
