"""FLUX.1-schnell's architecture: loading, one image of four steps, its peak beside what was predicted."""

from __future__ import annotations

import shutil
import time

import torch

from api.engine.generate import Engine
from scripts.benchmarks import architectures
from scripts.benchmarks.gpu.bench import Bench, Case
from scripts.benchmarks.gpu.places import Counted, forced, predicted
from scripts.benchmarks.gpu.rows import Row
from scripts.benchmarks.gpu.variants import Variant, ask, is_in_use, usable
from scripts.benchmarks.measure import median, milliseconds

SECTION = "FLUX-schnell"
_BYTES = {"real": 34e9, "cut": 10e9}
_WRITES = 0.5e9
"""Bytes a second at which files are made, at the least where it is worth beginning."""


def run(bench: Bench) -> None:
    """As large as there is room and time for."""
    size = _size(bench)
    if not size:
        bench.leave_out(f"{SECTION}: not enough disk, memory or time for {_BYTES['cut'] / 1e9:.0f} GB of files")
        return
    name = {"real": "FLUX-schnell", "cut": "FLUX-schnell cut to 5+10 blocks and 6 of T5's layers"}.get(
        size, "tiny FLUX"
    )
    side = 64 if size == "tiny" else 1024
    precision = "bf16" if bench.is_cuda else "fp32"
    case = Case(name, "flux", "FluxPipeline", "FlowMatchEulerDiscreteScheduler", precision, side, 4, 0.0, size)
    began = time.monotonic()
    _ = case.folder
    print(f"made in {time.monotonic() - began:.0f} s", flush=True)
    _one(bench, case)


def _size(bench: Bench) -> str:
    if not bench.is_cuda or bench.size == "tiny":
        return "tiny"
    disk = shutil.disk_usage(architectures.root()).free
    memory = torch.cuda.get_device_properties(bench.device).total_memory
    for size, needed in _BYTES.items():
        # twice on the device: ours and the plain one's, one after the other but with activations
        if disk > 1.2 * needed and memory > 1.3 * needed and bench.left > needed / _WRITES + 90:
            return size
    return ""


def _one(bench: Bench, case: Case) -> None:
    counted = Counted(bench)
    before = counted.live()
    with bench.engine(None, counted.device, counted.loader) as engine, counted.watching(engine), forced(engine, "full"):
        request = case.request(offload="none")
        first = milliseconds(lambda: engine.generate(request))
        engine.cache.unload(request.model.key)
        again = milliseconds(lambda: engine.generate(request))
        ours = [milliseconds(lambda: engine.generate(request)) for _ in range(3)]
        lossy = _lossy(bench, case, engine)
        peak, _done = counted.peak(lambda: engine.generate(request))
        foretold = predicted(engine, request, "full", guided=False)
    bench.clean()
    bench.add(Row(SECTION, f"{case.what}, loading and an image", first, "ms", more={"second_time_ms": again}))
    for variant, took in lossy:
        a, b = median(took), median(ours)
        bench.add(Row(SECTION, f"{case.what}, {variant.name}", a, "ms", b, "the same without it", b / a, lossy=True))
    ratio = foretold / (peak - before)
    bench.add(
        Row(
            SECTION, f"{case.name}, peak, full", (peak - before) / 1e9, "GB", foretold / 1e9,
            "predicted: weights by the books, calls as learned", ratio, "within 10%", abs(1 - ratio) <= 0.1,
        )
    )  # fmt: skip
    if bench.is_cuda and bench.left < 45:
        bench.leave_out(f"{SECTION}: plain diffusers, no time left")
        bench.add(Row(SECTION, f"{case.what}, one image", median(ours), "ms"))
        return
    plain = bench.plain(case, torch.bfloat16 if bench.is_cuda else None)
    bench.run_plain(plain, case)
    theirs = [milliseconds(lambda: bench.run_plain(plain, case)) for _ in range(3)]
    a, b = median(ours), median(theirs)
    against = f"{bench.against(case)}; not in turn, both do not fit at once"
    bench.add(Row(SECTION, f"{case.what}, one image", a, "ms", b, against, b / a))


def _lossy(bench: Bench, case: Case, engine: Engine) -> list[tuple[Variant, list[float]]]:
    """What requests for this family alone may ask for, and the milliseconds of each image."""
    found = []
    for variant in usable(bench, case.family):
        request = ask(variant, case, offload="none")
        if is_in_use(bench, variant, case, engine.generate(request).meta):
            found.append((variant, [milliseconds(lambda: engine.generate(request)) for _ in range(3)]))  # noqa: B023
    return found
