"""Jobs for later, over HTTP, through restarts and deaths."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from tests.running import Server, images_of, pixels, running

QUICK = {"prompt": "a red circle on a blue background", "num_inference_steps": 3, "seed": 5}
LONG = {"prompt": "a red circle", "num_inference_steps": 500, "seed": 1}
TOLERANCE = 1
"""Levels of 255 by which an image may differ from the one made alone; float32 on one CPU."""
OVER = ("COMPLETED", "FAILED", "CANCELLED", "TIMED_OUT")


@pytest.fixture
def fresh(tmp_path: Path, models_dir: Path) -> Iterator[Server]:
    with running({"MODELS_DIR": str(models_dir), "MAX_CONCURRENCY": "2"}, tmp_path / "server.log") as server:
        yield server


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory, models_dir: Path) -> Iterator[Server]:
    """Only tests of one file, one at a time, send to it; each leaves it idle."""
    environ = {"MODELS_DIR": str(models_dir), "MAX_CONCURRENCY": "2"}
    with running(environ, tmp_path_factory.mktemp("own") / "server.log") as server:
        yield server


def send(server: Server, model_inputs: dict[str, Any], headers: dict[str, str] | None = None, **more: Any) -> str:
    answer = server.client.post("/jobs", json={"modelInputs": model_inputs, **more}, headers=headers)
    assert answer.status_code == 202, answer.text
    assert answer.headers["location"] == f"/jobs/{answer.json()['id']}"
    return str(answer.json()["id"])


def look(server: Server, job_id: str, query: str = "") -> dict[str, Any]:
    answer = server.client.get(f"/jobs/{job_id}{query}")
    assert answer.status_code == 200, answer.text
    return dict(answer.json())


def wait_for(server: Server, job_id: str, states: tuple[str, ...] = OVER, seconds: float = 120) -> dict[str, Any]:
    deadline = time.monotonic() + seconds
    while (body := look(server, job_id, "?images=url"))["state"] not in states:
        assert time.monotonic() < deadline, body
        time.sleep(0.02)
    return body


def sse(
    server: Server, job_id: str, after: int | None = None, stop_at: int | None = None
) -> list[tuple[int, dict[str, Any]]]:
    headers = {"Accept": "text/event-stream"} | ({} if after is None else {"Last-Event-ID": str(after)})
    out: list[tuple[int, dict[str, Any]]] = []
    with server.client.stream("GET", f"/jobs/{job_id}/events", headers=headers) as answer:
        assert answer.headers["content-type"] == "text/event-stream"
        for line in answer.iter_lines():
            if line.startswith("id: "):
                number = int(line[4:])
            elif line.startswith("data: "):
                out.append((number, json.loads(line[6:])))
                if stop_at is not None and number >= stop_at:
                    return out
    return out


def restart(server: Server, environ: dict[str, str], log: Path, *, kill: bool) -> Server:
    if kill:
        for pid in [*server.worker_pids(), server.process.pid]:
            os.kill(pid, signal.SIGKILL)
        server.process.wait(10)
    else:
        assert server.stop() == 0
    again = Server({"STATE_DIR": str(server.log.with_suffix(".state")), **environ}, log)
    again.wait_live()
    return again


def test_a_job_is_accepted_run_and_read(server: Server) -> None:
    alone = images_of(server.post({**QUICK, "num_images_per_prompt": 2}).json())
    answer = server.client.post("/jobs", json={"modelInputs": {**QUICK, "num_images_per_prompt": 2}})
    assert answer.status_code == 202
    assert answer.json()["state"] == "IN_QUEUE"
    assert answer.json()["queuePosition"] >= 1
    job_id = answer.json()["id"]
    body = wait_for(server, job_id)
    assert (body["id"], body["state"], body["priority"], body["tries"]) == (job_id, "COMPLETED", "normal", 1)
    assert body["created"] <= body["started"] <= body["finished"]
    assert body["timings"].keys() == {"queued", "running"}
    whole = look(server, job_id)["result"]
    assert {"$meta", "$timings", "$mem_usage", "images_base64"} <= whole.keys()
    assert whole["$meta"]["modelInputs"]["seed"] == QUICK["seed"]
    linked = body["result"]
    assert "images_base64" not in linked
    for image, link, reference in zip(images_of(whole), linked["image_urls"], alone, strict=True):
        fetched = server.client.get(link)
        assert fetched.headers["content-type"] == "image/png"
        assert np.array_equal(pixels(fetched.content), image)
        assert np.abs(image.astype(int) - reference).max() <= TOLERANCE
    assert server.client.get(f"/jobs/{job_id}/images/2").json()["$error"]["code"] == "NOT_FOUND"
    listed = server.client.get("/jobs?limit=1").json()["jobs"]
    assert [(job["id"], job["state"]) for job in listed] == [(job_id, "COMPLETED")]


def test_async_on_the_native_route_is_the_same(server: Server) -> None:
    answer = server.post(QUICK, {"async": True, "image_format": "WEBP"})
    assert answer.status_code == 202
    body = wait_for(server, answer.json()["id"])
    image = server.client.get(body["result"]["image_urls"][0])
    assert image.headers["content-type"] == "image/webp"
    assert server.post(QUICK, {"async": False}).status_code == 200


@pytest.mark.parametrize(
    ("body", "headers", "code", "field"),
    [
        ({"modelInputs": {"prompt": "x", "width": 7}}, {}, "INVALID_INPUTS", "modelInputs.width"),
        ({"modelInputs": {"prompt": "x", "nope": 7}}, {}, "UNKNOWN_INPUT", "modelInputs.nope"),
        ({"modelInputs": {"prompt": "x", "image": "!"}}, {}, "INVALID_IMAGE", "modelInputs.image"),
        ({"modelInputs": {"prompt": "x"}, "callInputs": {"MODEL_ID": "no/such"}}, {}, "MODEL_MISMATCH", "callInputs.MODEL_ID"),
        ({"modelInputs": {"prompt": "x"}, "callInputs": {"streamEvents": True}}, {}, "INVALID_INPUTS", "callInputs.streamEvents"),
        ({"modelInputs": {"prompt": "x"}, "callInputs": {"preview": 0}}, {}, "INVALID_INPUTS", "callInputs.preview"),
        ({"modelInputs": {"prompt": "x"}, "priority": "hihg"}, {}, "INVALID_INPUTS", "priority"),
        ({"modelInputs": {"prompt": "x"}, "priority": 3}, {}, "INVALID_INPUTS", "priority"),
        ({"modelInputs": {"prompt": "x"}, "prio": "low"}, {}, "UNKNOWN_INPUT", "prio"),
        ({"modelInputs": {"prompt": "x"}}, {"Idempotency-Key": "k" * 201}, "INVALID_INPUTS", "Idempotency-Key"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said_at_once(
    server: Server, body: dict[str, Any], headers: dict[str, str], code: str, field: str
) -> None:
    before = server.client.get("/jobs").json()
    answer = server.client.post("/jobs", json=body, headers=headers)
    error = answer.json()["$error"]
    assert (error["code"], error.get("field")) == (code, field)
    assert 400 <= answer.status_code < 500
    assert server.client.get("/jobs").json() == before


@pytest.mark.parametrize(("method", "path"), [("GET", ""), ("DELETE", ""), ("GET", "/events"), ("GET", "/images/0")])
def test_an_unknown_id_is_a_404_that_says_why(server: Server, method: str, path: str) -> None:
    answer = server.client.request(method, f"/jobs/0123456789abcdef{path}")
    assert (answer.status_code, answer.json()["$error"]["code"]) == (404, "NO_SUCH_JOB")


def test_a_job_that_fails_when_it_runs_says_why(server: Server) -> None:
    job_id = send(server, QUICK, callInputs={"MODEL_ID": "tiny/cut"})
    body = wait_for(server, job_id)
    assert (body["state"], body["$error"]["code"]) == ("FAILED", "MODEL_BROKEN")
    assert body["$error"]["message"]
    last = sse(server, job_id)[-1][1]
    assert (last["state"], last["code"], last["$error"]["code"]) == ("FAILED", "MODEL_BROKEN", "MODEL_BROKEN")


def test_every_reader_sees_the_same_events_and_can_resume(server: Server) -> None:
    job_id = send(server, {**LONG, "num_inference_steps": 100})
    begun = sse(server, job_id, stop_at=5)  # and goes away in the middle
    rest = sse(server, job_id, after=begun[-1][0])
    told = begun + rest
    assert [number for number, _ in told] == list(range(1, len(told) + 1))
    assert all(body["seq"] == number for number, body in told)
    with server.client.stream("GET", f"/jobs/{job_id}/events", headers={"Accept": "application/x-ndjson"}) as answer:
        lines = [json.loads(line) for line in answer.iter_lines()]
    polled = server.client.get(f"/jobs/{job_id}/events", headers={"Accept": "application/json"}).json()
    assert polled["state"] == "COMPLETED"
    assert lines == polled["events"] == [body for _, body in told]
    later = server.client.get(f"/jobs/{job_id}/events?after=3", headers={"Accept": "application/json"}).json()
    assert later["events"] == lines[3:]
    states = [body["state"] for body in lines if body["type"] == "state"]
    assert states == ["IN_QUEUE", "IN_PROGRESS", "COMPLETED"]
    assert lines[-1]["state"] == "COMPLETED"
    steps = [body["step"] for body in lines if body.get("status") == "progress"]
    assert steps == sorted(steps)
    assert steps[-1] == 100
    over = server.client.get(
        f"/jobs/{job_id}/events", headers={"Accept": "text/event-stream", "Last-Event-ID": str(told[-1][0])}
    )
    assert over.status_code == 204  # an EventSource stops here


def test_progress_is_told_while_it_runs(own: Server) -> None:
    job_id = send(own, LONG)
    wait_for(own, job_id, ("IN_PROGRESS",))
    seen = []
    while len(seen) < 5:
        progress = look(own, job_id).get("progress")
        if progress and progress["step"] > 2 and (not seen or progress["step"] > seen[-1]["step"]):
            seen.append(progress)
    assert all(progress["total"] == 500 and progress["eta"] > 0 for progress in seen)
    assert own.client.delete(f"/jobs/{job_id}").json()["state"] == "CANCELLED"


def test_jobs_are_cancelled_wherever_they_are(own: Server) -> None:
    runs, other = send(own, LONG), send(own, LONG)
    waits = send(own, LONG)
    wait_for(own, other, ("IN_PROGRESS",))
    assert look(own, waits)["queuePosition"] == 1
    for job_id in (waits, runs, other):
        answer = own.client.delete(f"/jobs/{job_id}")
        assert (answer.status_code, answer.json()["state"]) == (200, "CANCELLED")
    deadline = time.monotonic() + 10
    while any(w["busy"] for w in own.client.get("/health/ready").json()["workers"]):
        assert time.monotonic() < deadline, "a cancelled job still runs"
        time.sleep(0.02)
    done = send(own, QUICK)
    assert wait_for(own, done)["state"] == "COMPLETED"
    assert own.client.delete(f"/jobs/{done}").json()["state"] == "COMPLETED"
    for job_id in (waits, runs, other):
        assert look(own, job_id)["$error"]["code"] == "CANCELLED"
        assert [body["state"] for _, body in sse(own, job_id) if body["type"] == "state"][-1] == "CANCELLED"
    assert own.client.get("/health/ready").json()["queue"] == 0


def test_priority_and_one_bound_for_all(tmp_path: Path, models_dir: Path) -> None:
    environ = {"MODELS_DIR": str(models_dir), "MAX_CONCURRENCY": "1", "MAX_QUEUE": "3"}
    with running(environ, tmp_path / "server.log") as server:
        runs = send(server, LONG)
        wait_for(server, runs, ("IN_PROGRESS",))
        jobs = {name: send(server, QUICK, priority=name) for name in ("low", "normal")}
        jobs["high"] = send(server, QUICK, {"Idempotency-Key": "again"}, priority="high")
        places = {name: look(server, job_id)["queuePosition"] for name, job_id in jobs.items()}
        assert places == {"high": 1, "normal": 2, "low": 3}
        for refused in (
            server.post(QUICK),
            server.post(QUICK, {"async": True}),
            server.client.post("/jobs", json={"modelInputs": QUICK}),
        ):
            assert (refused.status_code, refused.json()["$error"]["code"]) == (429, "QUEUE_FULL")
            assert int(refused.headers["retry-after"]) >= 1
        assert send(server, QUICK, {"Idempotency-Key": "again"}, priority="high") == jobs["high"]
        assert server.client.get("/health/ready").json()["queue"] == 3
        server.client.delete(f"/jobs/{runs}")
        begun = {name: wait_for(server, job_id)["started"] for name, job_id in jobs.items()}
        assert begun["high"] <= begun["normal"] <= begun["low"]
        assert server.post(QUICK).status_code == 200


def test_the_same_key_is_the_same_job(server: Server) -> None:
    first = send(server, QUICK, {"Idempotency-Key": "order 66"})
    assert send(server, QUICK, {"Idempotency-Key": "order 66"}) == first
    wait_for(server, first)
    assert send(server, QUICK, {"Idempotency-Key": "order 66"}) == first
    assert send(server, QUICK, {"Idempotency-Key": "order 67"}) != first
    other = server.client.post(
        "/jobs", json={"modelInputs": {**QUICK, "seed": 6}}, headers={"Idempotency-Key": "order 66"}
    )
    assert other.json()["$error"]["field"] == "Idempotency-Key"


def test_what_is_old_is_removed(tmp_path: Path, models_dir: Path) -> None:
    environ = {"MODELS_DIR": str(models_dir), "MAX_CONCURRENCY": "1", "JOB_TTL": "2", "RESULT_TTL": "2"}
    with running(environ, tmp_path / "server.log") as server:
        done = send(server, QUICK)
        assert wait_for(server, done)["state"] == "COMPLETED"
        results = tmp_path / "server.state" / "results"
        assert (results / done / "0.png").exists()
        runs, waits = send(server, LONG), send(server, QUICK)
        assert wait_for(server, waits, seconds=10)["$error"]["code"] == "TIMED_OUT"
        assert look(server, runs)["state"] == "IN_PROGRESS"
        server.client.delete(f"/jobs/{runs}")
        deadline = time.monotonic() + 10
        while any(server.client.get(f"/jobs/{job_id}").status_code == 200 for job_id in (done, waits, runs)):
            assert time.monotonic() < deadline
            time.sleep(0.1)
        assert server.client.get("/jobs").json() == {"jobs": []}
        while list(results.iterdir()):
            assert time.monotonic() < deadline
            time.sleep(0.1)


@pytest.mark.parametrize("kill", [pytest.param(False, marks=pytest.mark.slow), True])
def test_jobs_survive_a_restart_and_give_the_image_made_at_once(tmp_path: Path, models_dir: Path, kill: bool) -> None:
    environ = {"MODELS_DIR": str(models_dir), "MAX_CONCURRENCY": "2", "DRAIN_TIMEOUT": "0.2"}
    server = Server(environ, tmp_path / "server.log")
    try:
        server.wait_ready()
        wanted = [{**QUICK, "seed": seed} for seed in range(6)]
        alone = [images_of(server.post(inputs).json())[0] for inputs in wanted]
        long = send(server, {**LONG, "num_inference_steps": 80})
        finished = send(server, QUICK)
        wait_for(server, finished)
        wait_for(server, long, ("IN_PROGRESS",))
        second = send(server, {**LONG, "num_inference_steps": 80})
        wait_for(server, second, ("IN_PROGRESS",))
        jobs = [send(server, inputs) for inputs in wanted]
        server = restart(server, environ, tmp_path / "again.log", kill=kill)
        server.wait_ready()
        assert look(server, finished)["state"] == "COMPLETED"
        for job_id, reference in zip(jobs, alone, strict=True):
            assert wait_for(server, job_id)["state"] == "COMPLETED"
            image = images_of(look(server, job_id)["result"])[0]
            assert np.abs(image.astype(int) - reference).max() <= TOLERANCE
        for job_id in (long, second):
            body = wait_for(server, job_id)
            assert body["state"] == "COMPLETED"
            # a death while it ran was a try of it, a restart was not
            assert body["tries"] == (2 if kill else 1)
            events = [event for _, event in sse(server, job_id)]
            assert [e["seq"] for e in events] == list(range(1, len(events) + 1))
            states = [event["state"] for event in events if event["type"] == "state"]
            assert states == ["IN_QUEUE", "IN_PROGRESS", "IN_QUEUE", "IN_PROGRESS", "COMPLETED"]
        ids = [job["id"] for job in server.client.get("/jobs").json()["jobs"]]
        assert sorted(ids) == sorted([long, finished, second, *jobs])
    finally:
        server.stop()


@pytest.mark.slow
def test_a_job_that_was_running_at_three_deaths_is_failed(tmp_path: Path, models_dir: Path) -> None:
    environ = {"MODELS_DIR": str(models_dir)}
    server = Server(environ, tmp_path / "server.log")
    try:
        server.wait_ready()
        job_id = send(server, LONG)
        for death in range(3):
            deadline = time.monotonic() + 60  # a moment after the start the store still says what it said before
            while (body := wait_for(server, job_id, ("IN_PROGRESS",)))["tries"] != death + 1:
                assert time.monotonic() < deadline, body
                time.sleep(0.02)
            server = restart(
                server, {**environ, "STATE_DIR": str(tmp_path / "server.state")}, tmp_path / f"{death}.log", kill=True
            )
        body = wait_for(server, job_id)
        assert (body["state"], body["$error"]["code"]) == ("FAILED", "WORKER_DIED")
        server.wait_ready()
        assert server.post(QUICK).status_code == 200
    finally:
        server.stop()


def test_sigterm_lets_a_job_finish_within_the_drain(fresh: Server, tmp_path: Path, models_dir: Path) -> None:
    job_id = send(fresh, {**LONG, "num_inference_steps": 60})
    wait_for(fresh, job_id, ("IN_PROGRESS",))
    again = restart(fresh, {"MODELS_DIR": str(models_dir)}, tmp_path / "again.log", kill=False)
    try:
        body = look(again, job_id)
        assert (body["state"], body["tries"]) == ("COMPLETED", 1)
    finally:
        again.stop()


def test_two_servers_with_one_state_dir_are_told(own: Server, tmp_path: Path) -> None:
    second = Server({"STATE_DIR": str(own.log.with_suffix(".state"))}, tmp_path / "second.log")
    assert second.process.wait(60) == 2
    assert "another server uses this folder" in second.log.read_text()
    assert "Traceback" not in second.log.read_text()
    assert own.client.get("/health/live").status_code == 200


def test_without_persistence_the_prompt_is_nowhere_in_the_folder(tmp_path: Path, models_dir: Path) -> None:
    environ = {"MODELS_DIR": str(models_dir), "PERSIST_INPUTS": "0", "MAX_CONCURRENCY": "1"}
    server = Server(environ, tmp_path / "server.log")
    folder = tmp_path / "server.state"
    words = "a particular hippopotamus"

    def found() -> bool:
        files = [path for path in folder.rglob("*") if path.is_file()]
        assert files
        return any(words.encode() in path.read_bytes() or path.suffix == ".png" for path in files)

    try:
        server.wait_ready()
        done = send(server, {**QUICK, "prompt": words}, {"Idempotency-Key": words})
        assert wait_for(server, done)["state"] == "COMPLETED"
        assert look(server, done)["result"]["image_base64"]
        runs = send(server, {**LONG, "prompt": words})
        waits = send(server, {**QUICK, "prompt": words})
        wait_for(server, runs, ("IN_PROGRESS",))
        assert not found()
        server = restart(server, environ, tmp_path / "again.log", kill=True)
        server.wait_ready()
        assert not found()
        for job_id in (runs, waits):
            body = wait_for(server, job_id)
            assert body["state"] == "FAILED"
            assert "PERSIST_INPUTS" in body["$error"]["message"]
        assert server.client.get(f"/jobs/{done}").status_code == 404
    finally:
        server.stop()


@pytest.mark.slow
def test_fifty_queued_jobs_survive_the_death_of_everything(tmp_path: Path, models_dir: Path) -> None:
    environ = {"MODELS_DIR": str(models_dir), "MAX_CONCURRENCY": "4"}
    server = Server(environ, tmp_path / "server.log")
    try:
        server.wait_ready()
        wanted = [{**QUICK, "seed": seed, "num_inference_steps": 3 + seed % 5} for seed in range(50)]
        alone = [images_of(server.post(inputs).json())[0] for inputs in wanted]
        held = [send(server, LONG) for _ in range(4)]
        jobs = [send(server, inputs) for inputs in wanted]
        states = {job["id"]: job["state"] for job in server.client.get("/jobs").json()["jobs"]}
        assert [states[job_id] for job_id in jobs] == ["IN_QUEUE"] * 50
        server = restart(server, environ, tmp_path / "again.log", kill=True)
        server.wait_ready()
        for job_id in held:
            server.client.delete(f"/jobs/{job_id}")
        for job_id, reference in zip(jobs, alone, strict=True):
            body = wait_for(server, job_id)
            assert (body["state"], body["tries"]) == ("COMPLETED", 1)
            image = images_of(look(server, job_id)["result"])[0]
            assert np.abs(image.astype(int) - reference).max() <= TOLERANCE
            ends = [event for _, event in sse(server, job_id) if event.get("state") in OVER]
            assert len(ends) == 1
    finally:
        server.stop()


def test_a_reader_that_goes_away_disturbs_nobody(server: Server) -> None:
    job_id = send(server, {**LONG, "num_inference_steps": 60})
    for _ in range(20):
        with httpx.Client(base_url=server.url) as client, client.stream("GET", f"/jobs/{job_id}/events") as answer:
            next(answer.iter_lines())
    assert wait_for(server, job_id)["state"] == "COMPLETED"
    assert "Traceback" not in server.log.read_text()
