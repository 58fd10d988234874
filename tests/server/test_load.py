"""Many clients at once: right images, an answering port, a bounded queue."""

from __future__ import annotations

import concurrent.futures
import contextlib
import json
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from tests.running import Server, as_base64, images_of, running

TOLERANCE = 1
"""Levels of 255 by which an image may differ from the one made alone; float32 on one CPU."""


def requests() -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """Requests that differ in everything that could leak from one into another."""
    picture = as_base64(np.full((64, 64, 3), (40, 170, 70), np.uint8))
    base = {"num_inference_steps": 6}
    return [
        ({**base, "prompt": "a red circle on blue", "seed": 1}, {}),
        ({**base, "prompt": "a yellow star on black", "seed": 2, "guidance_scale": 3}, {"SCHEDULER": "DDIMScheduler"}),
        ({**base, "prompt": "two green rings on white", "seed": 3}, {"SCHEDULER": "EulerAncestralDiscreteScheduler"}),
        ({**base, "prompt": "a blue square on red", "seed": 4, "width": 96}, {}),
        ({**base, "prompt": "a red circle", "seed": 5, "image": picture, "strength": 0.7}, {}),
        ({**base, "prompt": "a cat", "seed": 6}, {"MODEL_ID": "tiny/a"}),
        ({**base, "prompt": "a cat", "seed": 6}, {"MODEL_ID": "tiny/b"}),
        ({**base, "prompt": "a cat", "seed": 7}, {"MODEL_ID": "tiny/nsfw", "safety_checker": False}),
    ]


def test_eight_clients_at_once_get_the_images_made_alone(server: Server) -> None:
    wanted = requests()
    alone = [images_of(server.post(*request).json())[0] for request in wanted]
    rounds = 5

    def client(index: int) -> list[np.ndarray]:
        with httpx.Client(base_url=server.url, timeout=120) as http:
            out = []
            for turn in range(rounds):
                model_inputs, call_inputs = wanted[(index + turn) % len(wanted)]
                response = http.post("/", json={"modelInputs": model_inputs, "callInputs": call_inputs})
                assert response.status_code == 200, response.text[:300]
                out.append(images_of(response.json())[0])
            return out

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        results = list(pool.map(client, range(8)))
    wrong = [
        (index, turn)
        for index, images in enumerate(results)
        for turn, image in enumerate(images)
        if np.abs(image.astype(int) - alone[(index + turn) % len(wanted)]).max() > TOLERANCE
    ]
    assert wrong == []


