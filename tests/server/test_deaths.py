"""The worker killed at random moments under load: every job ends once, rightly or with a clear error."""

from __future__ import annotations

import contextlib
import os
import random
import re
import signal
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from tests.running import Server, images_of, running
from tests.soak import size_of

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]

DEATHS = size_of("SOAK_DEATHS", 6)
CLIENTS = 8
TOLERANCE = 1
CLEAR = {"WORKER_DIED", "JOB_KILLED_WORKER", "NOT_READY"}
OVER = {"COMPLETED", "FAILED", "CANCELLED", "TIMED_OUT"}


class Load:
    """Clients that each send one request after the other, half of them as jobs for later.

    No two requests are equal: one that killed a worker is refused for a while, and what is refused was not accepted.

    Attributes:
        ended: how each accepted request ended: its inputs, the images or the error's code.
    """

    def __init__(self, server: Server) -> None:
        self.ended: list[tuple[dict[str, Any], list[np.ndarray] | str]] = []
        self.accepted = 0
        self.faults: list[str] = []
        self._server, self._over, self._lock = server, threading.Event(), threading.Lock()
        self._threads = [threading.Thread(target=self._client, args=(number,)) for number in range(CLIENTS)]

    def __enter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join(240)
        assert not any(thread.is_alive() for thread in self._threads), "a client waits for ever"

    def _client(self, number: int) -> None:
        rng, turn = random.Random(number), 0
        ask = self._ask_later if number % 2 else self._ask
        with httpx.Client(base_url=self._server.url, timeout=200) as http:
            while not self._over.is_set():
                turn += 1
                inputs = {
                    "prompt": f"a red circle on a blue background, {number} {turn}",
                    "num_inference_steps": rng.randint(2, 20),
                    "seed": rng.randrange(2**32),
                }
                try:
                    outcome = ask(http, inputs)
                except Exception as fault:
                    with self._lock:
                        self.faults.append(f"{type(fault).__name__}: {fault}")
                    return
                with self._lock:
                    self.ended.append((inputs, outcome))

    def _count(self) -> None:
        with self._lock:
            self.accepted += 1

    def _ask(self, http: httpx.Client, inputs: dict[str, Any]) -> list[np.ndarray] | str:
        self._count()
        answer = http.post("/", json={"modelInputs": inputs})
        body = answer.json()
        if answer.status_code == 200:
            return images_of(body)
        assert body["$error"]["message"]
        return str(body["$error"]["code"])

    def _ask_later(self, http: httpx.Client, inputs: dict[str, Any]) -> list[np.ndarray] | str:
        accepted = http.post("/jobs", json={"modelInputs": inputs})
        assert accepted.status_code == 202, accepted.text
        self._count()
        path = f"/jobs/{accepted.json()['id']}"
        while (body := http.get(path).json())["state"] not in OVER:
            time.sleep(0.05)
        told = http.get(f"{path}/events", headers={"Accept": "application/json"}).json()["events"]
        ends = [event for event in told if event.get("state") in OVER]
        assert len(ends) == 1, told
        assert told[-1] == ends[0], told
        if body["state"] == "COMPLETED":
            return images_of(body["result"])
        return str(body["$error"]["code"])


def alive(pid: int) -> bool:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


def kill_workers(server: Server, times: int, rng: random.Random) -> tuple[set[int], list[float]]:
    """Kill the worker at random moments, mostly while it runs jobs; who died, and seconds until the next was ready."""
    killed, until_ready = set[int](), list[float]()
    for turn in range(times):
        # some die before they are ready
        time.sleep(rng.uniform(0.0, 2.5))
        for pid in server.worker_pids():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
                killed.add(pid)
        began = time.monotonic()
        if turn % 5 == 4:
            continue
        time.sleep(0.3)
        while server.client.get("/health/ready").status_code != 200:
            assert time.monotonic() - began < 120
            time.sleep(0.05)
        until_ready.append(time.monotonic() - began)
    return killed, until_ready


def test_the_worker_is_killed_again_and_again_under_load(models_dir: Path, tmp_path: Path) -> None:
    with running(
        {"MODELS_DIR": str(models_dir), "RUNTIME_DOWNLOADS": "0", "OMP_NUM_THREADS": "1"}, tmp_path / "server.log"
    ) as server:
        pid = server.process.pid
        with Load(server) as load:
            killed, until_ready = kill_workers(server, DEATHS, random.Random(0))
            time.sleep(2)
        assert load.faults == []
        assert server.process.poll() is None
        assert server.process.pid == pid
        assert len(killed) >= DEATHS
        assert len(load.ended) == load.accepted
        codes = Counter(outcome if isinstance(outcome, str) else "image" for _, outcome in load.ended)
        print(f"\n{load.accepted} requests, {len(killed)} deaths: {dict(codes)}")
        print(f"seconds from a death to ready: {[round(seconds, 1) for seconds in sorted(until_ready)]}")
        print(f"of these, after torch was imported: {sorted(after_torch(tmp_path / 'server.log'))}")
        assert set(codes) <= CLEAR | {"image"}
        assert codes["image"] > CLIENTS
        wrong = [inputs for inputs, outcome in load.ended if differs(server, inputs, outcome)]
        assert wrong == []
        assert len(server.worker_pids()) == 1
        last = server.worker_pids()
    assert not any(alive(each) for each in [*killed, *last])


def after_torch(log: Path) -> list[float]:
    """Seconds that each start of a worker took beyond importing torch."""
    return [float(took) for took in re.findall(r"is ready .*, the rest took ([\d.]+) s", log.read_text())]


def differs(server: Server, inputs: dict[str, Any], outcome: list[np.ndarray] | str) -> bool:
    """Whether an image is another one than the same request gets alone."""
    if isinstance(outcome, str):
        return False
    (image,) = outcome
    (alone,) = images_of(server.post(inputs).json())
    return bool(np.abs(image.astype(int) - alone).max() > TOLERANCE)
