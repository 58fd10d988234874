"""The ways in which test.py sends: as a stream, for later, to RunPod, many at a time; and what it says when that fails."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from tests.unit.test_client import IMAGE, RESULT, ROOT

Answer = tuple[int, Any]
RUN = {"id": "job-1", "status": "IN_QUEUE"}


class Script:
    """A server that answers each route with what is written for it, the last of it for ever."""

    def __init__(self) -> None:
        self.answers: dict[str, list[Answer | Callable[[], Answer]]] = {}
        self.seen: list[tuple[str, dict[str, str], Any]] = []
        self._lock = threading.Lock()
        script = self

        class Handler(BaseHTTPRequestHandler):
            def do(self) -> None:
                data = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                what = f"{self.command} {self.path}"
                with script._lock:
                    script.seen.append((what, dict(self.headers), json.loads(data) if data else None))
                    left = script.answers.get(what) or [(404, {"error": "no such thing"})]
                    answer = left.pop(0) if len(left) > 1 else left[0]
                status, body = answer() if callable(answer) else answer
                data = body if isinstance(body, bytes) else json.dumps(body).encode()
                self.send_response(status)
                if status in (301, 302):
                    self.send_header("Location", "http://elsewhere.invalid/")
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                with contextlib.suppress(OSError):
                    self.wfile.write(data)

            do_GET = do_POST = do_DELETE = do

            def log_message(self, *_: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        threading.Thread(target=self.server.serve_forever, args=[0.02], daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def routes(self) -> list[str]:
        return [what for what, _, _ in self.seen]


@pytest.fixture
def script() -> Iterator[Script]:
    made = Script()
    yield made
    made.server.shutdown()


def start(script: Script, tmp_path: Path, *arguments: str, **environ: str) -> subprocess.Popen[str]:
    runpod = {"RUNPOD_API_URL": script.url + "/v2", "RUNPOD_MODEL_KEY": "key", "RUNPOD_API_KEY": "k3y"}
    return subprocess.Popen(
        [sys.executable, ROOT / "test.py", "--output", str(tmp_path), *arguments],
        env={"PATH": "", "TEST_URL": script.url, **runpod, **environ},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def run(script: Script, tmp_path: Path, *arguments: str, **environ: str) -> tuple[int, str, str]:
    process = start(script, tmp_path, *arguments, **environ)
    out, err = process.communicate()
    assert "Traceback" not in err, err
    return process.returncode, out, err


def lines(*events: dict[str, Any]) -> bytes:
    return b"".join(json.dumps(event).encode() + b"\n" for event in events)


STEP = {"type": "inference", "progress": 0.3, "step": 6, "total": 20, "eta": 2.31}


def test_a_stream_is_shown_as_it_comes_and_ends_in_the_answer(script: Script, tmp_path: Path) -> None:
    script.answers["POST /"] = [(200, lines({"type": "inference", "status": "start"}, STEP, RESULT))]
    status, out, err = run(script, tmp_path, "--stream", "txt2img")
    assert status == 0, out + err
    assert script.seen[0][2]["callInputs"]["streamEvents"] is True
    assert "step 6 of 20, 2.3s to go" in err
    assert (tmp_path / "txt2img.png").exists()


def test_a_stream_that_ends_in_an_error_is_a_failure(script: Script, tmp_path: Path) -> None:
    error = {"$error": {"code": "OUT_OF_MEMORY", "message": "It does not fit."}}
    script.answers["POST /"] = [(200, lines(STEP, error)), (200, lines(STEP))]
    status, out, _ = run(script, tmp_path, "--stream", "--repeat", "2", "txt2img")
    assert status == 1
    assert "OUT_OF_MEMORY: It does not fit." in out
    assert "ended without an answer" in out


def test_a_job_for_later_is_polled_and_its_key_sent(script: Script, tmp_path: Path) -> None:
    script.answers["POST /jobs"] = [(202, {"id": "j", "state": "IN_QUEUE"})]
    running = {"id": "j", "state": "IN_PROGRESS", "progress": {"step": 3, "total": 20, "eta": None}}
    done = {"id": "j", "state": "COMPLETED", "result": RESULT, "timings": {"queued": 400, "running": 900}}
    busy = {"$error": {"code": "RATE_LIMITED", "message": "later"}}
    script.answers["GET /jobs/j"] = [(200, running), (502, b"<html>"), (429, busy), (200, done)]
    status, out, err = run(script, tmp_path, "--async", "txt2img", API_KEY="secret-key")
    assert status == 0, out + err
    assert "step 3 of 20" in err
    assert "(queued: 0.4s, running: 0.9s, inference: 2.4s)" in out
    assert {headers.get("Authorization") for _, headers, _ in script.seen} == {"Bearer secret-key"}
    assert script.seen[0][1].get("Idempotency-Key")
    assert "Python-urllib" not in script.seen[0][1]["User-Agent"]


def test_a_job_for_later_that_fails_says_why(script: Script, tmp_path: Path) -> None:
    script.answers["POST /jobs"] = [(202, {"id": "j", "state": "IN_QUEUE"})]
    failed = {"id": "j", "state": "FAILED", "$error": {"code": "MODEL_BROKEN", "message": "cut short"}}
    script.answers["GET /jobs/j"] = [(200, failed)]
    status, out, _ = run(script, tmp_path, "--async", "txt2img")
    assert (status, "MODEL_BROKEN: cut short" in out) == (1, True)


def test_runpod_shows_progress_and_saves_the_simple_forms_image(script: Script, tmp_path: Path) -> None:
    script.answers["POST /v2/key/run"] = [(200, RUN)]
    running = {**RUN, "status": "IN_PROGRESS", "output": {"step": 6, "total": 20}}
    done = {**RUN, "status": "COMPLETED", "output": {"image": IMAGE}, "delayTime": 300, "executionTime": 1200}
    script.answers["GET /v2/key/status/job-1"] = [(200, RUN), (200, running), (429, {}), (200, done)]
    status, out, err = run(script, tmp_path, "--runpod", "txt2img")
    assert status == 0, out + err
    assert "IN_PROGRESS step 6 of 20" in err
    assert "(queued: 0.3s, running: 1.2s)" in out
    assert (tmp_path / "txt2img.png").exists()


def test_runpod_streams(script: Script, tmp_path: Path) -> None:
    script.answers["POST /v2/key/run"] = [(200, RUN)]
    first = {"status": "IN_PROGRESS", "stream": [{"output": {"step": 6, "total": 20}}, {"output": "hello"}]}
    script.answers["GET /v2/key/stream/job-1"] = [(200, first), (200, {"status": "COMPLETED", "stream": []})]
    script.answers["GET /v2/key/status/job-1"] = [(200, {**RUN, "status": "COMPLETED", "output": [STEP, RESULT]})]
    status, out, err = run(script, tmp_path, "--runpod", "--stream", "txt2img")
    assert status == 0, out + err
    assert "IN_PROGRESS step 6 of 20" in err
    assert script.seen[0][2]["input"]["callInputs"]["streamEvents"] is True
    assert script.routes().count("GET /v2/key/status/job-1") == 1


WORKER_ERROR = json.dumps({"error_type": "<class 'ValueError'>", "error_message": "it broke", "error_traceback": "…"})


@pytest.mark.parametrize(
    ("job", "told"),
    [
        ({"status": "FAILED", "error": WORKER_ERROR}, "FAILED: it broke\n"),
        ({"status": "FAILED", "output": {"$error": {"code": "X", "message": "no such model"}}}, "no such model"),
        ({"status": "FAILED"}, "says nothing about why"),
        ({"status": "TIMED_OUT"}, "execution timeout"),
        ({"status": "CANCELLED"}, "Somebody else cancelled it"),
        ({"status": "COMPLETED", "output": {"error": "bad prompt"}}, "FAILED: bad prompt"),
        ({"status": "COMPLETED", "output": {"$error": {"code": "NO_GO", "message": "m"}}}, "NO_GO: m"),
        ({"status": "COMPLETED"}, "COMPLETED without an output"),
    ],
)
def test_runpod_says_why_there_is_no_picture(script: Script, tmp_path: Path, job: dict[str, Any], told: str) -> None:
    script.answers["POST /v2/key/run"] = [(200, RUN)]
    script.answers["GET /v2/key/status/job-1"] = [(200, {"id": "job-1", **job})]
    status, out, _ = run(script, tmp_path, "--runpod", "txt2img")
    assert status == 1
    assert told in out


@pytest.mark.parametrize(
    ("answers", "told"),
    [
        ({"POST /v2/key/run": (401, b"")}, "RUNPOD_API_KEY"),
        ({"POST /v2/key/run": (404, {"error": "endpoint not found"})}, "RUNPOD_MODEL_KEY"),
        ({"POST /v2/key/run": (413, {"error": "too large"})}, "smaller pictures"),
        ({"POST /v2/key/run": (200, b"<html>hello</html>")}, "RUNPOD_API_URL"),
        ({"POST /v2/key/run": (302, b"")}, "keys are not sent on"),
        ({"POST /v2/key/run": (200, RUN), "GET /v2/key/status/job-1": (404, {})}, "30 minutes"),
    ],
)
def test_runpod_says_why_it_was_refused(script: Script, tmp_path: Path, answers: dict[str, Answer], told: str) -> None:
    script.answers = {what: [answer] for what, answer in answers.items()}
    status, out, _ = run(script, tmp_path, "--runpod", "txt2img")
    assert status == 1
    assert told in out


@pytest.mark.parametrize(
    ("status", "told"), [(401, "API_KEY"), (524, "--stream or --async"), (502, "may still be starting")]
)
def test_what_proxies_say_is_explained(script: Script, tmp_path: Path, status: int, told: str) -> None:
    script.answers["POST /"] = [(status, b"<html>whatever</html>")]
    code, out, _ = run(script, tmp_path, "txt2img")
    assert code == 1
    assert told in out


def interrupt(script: Script, tmp_path: Path, route: str, *arguments: str) -> tuple[int, str]:
    process = start(script, tmp_path, *arguments)
    deadline = time.monotonic() + 60
    while route not in script.routes():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    for _ in range(2):  # as where a process group gets it, and its leader once more
        os.kill(process.pid, signal.SIGINT)
        time.sleep(0.05)
    out, err = process.communicate()
    assert "Traceback" not in err, err
    return process.returncode, out


def test_ctrl_c_cancels_the_job_at_runpod(script: Script, tmp_path: Path) -> None:
    script.answers["POST /v2/key/run"] = [(200, RUN)]
    script.answers["GET /v2/key/status/job-1"] = [(200, {**RUN, "status": "IN_PROGRESS"})]
    script.answers["POST /v2/key/cancel/job-1"] = [(200, {"id": "job-1", "status": "CANCELLED"})]
    status, out = interrupt(script, tmp_path, "GET /v2/key/status/job-1", "--runpod", "txt2img", "img2img")
    assert status == 130
    assert script.routes().count("POST /v2/key/cancel/job-1") == 1
    assert script.routes().count("POST /v2/key/run") == 1, "the next one was not begun"
    assert "0 of 2 passed" in out


def test_ctrl_c_cancels_every_job_for_later(script: Script, tmp_path: Path) -> None:
    script.answers["POST /jobs"] = [(202, {"id": f"j{n}", "state": "IN_QUEUE"}) for n in range(3)]
    for n in range(3):
        script.answers[f"GET /jobs/j{n}"] = [(200, {"id": f"j{n}", "state": "IN_QUEUE"})]
        script.answers[f"DELETE /jobs/j{n}"] = [(200, {"id": f"j{n}", "state": "CANCELLED"})]
    more = ["--async", "--concurrency", "2", "--repeat", "5", "--json", "txt2img"]
    status, out = interrupt(script, tmp_path, "GET /jobs/j1", *more)
    assert status == 130
    assert {"DELETE /jobs/j0", "DELETE /jobs/j1"} <= set(script.routes())
    assert json.loads(out)["stopped"] is True


def test_one_that_takes_too_long_is_cancelled(script: Script, tmp_path: Path) -> None:
    script.answers["POST /v2/key/run"] = [(200, RUN)]
    script.answers["GET /v2/key/status/job-1"] = [(200, {**RUN, "status": "IN_PROGRESS"})]
    status, out, _ = run(script, tmp_path, "--runpod", "--timeout", "0.3", "txt2img")
    assert status == 1
    assert "TIMED_OUT: It was not done in 0 s" in out
    assert script.routes()[-1] == "POST /v2/key/cancel/job-1"


def test_so_many_run_at_a_time_and_their_latency_is_shown(script: Script, tmp_path: Path) -> None:
    together = threading.Barrier(4, timeout=60)

    def answer() -> Answer:
        together.wait()  # breaks, and answers nothing, unless four are here at once
        return 200, RESULT

    script.answers["POST /"] = [answer]
    status, out, err = run(script, tmp_path, "--concurrency", "4", "--repeat", "8", "txt2img")
    assert status == 0, out + err
    told = out.splitlines()
    at = next(number for number, line in enumerate(told) if line.startswith("txt2img  "))
    head, row = told[at - 1], told[at]
    assert head.split() == ["runs", "failed", "p50", "p95", "min", "max", "requests/s", "images/s"]
    assert row.split()[1:3] == ["8", "0"]
    assert "8 of 8 passed" in out
    assert [path.name for path in tmp_path.iterdir()] == ["txt2img.png"]


def test_json_is_one_object_and_nothing_else(script: Script, tmp_path: Path) -> None:
    error = {"$error": {"code": "INVALID_INPUTS", "message": "no"}}
    script.answers["POST /"] = [(200, RESULT), (200, RESULT), (400, error)]
    status, out, err = run(script, tmp_path, "--json", "--repeat", "3", "txt2img")
    told = json.loads(out)
    assert (status, err) == (1, "")
    assert (told["ok"], told["total"]["runs"], told["total"]["failed"]) == (False, 3, 1)
    took = sorted(one["seconds"] for one in told["runs"] if one["ok"])
    assert (told["tests"]["txt2img"]["p50_s"], told["tests"]["txt2img"]["p95_s"]) == (took[0], took[1])
    assert [one.get("error") for one in told["runs"]] == [None, None, {"code": "INVALID_INPUTS", "message": "no"}]
    assert told["runs"][0]["files"] == [str(tmp_path / "txt2img.png")]


def test_pictures_that_are_not_there_are_said(script: Script, tmp_path: Path) -> None:
    alone = tmp_path / "alone"
    alone.mkdir()
    (alone / "test.py").write_bytes((ROOT / "test.py").read_bytes())
    command = [sys.executable, alone / "test.py", "--url", script.url, "img2img"]
    out = subprocess.run(command, env={"PATH": ""}, capture_output=True, text=True, check=False)
    assert (out.returncode, out.stderr) == (1, "")
    assert "green-circle-left.png is not there" in out.stdout


@pytest.mark.parametrize(
    "arguments", [("localhost:8000",), ("http://", "--stream"), ("pod-1-8000.proxy.runpod.net/", "--async")]
)
def test_an_address_that_is_none_is_said(script: Script, tmp_path: Path, arguments: tuple[str, ...]) -> None:
    status, out, _ = run(script, tmp_path, "--url", *arguments, "txt2img")
    assert status == 1
    assert "is no address" in out or "does not answer" in out


def test_an_empty_address_is_the_usual_one(script: Script, tmp_path: Path) -> None:
    """As where a guide's ``export TEST_URL=""`` was copied."""
    _, out, _ = run(script, tmp_path, "--json", "--timeout", "1", "txt2img", TEST_URL="")
    assert json.loads(out)["url"] == "http://localhost:8000"


