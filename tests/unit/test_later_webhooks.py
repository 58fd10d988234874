"""What the receiver of a job for later is told, with stand-ins for workers and sender."""

from __future__ import annotations

import asyncio
import types
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest

from api.errors import ApiError
from api.service.jobs import TERMINAL
from api.service.later import Later
from api.settings import Settings

CALL = {"SEND_URL": "https://receiver.test/", "startRequestId": "mine"}


class Hook:
    """Notes what it is told, and whether its job is over by then."""

    def __init__(self, later: Later, job: str, told: list[Any]) -> None:
        self._later, self._job, self._told = later, job, told

    def begin(self, options: Any = None) -> None: ...

    def __call__(self, event: Any) -> None: ...

    def fail(self, error: ApiError) -> None:
        self._told.append((self._job, error.code))

    async def stored(self) -> None:
        await asyncio.sleep(0.1)
        entry = await self._later.ledger.get(self._job)
        self._told.append((self._job, "stored", entry.state in TERMINAL))


class Service:
    """A service whose jobs all end in the same way; with none, they wait."""

    def __init__(self, slots: int, error: ApiError | None = None) -> None:
        worker = types.SimpleNamespace(ready=True, info=types.SimpleNamespace(slots=slots))
        self.dispatcher = types.SimpleNamespace(workers=[worker], expected=0, check_room=lambda: None)
        self.webhooks = types.SimpleNamespace(hook=self.hook)
        self.error = error
        self.told: list[Any] = []
        self.later: Later

    def hook(self, call_inputs: dict[str, Any], *, job: str, owner: str) -> Hook:
        assert call_inputs == CALL
        return Hook(self.later, job, self.told)

    async def check(self, *_: Any) -> None: ...

    async def admit(self, *_: Any) -> None:
        if self.error is None:
            await asyncio.sleep(1000)
        raise self.error or AssertionError


Make = Callable[[Service], Later]


@pytest.fixture
async def make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Make]:
    made: list[Later] = []
    monkeypatch.setattr("api.service.later._LAST_WORDS", 0.2)

    def start(service: Service) -> Later:
        monkeypatch.setenv("STATE_DIR", str(tmp_path))
        service.later = Later(Settings.from_env(), service)  # type: ignore[arg-type]
        made.append(service.later)
        service.later.start()
        return service.later

    yield start
    for later in made:
        if not later.ledger._closed:
            await later.stop()


async def until(condition: Callable[[], Any]) -> None:
    async with asyncio.timeout(20):
        while not condition():
            await asyncio.sleep(0.01)


async def test_a_job_is_over_only_when_its_last_event_is_safe(make: Make) -> None:
    service = Service(1, ApiError("MODEL_BROKEN", "cut"))
    entry = await make(service).accept("r", {}, CALL)
    await until(lambda: len(service.told) == 2)
    assert service.told == [(entry.id, "MODEL_BROKEN"), (entry.id, "stored", False)]


async def test_what_goes_back_in_line_has_not_failed(make: Make) -> None:
    service = Service(1, ApiError("QUEUE_FULL", "full"))
    later = make(service)
    await later.accept("r", {}, CALL)
    await asyncio.sleep(0.3)
    assert service.told == []


@pytest.mark.parametrize("slots", [0, 1], ids=["waits", "runs"])
async def test_a_job_that_is_cancelled_tells_so(make: Make, slots: int) -> None:
    service = Service(slots)
    later = make(service)
    entry = await later.accept("r", {}, CALL)
    await until(lambda: len(later._running) == slots)
    await later.cancel(entry.id)
    assert (entry.id, "CANCELLED") in service.told
    told = list(service.told)
    await later.cancel(entry.id)
    assert service.told == told  # it was over


async def test_a_job_that_killed_the_server_too_often_tells_so(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    first = Service(1)
    later = make(first)
    entry = await later.accept("r", {}, CALL)
    await until(lambda: later._running)
    monkeypatch.setattr("api.service.later.MAX_TRIES", 1)
    monkeypatch.setattr(later._store, "running", lambda: [])  # as if it had died
    await later.stop()
    second = Service(1)
    make(second)
    await until(lambda: second.told)
    assert second.told == [(entry.id, "WORKER_DIED")]
