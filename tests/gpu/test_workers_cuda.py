"""Several workers with one host tier on CUDA: what is pinned is shared, and the images are those of one worker.

Not part of ``scripts/test``: ``python -m pytest tests/gpu/test_workers_cuda.py -m gpu`` on a machine with GPUs. It has been
written without one and not been run yet.
"""

from __future__ import annotations

import concurrent.futures
import gc
import os
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from api.engine import common_host
from api.schema.generation import ModelRef
from tests.running import Server, images_of, running
from tests.sharing import cast_model, sharing

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]
several = pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.device_count() < 2, reason="there is one CUDA device, and two are needed"
)
IMAGE = {"prompt": "a dog", "num_inference_steps": 3, "seed": 5, "width": 64, "height": 64}


def test_shared_memory_is_pinned_and_copied_from(caplog: pytest.LogCaptureFixture) -> None:
    """Also with one GPU: CUDA takes the mapping, keeps it when it is closed to writing, and copies by itself."""
    size = 64 * 2**20
    with sharing(2**30) as container:
        link = container.link()
        link.claim({"a": size}, wait=False, over=lambda: False)
        descriptor, _ = link.open("a", size)
        pattern = os.urandom(2**20)
        for at in range(0, size, len(pattern)):
            os.pwrite(descriptor, pattern, at)
        link.read("a", well=True)
        views = [common_host._view(descriptor, size, pin=True) for _ in range(2)]  # as two workers have it
        os.close(descriptor)
        assert not caplog.records, "CUDA refused to pin it"
        for pages in views:
            here = torch.frombuffer(pages, dtype=torch.uint8)
            assert here.is_pinned()
            there = torch.empty(size, dtype=torch.uint8, device="cuda")
            there.copy_(here, non_blocking=True)
            torch.cuda.synchronize()
            assert torch.equal(there.cpu(), here)
            began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            began.record()
            there.copy_(here, non_blocking=True)
            ended.record()
            ended.synchronize()
            print(f"{size / began.elapsed_time(ended) / 1e6:.1f} GB/s from shared memory")
            del here
        views.clear()
        gc.collect()


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[ModelRef]]:
    root = tmp_path_factory.mktemp("models")
    return root, [cast_model(root / f"tiny--{number}", number) for number in range(3)]


def environ(root: Path, devices: str, **more: str) -> dict[str, str]:
    usual = {"RUNTIME_DOWNLOADS": "0", "MODEL_ID": "tiny/0", "MODEL_PRECISION": "fp32"}
    return {"MODELS_DIR": str(root), "DEVICES": devices, **usual, **more}


def image(server: Server, model: str) -> np.ndarray:
    answer = server.post(IMAGE, {"MODEL_ID": model})
    assert answer.status_code == 200, answer.text
    return images_of(answer.json())[0].astype(int)


def wait_for_all(server: Server) -> None:
    while not all(worker["ready"] for worker in server.client.get("/health/ready").json()["workers"]):
        assert server.process.poll() is None, server.log.read_text()
        time.sleep(0.1)


@several
def test_all_gpus_have_one_copy_and_draw_the_same(models: tuple[Path, list[ModelRef]], tmp_path: Path) -> None:
    root, refs = models
    with running(environ(root, "cuda:0"), tmp_path / "one.log") as server:
        expected = [image(server, ref.model_id) for ref in refs]
    devices = ",".join(f"cuda:{number}" for number in range(torch.cuda.device_count()))
    with running(environ(root, devices), tmp_path / "server.log") as server:
        wait_for_all(server)
        for ref in refs:
            answer = server.client.post("/models/load", json={"MODEL_ID": ref.model_id})
            assert answer.status_code == 200, answer.text
        listed = server.client.get("/models").json()
        hosts = [worker["host"]["bytes"] for worker in listed["memory"]]
        assert len(set(hosts)) == 1 and listed["host"]["held"] == hosts[0], "each has all of it, and it is there once"
        jobs = [number % len(refs) for number in range(24)]
        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            drawn = pool.map(lambda number: image(server, refs[number].model_id), jobs)
            for number, found in zip(jobs, drawn, strict=True):
                assert np.abs(found - expected[number]).max() <= 1
        os.kill(server.worker_pids()[0], signal.SIGKILL)
        assert np.abs(image(server, "tiny/0") - expected[0]).max() <= 1
        wait_for_all(server)
        assert "cannot be pinned" not in server.log.read_text()
