"""What each key has had of the server: counted where all results pass, kept over a restart, told to whom it belongs."""

from __future__ import annotations

import asyncio
import types
from pathlib import Path
from typing import Any

import pytest

from api.errors import ApiError
from api.schema.generation import GenerationResult
from api.service import usage as module
from api.service.entries import Terms
from api.service.jobs import JobState
from api.service.later import Later
from api.service.limits import Limits
from api.service.service import Service
from api.service.usage import Usage
from api.settings import Settings
from tests.inprocess import app_of, service_of, serving

NOTHING = {"requests": 0, "images": 0, "device_seconds": 0.0, "load_seconds": 0.0, "failures": 0}


def result(inference: int = 1500, load: int | None = 500, images: int = 1) -> GenerationResult:
    timings = {"inference": inference, **({"loadModel": load} if load is not None else {})}
    return GenerationResult([b"x"] * images, {"modelInputs": {"seed": 1}}, timings, 0)


def files(folder: Path) -> list[Path]:
    return list(folder.iterdir())


def test_what_is_counted(tmp_path: Path) -> None:
    usage = Usage(tmp_path)
    usage.note("alice", result(), 1)
    usage.note("alice", result(inference=250, load=None), 4)
    usage.note("alice", ApiError("OUT_OF_MEMORY", "x"))
    usage.note("alice", ApiError("TIMED_OUT", "x"))
    usage.note("bob", ApiError("CANCELLED", "x"))
    usage.note("carol", ApiError("QUEUE_FULL", "x"))
    usage.note("carol", ApiError("NOT_READY", "x"))
    assert usage.snapshot() == [
        {"owner": "alice", "requests": 4, "images": 5, "device_seconds": 1.75, "load_seconds": 0.5, "failures": 2},
        {"owner": "bob", **NOTHING, "requests": 1},
    ]
    assert usage.of("nobody") == {"owner": "nobody", **NOTHING}


async def test_a_restart_forgets_nothing(tmp_path: Path) -> None:
    usage = Usage(tmp_path)
    usage.load()
    usage.start()
    usage.note("alice", result(), 1)
    await usage.stop()
    again = Usage(tmp_path)
    again.load()
    assert (again.snapshot(), again.since) == (usage.snapshot(), usage.since)
    assert [file.name for file in files(tmp_path)] == ["usage.json"]


async def test_it_is_written_now_and_then(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_EVERY", 0.01)
    usage = Usage(tmp_path)
    usage.start()
    usage.note("alice", result(), 1)
    async with asyncio.timeout(20):
        while not (tmp_path / "usage.json").exists():
            await asyncio.sleep(0.01)
    killed = Usage(tmp_path)
    killed.load()
    assert killed.snapshot() == usage.snapshot()
    await usage.stop()


async def test_a_disk_with_a_fault_loses_nothing_but_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = Usage(tmp_path / "not there")
    usage.start()
    usage.note("alice", result(), 1)
    await usage._write()
    (tmp_path / "not there").mkdir()
    await usage.stop()
    again = Usage(tmp_path / "not there")
    again.load()
    assert again.snapshot() == usage.snapshot()


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"since": 1, "keys": {"a": 3}}'])
def test_a_broken_file_is_put_aside(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "usage.json").write_bytes(content)
    usage = Usage(tmp_path)
    usage.load()
    assert usage.snapshot() == []
    assert [file.name for file in tmp_path.iterdir()] == ["usage.broken"]


async def begun(service: Service, times: int = 1) -> list[Any]:
    """The jobs that are in line, once there are so many."""
    async with asyncio.timeout(60):
        while len(service.dispatcher._jobs) < times:
            await asyncio.sleep(0.01)
    return list(service.dispatcher._jobs.values())


async def test_each_key_sees_its_own_and_an_admin_sees_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    service = service_of(
        API_KEYS="alice:key-of-alice,bob:key-of-bob,root:key-of-root", ADMIN_KEYS="root", KEY_CONCURRENCY="1,bob=2",
        STATE_DIR=str(tmp_path),
    )  # fmt: skip
    async with serving(app_of(service, monkeypatch)) as client:

        def as_(name: str) -> dict[str, str]:
            return {"Authorization": f"Bearer key-of-{name}"}

        body = {"modelInputs": {"prompt": "a red circle", "num_images_per_prompt": 2}}
        streamed = {**body, "callInputs": {"streamEvents": True}}
        for sent in (body, streamed):
            waiting = asyncio.create_task(client.post("/", json=sent, headers=as_("alice")))
            (job,) = await begun(service)
            assert job.owner == "alice"
            for busy in (body, streamed):
                refused = await client.post("/", json=busy, headers=as_("alice"))
                assert (refused.status_code, refused.json()["$error"]["code"]) == (429, "TOO_MANY_JOBS")
                assert "Retry-After" in refused.headers
            service.dispatcher._jobs.clear()
            job.complete(result(images=2))
            assert (await waiting).status_code == 200
        waiting = asyncio.create_task(client.post("/", json=body, headers=as_("bob")))
        (job,) = await begun(service)
        service.dispatcher._jobs.clear()
        job.fail(ApiError("OUT_OF_MEMORY", "x"))
        assert (await waiting).status_code == 507

        told = {
            name: (await client.get("/usage", headers=as_(name))).json()["usage"] for name in ("alice", "bob", "root")
        }
        of_alice = {
            "owner": "alice", "requests": 2, "images": 4, "device_seconds": 3.0, "load_seconds": 1.0, "failures": 0,
            "limits": {"jobsPerMinute": None, "concurrency": 1, "jobs": 0},
        }  # fmt: skip
        assert told["alice"] == [of_alice]
        assert [(used["owner"], used["requests"], used["failures"]) for used in told["bob"]] == [("bob", 1, 1)]
        assert [used["owner"] for used in told["root"]] == ["alice", "bob", "root"]
        assert told["root"][0] == of_alice


