"""test.py: the command people try first, against a stand-in for each kind of server."""

from __future__ import annotations

import base64
import json
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from api.engine.encode import encode_png

ROOT = Path(__file__).resolve().parents[2]
IMAGE = base64.b64encode(encode_png(np.zeros((8, 8, 3), np.uint8))).decode()
RESULT = {"$meta": {}, "image_base64": IMAGE, "$timings": {"inference": 2400}, "$mem_usage": 0}


class StandIn(BaseHTTPRequestHandler):
    """Answers like the native server, and like RunPod's platform under /v2/key."""

    seen: list[tuple[str, dict[str, Any], str]]
    polls: int

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        type(self).seen.append((self.path, body, self.headers.get("Authorization", "")))
        if self.path == "/v2/key/run":
            self.reply(200, {"id": "job-1", "status": "IN_QUEUE"})
        elif body["modelInputs"].get("prompt") == "bad":
            self.reply(400, {"$error": {"code": "INVALID_INPUTS", "message": "no"}})
        else:
            self.reply(200, RESULT)

    def do_GET(self) -> None:
        type(self).polls += 1
        done = {"id": "job-1", "status": "COMPLETED", "output": RESULT}
        failed = {"id": "job-1", "status": "FAILED", "error": "it broke"}
        last = failed if type(self).seen[-1][1]["input"]["modelInputs"].get("prompt") == "bad" else done
        self.reply(200, last if type(self).polls > 2 else {"id": "job-1", "status": "IN_PROGRESS"})

    def reply(self, status: int, body: dict[str, Any]) -> None:
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def stand_in() -> Iterator[tuple[type[StandIn], str]]:
    handler = type("Fresh", (StandIn,), {"seen": [], "polls": 0})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, args=[0.02], daemon=True).start()
    yield handler, f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


def run(*arguments: str, **environ: str) -> subprocess.CompletedProcess[str]:
    arguments = ("--output", tempfile.mkdtemp(), *arguments)  # what people made themselves stays as it is
    return subprocess.run(
        [sys.executable, ROOT / "test.py", *arguments],
        env={"PATH": "", **environ},
        capture_output=True,
        text=True,
        check=False,
    )


def test_it_prints_timings_and_shortens_images(stand_in: tuple[type[StandIn], str], tmp_path: Path) -> None:
    out = run("txt2img", "--output", str(tmp_path), TEST_URL=stand_in[1] + "/")
    assert out.returncode == 0, out.stdout + out.stderr
    assert "(inference: 2.4s)" in out.stdout
    assert "[8x8 PNG image, 0." in out.stdout
    assert IMAGE not in out.stdout
    assert (tmp_path / "txt2img.png").read_bytes() == base64.b64decode(IMAGE)


def test_arguments_reach_the_request(stand_in: tuple[type[StandIn], str]) -> None:
    handler, url = stand_in
    options = ["--call-arg", "MODEL_ID=a/b", "--model-arg", "seed=9", "--scheduler", "DDIMScheduler", "--xmfe", "1"]
    assert run("txt2img", *options, TEST_URL=url).returncode == 0
    body = handler.seen[0][1]
    assert body["modelInputs"]["seed"] == 9
    wanted = {"MODEL_ID": "a/b", "SCHEDULER": "DDIMScheduler", "xformers_memory_efficient_attention": True}
    assert body["callInputs"] == wanted


def test_a_failed_request_is_a_failed_run(stand_in: tuple[type[StandIn], str]) -> None:
    out = run("txt2img", "img2img", "--model-arg", "prompt=bad", TEST_URL=stand_in[1])
    assert out.returncode == 1
    assert "INVALID_INPUTS" in out.stdout
    assert "0 of 2 passed" in out.stdout


def test_no_server_is_said_plainly() -> None:
    out = run("txt2img", TEST_URL="http://127.0.0.1:9/")
    assert out.returncode == 1
    assert "scripts/serve" in out.stdout
    assert "Traceback" not in out.stderr


def test_an_unknown_name_is_refused() -> None:
    assert run("txt3img").returncode == 2


def runpod(url: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return run(
        "--runpod", "txt2img", *arguments, RUNPOD_API_URL=url + "/v2", RUNPOD_MODEL_KEY="key", RUNPOD_API_KEY="k3y"
    )


def test_runpod_polls_until_the_job_is_done(stand_in: tuple[type[StandIn], str]) -> None:
    handler, url = stand_in
    out = runpod(url)
    assert out.returncode == 0, out.stdout + out.stderr
    path, body, authorization = handler.seen[0]
    assert (path, authorization) == ("/v2/key/run", "Bearer k3y")
    assert "modelInputs" in body["input"]
    assert handler.polls == 3


def test_runpod_tells_why_a_job_failed(stand_in: tuple[type[StandIn], str]) -> None:
    out = runpod(stand_in[1], "--model-arg", "prompt=bad")
    assert out.returncode == 1
    assert "it broke" in out.stdout


def test_runpod_needs_its_keys() -> None:
    out = run("--runpod", "txt2img")
    assert out.returncode == 2
    assert "RUNPOD_API_KEY" in out.stderr
