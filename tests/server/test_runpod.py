"""RunPod's routes with its own client, through crashes, cancels and nonsense."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import runpod
from runpod.endpoint import runner
from runpod.endpoint.asyncio import asyncio_runner
from runpod.http_client import AsyncClientSession

from tests.running import Server, images_of, pixels, running
from tests.sources import KEY, SECRET, Bucket, moto

QUICK = {"prompt": "a red circle on a blue background", "num_inference_steps": 3, "seed": 5}
LONG = {"prompt": "a red circle", "num_inference_steps": 500, "seed": 1}
OVER = ("COMPLETED", "FAILED", "CANCELLED", "TIMED_OUT")
TOLERANCE = 1
"""Levels of 255 by which an image may differ from the one made alone; float32 on one CPU."""


@pytest.fixture(scope="module")
def bucket() -> Iterator[Bucket]:
    with moto() as address:
        yield Bucket(address, "pictures")


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Each test leaves it idle."""
    environ = {"MAX_CONCURRENCY": "1", "RUNTIME_DOWNLOADS": "0", "ALLOW_PRIVATE_URLS": "1"}
    with running(environ, tmp_path_factory.mktemp("own") / "server.log") as server:
        yield server


@pytest.fixture
def endpoint(own: Server, monkeypatch: pytest.MonkeyPatch) -> runner.Endpoint:
    monkeypatch.setattr(runpod, "endpoint_url_base", f"{own.url}/v2")
    monkeypatch.setattr(runpod, "api_key", "any")
    monkeypatch.setattr(runner.time, "sleep", lambda _: threading.Event().wait(0.05))
    return runpod.Endpoint("shapes")


def send(server: Server, inputs: dict[str, Any], path: str = "run", **more: Any) -> str:
    answer = server.client.post(f"/v2/shapes/{path}", json={"input": inputs, **more})
    assert answer.status_code == 200, answer.text
    return str(answer.json()["id"])


def look(server: Server, job_id: str, path: str = "status") -> dict[str, Any]:
    answer = server.client.get(f"/v2/shapes/{path}/{job_id}")
    assert answer.status_code == 200, answer.text
    return dict(answer.json())


def wait_for(server: Server, job_id: str, states: tuple[str, ...] = OVER) -> dict[str, Any]:
    while (body := look(server, job_id))["status"] not in states:
        time.sleep(0.02)
    return body


def test_the_client_for_python(own: Server, endpoint: runner.Endpoint) -> None:
    alone = images_of(own.post(QUICK).json())[0]
    job = endpoint.run({"input": QUICK})
    output = job.output(timeout=60)
    assert job.status() == "COMPLETED"
    assert (output["seed"], output["meta"]["modelInputs"]["num_inference_steps"]) == (5, 3)
    assert np.abs(pixels(output["image"]).astype(int) - alone).max() <= TOLERANCE
    native = endpoint.run_sync({"modelInputs": {**QUICK, "num_images_per_prompt": 2}, "callInputs": {"preview": True}})
    assert len(images_of(native)) == 2 and native["$meta"]["modelInputs"]["seed"] == 5
    chunks = list(endpoint.run({**LONG, "num_inference_steps": 20, "preview": 10}).stream())
    steps = [chunk["progress"] for chunk in chunks if chunk.get("status") == "progress"]
    assert steps == sorted(steps) and steps[-1] == 1.0
    assert any(chunk.get("status") == "preview" and chunk["image_base64"] for chunk in chunks)
    assert [chunk for chunk in chunks if "image" in chunk] == chunks[-1:]
    health = endpoint.health()
    assert health["jobs"]["completed"] >= 3
    assert health["workers"] == {"idle": 1, "initializing": 0, "ready": 1, "running": 0, "throttled": 0}


def test_what_runs_is_cancelled_and_what_waits_purged(own: Server, endpoint: runner.Endpoint) -> None:
    first = endpoint.run(LONG)
    wait_for(own, first.job_id, ("IN_PROGRESS",))
    waiting = [endpoint.run(LONG) for _ in range(3)]
    native = own.client.post("/jobs", json={"modelInputs": LONG}).json()["id"]
    assert endpoint.health()["jobs"].items() >= {"inProgress": 1, "inQueue": 3}.items()
    assert endpoint.purge_queue() == {"removed": 3, "status": "completed"}
    assert first.status() == "IN_PROGRESS"
    assert [job.status() for job in waiting] == ["CANCELLED"] * 3
    assert first.cancel() == {"id": first.job_id, "status": "CANCELLED"} == first.cancel()
    told = list(waiting[0].stream())  # which ends, though the client knows no stream that was cancelled
    assert told == []
    assert own.client.get(f"/jobs/{native}").json()["state"] in ("IN_QUEUE", "IN_PROGRESS")
    own.client.delete(f"/jobs/{native}")
    assert look(own, first.job_id) | {"delayTime": 0, "executionTime": 0} == {
        "id": first.job_id, "status": "CANCELLED", "delayTime": 0, "executionTime": 0,
    }  # fmt: skip