@pytest.mark.parametrize(
    ("arguments", "body", "told"),
    [
        ((), {}, "FAILED: txt2img: NO_IMAGES: "),
        ((), {"images_base64": []}, "FAILED: txt2img: NO_IMAGES: "),
        ((), {"image_base64": ""}, "FAILED: txt2img: NOT_UNDERSTOOD: "),
        ((), {"image_base64": IMAGE, "$timings": 5}, "FAILED: txt2img: NOT_UNDERSTOOD: "),
        ((), {"$error": "boom"}, "FAILED: txt2img: NOT_UNDERSTOOD: "),
        (("--async",), {"id": "job-1", "state": "COMPLETED"}, "FAILED: txt2img: NOT_UNDERSTOOD: "),
        (("--async",), b"<html>", "FAILED: txt2img: NOT_UNDERSTOOD: "),
        (("--output", "/dev/null/here"), {"image_base64": IMAGE}, "FAILED: txt2img: NOT_SAVED: /dev/null"),
    ],
)
def test_an_answer_without_a_picture_is_a_failure(
    script: Script, tmp_path: Path, arguments: tuple[str, ...], body: Any, told: str
) -> None:
    script.answers["POST /"] = script.answers["POST /jobs"] = [(200, body)]
    code, out, err = run(script, tmp_path, "txt2img", *arguments)
    assert (code, "Traceback" in err) == (1, False), err
    assert told in out
