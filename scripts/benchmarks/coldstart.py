"""Cold start of the serverless worker: from the start of the process to the first call of the denoiser.

Ours, ``python -m api runpod``, against plain diffusers in one script with the same SDK, both with one job that waits at
a stand-in for the platform. With the demo model and with SD 1.5's architecture at full size, random weights. ``warm``:
every file is in the page cache. ``cold``: those of the weights were dropped from it; the libraries' cannot be, while
any process maps them. Weights that are mapped are read when they are first used, so the time to the result, after one
step, is told as well. ``COLDSTART_ROUNDS`` says how often, three times unless told.
"""

from __future__ import annotations

import contextlib
import http.server
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import torch

from scripts.benchmarks.architectures import model
from scripts.benchmarks.measure import Figure, median
from scripts.benchmarks.serving import ROOT
from scripts.benchmarks.switch import drop_page_cache, fill_page_cache

_ROUNDS = int(os.environ.get("COLDSTART_ROUNDS", "3"))
_LIMIT = 600.0
_INPUT = {"prompt": "a red circle", "num_inference_steps": 1, "width": 64, "height": 64, "seed": 1}
_PLAIN = """
import time
marks = [("sdk", time.time())]
import runpod
marks.append(("diffusers", time.time()))
import base64, io, sys
import torch
from diffusers import StableDiffusionPipeline
marks.append(("from_pretrained", time.time()))
folder, device, dtype = sys.argv[1:]
del sys.argv[1:]
pipe = StableDiffusionPipeline.from_pretrained(folder, dtype=getattr(torch, dtype), local_files_only=True).to(device)
marks.append(("start", time.time()))

def first(*_):
    hook.remove()
    marks.append(("denoiser", time.time()))
    print("MARKS", *[f"{name}={at}" for name, at in marks], flush=True)

hook = pipe.unet.register_forward_pre_hook(first)

def handler(job):
    wanted = dict(job["input"])
    generator = torch.Generator().manual_seed(wanted.pop("seed"))
    out = io.BytesIO()
    pipe(**wanted, generator=generator).images[0].save(out, "PNG")
    return {"image": base64.b64encode(out.getvalue()).decode()}

runpod.serverless.start({"handler": handler})
"""


class _Platform(http.server.ThreadingHTTPServer):
    """Has one job, and takes its result."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Asked)
        self.taken = threading.Lock()
        self.result: dict[str, Any] = {}
        self.over = threading.Event()

    def environ(self) -> dict[str, str]:
        """What the platform puts into the worker's environment."""
        base = f"http://127.0.0.1:{self.server_address[1]}"
        skip = dict.fromkeys(("RUNPOD_SKIP_GPU_CHECK", "RUNPOD_SKIP_AUTO_SYSTEM_CHECKS"), "true")
        return {
            "RUNPOD_WEBHOOK_GET_JOB": f"{base}/job-take/$ID?x=1",
            "RUNPOD_WEBHOOK_POST_OUTPUT": f"{base}/job-done/$RUNPOD_POD_ID/$ID?x=1",
            "RUNPOD_WEBHOOK_PING": f"{base}/ping/$RUNPOD_POD_ID",
            "RUNPOD_POD_ID": "bench",
            "RUNPOD_AI_API_KEY": "bench",
            "RUNPOD_LOG_LEVEL": "ERROR",
            **skip,
        }


