"""A real server whose worker is played inside it: it answers at once, and computes nothing.

``python -m tests.played serve`` is ``python -m api serve`` with it.
"""

from __future__ import annotations

import asyncio
import contextlib
import io
import sys
from collections.abc import Iterator
from pathlib import Path

from PIL import Image

from api.cli.main import main
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
from api.service.workers import Worker
from tests.running import Server

_BYTES = 1000


class Player:
    """Plays one worker's process.

    Args:
        worker: whose process it plays.
    """

    def __init__(self, worker: Worker) -> None:
        self.worker = worker
        self.models: dict[str, Held] = {}
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


class Played(Server):
    """Such a server in its own process."""

    module = "tests.played"


@contextlib.contextmanager
def playing(folder: Path, **environ: str) -> Iterator[Played]:
    """A server with a played worker; its models and its state are in the folder."""
    said = {"MODELS_DIR": str(folder), "DEVICES": "cpu", "RUNTIME_DOWNLOADS": "0", **environ}
    server = Played(said, folder / "server.log")
    try:
        server.wait_ready()
        yield server
    finally:
        server.stop()


if __name__ == "__main__":
    Worker.start = lambda worker: Player(worker).start()  # type: ignore[method-assign]
    sys.exit(main())