async def test_the_asyncio_client(own: Server, endpoint: runner.Endpoint) -> None:
    async with AsyncClientSession() as session:
        there = asyncio_runner.Endpoint("shapes", session)
        job = await there.run(QUICK)
        assert (await job.output(timeout=60))["seed"] == 5
        long = await there.run(LONG)
        assert (await long.cancel())["status"] == "CANCELLED"
        assert (await there.purge_queue())["removed"] == 0
        assert (await there.health())["jobs"]["inProgress"] == 0


def test_runsync_waits_so_long_and_the_job_goes_on(own: Server) -> None:
    job_id = send(own, LONG, "runsync?wait=1000")
    assert look(own, job_id)["output"].keys() == {"progress", "step", "total", "eta"}
    with pytest.raises(httpx.ReadTimeout), httpx.Client(base_url=own.url, timeout=0.3) as client:
        client.get(f"/v2/shapes/status-sync/{job_id}")
    with ThreadPoolExecutor(1) as pool:
        end = pool.submit(look, own, job_id, "status-sync")
        time.sleep(0.2)
        assert not end.done()
        own.client.post(f"/v2/shapes/cancel/{job_id}")
        assert end.result()["status"] == "CANCELLED"
    for wait in ("999", "300001", "x"):
        assert own.client.post(f"/v2/shapes/runsync?wait={wait}", json={"input": QUICK}).status_code == 400


def test_a_client_that_goes_away_from_runsync_leaves_its_job(own: Server) -> None:
    same: dict[str, Any] = {"json": {"input": LONG}, "headers": {"Idempotency-Key": "gone"}}
    with pytest.raises(httpx.ReadTimeout), httpx.Client(base_url=own.url, timeout=0.5) as client:
        client.post("/v2/shapes/runsync", **same)
    again = own.client.post("/v2/shapes/runsync?wait=1000", **same).json()
    assert again["status"] == "IN_PROGRESS"
    assert own.client.get("/jobs?limit=1").json()["jobs"][0]["id"] == again["id"]
    own.client.post(f"/v2/shapes/cancel/{again['id']}")


def test_low_priority_and_once_more(own: Server) -> None:
    first = send(own, LONG)
    wait_for(own, first, ("IN_PROGRESS",))
    low = send(own, {**QUICK, "seed": 1}, policy={"lowPriority": True})
    late = send(own, {**QUICK, "seed": 2, "image": "http://127.0.0.1:1/x.png", "is_url": True})
    own.client.post(f"/v2/shapes/cancel/{first}")
    done = {job_id: wait_for(own, job_id) for job_id in (low, late)}
    assert done[late]["delayTime"] < done[low]["delayTime"]
    assert (done[low]["status"], done[late]["status"]) == ("COMPLETED", "FAILED")
    assert done[late]["error"].startswith("SOURCE_UNREACHABLE: input.image: ")
    assert own.client.post(f"/v2/shapes/retry/{low}").status_code == 400
    assert own.client.post(f"/v2/shapes/retry/{late}").json() == {"id": late, "status": "IN_QUEUE"}
    assert wait_for(own, late)["status"] == "FAILED"
    assert own.client.get("/v2/shapes/health").json()["jobs"]["retried"] == 1


def test_a_stream_tells_each_thing_to_one_of_its_readers(own: Server) -> None:
    job_id = send(own, {**LONG, "num_inference_steps": 25})
    got: list[list[dict[str, Any]]] = [[], []]

    def read(mine: list[dict[str, Any]]) -> None:
        with httpx.Client(base_url=own.url, timeout=30) as client:
            while True:
                body = client.get(f"/v2/shapes/stream/{job_id}").json()
                mine += [chunk["output"] for chunk in body["stream"]]
                if body["status"] in OVER:
                    return

    readers = [threading.Thread(target=read, args=(mine,)) for mine in got]
    for reader in readers:
        reader.start()
    for reader in readers:
        reader.join()
    steps = sorted(chunk["step"] for mine in got for chunk in mine if chunk.get("status") == "progress")
    assert len(set(steps)) == len(steps) and steps[-1] == 25
    assert sum("image" in chunk for mine in got for chunk in mine) == 1
    body = look(own, job_id, "stream")
    assert (body["status"], body["stream"]) == ("COMPLETED", [])


