"""A server in this process whose workers are played: every route, the queue and the store are real, nothing is computed."""

from __future__ import annotations

import asyncio
import contextlib
import io
import os
import secrets
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from PIL import Image

from api.http.app import build_app
from api.schema.generation import GenerationRequest, GenerationResult
from api.schema.messages import Computed, Done, Failed, Generate, Phase, Progress, Ready, parse_to_worker
from api.service.service import Service
from api.service.workers import Worker
from api.settings import Settings
from tests.running import ROOT, free_port


def a_png() -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (8, 8)).save(out, "PNG")
    return out.getvalue()


class Played:
    """What the workers do: each request loads a model, makes two steps, and gives a black image.

    Attributes:
        fails: prompts of requests that fail.
    """

    def __init__(self) -> None:
        self.fails: set[str] = set()
        self.requests: list[GenerationRequest] = []
        self._tasks: set[asyncio.Task[None]] = set()

    def start(self, worker: Worker) -> None:
        worker._write = lambda data: self._take(worker, data)  # type: ignore[method-assign]
        worker._receive(Ready("cpu", "a CPU", {}, 2, 1, 4))

    def _take(self, worker: Worker, data: bytes) -> None:
        message = parse_to_worker(data[4:])
        if isinstance(message, Generate):
            self.requests.append(message.request)
            task = asyncio.get_running_loop().create_task(self._run(worker, message))
            self._tasks.add(task)

    async def _run(self, worker: Worker, message: Generate) -> None:
        request = message.request
        for kind in ("loadModel", "inference"):
            await self._tell(worker, message.events, Phase(request.id, kind, "start"))
            if kind == "inference":
                for step in (1, 2):
                    await self._tell(worker, message.events, Progress(request.id, step, 2))
                if request.inputs.get("prompt") in self.fails:
                    worker._receive(Failed(request.id, "PIPELINE_ERROR", "no", {}, ""))
                    return
            await self._tell(worker, message.events, Phase(request.id, kind, "done"))
        worker._receive(Computed(request.id))
        await asyncio.sleep(0.01)
        timings = {"loadModel": 10, "inference": 20, "encode": 10}
        meta = {**request.meta, "placement": "full"}
        worker._receive(Done(request.id, GenerationResult([a_png()] * request.images, meta, timings, 0.0)))

    async def _tell(self, worker: Worker, events: bool, event: Any) -> None:
        await asyncio.sleep(0.005)
        if events:
            worker._receive(event)


class Playing:
    """A service with played workers, and a client of its server."""

    def __init__(self, service: Service, client: httpx.AsyncClient, played: Played) -> None:
        self.service = service
        self.client = client
        self.played = played

    async def post(
        self, prompt: str = "x", call_inputs: dict[str, Any] | None = None, **headers: str
    ) -> httpx.Response:
        body = {"modelInputs": {"prompt": prompt, "num_inference_steps": 2}, "callInputs": call_inputs or {}}
        return await self.client.post("/", json=body, headers=headers)

    async def until_over(self, job_id: str) -> dict[str, Any]:
        """A job for later, once it is over."""
        async with asyncio.timeout(20):
            while True:
                job: dict[str, Any] = (await self.client.get(f"/jobs/{job_id}")).json()
                if job["state"] not in ("IN_QUEUE", "IN_PROGRESS"):
                    return job
                await asyncio.sleep(0.02)


@contextlib.asynccontextmanager
async def playing(folder: Path, monkeypatch: pytest.MonkeyPatch, **environ: str) -> AsyncIterator[Playing]:
    """Serve in this process.

    Args:
        folder: for its state.
        monkeypatch: has workers played until the test is over.
        environ: settings.
    """
    played = Played()
    monkeypatch.setattr(Worker, "start", lambda worker: played.start(worker))  # noqa: PLW0108  a bound one gets no worker
    values = {
        "STATE_DIR": str(folder),
        "BAKED_MODELS_DIR": str(ROOT / "models"),
        "DEVICES": "cpu",
        "DRAIN_TIMEOUT": "0.1",
        **environ,
    }
    service = Service(Settings.from_env({**os.environ, **values}))
    service.open()
    app = build_app(service, f"playing-{secrets.token_hex(4)}")
    app.config.TOUCHUP = False  # it rewrites Sanic itself, which bears that once in a process
    port = free_port()
    server = await app.create_server("127.0.0.1", port, return_asyncio_server=True, access_log=False)
    assert server is not None
    await server.startup()
    await server.before_start()
    await server.start_serving()
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=20) as client:
        try:
            yield Playing(service, client, played)
        finally:
            await service.stop()
            server.close()
            await server.wait_closed()
