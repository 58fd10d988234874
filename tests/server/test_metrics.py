"""What ``/metrics`` tells of a worker that computes."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families as parse

from tests.running import Server, running

INPUTS = {"prompt": "a red circle on a blue background", "num_inference_steps": 8, "seed": 5}
UNET = ("cpu", "UNet2DConditionModel.forward")


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory, models_dir: Path) -> Iterator[Server]:
    """One that nobody else sends requests to; both models do not fit in memory together."""
    environ = {"MODELS_DIR": str(models_dir), "RUNTIME_DOWNLOADS": "0"}
    with running(environ, tmp_path_factory.mktemp("log") / "server.log") as server:
        yield server


def values(server: Server) -> dict[tuple[str, tuple[str, ...]], float]:
    return {
        (s.name.removeprefix("diffusers_api_"), tuple(value for _, value in sorted(s.labels.items()))): s.value
        for family in parse(server.client.get("/metrics").text)
        for s in family.samples
    }


def until(server: Server, key: tuple[str, tuple[str, ...]], least: float) -> dict[tuple[str, tuple[str, ...]], float]:
    """The metrics, once a worker has told that it has counted so many."""
    deadline = time.monotonic() + 60
    while (found := values(server)).get(key, 0) < least:
        assert time.monotonic() < deadline, (key, found.get(key))
        time.sleep(0.1)
    return found


def test_counts_are_those_of_the_requests(alone: Server) -> None:
    for _ in range(3):
        assert alone.post(INPUTS).status_code == 200
    # those that run at once, each with another prompt, so that none is remembered
    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(lambda n: alone.post({**INPUTS, "prompt": f"{n} circles", "seed": n}), range(4)))
    assert [answer.status_code for answer in answers] == [200] * 4
    assert alone.post({**INPUTS, "width": 3}).status_code == 400
    found = until(alone, ("step_seconds_count", ("cpu", "StableDiffusionPipeline")), 7 * 7)
    assert found["http_requests_total", ("POST", "/", "200")] == 7
    assert found["http_requests_total", ("POST", "/", "400")] == 1
    assert found["jobs_ended_total", ("connection", "COMPLETED")] == 7
    assert found["images_total", ()] == 7
    assert found["phase_seconds_count", ("inference",)] == found["queue_seconds_count", ("connection",)] == 7
    assert found["step_seconds_count", ("cpu", "StableDiffusionPipeline")] == 7 * 7  # between eight steps
    calls, jobs = found["batch_jobs_count", UNET], found["batch_jobs_sum", UNET]
    assert calls < jobs  # some were merged
    assert found["batch_jobs_bucket", ("cpu", "1.0", UNET[1])] < calls
    assert found["call_seconds_count", UNET] == calls
    assert found["batch_rows_total", UNET] == 2 * jobs  # guidance
    assert found["worker_resident_bytes", ("cpu",)] > 1e8
    assert found["tier_bytes", ("cpu", "device")] > 1e6


def test_switches_and_loads_are_counted(alone: Server) -> None:
    before = values(alone)
    inputs = {"prompt": "x", "num_inference_steps": 1, "width": 64, "height": 64}
    for model in ("tiny/a", "tiny/b", "tiny/a"):  # the last time it is in memory
        assert alone.post(inputs, {"MODEL_ID": model}).status_code == 200
    found = until(alone, ("switches_total", ("cpu",)), before["switches_total", ("cpu",)] + 2)
    assert found["switches_total", ("cpu",)] == before["switches_total", ("cpu",)] + 2
    key = "load_seconds_count", ("cpu", "disk")
    assert found[key] == before[key] + 2
    assert found["moved_bytes_total", ("cpu", "read")] > before["moved_bytes_total", ("cpu", "read")]
    assert found["models", ("cpu", "device")] == 3
    alone.client.post("/models/unload", json={"MODEL_ID": "tiny/b"})
    gone = until(
        alone, ("evictions_total", ("cpu", "device")), before.get(("evictions_total", ("cpu", "device")), 0) + 1
    )
    assert gone["models", ("cpu", "device")] == 2