def test_an_id_of_the_clients(own: Server) -> None:
    body = {"input": QUICK}
    first = own.client.put("/v2/shapes/jobs/order-1", json=body)
    again = own.client.put("/v1/shapes/jobs/order-1", json=body)
    assert (first.json()["id"], again.json()["id"]) == ("order-1", "order-1")
    other = own.client.put("/v2/shapes/jobs/order-1", json={"input": {**QUICK, "seed": 6}})
    assert (other.status_code, other.json()["$error"]["field"]) == (400, "id")
    assert own.client.put("/v2/else/jobs/order-1", json=body).status_code == 400
    assert own.client.put("/jobs/order-1", json={"modelInputs": QUICK}).status_code == 400
    native = [own.client.put("/jobs/order-2", json={"modelInputs": QUICK}) for _ in range(2)]
    assert [answer.status_code for answer in native] == [202, 202]
    for bad in ("..", "%2e%2e", ".x", "a%2Fb", "a" * 101, "ä"):
        assert own.client.put(f"/jobs/{bad}", json={"modelInputs": QUICK}).status_code in (400, 404, 405)
    assert own.client.get("/v2/else/status/order-1").status_code == 404
    wait_for(own, "order-1")


@pytest.mark.parametrize(
    ("path", "body", "field"),
    [
        ("run", b"", None),
        ("run", b"{", None),
        ("run", b"[]", None),
        ("run", b"{}", "input"),
        ("run", b'{"input": null}', "input"),
        ("run", b'{"input": {"prompt": "x", "width": 7}}', "input.width"),
        ("run", b'{"input": {"modelInputs": {"prompt": "x", "width": 7}}}', "input.modelInputs.width"),
        ("run", b'{"input": {"prompt": "x", "SCHEDULER": 3}}', "input.SCHEDULER"),
        ("runsync", b'{"input": {"prompt": "x"}, "policy": {"ttl": 1}}', "policy.ttl"),
        ("runsync", b'{"input": {"prompt": "x"}, "webhook": "file:///etc/passwd"}', "webhook"),
    ],
)
def test_nonsense_is_refused_in_both_ways_of_telling_it(own: Server, path: str, body: bytes, field: str | None) -> None:
    answer = own.client.post(f"/v2/shapes/{path}", content=body)
    told = answer.json()
    assert answer.status_code == 400
    assert told["$error"].get("field") == field
    assert told["error"].startswith(told["$error"]["code"])
    for way in ("status/nope", "stream/nope", "cancel/nope"):
        missing = own.client.get(f"/v2/shapes/{way}")
        assert (missing.status_code, missing.json()["error"][:11]) == (404, "NO_SUCH_JOB")


def test_words_of_other_dialects_are_free_under_v1(own: Server) -> None:
    for path in ("/v1/images/run", "/v1/models/health", "/v1/chat/run"):
        assert own.client.post(path, json={"input": QUICK}).json()["$error"]["code"] == "NOT_FOUND"


def test_images_go_to_the_clients_bucket(own: Server, bucket: Bucket) -> None:
    there = {
        "accessId": KEY,
        "accessSecret": SECRET,
        "bucketName": "pictures",
        "endpointUrl": f"http://{bucket.address}",
    }
    two = {**QUICK, "num_images_per_prompt": 2}
    body = own.client.post("/v2/shapes/runsync", json={"input": two, "s3Config": {**there, "objectPath": "out"}}).json()
    urls = body["output"]["image_urls"]
    assert bucket.names() == {f"out/{body['id']}/0.png", f"out/{body['id']}/1.png"}
    assert [pixels(httpx.get(url).content).shape for url in urls] == [(64, 64, 3)] * 2
    gone = own.client.post("/v2/shapes/runsync", json={"input": QUICK, "s3Config": {**there, "bucketName": "none"}})
    assert "UPLOAD_FAILED: s3Config: " in gone.json()["error"]
    # it failed, so its inputs are there to be tried again; nobody is told of the secret
    state = own.log.with_suffix(".state") / "jobs.sqlite3"
    assert state.stat().st_mode & 0o077 == 0
    assert SECRET not in own.log.read_text() + gone.text


@pytest.mark.slow
def test_a_killed_server_loses_nothing(tmp_path: Path) -> None:
    environ = {"MAX_CONCURRENCY": "1", "RUNTIME_DOWNLOADS": "0"}
    server = Server(environ, tmp_path / "server.log")
    server.wait_ready()
    try:
        runs = send(server, {**LONG, "num_inference_steps": 120})
        waits = [send(server, {**QUICK, "seed": seed}) for seed in range(5)]
        wait_for(server, runs, ("IN_PROGRESS",))
        look(server, runs, "stream")
        for pid in [*server.worker_pids(), server.process.pid]:
            os.kill(pid, signal.SIGKILL)
        server.process.wait(10)
        server.client.close()
        server = Server({**environ, "STATE_DIR": str(tmp_path / "server.state")}, tmp_path / "again.log")
        server.wait_ready()
        for job_id in (runs, *waits):
            body = look(server, job_id, "status-sync")
            assert (body["status"], "image" in body["output"]) == ("COMPLETED", True)
        chunks = look(server, runs, "stream")["stream"]
        assert "image" in chunks[-1]["output"]
    finally:
        server.stop()
