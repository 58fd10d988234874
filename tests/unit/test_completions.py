"""Ends of jobs are told to their webhooks, whatever happens on the way."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from api.errors import ApiError
from api.schema.generation import GenerationResult
from api.service import completions
from api.service.completions import Completions
from api.service.endpoints import EndpointStore
from api.service.entries import Terms
from api.service.ledger import Ledger

META = {"modelInputs": {"seed": 7}, "device": "cpu"}


class Receiver:
    """Takes messages, or cannot as often as it is told."""

    def __init__(self) -> None:
        self.got: list[tuple[str, str, dict[str, Any]]] = []
        self.faults: list[Exception] = []

    async def post(self, url: str, body: bytes, *, job: str, kind: str, sign_key: str = "", owner: str = "") -> None:
        await asyncio.sleep(0)
        if self.faults:
            raise self.faults.pop()
        assert kind == "runpod"
        self.got.append((url, owner, msgspec.json.decode(body)))


class Running:
    """A ledger whose ends are told to a receiver."""

    def __init__(self, folder: Path) -> None:
        self.store = EndpointStore(folder, persist_inputs=True)
        self.store.open()
        self.ledger = Ledger(self.store, 60)
        self.completions = Completions(self.ledger, self.store)
        self.ledger.on_end = lambda _: self.completions.look()
        self.receiver = Receiver()
        self.task: asyncio.Task[None] | None = None
        self.closed = False

    def accept(self, job_id: str, **more: Any) -> None:
        terms = Terms(endpoint="e", owner="alice", simple=True, webhook=f"https://example.com/{job_id}", **more)
        self.store.accept(job_id, "r", b"{}", priority=1, now=0.0, ttl=1e12, events=[], terms=terms)

    def tell(self) -> None:
        self.task = asyncio.create_task(self.completions.tell(self.receiver))

    async def until(self, condition: Callable[[], Any]) -> None:
        async with asyncio.timeout(20):
            while not condition():
                await asyncio.sleep(0.01)

    async def all_told(self) -> bool:
        return not await self.ledger.call(self.store.to_tell)

    async def close(self) -> None:
        if self.task:
            self.task.cancel()
        if not self.closed:
            await self.ledger.close()
        self.closed = True


@pytest.fixture
async def running(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Running]:
    monkeypatch.setattr(completions, "_PAUSE", 0.02)
    made = Running(tmp_path)
    yield made
    await made.close()


async def test_every_end_is_told_once_as_status_tells_it(running: Running) -> None:
    running.tell()
    for job_id in "abc":
        running.accept(job_id)
    running.store.take(1.0, [])
    await running.ledger.end("a", GenerationResult([b"png"], META, {}, 0.0))
    await running.ledger.end("b", ApiError("PIPELINE_ERROR", "why"))
    assert await running.ledger.purge("e", "alice", ApiError("CANCELLED", "x")) == 1
    await running.until(lambda: len(running.receiver.got) == 3)
    while not await running.all_told():
        await asyncio.sleep(0.01)
    assert [(url, owner) for url, owner, _ in running.receiver.got] == [
        (f"https://example.com/{job_id}", "alice") for job_id in "abc"
    ]
    done, failed, cancelled = [body for *_, body in running.receiver.got]
    assert {"id": "a", "status": "COMPLETED", "workerId": "cpu"}.items() <= done.items()
    assert done["output"] == {"image": "cG5n", "seed": 7, "meta": META, "timings": {}}
    assert (failed["status"], failed["error"]) == ("FAILED", "PIPELINE_ERROR: why")
    assert (cancelled["status"], "error" in cancelled) == ("CANCELLED", False)
    assert done["executionTime"] > 0 and "executionTime" not in failed


async def test_what_cannot_be_handed_over_is_tried_again_and_keeps_no_other_back(running: Running) -> None:
    running.receiver.faults = [OSError(28, "No space left on device")] * 3
    running.tell()
    for job_id in "ab":
        running.accept(job_id)
        await running.ledger.end(job_id, ApiError("PIPELINE_ERROR", "why"))
    await running.until(lambda: len(running.receiver.got) == 2)
    await asyncio.sleep(0.1)
    assert sorted(body["id"] for *_, body in running.receiver.got) == ["a", "b"]


async def test_what_ended_before_a_crash_is_told_after_it(tmp_path: Path, running: Running) -> None:
    running.accept("a")
    await running.ledger.end("a", ApiError("PIPELINE_ERROR", "why"))
    await running.close()
    again = Running(tmp_path)
    again.tell()
    await again.until(lambda: again.receiver.got)
    assert again.receiver.got[0][2]["id"] == "a"
    await again.close()
    third = Running(tmp_path)
    third.tell()
    await asyncio.sleep(0.1)
    assert third.receiver.got == []
    await third.close()


async def test_images_that_are_gone_do_not_keep_the_end_from_being_told(running: Running) -> None:
    running.accept("a")
    running.store.take(1.0, [])
    await running.ledger.end("a", GenerationResult([b"png"], META, {}, 0.0))
    running.store.images.remove("a")
    running.tell()
    await running.until(lambda: running.receiver.got)
    assert running.receiver.got[0][2] == {"id": "a", "status": "COMPLETED"}


async def test_a_job_that_was_sent_once_more_meanwhile_is_told_of_at_its_next_end(
    running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    for job_id in "ab":
        running.accept(job_id)
        await running.ledger.end(job_id, ApiError("PIPELINE_ERROR", "why"))
    post = running.receiver.post

    async def slow(url: str, *arguments: Any, **more: Any) -> None:
        if url.endswith("/a"):
            assert await running.ledger.retry("b", 60)
        await post(url, *arguments, **more)

    monkeypatch.setattr(running.receiver, "post", slow)
    running.tell()
    await running.until(lambda: running.receiver.got)
    await asyncio.sleep(0.1)
    await running.ledger.end("b", ApiError("PIPELINE_ERROR", "again"))
    await running.until(lambda: len(running.receiver.got) == 2)
    assert [(body["id"], body["status"]) for *_, body in running.receiver.got] == [("a", "FAILED"), ("b", "FAILED")]
