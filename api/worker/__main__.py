"""``python -m api.worker FD DEVICE``: takes requests from a socket, gives results back.

Three threads: this one runs the engine, one reads the socket (so that a cancel is heard while a
job runs, and the end of the parent ends this process at once), a few encode images.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import queue
import signal
import socket
import threading
import time
import traceback
import warnings
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from api import logs
from api.errors import ApiError
from api.schema.generation import GenerationRequest, GenerationResult
from api.schema.messages import (
    HEADER,
    Cancel,
    Done,
    Failed,
    FromWorker,
    Generate,
    Load,
    Loaded,
    Phase,
    Progress,
    Ready,
    frame,
    parse_to_worker,
)
from api.settings import Settings

if TYPE_CHECKING:
    from api.engine.generate import Engine, Generated

log = logging.getLogger("api.worker")
_ENCODERS = 4


class Link:
    """The socket to the service.

    Args:
        sock: connected; this process ends when the other side closes it.
    """

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._lock = threading.Lock()
        self.inbox: queue.SimpleQueue[Load | Generate] = queue.SimpleQueue()
        self._cancelled: set[str] = set()
        threading.Thread(target=self._listen, name="link", daemon=True).start()

    def send(self, message: FromWorker) -> None:
        """Send a message; from any thread."""
        data = frame(message)
        with self._lock:
            self._sock.sendall(data)

    def is_cancelled(self, job_id: str) -> bool:
        """Whether the service has asked to stop this job."""
        return job_id in self._cancelled

    def forget(self, job_id: str) -> None:
        """The job is over."""
        self._cancelled.discard(job_id)

    def _listen(self) -> None:
        with contextlib.suppress(OSError), self._sock.makefile("rb") as stream:
            while header := stream.read(HEADER.size):
                message = parse_to_worker(stream.read(HEADER.unpack(header)[0]))
                if isinstance(message, Cancel):
                    self._cancelled.add(message.id)
                else:
                    self.inbox.put(message)
        os._exit(0)


class Worker:
    """Runs requests one after the other.

    Args:
        link: where they come from.
        engine: what runs them.
        init_ms: how long the start took; told once.
    """

    def __init__(self, link: Link, engine: Engine, init_ms: int) -> None:
        self._link = link
        self._engine = engine
        self._init_ms: int | None = init_ms
        self._encoders = ThreadPoolExecutor(_ENCODERS, thread_name_prefix="encode")

    def serve(self) -> None:
        """Take messages until the process ends."""
        while True:
            message = self._link.inbox.get()
            if isinstance(message, Load):
                self.warm(message)
            else:
                self._generate(message.request)

    def warm(self, message: Load) -> None:
        """Load a model ahead of any request; a fault is logged, and told again to who asks for it."""
        try:
            self._engine.load(message.model)
        except ApiError as error:
            log.error("%s: %s", error.code, error.message)
        self._link.send(Loaded(self._engine.cache.sizes()))

    def _generate(self, request: GenerationRequest) -> None:
        from api.engine.generate import Cancelled

        link, job = self._link, request.id
        try:
            if link.is_cancelled(job):
                raise Cancelled
            generated = self._engine.generate(
                request,
                on_step=lambda step, total: link.send(Progress(job, step, total)),
                on_phase=lambda kind, status: link.send(Phase(job, kind, status)),
                cancelled=lambda: link.is_cancelled(job),
            )
        except Cancelled:
            link.send(Failed(job, "CANCELLED", "The job was cancelled.", {}, ""))
        except ApiError as error:
            details = {"field": error.field, "requested": error.requested, "available": error.available}
            link.send(Failed(job, error.code, error.message, details, traceback.format_exc()))
        except Exception as fault:  # the worker lives on; the client learns that it is not to blame
            log.exception("a job failed", extra={"request_id": job})
            message = f"The pipeline failed ({type(fault).__name__}); the server's log says more."
            link.send(Failed(job, "INTERNAL_ERROR", message, {}, traceback.format_exc()))
        else:
            if "loadModel" in generated.timings:
                link.send(Loaded(self._engine.cache.sizes()))
            init, self._init_ms = self._init_ms, None
            self._hand_over(request, generated, init)
        finally:
            link.forget(job)

    def _hand_over(self, request: GenerationRequest, generated: Generated, init: int | None) -> None:
        """Give the images to the encoders and leave the device's thread free for the next job."""
        from api.engine.encode import encode

        began = time.perf_counter()
        meta = {**request.meta, **generated.meta}
        text = describe(meta) if request.image_format == "PNG" else None
        submit, style = self._encoders.submit, (request.image_format, request.image_quality, text)
        images = [submit(encode, image, *style) for image in generated.images]
        timings = ({} if init is None else {"init": init}) | generated.timings
        usage = self._engine.device.mem_usage()

        def finish() -> None:
            try:
                encoded = [image.result() for image in images]  # submitted earlier, so never behind this
                timings["encode"] = round((time.perf_counter() - began) * 1000)
                self._link.send(Done(request.id, GenerationResult(encoded, meta, timings, usage, generated.nsfw)))
            except Exception:
                log.exception("an image could not be encoded", extra={"request_id": request.id})
                message = "The image could not be encoded; the server's log says more."
                self._link.send(Failed(request.id, "INTERNAL_ERROR", message, {}, traceback.format_exc()))

        submit(finish)


def describe(meta: dict[str, Any]) -> str:
    """The ``parameters`` text of a PNG, in the form that image tools read."""
    inputs = meta["modelInputs"]
    prompt = inputs.get("prompt") or ""
    lines = ["\n".join(prompt) if isinstance(prompt, list) else prompt]
    if inputs.get("negative_prompt"):
        negative = inputs["negative_prompt"]
        lines.append(f"Negative prompt: {negative[0] if isinstance(negative, list) else negative}")
    known = {
        "Steps": inputs.get("num_inference_steps"),
        "Sampler": meta["SCHEDULER"],
        "CFG scale": inputs.get("guidance_scale"),
        "Seed": inputs.get("seed"),
        "Denoising strength": inputs.get("strength"),
        "Model": meta["MODEL_ID"],
        "Model hash": meta["MODEL_REVISION"],
    }
    lines.append(", ".join(f"{name}: {value}" for name, value in known.items() if value is not None))
    return "\n".join(lines)


def _quiet_libraries() -> None:
    """Progress bars and advice of the libraries do not belong in a server's log."""
    import diffusers
    import transformers

    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()
    warnings.simplefilter("ignore", FutureWarning)


def main() -> None:
    """Start: import torch, tell the service, serve."""
    began = time.perf_counter()
    parser = argparse.ArgumentParser()
    parser.add_argument("fd", type=int)
    parser.add_argument("device")
    args = parser.parse_args()
    settings = Settings.from_env()
    logs.configure(settings.log_format, settings.log_level)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal's Ctrl-C is the service's to handle
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    link = Link(socket.socket(fileno=args.fd))

    from api.engine.device import Device
    from api.engine.generate import Engine

    _quiet_libraries()
    engine = Engine(Device(args.device, required=bool(settings.devices)))
    init_ms = round((time.perf_counter() - began) * 1000)
    device = engine.device
    worker = Worker(link, engine, init_ms)
    while not link.inbox.empty():
        first = link.inbox.get()
        assert isinstance(first, Load)  # the service sends nothing else before it hears Ready
        worker.warm(first)
    link.send(Ready(str(device.torch), device.name, engine.versions, init_ms))
    worker.serve()


if __name__ == "__main__":
    main()
