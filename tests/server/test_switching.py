"""Many models in little memory: right images, budgets kept, few switches, and what clients see and change of it."""

from __future__ import annotations

import concurrent.futures
import os
import random
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline

from tests.running import Server, images_of, running
from tests.soak import memory_of, size_of
from tests.tiny import save_tiny

MODELS = [f"tiny/m{number}" for number in range(10)]
SHARING = MODELS[:5]
"""These have one text encoder and one VAE."""
TOLERANCE = 1
INPUTS = {
    "prompt": "a cat on a mat",
    "seed": 5,
    "num_inference_steps": 2,
    "guidance_scale": 4.0,
    "width": 64,
    "height": 64,
}
OPTIONS = {"SCHEDULER": "DDIMScheduler"}


def folder_of(root: Path, model: str) -> Path:
    return root / model.replace("/", "--")


@pytest.fixture(scope="module")
def ten(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten models of one architecture."""
    root = tmp_path_factory.mktemp("ten")
    for number, model in enumerate(MODELS):
        save_tiny(folder_of(root, model), seed=100 + number)
        if model in SHARING[1:]:
            for part in ("vae", "text_encoder"):
                shutil.rmtree(folder_of(root, model) / part)
                shutil.copytree(folder_of(root, MODELS[0]) / part, folder_of(root, model) / part)
    return root


@pytest.fixture(scope="module")
def right(ten: Path) -> dict[str, np.ndarray]:
    """The image of each model through plain diffusers."""
    images = {}
    for model in MODELS:
        pipe = DiffusionPipeline.from_pretrained(folder_of(ten, model), use_safetensors=True)
        pipe.set_progress_bar_config(disable=True)
        inputs = {name: value for name, value in INPUTS.items() if name != "seed"}
        images[model] = np.asarray(pipe(**inputs, generator=torch.Generator().manual_seed(5)).images[0]).astype(int)
    worst = min(np.abs(images[a] - images[b]).max() for a in MODELS for b in MODELS if a != b)
    assert worst > 3 * TOLERANCE, "two models that cannot be told apart"
    return images


def bytes_of(folder: Path, parts: str = "*") -> int:
    return sum(file.stat().st_size for file in folder.glob(f"{parts}/*.safetensors"))


def environ(ten: Path, **more: str) -> dict[str, str]:
    return {"MODELS_DIR": str(ten), "MODEL_ID": MODELS[9], "RUNTIME_DOWNLOADS": "0", "OMP_NUM_THREADS": "1", **more}


def memory(server: Server) -> dict[str, Any]:
    return server.client.get("/models").json()["memory"][0]


def entry(server: Server, model: str, *, installed: bool = True) -> dict[str, Any]:
    models = server.client.get("/models").json()["models"]
    return next(e for e in models if (e["MODEL_ID"], e["installed"]) == (model, installed))


def until(condition: Any, seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def is_right(answer: httpx.Response, image: np.ndarray) -> bool:
    assert answer.status_code == 200, answer.text[:500]
    return bool(np.abs(images_of(answer.json())[0].astype(int) - image).max() <= TOLERANCE)


@pytest.mark.parametrize(
    "count", [60, pytest.param(size_of("SOAK_SWITCHES", 300), marks=[pytest.mark.slow, pytest.mark.timeout(3600)])]
)
def test_ten_models_in_a_budget_of_three(ten: Path, right: dict[str, np.ndarray], tmp_path: Path, count: int) -> None:
    rng, one = random.Random(count), bytes_of(folder_of(ten, MODELS[9]))
    limits = {"VRAM_LIMIT": str(3 * one), "RAM_LIMIT": str(5 * one)}
    with running(environ(ten, **limits), tmp_path / "server.log") as server:
        loads, states = [0], list[float]()

        def ask(model: str) -> bool:
            with httpx.Client(base_url=server.url, timeout=200) as http:
                body = {"modelInputs": INPUTS, "callInputs": {**OPTIONS, "MODEL_ID": model}}
                answer = http.post("/", json=body)
                timings = answer.json().get("$timings", {})
                if "loadModel" in timings:
                    loads[0] += 1
                    assert {"read", "build", "copy"} <= set(timings)
                return is_right(answer, right[model])

        with concurrent.futures.ThreadPoolExecutor(4) as pool:
            for _ in range(10):
                chosen = [rng.choice(MODELS) for _ in range(count // 10)]
                assert all(list(pool.map(ask, chosen)))
                states.append(memory_of(server.worker_pids()[0]))
        now = memory(server)
        print(f"\n{count} requests, {loads[0]} loads; {now}; MB of the worker: {[round(mb) for mb in states]}")
        assert loads[0] > count // 10
        assert now["device"]["limit"] == 3 * one
        assert 2 * one < now["device"]["peak"] <= 3 * one
        assert now["host"]["bytes"] <= 5 * one
        assert states[-1] - states[4] < 32


def test_five_models_that_share_parts_hold_them_once(ten: Path, right: dict[str, np.ndarray], tmp_path: Path) -> None:
    with running(environ(ten), tmp_path / "server.log") as server:
        assert server.client.post("/models/unload", json={"MODEL_ID": MODELS[9]}).json()["tier"] == "disk"
        taken = [memory(server)["device"]["bytes"]]
        for model in SHARING:
            answer = server.client.post("/models/load", json={"MODEL_ID": model}).json()
            assert answer["tier"] == "device", answer
            taken.append(memory(server)["device"]["bytes"])
        unet = bytes_of(folder_of(ten, MODELS[0]), "unet")
        all_parts = bytes_of(folder_of(ten, MODELS[0]))
        print(f"\nbytes on the device after each of five: {taken}; files of one: {all_parts}, of its UNet {unet}")
        assert taken[0] == 0
        steps = np.diff(taken)
        # files have headers
        assert 0.8 * all_parts < steps[0] <= all_parts
        assert all(0.8 * unet < step <= unet for step in steps[1:])
        assert memory(server)["host"]["bytes"] == taken[-1]
        for model in SHARING:
            assert is_right(server.post(INPUTS, {**OPTIONS, "MODEL_ID": model}), right[model])
        for model in SHARING:
            server.client.post("/models/unload", json={"MODEL_ID": model})
        assert memory(server)["device"]["bytes"] == memory(server)["host"]["bytes"] == 0


@pytest.mark.slow  # tests/unit/test_dispatch_order.py says it of the queue alone
@pytest.mark.parametrize("slots", ["1", "16"])
def test_an_alternating_queue_switches_seldom(ten: Path, tmp_path: Path, slots: str) -> None:
    one = bytes_of(folder_of(ten, MODELS[9]))
    limits = {"VRAM_LIMIT": str(one), "MAX_CONCURRENCY": slots}
    with (
        running(environ(ten, **limits), tmp_path / "server.log") as server,
        concurrent.futures.ThreadPoolExecutor(40) as pool,
    ):
        blocker = pool.submit(server.post, {**INPUTS, "num_inference_steps": 300}, {**OPTIONS, "MODEL_ID": MODELS[9]})
        until(lambda: server.client.get("/health/ready").json()["workers"][0]["busy"])
        models = [MODELS[5 + number % 2] for number in range(40)]
        answers = list(pool.map(lambda model: server.post(INPUTS, {**OPTIONS, "MODEL_ID": model}), models))
        assert blocker.result().status_code == 200
        assert [answer.status_code for answer in answers] == [200] * 40
        switches = server.log.read_text().count("loaded ") - 1
        print(f"\n{switches} switches with {slots} slots")
        assert 2 <= switches <= 10


def test_load_pin_and_unload_over_http(ten: Path, tmp_path: Path) -> None:
    one = bytes_of(folder_of(ten, MODELS[9]))
    with running(environ(ten, VRAM_LIMIT=str(2 * one), RAM_LIMIT=str(4 * one)), tmp_path / "server.log") as server:
        post = server.client.post
        pinned = post("/models/load", json={"MODEL_ID": MODELS[5], "pin": True}).json()
        assert (pinned["tier"], pinned["pinned"], pinned["leases"]) == ("device", "device", 0)
        for model in MODELS[6:9]:
            assert server.post(INPUTS, {"MODEL_ID": model}).status_code == 200
        assert entry(server, MODELS[5])["tier"] == "device"
        staged = post("/models/load", json={"callInputs": {"MODEL_ID": MODELS[7]}, "tier": "host"}).json()
        assert staged["tier"] == "host"
        assert staged["bytes"]["device"] == 0 < staged["bytes"]["host"]
        # pinned as well, it leaves no room for a third
        assert post("/models/load", json={"MODEL_ID": MODELS[6], "pin": True}).status_code == 200
        full = server.post(INPUTS, {"MODEL_ID": MODELS[8]})
        assert full.status_code == 507
        assert "pinned" in full.json()["$error"]["message"]
        freed = post("/models/unload", json={"MODEL_ID": MODELS[6]}).json()
        assert (freed["tier"], freed["pinned"]) == ("disk", None)
        assert server.post(INPUTS, {"MODEL_ID": MODELS[8]}).status_code == 200
        shown = entry(server, MODELS[8])
        assert shown["bytes"]["disk"] >= shown["bytes"]["device"] > 0
        assert abs(shown["last_used"] / 1000 - time.time()) < 60


def test_what_was_pinned_is_listed_and_unloaded_though_its_files_were_replaced_or_removed(
    ten: Path, tmp_path: Path
) -> None:
    removed, replaced, by_revision = models = ["tiny/m5", "tiny/m6", "tiny/m7"]
    for model in models:
        shutil.copytree(folder_of(ten, model), folder_of(tmp_path, model))
    with running(environ(tmp_path, MODEL_ID="demo/shapes"), tmp_path / "server.log") as server:
        post = server.client.post
        for model in models:
            assert post("/models/load", json={"MODEL_ID": model, "pin": True}).json()["pinned"] == "device"
        before = server.client.get("/models").json()["models"]
        for model in models:
            shutil.rmtree(folder_of(tmp_path, model))
        for model in (replaced, by_revision):
            shutil.copytree(folder_of(ten, MODELS[8]), folder_of(tmp_path, model))
        # all that takes memory is listed, also beside what it was replaced by
        shown = server.client.get("/models").json()["models"]
        assert [(e["MODEL_ID"], e["tier"]) for e in shown if e["installed"]] == [
            ("demo/shapes", "device"), (replaced, "disk"), (by_revision, "disk"),
        ]  # fmt: skip
        gone = {e["MODEL_ID"]: e for e in shown if not e["installed"]}
        old = {e["MODEL_ID"]: e["MODEL_REVISION"] for e in before}
        assert {model: (e["MODEL_REVISION"], e["tier"]) for model, e in gone.items()} == {
            model: (old[model], "device") for model in models
        }
        assert {e["bytes"]["disk"] for e in gone.values()} == {0}
        assert sum(e["bytes"]["device"] for e in shown) == memory(server)["device"]["bytes"]
        # one revision of two
        new = entry(server, by_revision)["MODEL_REVISION"]
        for revision, tier in ((new, "device"), (old[by_revision], "disk")):
            body = {"MODEL_ID": by_revision, "MODEL_REVISION": revision}
            assert post("/models/unload", json=body).status_code == 200
            tiers = [e["tier"] for e in server.client.get("/models").json()["models"] if e["MODEL_ID"] == by_revision]
            assert (tier in tiers) and len(tiers) == (2 if tier == "device" else 1)
        for model in (removed, replaced):
            freed = post("/models/unload", json={"MODEL_ID": model})
            assert (freed.status_code, freed.json()["tier"]) == (200, "disk"), freed.text
        post("/models/unload", json={"MODEL_ID": "demo/shapes"})
        assert memory(server)["device"]["bytes"] == memory(server)["host"]["bytes"] == 0
        assert post("/models/unload", json={"MODEL_ID": removed}).status_code == 404


def test_a_load_is_answered_when_the_server_shuts_down(ten: Path, tmp_path: Path) -> None:
    with (
        running(environ(ten, DRAIN_TIMEOUT="1"), tmp_path / "server.log") as server,
        concurrent.futures.ThreadPoolExecutor(1) as pool,
    ):
        (worker,) = server.worker_pids()
        os.kill(worker, signal.SIGSTOP)
        try:
            asked = pool.submit(server.client.post, "/models/load", json={"MODEL_ID": MODELS[1]})
            time.sleep(1)  # nothing tells that it has come
            server.process.send_signal(signal.SIGTERM)
            answer = asked.result()
        finally:
            os.kill(worker, signal.SIGCONT)
        assert (answer.status_code, answer.json()["$error"]["code"]) == (503, "NOT_READY")


@pytest.mark.parametrize(
    ("path", "body", "status", "code", "field"),
    [
        ("load", {"MODEL_ID": "tiny/m0", "tier": "disk"}, 400, "INVALID_INPUTS", "tier"),
        ("unload", {"MODEL_ID": "tiny/m0", "tier": "device"}, 400, "INVALID_INPUTS", "tier"),
        ("load", {"MODEL_ID": "tiny/m0", "pin": "yes"}, 400, "INVALID_INPUTS", "pin"),
        ("load", {"MODEL": "tiny/m0"}, 400, "UNKNOWN_INPUT", "callInputs.MODEL"),
        ("load", {"MODEL_ID": "no/such"}, 404, "MODEL_MISMATCH", None),
        ("unload", {"MODEL_ID": "no/such"}, 404, "MODEL_NOT_FOUND", "MODEL_ID"),
        ("load", {"MODEL_ID": "tiny/cut"}, 422, "MODEL_BROKEN", None),
    ],
)
def test_what_cannot_be_loaded_is_told(
    server: Server, path: str, body: dict[str, Any], status: int, code: str, field: str | None
) -> None:
    answer = server.client.post(f"/models/{path}", json=body)
    error = answer.json()["$error"]
    assert (answer.status_code, error["code"]) == (status, code), error
    assert field is None or error["field"] == field


@pytest.fixture(scope="module")
def mortal(ten: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    one = bytes_of(folder_of(ten, MODELS[9]))
    limits = {"VRAM_LIMIT": str(3 * one), "MODEL_ID": MODELS[8]}
    with running({**environ(ten), **limits}, tmp_path_factory.mktemp("log") / "server.log") as server:
        yield server


def test_a_worker_that_dies_gets_back_what_requests_had_brought_in(
    mortal: Server, right: dict[str, np.ndarray]
) -> None:
    server = mortal
    for model in (MODELS[5], MODELS[6], MODELS[7]):
        assert server.post(INPUTS, {**OPTIONS, "MODEL_ID": model}).status_code == 200
    assert server.client.post("/models/load", json={"MODEL_ID": MODELS[6], "pin": True}).status_code == 200
    until(lambda: entry(server, MODELS[7])["tier"] == "device")
    assert entry(server, MODELS[8])["tier"] == "host"
    (pid,) = server.worker_pids()
    os.kill(pid, signal.SIGKILL)
    until(lambda: server.worker_pids() not in ([], [pid]) and server.client.get("/health/ready").status_code == 200, 60)
    # the default model came first; of the others the pinned one, then the one used last; no room is made for the third
    until(lambda: entry(server, MODELS[7])["tier"] == "device")
    assert entry(server, MODELS[8])["tier"] == "device"
    assert (entry(server, MODELS[6])["tier"], entry(server, MODELS[6])["pinned"]) == ("device", "device")
    assert entry(server, MODELS[5])["tier"] == "disk"
    for model in (MODELS[6], MODELS[7]):
        answer = server.post(INPUTS, {**OPTIONS, "MODEL_ID": model})
        assert "loadModel" not in answer.json()["$timings"]
        assert is_right(answer, right[model])
