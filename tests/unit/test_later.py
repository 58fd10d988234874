"""Jobs for later when the store has faults, with stand-ins for the workers."""

from __future__ import annotations

import asyncio
import itertools
import sqlite3
import types
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest

from api.errors import ApiError
from api.service import intake as intakes
from api.service import later as laters
from api.service import ledger as ledgers
from api.service.jobs import JobState
from api.service.later import Later
from api.service.reports import state_event
from api.service.store import Store
from api.settings import Settings


class Room:
    """A dispatcher that has room for ``most`` requests in line."""

    def __init__(self, most: int) -> None:
        self.workers = [types.SimpleNamespace(ready=True, info=types.SimpleNamespace(slots=4))]
        self.expected = 0
        self.most = most

    def check_room(self) -> None:
        if self.expected >= self.most:
            raise ApiError("QUEUE_FULL", "full")


class Refusing:
    """A service that has no room, so that every job is given back."""

    def __init__(self) -> None:
        self.dispatcher = Room(100)
        self.webhooks = types.SimpleNamespace(hook=lambda *_, **__: None)
        self.admitted = 0

    async def check(self, *_: Any) -> None: ...

    async def admit(self, *_: Any) -> None:
        self.admitted += 1
        raise ApiError("QUEUE_FULL", "full")


def later_of(folder: Path, service: Any, monkeypatch: pytest.MonkeyPatch) -> Later:
    monkeypatch.setenv("STATE_DIR", str(folder))
    return Later(Settings.from_env(), service)


def begun(folder: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Later, Refusing]:
    """One that has begun, over a service that has no room."""
    service = Refusing()
    later = later_of(folder, service, monkeypatch)
    later.start()
    return later, service


def failing(call: Callable[..., Any], times: int) -> Callable[..., Any]:
    """A method of the store that fails so often before it works."""
    count = itertools.count()

    def wrapped(*arguments: Any, **more: Any) -> Any:
        if next(count) < times:
            raise sqlite3.OperationalError("database or disk is full")
        return call(*arguments, **more)

    return wrapped


def leave_one_running(folder: Path) -> None:
    """What a process leaves that died while it ran a job."""
    store = Store(folder, persist_inputs=True)
    store.open()
    inputs = b'{"modelInputs": {}, "callInputs": {}}'
    store.accept("a", "r", inputs, priority=1, now=0, ttl=1e12, events=[state_event(JobState.IN_QUEUE)])
    store.take(0.0, [])
    store.close()


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ledgers, "_PAUSE", 0.02)
    monkeypatch.setattr(laters, "_PAUSE", 0.02)


@pytest.fixture
async def until() -> AsyncIterator[Callable[[Callable[[], Any]], Any]]:
    async def wait(condition: Callable[[], Any]) -> None:
        async with asyncio.timeout(20):
            while not condition():
                await asyncio.sleep(0.01)

    yield wait


async def test_a_start_that_meets_a_full_disk_is_taken_up_when_there_is_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    leave_one_running(tmp_path)
    later = later_of(tmp_path, Refusing(), monkeypatch)
    monkeypatch.setattr(later._store, "running", failing(later._store.running, 2))
    monkeypatch.setattr(later._store, "give_back", failing(later._store.give_back, 3))
    later.start()
    async with asyncio.timeout(20):
        accepted = await later.accept("r", {"prompt": "x"}, {})
        assert (await later.cancel("a")).state == JobState.CANCELLED
    assert later.waiting == later._service.dispatcher.expected
    assert accepted.state == JobState.IN_QUEUE
    await later.stop()


async def test_while_the_store_cannot_be_read_clients_are_told_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    leave_one_running(tmp_path)
    monkeypatch.setattr(intakes, "_RECOVERY", 0.1)
    later = later_of(tmp_path, Refusing(), monkeypatch)
    monkeypatch.setattr(later._store, "running", failing(later._store.running, 10**9))
    later.start()
    for call in (later.accept("r", {"prompt": "x"}, {}), later.cancel("a")):
        async with asyncio.timeout(20):
            with pytest.raises(ApiError, match="STATE_DIR") as told:
                await call
        assert told.value.code == "NOT_READY"
    async with asyncio.timeout(20):
        await later.stop()


async def test_a_job_is_not_lost_when_it_cannot_be_written_that_it_waits_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, until: Any
) -> None:
    later, service = begun(tmp_path, monkeypatch)
    monkeypatch.setattr(later._store, "give_back", failing(later._store.give_back, 2))
    await later.accept("r", {"prompt": "x"}, {})
    await until(lambda: service.admitted >= 2)  # it was its turn once more
    await later.stop()


async def test_a_disk_that_stays_full_does_not_keep_the_server_from_stopping(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, until: Any
) -> None:
    monkeypatch.setattr(laters, "_LAST_WORDS", 0.2)
    later, service = begun(tmp_path, monkeypatch)
    monkeypatch.setattr(later._store, "give_back", failing(later._store.give_back, 10**9))
    job = await later.accept("r", {"prompt": "x"}, {})
    await until(lambda: service.admitted)
    async with asyncio.timeout(20):
        await later.stop()
    store = Store(tmp_path, persist_inputs=True)
    store.open()
    assert [job_id for job_id, _ in store.running()] == [job.id]  # the next start finds it
    store.close()


async def test_a_job_keeps_its_place_on_the_way_from_the_store_to_the_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, until: Any
) -> None:
    """Somebody who comes in between finds the line as full as it was."""
    service = Refusing()
    service.dispatcher.most = 1
    later = later_of(tmp_path, service, monkeypatch)
    later.start()
    seen: list[int] = []
    tell = later.ledger.tell

    def told(job_id: str) -> None:
        asyncio.get_running_loop().call_soon(lambda: seen.append(service.dispatcher.expected))
        tell(job_id)

    async def admit(*_: Any) -> None:
        service.admitted += 1
        assert service.dispatcher.expected == 0  # it is not counted twice either: the real one counts from here
        raise ApiError("PIPELINE_ERROR", "x")

    monkeypatch.setattr(later.ledger, "tell", told)
    monkeypatch.setattr(service, "admit", admit)
    job = await later.accept("r", {"prompt": "x"}, {})
    await until(lambda: service.admitted)
    assert seen[0] == 1
    await until(lambda: not later._running)
    assert (await later.ledger.get(job.id)).error == {"code": "PIPELINE_ERROR", "message": "x"}
    assert service.dispatcher.expected == later.waiting == 0
    await later.stop()


async def test_a_job_that_is_cancelled_before_it_began_leaves_no_place_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, until: Any
) -> None:
    later, service = begun(tmp_path, monkeypatch)
    begin = later._begin

    def cancelled(work: Any) -> Any:
        task = begin(work)
        if work.__name__ == "_run":
            task.cancel()
        return task

    monkeypatch.setattr(later, "_begin", cancelled)
    await later.accept("r", {"prompt": "x"}, {})
    await until(lambda: not later.waiting and not later._running)
    assert service.dispatcher.expected == service.admitted == 0
    await later.stop()