def test_the_port_answers_while_a_job_runs(server: Server) -> None:
    times = []
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        job = pool.submit(server.post, {"prompt": "a red circle", "num_inference_steps": 200, "seed": 1})
        with httpx.Client(base_url=server.url) as http:
            while not job.done():
                began = time.monotonic()
                assert http.get("/health/live").status_code == 200
                times.append(time.monotonic() - began)
                time.sleep(0.01)
        assert job.result().status_code == 200
    assert len(times) > 20
    assert sorted(times)[len(times) // 2] < 0.1


@pytest.fixture(scope="module")
def small(models_dir: Path, tmp_path_factory: pytest.TempPathFactory):
    """A server with a queue of two and short time-outs."""
    environ = {
        "MODELS_DIR": str(models_dir),
        "MAX_QUEUE": "2",
        "MAX_CONCURRENCY": "1",
        "REQUEST_TIMEOUT": "6",
        "LEGACY_STATUS": "1",
    }
    with running({**environ, "LOG_LEVEL": "debug"}, tmp_path_factory.mktemp("log") / "server.log") as started:
        yield started


LONG = {"prompt": "a red circle", "num_inference_steps": 500, "seed": 1, "num_images_per_prompt": 4}


def wait_until(condition: Any, seconds: float = 10) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def status(server: Server) -> dict[str, Any]:
    return server.client.get("/health/ready").json()


def idle(server: Server) -> bool:
    now = status(server)
    return now["queue"] == 0 and not any(w["busy"] for w in now["workers"])


def send_and_hang_up(server: Server, seconds: float) -> None:
    with pytest.raises(httpx.TimeoutException):
        httpx.post(server.url, json={"modelInputs": LONG, "callInputs": {}}, timeout=seconds)


def test_a_client_that_goes_away_ends_its_job(small: Server) -> None:
    wait_until(lambda: idle(small))
    send_and_hang_up(small, 0.5)
    wait_until(lambda: idle(small), 3)


@contextlib.contextmanager
def occupied(server: Server) -> Iterator[None]:
    """One request runs and two wait until the end of the block, where their clients hang up."""
    wait_until(lambda: idle(server))
    body = json.dumps({"modelInputs": LONG, "callInputs": {}})
    head = f"POST / HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    with contextlib.ExitStack() as clients:
        for _ in range(3):
            client = clients.enter_context(socket.create_connection(("127.0.0.1", server.port)))
            client.sendall((head + body).encode())
        wait_until(lambda: status(server)["queue"] == 2)
        yield
    wait_until(lambda: idle(server))


def test_a_full_queue_is_said_at_once(small: Server) -> None:
    with occupied(small):
        began = time.monotonic()
        response = small.post({"prompt": "a"})
        took = time.monotonic() - began
        assert status(small)["queue"] == 2
    assert response.json()["$error"]["code"] == "QUEUE_FULL"
    assert int(response.headers["retry-after"]) >= 1
    assert took < 1
    assert small.post({"prompt": "a", "num_inference_steps": 1}).status_code == 200


def test_a_full_queue_is_a_429_for_streams_too(small: Server) -> None:
    def refused(_: int) -> bool:
        body = {"modelInputs": {"prompt": "a", "num_inference_steps": 100}, "callInputs": {"streamEvents": True}}
        answer = httpx.post(small.url, json=body, timeout=30).text
        return "QUEUE_FULL" in answer and answer.count("\n") == 0  # a whole answer, no stream

    with occupied(small), concurrent.futures.ThreadPoolExecutor(12) as pool:
        assert all(pool.map(refused, range(12)))


def test_a_request_that_takes_too_long_times_out(small: Server) -> None:
    wait_until(lambda: idle(small))
    steps = {**LONG, "num_images_per_prompt": 16}
    assert small.post(steps).json()["$error"]["code"] == "TIMED_OUT"
    wait_until(lambda: idle(small), 5)


def test_legacy_status_is_200_and_debug_shows_the_stack(small: Server) -> None:
    response = small.post({"prompt": "a"}, {"MODEL_ID": "tiny/partless"})
    assert response.status_code == 200
    assert "Traceback" in response.json()["$error"]["stack"]
    assert small.client.get("/nowhere").status_code == 404


@pytest.mark.slow
def test_two_workers_share_the_queue_and_keep_their_models(models_dir: Path, tmp_path: Path) -> None:
    """With two devices two jobs run at once, and a job goes where its model is in memory."""
    environ = {"MODELS_DIR": str(models_dir), "DEVICES": "cpu,cpu", "MODEL_ID": "tiny/a", "OMP_NUM_THREADS": "1"}
    with running(environ, tmp_path / "server.log") as server, concurrent.futures.ThreadPoolExecutor(2) as pool:
        wait_until(lambda: all(w["ready"] for w in status(server)["workers"]), 60)
        long = {"prompt": "a cat", "num_inference_steps": 300, "seed": 1}
        jobs = [pool.submit(server.post, long) for _ in range(2)]
        wait_until(lambda: all(w["busy"] for w in status(server)["workers"]))
        a, b = (images_of(job.result().json())[0].astype(int) for job in jobs)
        assert np.abs(a - b).max() <= TOLERANCE
        # the model that one worker has loaded is not loaded by the other while that one is free
        loads = [
            "loadModel" in server.post({**long, "num_inference_steps": 1}, {"MODEL_ID": "tiny/b"}).json()["$timings"]
            for _ in range(4)
        ]
        assert loads == [True, False, False, False]
