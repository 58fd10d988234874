"""25 steps with RunPod's client for Python, ``runpod``, as its users write them. Prints a line of JSON for each.

    RUNPOD_ENDPOINT_BASE_URL=http://localhost:8000/v2 python tests/clients/scenario.py KEY

The server runs one job at a time, so that what is sent while a long one runs waits.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import io
import itertools
import json
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import aiohttp
import requests
import runpod
from PIL import Image
from runpod import AsyncioEndpoint, Endpoint

FINAL = ("COMPLETED", "FAILED", "CANCELLED", "TIMED_OUT")
PROMPT = "a red circle on a blue background"
LONG = {"modelInputs": {"prompt": PROMPT, "num_inference_steps": 500, "num_images_per_prompt": 16}}
"""Takes minutes; is always cancelled."""
UNREACHABLE = {
    "modelInputs": {"prompt": PROMPT, "image": "http://127.0.0.1:9/x.png"},
    "callInputs": {"is_url": True},
}
numbers = itertools.count(1)


def native(seed: int, steps: int = 8) -> dict[str, Any]:
    inputs = {"prompt": PROMPT, "num_inference_steps": steps, "seed": seed}
    return {"modelInputs": inputs, "callInputs": {"image_format": "PNG"}}


def simple(seed: int, steps: int = 8) -> dict[str, Any]:
    return {"prompt": PROMPT, "num_inference_steps": steps, "seed": seed}


def pixels(output: dict[str, Any]) -> bytes:
    data = base64.b64decode(output.get("image_base64") or output["image"])
    image = Image.open(io.BytesIO(data))
    assert image.size == (64, 64)
    return image.convert("RGB").tobytes()


@contextlib.contextmanager
def step(what: str) -> Iterator[None]:
    """One of the steps: one that fails is told, and the others go on."""
    began = time.monotonic()
    told: dict[str, Any] = {"step": next(numbers), "what": what, "ok": True}
    try:
        yield
    except Exception:
        told |= {"ok": False, "error": traceback.format_exc()}
    print(json.dumps({**told, "seconds": round(time.monotonic() - began, 2)}), flush=True)


def until(condition: Callable[[], bool], seconds: float = 90) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it does not come"
        time.sleep(0.1)


def raw(endpoint: Endpoint, job: Any) -> dict[str, Any]:
    """What ``status`` answers, whole; the client keeps two keys of it."""
    return endpoint.rp_client.get(f"{endpoint.endpoint_id}/status/{job.job_id}")


def fresh(endpoint: Endpoint, job: Any) -> Any:
    """The same job, of which nothing is remembered here."""
    return runpod.endpoint.runner.Job(endpoint.endpoint_id, job.job_id, endpoint.rp_client)


def with_policy(input: dict[str, Any], **policy: Any) -> dict[str, Any]:
    return {"input": input, "policy": policy}


def refused(call: Callable[[], Any]) -> requests.Response:
    try:
        call()
    except requests.HTTPError as fault:
        return fault.response
    raise AssertionError("it was not refused")


def first_images(endpoint: Endpoint) -> dict[int, bytes]:
    """Steps 1–7: a job from its acceptance to its picture."""
    known: dict[int, bytes] = {}
    with step("health counts the jobs and the workers of an endpoint at which nothing happens"):
        health = endpoint.health()
        assert set(health["jobs"]) == {"completed", "failed", "inProgress", "inQueue", "retried"}
        assert set(health["workers"]) == {"idle", "initializing", "ready", "running", "throttled"}
        assert all(type(count) is int for group in health.values() for count in group.values())
        assert (health["workers"]["ready"], health["jobs"]["inProgress"], health["jobs"]["inQueue"]) == (1, 0, 0)
    with step("run answers at once with an id, and its job is not over yet"):
        job = endpoint.run({"input": native(1, steps=40)})
        assert job.job_id
        assert job.status() in ("IN_QUEUE", "IN_PROGRESS")
    with step("output waits for the native response"):
        output = job.output(timeout=90)
        assert output["$meta"]["modelInputs"]["seed"] == 1
        assert output["$timings"]["inference"] > 0
        known[0] = pixels(output)
    with step("the status stays COMPLETED, and the output there for whoever asks later"):
        again = fresh(endpoint, job)
        assert again.status() == "COMPLETED"
        assert pixels(again.output()) == known[0]
        assert {"delayTime", "executionTime", "workerId"} <= set(raw(endpoint, job))
    with step("run_sync waits by itself; the same seed is the same image, another one is another"):
        known[1] = pixels(endpoint.run_sync({"input": native(1)}))
        assert pixels(endpoint.run_sync({"input": native(1)})) == known[1]
        known[2] = pixels(endpoint.run_sync({"input": native(2)}))
        assert known[2] != known[1]
    with step("the simple form gives the same image as the native one, and says the seed"):
        output = endpoint.run_sync({"input": simple(1)})
        assert pixels(output) == known[1]
        assert output["seed"] == 1
        assert "image_base64" not in output
    with step("inputs are the same whether the client wraps them or its user does"):
        assert pixels(endpoint.run(simple(2)).output(timeout=90)) == known[2]
        assert pixels(endpoint.run({"input": simple(2)}).output(timeout=90)) == known[2]
    return known


def failures(endpoint: Endpoint) -> None:
    """Steps 8–12: what is said when there is no picture."""
    with step("an input that cannot be is refused at once, with its name and what was meant"):
        answer = refused(lambda: endpoint.run({"input": {**simple(1), "widht": 64}}))
        assert answer.status_code == 400
        assert "input.widht" in answer.json()["error"] and "width" in answer.json()["error"]
    with step("a job that is not known is a 404"):
        answer = refused(lambda: runpod.endpoint.runner.Job("demo", "no-such-job", endpoint.rp_client).status())
        assert answer.status_code == 404
        assert "RESULT_TTL" in answer.json()["error"]
    with step("a wrong key is the client's own RuntimeError"):
        wrong = Endpoint("demo", api_key="wrong-key-of-a-stranger")
        for call in (lambda: wrong.run({"input": simple(1)}), wrong.health, wrong.purge_queue):
            try:
                call()
                raise AssertionError("a wrong key was let in")
            except RuntimeError as fault:
                assert "401" in str(fault)
    with step("a job that fails is FAILED, has no output, and says why"):
        job = endpoint.run({"input": UNREACHABLE})
        assert job.output(timeout=90) is None
        assert fresh(endpoint, job).status() == "FAILED"
        assert "SOURCE_UNREACHABLE" in raw(endpoint, job)["error"]
    with step("run_sync of a job that fails comes back as well"):
        assert endpoint.run_sync({"input": UNREACHABLE}, timeout=90) is None


def cancels(endpoint: Endpoint, known: dict[int, bytes]) -> None:
    """Steps 13–17: jobs that run, that wait, and that are over."""
    long = endpoint.run({"input": LONG})
    waiting = endpoint.run({"input": native(1)})
    with step("a job that runs tells how far it is"):
        until(lambda: (raw(endpoint, long).get("output") or {}).get("step", 0) >= 1)
        output = raw(endpoint, long)["output"]
        assert output["total"] == 500
        assert 0 < output["progress"] < 1
        assert long.status() == "IN_PROGRESS"
    with step("what comes meanwhile waits, and health counts both"):
        assert waiting.status() == "IN_QUEUE"
        jobs = endpoint.health()["jobs"]
        assert (jobs["inProgress"], jobs["inQueue"]) == (1, 1)
    with step("cancel takes a job that waits out of the queue"):
        assert waiting.cancel() == {"id": waiting.job_id, "status": "CANCELLED"}
        assert waiting.status() == "CANCELLED"
        assert waiting.output() is None
    with step("cancel ends a job that runs, and the next one begins"):
        assert long.cancel() == {"id": long.job_id, "status": "CANCELLED"}
        assert pixels(endpoint.run_sync({"input": native(1)}, timeout=30)) == known[1]
        assert fresh(endpoint, long).status() == "CANCELLED"
    with step("cancel changes nothing of a job that is over"):
        job = endpoint.run({"input": native(2)})
        assert pixels(job.output(timeout=90)) == known[2]
        assert job.cancel() == {"id": job.job_id, "status": "COMPLETED"}
        assert pixels(fresh(endpoint, job).output()) == known[2]


def streams(endpoint: Endpoint, known: dict[int, bytes]) -> None:
    """Steps 18–20: streams, and the queue as a whole."""
    job = endpoint.run({"input": native(1, steps=40)})
    with step("stream tells the steps in their order, and at last the output"):
        told = list(job.stream())
        steps = [one["step"] for one in told if "step" in one]
        assert steps and steps == sorted(steps)
        assert pixels(told[-1]) == known[0]
        assert sum("image_base64" in one for one in told) == 1
    with step("a stream that was read to its end is over at once when it is asked for again"):
        assert list(fresh(endpoint, job).stream()) == []
        cancelled = endpoint.run({"input": LONG})
        cancelled.cancel()
        assert all("image_base64" not in one for one in cancelled.stream()), "and that of a cancelled one ends"
    with step("purge_queue takes what waits, and leaves what runs"):
        long = endpoint.run({"input": LONG})
        until(lambda: long.status() == "IN_PROGRESS")
        waiting = [endpoint.run({"input": native(seed)}) for seed in (1, 2, 3)]
        assert endpoint.purge_queue() == {"removed": 3, "status": "completed"}
        assert [job.status() for job in waiting] == ["CANCELLED"] * 3
        assert long.status() == "IN_PROGRESS"
        long.cancel()


def policies(endpoint: Endpoint) -> None:
    """Steps 21–22: how long a job may run, and wait."""
    short = endpoint.run(with_policy(LONG, executionTimeout=5000))
    long = endpoint.run({"input": LONG})
    brief = endpoint.run(with_policy(native(1), ttl=10_000))
    sent = time.monotonic()
    with step("a job that runs longer than its executionTimeout is TIMED_OUT"):
        until(lambda: short.status() in FINAL, 30)
        assert short.status() == "TIMED_OUT"
        assert time.monotonic() - sent > 3
        assert raw(endpoint, short)["error"]
    with step("a job that waits longer than its ttl is TIMED_OUT, and never ran"):
        until(lambda: brief.status() in FINAL, 30)
        assert brief.status() == "TIMED_OUT"
        assert time.monotonic() - sent > 9
        assert "executionTime" not in raw(endpoint, brief)
    long.cancel()


async def at_once(known: dict[int, bytes], key: str) -> None:
    """Steps 23–25: the client for asyncio."""
    async with aiohttp.ClientSession() as session:
        endpoint = AsyncioEndpoint("demo", session, api_key=key)
        with step("asyncio: run, status, output, health"):
            job = await endpoint.run(native(1))
            assert await job.status() in (*FINAL, "IN_QUEUE", "IN_PROGRESS")
            assert pixels(await job.output(timeout=90)) == known[1]
            assert await job.status() == "COMPLETED"
            assert (await endpoint.health())["workers"]["ready"] == 1
        with step("asyncio: many at once, and each gets its own image"):
            seeds = [1, 2] * 4
            jobs = await asyncio.gather(*(endpoint.run(native(seed)) for seed in seeds))
            assert len({job.job_id for job in jobs}) == 8
            outputs = await asyncio.gather(*(job.output(timeout=90) for job in jobs))
            assert [pixels(output) for output in outputs] == [known[seed] for seed in seeds]
        with step("asyncio: stream, cancel, purge_queue"):
            told = [one async for one in (await endpoint.run(native(2))).stream()]
            assert pixels(told[-1]) == known[2]
            long = await endpoint.run(LONG)
            while await long.status() != "IN_PROGRESS":
                await asyncio.sleep(0.1)
            await endpoint.run(native(1))
            assert (await endpoint.purge_queue())["removed"] == 1
            assert (await long.cancel())["status"] == "CANCELLED"
            assert await long.status() == "CANCELLED"


def main() -> int:
    key = sys.argv[1]
    endpoint = Endpoint("demo", api_key=key)
    known = first_images(endpoint)
    failures(endpoint)
    cancels(endpoint, known)
    streams(endpoint, known)
    policies(endpoint)
    asyncio.run(at_once(known, key))
    return 0


if __name__ == "__main__":
    sys.exit(main())
