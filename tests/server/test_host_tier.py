"""Several workers with one host tier, in processes of their own: one copy, whoever is killed, the right images."""

from __future__ import annotations

import concurrent.futures
import os
import random
import re
import signal
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.running import Server, images_of, running
from tests.shapes import half, other

IMAGE = {"prompt": "a red circle", "num_inference_steps": 3, "seed": 5}
MIB = 2**20


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models in half precision, which a CPU has to cast, so that they are no pages of files; and one that it has not."""
    root = tmp_path_factory.mktemp("models")
    for number in range(6):
        half(root / f"half--{number}", keep_plain=False)
        if number:
            _change(root / f"half--{number}", number)
    other(root / "plain--1", 1)
    return root


def _change(model: Path, number: int) -> None:
    from safetensors.torch import load_file, save_file

    path = next((model / "unet").glob("*.safetensors"))
    weights = load_file(path)
    weights["conv_out.bias"] = weights["conv_out.bias"] + 0.05 * number
    save_file(weights, path)


def call(model: str) -> dict[str, Any]:
    return {"MODEL_ID": model, "MODEL_PRECISION": "fp16"}


def image(server: Server, model: str, seed: int = 5) -> np.ndarray:
    answer = server.post({**IMAGE, "seed": seed}, call(model))
    assert answer.status_code == 200, answer.text
    return images_of(answer.json())[0]


def environ(folder: Path, devices: int = 2, **more: str) -> dict[str, str]:
    names = ",".join(["cpu"] * devices)
    usual = {"DEVICES": names, "RUNTIME_DOWNLOADS": "0", "OMP_NUM_THREADS": "1", "MODEL_ID": "half/0"}
    return {"MODELS_DIR": str(folder), "MODEL_PRECISION": "fp16", **usual, **more}


def wait_for_all(server: Server) -> None:
    while not all(worker["ready"] for worker in server.client.get("/health/ready").json()["workers"]):
        assert server.process.poll() is None, server.log.read_text()
        time.sleep(0.05)


def everywhere(server: Server, model: str) -> None:
    """Have every worker load a model."""
    answer = server.client.post("/models/load", json=call(model))
    assert answer.status_code == 200, answer.text


def mapped(pid: int) -> Counter[str]:
    """Kilobytes of shared weights that a process has mapped: ``Rss``, and ``Pss``, its share of what others have too."""
    found, ours = Counter[str](), False
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line):
            ours = "/memfd:host-tier" in line
        elif ours and (match := re.match(r"(Rss|Pss): +(\d+) kB", line)):
            found[match[1]] += int(match[2])
    return found


def moved(server: Server, way: str) -> float:
    text = server.client.get("/metrics").text
    return sum(float(n) for n in re.findall(rf'moved_bytes_total{{device="[^"]*",way="{way}"}} (\S+)', text))


@pytest.fixture(scope="module")
def expected(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, np.ndarray]]:
    """What one worker alone draws."""
    with running(environ(folder, 1), tmp_path_factory.mktemp("one") / "server.log") as server:
        yield {f"half/{number}": image(server, f"half/{number}") for number in range(6)}


@pytest.mark.slow
def test_two_processes_have_one_copy_read_once(folder: Path, expected: dict[str, np.ndarray], tmp_path: Path) -> None:
    with running(environ(folder), tmp_path / "server.log") as server:
        wait_for_all(server)
        everywhere(server, "half/0")
        deadline = time.monotonic() + 30
        while not moved(server, "share") and time.monotonic() < deadline:
            time.sleep(0.2)  # counts come every two seconds
        one, two = map(mapped, server.worker_pids())
        size = server.client.get("/models").json()["host"]["held"]
        assert moved(server, "read") == moved(server, "share") == size
        for found in (one, two):
            assert found["Rss"] * 1024 >= size * 0.99, "all of it is mapped"
        assert (one["Pss"] + two["Pss"]) * 1024 < size * 1.05, "and there once"
        with concurrent.futures.ThreadPoolExecutor(8) as pool:  # both are at work
            for drawn in pool.map(lambda _: image(server, "half/0"), range(16)):
                assert np.abs(drawn.astype(int) - expected["half/0"]).max() <= 1


@pytest.mark.slow
def test_a_worker_that_is_killed_takes_nothing_with_it(
    folder: Path, expected: dict[str, np.ndarray], tmp_path: Path
) -> None:
    with running(environ(folder), tmp_path / "server.log") as server:
        wait_for_all(server)
        for model in ("half/0", "half/1"):
            everywhere(server, model)
        before = server.client.get("/models").json()["host"]
        time.sleep(3)  # counts come every two seconds, and what was not told by then dies with the worker
        pids = server.worker_pids()
        for pid in pids:  # while they hold it, one after the other
            os.kill(pid, signal.SIGKILL)
            assert np.abs(image(server, "half/0").astype(int) - expected["half/0"]).max() <= 1
            wait_for_all(server)
        assert not set(pids) & set(server.worker_pids())
        for model in ("half/0", "half/1"):
            everywhere(server, model)
        after = server.client.get("/models").json()["host"]
        assert after["held"] == before["held"]
        time.sleep(3)
        assert moved(server, "read") == after["held"], "both incarnations of both workers found it there"


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_workers_that_are_killed_while_they_read_leave_nothing_half(
    folder: Path, expected: dict[str, np.ndarray], tmp_path: Path
) -> None:
    rng = random.Random(3)
    with running(environ(folder, MAX_QUEUE="100"), tmp_path / "server.log") as server:
        wait_for_all(server)
        for _ in range(5):
            server.client.post("/models/unload", json=call("half/2"))
            with concurrent.futures.ThreadPoolExecutor(4) as pool:
                asked = [pool.submit(image, server, "half/2") for _ in range(4)]
                time.sleep(rng.uniform(0.0, 0.3))
                os.kill(rng.choice(server.worker_pids()), signal.SIGKILL)
                for one in asked:
                    assert np.abs(one.result().astype(int) - expected["half/2"]).max() <= 1


@pytest.mark.slow
def test_two_models_that_do_not_fit_together_take_turns(
    folder: Path, expected: dict[str, np.ndarray], tmp_path: Path
) -> None:
    with running(environ(folder), tmp_path / "sizes.log") as server:
        image(server, "half/0")
        size = server.client.get("/models").json()["host"]["held"]
    with running(environ(folder, RAM_LIMIT=str(int(size * 1.3))), tmp_path / "server.log") as server:
        wait_for_all(server)
        most = 0
        with concurrent.futures.ThreadPoolExecutor(4) as pool:
            asked = [pool.submit(image, server, f"half/{number % 2}") for number in range(12)]
            while not all(one.done() for one in asked):
                host = server.client.get("/models").json()["host"]
                most = max(most, host["held"] + host["kept"])
                time.sleep(0.05)
            for number, one in enumerate(asked):
                assert np.abs(one.result().astype(int) - expected[f"half/{number % 2}"]).max() <= 1
        assert 0 < most <= int(size * 1.3)


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_four_workers_and_six_models_in_little_memory(
    folder: Path, expected: dict[str, np.ndarray], tmp_path: Path
) -> None:
    rng = random.Random(11)
    with running(environ(folder), tmp_path / "sizes.log") as server:
        image(server, "half/0")
        size = server.client.get("/models").json()["host"]["held"]
    limit = int(size * 2.5)
    settings = environ(folder, 4, RAM_LIMIT=str(limit), MAX_QUEUE="200", MAX_CONCURRENCY="2", MAX_SWITCH_WAIT="2")
    with running(settings, tmp_path / "server.log") as server:
        wait_for_all(server)
        models = [f"half/{rng.randrange(6)}" for _ in range(48)]
        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            asked = [pool.submit(image, server, model) for model in models]
            for number, (model, one) in enumerate(zip(models, asked, strict=True)):
                assert np.abs(one.result().astype(int) - expected[model]).max() <= 1
                if number in (12, 30):
                    os.kill(rng.choice(server.worker_pids()), signal.SIGKILL)
                host = server.client.get("/models").json()["host"]
                assert host["held"] + host["kept"] <= limit
