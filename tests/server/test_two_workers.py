"""Two devices: which of them gets a job."""

from __future__ import annotations

import concurrent.futures
import re
from pathlib import Path

from tests.running import running

IMAGE = {"prompt": "a red circle", "num_inference_steps": 3, "seed": 5}


def test_a_burst_for_a_cold_model_loads_it_on_one_worker(models_dir: Path, tmp_path: Path) -> None:
    environ = {
        "MODELS_DIR": str(models_dir),
        "DEVICES": "cpu,cpu",
        "RUNTIME_DOWNLOADS": "0",
        "OMP_NUM_THREADS": "1",
        "MAX_CONCURRENCY": "8",
    }
    with running(environ, tmp_path / "server.log") as server:
        while not all(worker["ready"] for worker in server.client.get("/health/ready").json()["workers"]):
            assert server.process.poll() is None
        for model in ("tiny/a", "tiny/b"):
            with concurrent.futures.ThreadPoolExecutor(6) as pool:
                asked = [pool.submit(server.post, IMAGE, {"MODEL_ID": model}) for _ in range(6)]
                assert [one.result().status_code for one in asked] == [200] * 6
        loads = re.findall(r"loaded [^ ]*tiny--([ab])@", (tmp_path / "server.log").read_text())
        assert sorted(loads) == ["a", "b"]
