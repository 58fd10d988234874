"""A worker that was started before the service was there."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

import pytest

from api.schema.messages import Ready, frame
from api.serverless import ahead
from api.service import spawning, workers
from api.service.workers import Worker

_READY = frame(Ready("cpu", "a CPU", {}, 2, 1, 2))
_CODE = f"import socket,sys,time; s=socket.socket(fileno=int(sys.argv[1])); s.sendall({_READY!r}); s.recv(1)"


@pytest.fixture(autouse=True)
def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    def command(device: str, number: int, count: int) -> list[str]:
        return [sys.executable, "-c", _CODE, str(number)]

    monkeypatch.setattr(spawning, "command", command)
    monkeypatch.setattr(workers, "command", command)


async def until(condition: object) -> None:
    async with asyncio.timeout(20):
        while not condition():  # type: ignore[operator]
            await asyncio.sleep(0.005)


async def test_it_is_taken_over_and_the_next_one_is_started_as_ever() -> None:
    worker = Worker("cpu", 60, lambda worker, message: None, lambda worker: None)
    first = worker.spawned = spawning.spawn("cpu", 1)
    worker.start()
    await until(lambda: worker.ready)
    assert worker.pid == first.pid
    first.kill()
    await until(lambda: worker.ready and worker.pid not in (None, first.pid))
    assert first.returncode == -9
    assert worker.restarts == 1
    await worker.stop()
    assert worker.pid is None


async def test_it_is_ended_with_the_service() -> None:
    worker = Worker("cpu", 60, lambda worker, message: None, lambda worker: None)
    first = worker.spawned = spawning.spawn("cpu", 1)
    worker.start()
    await until(lambda: worker.ready)
    await worker.stop()
    assert first.returncode == 0, "it reads the end of its socket"


def test_weights_that_nobody_reads_yet_are_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = tmp_path / "unet" / "x.safetensors"
    weights.parent.mkdir()
    weights.write_bytes(bytes(1_200_000))
    (tmp_path / "unet" / "config.json").write_text("{}")
    (tmp_path / "gone.safetensors").symlink_to(tmp_path / "nowhere")
    asked: list[tuple[int, int]] = []
    monkeypatch.setattr("os.posix_fadvise", lambda fd, begin, size, advice: asked.append((begin, size)))
    ahead._read_all([str(tmp_path), str(tmp_path / "missing")])
    assert [begin for begin, _ in asked] == [0, 2**19, 2**20]
    assert asked[-1][0] + asked[-1][1] >= 1_200_000
