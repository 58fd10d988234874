"""A real HTTP server in this process whose worker is played: it answers at once, and computes nothing."""

from __future__ import annotations

import asyncio
import contextlib
import io
import threading
from collections.abc import Iterator
from pathlib import Path

import httpx
from PIL import Image

from api.http.app import build_app
from api.schema.generation import GenerationRequest, GenerationResult, ModelRef
from api.schema.images import IMAGE_FORMATS
from api.schema.messages import (
    HEADER,
    Answer,
    Cancel,
    Done,
    FromWorker,
    Generate,
    Held,
    Load,
    Loaded,
    Memory,
    Phase,
    Plan,
    Planned,
    Progress,
    Ready,
    Unload,
    parse_to_worker,
)
from api.service.service import Service
from api.service.workers import Worker
from api.settings import Settings
from tests.running import free_port

_BYTES = 1000


class Player:
    """Plays one worker's process.

    Args:
        worker: whose process it plays.
    """

    def __init__(self, worker: Worker) -> None:
        self.worker = worker
        self.models: dict[str, Held] = {}
        worker.start = self.start  # type: ignore[method-assign]
        worker._write = self.receive  # type: ignore[method-assign]

    def start(self) -> None:
        self.says(Ready("cpu", "a played CPU", {}, 1, 1, 4))

    def says(self, *messages: FromWorker) -> None:
        for message in messages:
            self.worker._receive(message)
            if self.worker._alarm:  # it is never silent
                self.worker._alarm.cancel()

    def receive(self, framed: bytes) -> None:
        """What the server sends; answered in its turn, as a process would."""
        loop = asyncio.get_running_loop()
        match parse_to_worker(framed[HEADER.size :]):
            case Generate(request):
                loop.call_soon(self.generate, request)
            case Load(model, id, tier, pin):
                loop.call_soon(self.hold, model, id, tier, tier if pin else "")
            case Unload(key, id):
                self.models.pop(key, None)
                loop.call_soon(self.says, self.loaded(), Answer(id))
            case Plan(_, id):
                planned = Planned(True, "", "full", "device", _BYTES, 0, 0, 0.0, 0.0)
                loop.call_soon(self.says, Answer(id, plan=planned))
            case Cancel():
                pass  # it is done before it could stop

    def hold(self, model: ModelRef, id: str, tier: str, pin: str) -> None:
        self.models[model.key] = Held(model, tier, _BYTES, _BYTES, 0, pin, 1.0)
        self.says(self.loaded(), Answer(id))

    def loaded(self) -> Loaded:
        size = _BYTES * len(self.models)
        return Loaded(dict(self.models), Memory(size, 10**9, size, size, 10**9))

    def generate(self, request: GenerationRequest) -> None:
        size = request.inputs.get("width") or 8, request.inputs.get("height") or 8
        out = io.BytesIO()
        with contextlib.suppress(OSError):  # a codec that is not installed
            Image.new("RGB", size, "red").save(
                out, IMAGE_FORMATS[request.image_format].extension.replace("jpg", "jpeg")
            )
        steps = request.inputs.get("num_inference_steps") or 1
        meta = {**request.meta, "device": "cpu", "dtype": "float32", "placement": "full", "numerics": "played"}
        images = [out.getvalue()] * request.images
        self.says(
            Phase(request.id, "inference", "start"),
            *(Progress(request.id, step, steps) for step in range(1, steps + 1)),
            Phase(request.id, "inference", "done"),
            Done(request.id, GenerationResult(images, meta, {"inference": 1, "encode": 0}, 0.0)),
        )


class Site:
    """A running server.

    Args:
        settings: its configuration.
    """

    def __init__(self, settings: Settings) -> None:
        self.service = Service(settings)
        self.players = [Player(worker) for worker in self.service.dispatcher.workers]
        self.port = free_port()
        self.app = build_app(self.service, f"played-{self.port}")
        self.url = f"http://127.0.0.1:{self.port}"
        self.client = httpx.Client(base_url=self.url, timeout=60)


@contextlib.contextmanager
def playing(state_dir: Path, **environ: str) -> Iterator[Site]:
    """A server with a played worker, which listens until the end of the block."""
    settings = Settings.from_env({"STATE_DIR": str(state_dir), "DEVICES": "cpu", "RUNTIME_DOWNLOADS": "0", **environ})
    site = Site(settings)
    loop, began, end = asyncio.new_event_loop(), threading.Event(), asyncio.Event()

    async def serve() -> None:
        server = await site.app.create_server(
            host="127.0.0.1", port=site.port, return_asyncio_server=True, access_log=False
        )
        assert server is not None
        await server.startup()
        await server.before_start()
        await server.start_serving()
        began.set()
        await end.wait()
        await server.before_stop()
        await server.close()

    thread = threading.Thread(target=loop.run_until_complete, args=(serve(),), daemon=True)
    thread.start()
    assert began.wait(60)
    try:
        yield site
    finally:
        site.client.close()
        loop.call_soon_threadsafe(end.set)
        thread.join(60)
        loop.close()