class _Asked(http.server.BaseHTTPRequestHandler):
    server: _Platform

    def do_GET(self) -> None:
        """A worker asks for a job, or says that it lives."""
        if "/job-take" in self.path and self.server.taken.acquire(blocking=False):
            job = {"id": "one", "input": _INPUT}
            body = json.dumps([job] if "batch" in self.path else job).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)
            return
        if "/job-" in self.path:
            self.server.over.wait(0.5)
        self.send_response(204)
        self.end_headers()

    def do_POST(self) -> None:
        """A worker is done, or says how far it is."""
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.send_response(200)
        self.send_header("Content-Length", "0")
        self.end_headers()
        if body.get("status") != "IN_PROGRESS":
            self.server.result = body
            self.server.over.set()

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing."""


@contextlib.contextmanager
def _platform() -> Iterator[_Platform]:
    with _Platform() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


@dataclass
class _Start:
    """One cold start: seconds from the start of the process.

    Attributes:
        denoiser: to the first call of the denoiser.
        result: to the result.
        phases: beginning and end of each, as a line.
    """

    denoiser: float
    result: float
    phases: str


@dataclass
class _Case:
    name: str
    folder: Path
    model_id: str
    environ: dict[str, str] = field(default_factory=dict)

    @property
    def files(self) -> list[Path]:
        return sorted(self.folder.glob("*/*.safetensors"))


def _started(command: list[str], environ: dict[str, str], marks: Callable[[str, float], tuple[float, str]]) -> _Start:
    """Start a worker, and wait until its job is done."""
    with _platform() as platform, tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        env = {**os.environ, **platform.environ(), **environ, "STATE_DIR": str(Path(folder) / "state")}
        with log.open("w") as out:
            began = time.time()
            process = subprocess.Popen(
                command, cwd=ROOT, env=env, stdout=out, stderr=subprocess.STDOUT, start_new_session=True
            )
            try:
                done = platform.over.wait(_LIMIT)
                took = time.time() - began
            finally:
                os.killpg(process.pid, signal.SIGKILL)  # the SDK forks one that would stay
                process.wait()
        text = log.read_text()
        assert done and "output" in platform.result, f"no result: {platform.result}\n{text[-3000:]}"
        denoiser, phases = marks(text, began)
        return _Start(denoiser, took, phases)


def _ours(case: _Case) -> _Start:
    def marks(text: str, began: float) -> tuple[float, str]:
        lines = [json.loads(line) for line in text.splitlines() if line.startswith('{"time"')]
        first = next(line for line in lines if re.search(r"first call of UNet2DCondition\w+\.forward", line["message"]))
        ready = next(line["message"] for line in lines if line["message"].startswith("ready for jobs"))
        return datetime.fromisoformat(first["time"]).timestamp() - began, ready

    environ = {"MODEL_ID": case.model_id, "LOG_FORMAT": "json", "LOG_LEVEL": "info", **case.environ}
    return _started([sys.executable, "-m", "api", "runpod"], environ, marks)


def _plain(case: _Case, device: str, dtype: str) -> _Start:
    def marks(text: str, began: float) -> tuple[float, str]:
        line = text.partition("MARKS ")[2].partition("\n")[0]  # behind a progress bar
        found = [(name, float(at) - began) for name, _, at in (part.partition("=") for part in line.split())]
        ends = [at for _, at in found[1:]]
        phases = [f"{name} {at:.2f}–{end:.2f}" for (name, at), end in zip(found, ends, strict=False)]
        return found[-1][1], ", ".join(phases)

    command = [sys.executable, "-W", "ignore", "-c", _PLAIN, str(case.folder), device, dtype]
    return _started(command, {"HF_HUB_OFFLINE": "1"}, marks)


def _compared(case: _Case, state: str, prepare: Callable[[], None]) -> Figure:
    cuda = torch.cuda.is_available()
    device, dtype = ("cuda", "float16") if cuda else ("cpu", "float32")
    ours: list[_Start] = []
    plain: list[_Start] = []
    for number in range(_ROUNDS + (state == "warm")):
        prepare()
        one = _ours(case)
        prepare()
        other = _plain(case, device, dtype)
        if number or state != "warm":  # what is compiled and mapped for the first time is nobody's cold start
            ours.append(one)
            plain.append(other)
    name = f"coldstart-{case.name}-{state}"
    print(f"{name}, ours: {ours[-1].phases}", file=sys.stderr)
    print(f"{name}, plain: {plain[-1].phases}", file=sys.stderr)
    to_call, base = median([one.denoiser for one in ours]), median([one.denoiser for one in plain])
    more = {
        "of_baseline": round(to_call / base, 3),
        "GB": round(sum(file.stat().st_size for file in case.files) / 1e9, 2),
        "s_result": round(median([one.result for one in ours]), 2),
        "s_result_plain": round(median([one.result for one in plain]), 2),
        "load": round(os.getloadavg()[0], 1),
        "rounds": [vars(one) for one in ours],
        "rounds_plain": [vars(one) for one in plain],
    }
    return Figure(name, to_call, base, "s", "diffusers and the SDK in one script", base / to_call, more)


def run() -> list[Figure]:
    """Measure."""
    print(f"load average {os.getloadavg()}", file=sys.stderr)
    precision = "fp16" if torch.cuda.is_available() else "fp32"
    with tempfile.TemporaryDirectory() as folder:
        real = model("sd1", precision, 1)
        (Path(folder) / "bench--sd1").symlink_to(real)
        local = {"LOCAL_MODELS": folder, "MODELS_DIR": str(Path(folder) / "none"), "MODEL_PRECISION": precision}
        cases = [
            _Case("demo", ROOT / "models" / "shapes", "demo/shapes", {"MODEL_PRECISION": precision}),
            _Case("sd1", real, "bench/sd1", local),
        ]
        return [
            _compared(case, state, lambda case=case, prepare=prepare: prepare(case.files))  # type: ignore[misc]
            for case in cases
            for state, prepare in (("warm", fill_page_cache), ("cold", drop_page_cache))
        ]
