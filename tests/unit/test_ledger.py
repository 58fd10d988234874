"""What readers of a job are told, and what happens when the disk is full."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from api.errors import ApiError
from api.schema.generation import GenerationResult
from api.service import ledger as ledgers
from api.service.jobs import JobState
from api.service.ledger import Ledger
from api.service.store import Store

RESULT = GenerationResult([b"png"], {}, {}, 0.0)


class Written:
    """A store with one job that runs, its ledger, and a task that writes events."""

    def __init__(self, folder: Path) -> None:
        self.store = Store(folder, persist_inputs=True)
        self.store.open()
        self.store.accept("a", "r", b"{}", priority=1, now=0.0, ttl=1e6, events=[{"n": 0}])
        self.store.take(0.0, [])
        self.ledger = Ledger(self.store, 60)
        self.task = asyncio.create_task(self.ledger.write_events())

    async def read(self, after: int = 0) -> list[int]:
        return [seq async for portion in self.ledger.follow("a", after) for seq, _ in portion]


@pytest.fixture
async def written(tmp_path: Path) -> AsyncIterator[Written]:
    made = Written(tmp_path)
    yield made
    made.task.cancel()
    await made.ledger.close()


async def test_readers_that_come_at_any_time_read_the_same(written: Written) -> None:
    readers = []
    for number in range(30):
        readers.append(asyncio.create_task(written.read()))
        written.ledger.note("a", {"n": number})
        await asyncio.sleep(0.005)
    await written.ledger.end("a", RESULT)
    written.ledger.note("a", {"n": "too late"})
    readers.append(asyncio.create_task(written.read()))
    for told in await asyncio.wait_for(asyncio.gather(*readers), 5):
        assert told == list(range(1, 33))
    assert await written.read(after=20) == list(range(21, 33))
    await asyncio.sleep(0.1)
    assert [body.get("state") for _, body in await written.ledger.events("a")][-1] == "COMPLETED"


async def test_an_end_from_outside_and_the_own_end_that_meet_leave_one(written: Written) -> None:
    cancelled = ApiError("CANCELLED", "x")
    ends = await asyncio.gather(written.ledger.end("a", cancelled), written.ledger.end("a", RESULT))
    assert ends == [JobState.IN_PROGRESS, None]
    entry = await written.ledger.get("a")
    assert (entry.state, entry.result) == (JobState.CANCELLED, None)
    assert [body["state"] for _, body in await written.ledger.events("a") if "state" in body] == ["CANCELLED"]


async def test_images_that_cannot_be_written_fail_the_job_and_say_so(
    written: Written, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(written.store.images, "write", write)
    monkeypatch.setattr(ledgers, "_PAUSE", 0.01)
    await written.ledger.end("a", RESULT)
    entry = await written.ledger.get("a")
    assert entry.error
    assert (entry.state, entry.error["code"]) == (JobState.FAILED, "DISK_FULL")


async def test_an_end_that_cannot_be_written_is_written_when_it_can(
    written: Written, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, faults = written.store.fail, [sqlite3.OperationalError("disk I/O error")] * 3

    def fail(*arguments: Any, **more: Any) -> Any:
        if faults:
            raise faults.pop()
        return real(*arguments, **more)

    monkeypatch.setattr(written.store, "fail", fail)
    monkeypatch.setattr(ledgers, "_PAUSE", 0.01)
    written.ledger.note("a", {"n": 1})
    await written.ledger.end("a", ApiError("PIPELINE_ERROR", "why"))
    assert (await written.ledger.get("a")).error == {"code": "PIPELINE_ERROR", "message": "why"}
    assert [body.get("n") for _, body in await written.ledger.events("a")] == [0, 1, None]


async def test_readers_are_let_go_when_the_store_closes(tmp_path: Path) -> None:
    written = Written(tmp_path)
    reader = asyncio.create_task(written.read())
    await asyncio.sleep(0.05)
    written.task.cancel()
    await written.ledger.close()
    with pytest.raises(ApiError, match="shutting down"):
        await asyncio.wait_for(reader, 2)
