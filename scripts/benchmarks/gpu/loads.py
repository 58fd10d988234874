"""How long a model takes to the device: from a cold disk, from the page cache, from the host's memory.

Of a loader's own work; what else a server does at a switch is its queue and takes milliseconds.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from typing import Any

import torch

from api.engine.budgets import host_memory
from api.engine.loader import PartLoader
from scripts.benchmarks.gpu.bench import Bench, Case
from scripts.benchmarks.gpu.rows import Row
from scripts.benchmarks.measure import median
from scripts.benchmarks.switch import Computing, Side, drop_page_cache, fill_page_cache, touch

SECTION = "load and switch"
_ROUNDS = 3


def run(bench: Bench) -> None:
    """Both cases."""
    for family in ("sd1", "sdxl"):
        _one(bench, bench.case(family))


def _one(bench: Bench, case: Case) -> None:
    device = Computing(bench.device)
    loader = PartLoader(device, host_memory().total // 2)
    a, b = (Side(loader, case.family, case.precision, seed, device.torch, case.size) for seed in (1, 2))
    plain = {"to(device)": a.plain, "device_map": a.mapped}
    size = sum(file.stat().st_size for file in a.files) / 1e9

    def warm() -> None:
        fill_page_cache(a.files)

    def cold() -> None:
        drop_page_cache(a.files)

    host = a.hosted()
    resident = {name: part for name, part in b.ours().items() if isinstance(part, torch.nn.Module)}
    ways: list[tuple[str, Callable[[], dict[str, Any]], Callable[[], None]]] = [
        ("host → device", lambda: a.ours(host), warm),
        ("host → device, in place of one of its architecture", lambda: a.ours(host, resident), warm),
        ("page cache → device", a.ours, warm),
        ("cold disk → device", a.ours, cold),
    ]
    for what, ours, prepare in ways:
        if bench.is_cuda and bench.left < 60:
            bench.leave_out(f"{SECTION}, {case.name}, {what}: no time left")
            continue
        times = _in_turn(bench, {"ours": ours, **plain}, prepare)
        took = median(times.pop("ours"))
        best = min(times, key=lambda name: median(times[name]))
        baseline = median(times[best])
        bench.add(
            Row(
                SECTION, f"{case.name}, {what}", took, "s", baseline, f"diffusers from the files, {best}",
                baseline / took, more={"GB": size, "GB_per_s": size / took},
            )
        )  # fmt: skip
    host.clear()
    resident.clear()
    bench.clean()


def _in_turn(
    bench: Bench, contenders: dict[str, Callable[[], dict[str, Any]]], prepare: Callable[[], None]
) -> dict[str, list[float]]:
    names = list(contenders)
    times: dict[str, list[float]] = {name: [] for name in names}
    for number in range(_ROUNDS + 1):
        if number > 1 and bench.is_cuda and bench.left < 60:
            break
        for name in names[number % len(names) :] + names[: number % len(names)]:
            gc.collect()
            prepare()
            began = time.perf_counter()
            loaded = contenders[name]()
            touch(loaded)
            took = time.perf_counter() - began
            del loaded
            if number:  # the first has warmed up what is made once
                times[name].append(took)
    return times