async def test_a_client_that_goes_away_gives_its_place_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    service = service_of(API_KEYS="alice:key-of-alice", KEY_CONCURRENCY="1", STATE_DIR=str(tmp_path))
    async with serving(app_of(service, monkeypatch)) as client:
        body = {"modelInputs": {"prompt": "a red circle"}}
        for stream in (False, True):
            sent = {**body, "callInputs": {"streamEvents": stream}}
            waiting = asyncio.create_task(client.post("/", json=sent, headers={"Authorization": "key-of-alice"}))
            await begun(service)
            waiting.cancel()
            async with asyncio.timeout(20):
                while service.limits.of("alice")["jobs"]:
                    await asyncio.sleep(0.01)
            assert not service.dispatcher._jobs
        assert service.usage.of("alice") == {"owner": "alice", **NOTHING, "requests": 2}


class Busy:
    """A service whose jobs end when a test says so."""

    def __init__(self) -> None:
        worker = types.SimpleNamespace(ready=True, info=types.SimpleNamespace(slots=1))
        self.dispatcher = types.SimpleNamespace(workers=[worker], expected=0, check_room=lambda: None)
        self.outcome: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self.owners: list[str] = []
        self.wrong = False
        self.webhooks = types.SimpleNamespace(hook=lambda *_, **__: None)

    async def check(self, *_: Any) -> None:
        if self.wrong:
            raise ApiError("INVALID_INPUTS", "x")

    async def admit(self, *_: Any) -> Any:
        return types.SimpleNamespace(request=types.SimpleNamespace(images=1, image_format="PNG"))

    def submit(self, admitted: Any, on_event: Any = None, owner: str = "") -> None:
        self.owners.append(owner)

    async def finish(self, job: Any, **_: Any) -> Any:
        return await self.outcome


async def test_jobs_for_later_count_until_they_are_over(tmp_path: Path) -> None:
    settings = Settings.from_env({"STATE_DIR": str(tmp_path), "KEY_CONCURRENCY": "2"})
    limits, service = Limits(settings, ["alice"]), Busy()
    later = Later(settings, service, limits)  # type: ignore[arg-type]
    later.start()

    async def accept(key: str | None = None) -> Any:
        return await later.accept("r", {"prompt": "x"}, {}, "normal", key, terms=Terms(owner="alice"))

    async def until(jobs: int) -> None:
        async with asyncio.timeout(20):
            while limits.of("alice")["jobs"] != jobs:
                await asyncio.sleep(0.01)

    first, second = await accept(), await accept("mine")
    assert (await accept("mine")).id == second.id  # the same job, and no other place
    with pytest.raises(ApiError) as full:
        await accept()
    assert full.value.code == "TOO_MANY_JOBS"
    assert (await later.cancel(second.id)).state == JobState.CANCELLED
    await until(1)
    service.wrong = True
    with pytest.raises(ApiError, match="x"):
        await accept()
    await until(1)
    service.outcome.set_exception(ApiError("PIPELINE_ERROR", "x"))
    await until(0)
    assert service.owners == ["alice"]
    assert (await later.ledger.get(first.id)).state == JobState.FAILED
    await later.stop()


async def test_jobs_that_an_earlier_process_took_in_count_until_they_are_over(tmp_path: Path) -> None:
    settings = Settings.from_env({"STATE_DIR": str(tmp_path)})
    before = Later(settings, Busy(), Limits(settings, ["alice"]))  # type: ignore[arg-type]
    before.start()
    ids = [(await before.accept("r", {"prompt": "x"}, {}, terms=Terms(owner="alice"))).id for _ in range(3)]
    await before.cancel(ids[0])
    await before.stop()
    limits = Limits(Settings.from_env({"KEY_CONCURRENCY": "2"}), ["alice"])
    later = Later(settings, Busy(), limits)  # type: ignore[arg-type]
    later.start()
    await later.cancel(ids[1])
    assert limits.of("alice")["jobs"] == 1
    await later.cancel(ids[2])
    assert limits.of("alice")["jobs"] == 0
    await later.stop()
