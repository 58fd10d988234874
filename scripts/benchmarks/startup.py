"""From ``python -m api serve`` to the first answers, against importing the pipeline in plain Python."""

from __future__ import annotations

import subprocess
import sys
import time

from scripts.benchmarks.measure import Figure, median
from scripts.benchmarks.serving import ROOT, free_port, start, wait_for

ROUNDS = 5
_PLAIN = """
import torch, diffusers
diffusers.StableDiffusionPipeline.from_pretrained("models/shapes", dtype=torch.float32)
"""


def _serve() -> tuple[float, float]:
    """Seconds to live and to ready."""
    port = free_port()
    began = time.perf_counter()
    process = start(port)
    try:
        wait_for(port, "/health/live")
        live = time.perf_counter() - began
        wait_for(port, "/health/ready")
        return live, time.perf_counter() - began
    finally:
        process.terminate()
        process.wait(30)


def _plain() -> float:
    began = time.perf_counter()
    subprocess.run([sys.executable, "-W", "ignore", "-c", _PLAIN], cwd=ROOT, check=True, stderr=subprocess.DEVNULL)
    return time.perf_counter() - began


def run() -> list[Figure]:
    """Measure."""
    _serve()
    live, ready, plain = [], [], []
    for _ in range(ROUNDS):
        first, able = _serve()
        live.append(first)
        ready.append(able)
        plain.append(_plain())
    base = median(plain)
    against = "a Python process that imports diffusers and loads the model"
    return [
        Figure("startup-live", median(live), base, "s", against, base / median(live)),
        Figure("startup-ready", median(ready), base, "s", against, base / median(ready)),
    ]
