"""What each placement takes of the device's memory, beside what was predicted, and how far its image is from ``full``.

On a CPU the device's memory is that of the tests, which count what tensors take.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch

from api.engine.device import Device
from api.engine.generate import Engine, Generated
from api.engine.offload import held_as
from api.engine.parts import Loader
from api.engine.peaks import CudaMeter
from api.engine.placement import about, build_of, codec_of, weights_of
from api.schema.generation import GenerationRequest
from scripts.benchmarks.gpu.bench import Bench, Case
from scripts.benchmarks.gpu.rows import Row
from scripts.benchmarks.measure import milliseconds

SECTION = "placements"
RUNGS = ("full", "sliced", "tiled", "model", "sequential", "model+tiled", "sequential+tiled")
WITHIN = 0.1
"""Of the measured bytes, that the prediction may be off."""
_STEPS = 2


def offload_of(placement: str) -> str:
    """What a request asks for that is to have its weights held as in a placement."""
    way = weights_of(placement)
    return "none" if way == "full" else way


@contextlib.contextmanager
def forced(engine: Engine, placement: str) -> Iterator[None]:
    """Have every request run under a placement; it asks for the weights' part of it by ``offload_of``."""
    ladder: Any = engine.attempts.ladder
    ladder.start = lambda *_: placement
    try:
        yield
    finally:
        del ladder.start


def predicted(engine: Engine, request: GenerationRequest, placement: str, *, guided: bool) -> float:
    """Bytes at the most on the device, by the books and by what calls of requests like it have taken.

    Args:
        engine: that has run some.
        request: which; not of a picture.
        placement: under which.
        guided: a step takes two rows for each image.
    """
    held = held_as(request.model, weights_of(placement))
    with engine.line.lease(held, lambda: False) as model:
        parts = model.components
        rows = {
            type(parts[name]).__name__: request.images * (2 if guided and name != "vae" else 1)
            for name in ("unet", "transformer", "vae")
            if name in parts
        }
        calls = engine.peaks.expected(about(build_of(model), request, placement), rows)
    return engine.cache.device_bytes(held) + calls


class Counted:
    """The peak of the device's memory while something runs.

    Args:
        bench: on which device.

    Attributes:
        device: for an engine.
        loader: for the same; None: the engine's own.
    """

    def __init__(self, bench: Bench) -> None:
        self._allocator: Any = None
        self.loader: Loader | None = None
        if bench.is_cuda:
            self.device: Device = Device(bench.device)
        else:
            from tests.budgeted import Allocator, Apart, Outside

            self._allocator = Allocator()
            apart = Apart(self._allocator)
            self.device, self.loader = apart, Outside(apart)

    @contextlib.contextmanager
    def watching(self, engine: Engine) -> Iterator[None]:
        """Count what an engine takes."""
        with self._allocator.inside(engine) if self._allocator else contextlib.nullcontext():
            yield

    def live(self) -> int:
        """Bytes now."""
        return self._allocator.live if self._allocator else torch.cuda.memory_allocated(self.device.torch)

    def peak(self, run: Callable[[], Generated]) -> tuple[int, Generated]:
        """Bytes at the most while it runs, and what it gives."""
        gc.collect()
        if self._allocator is None:
            meter = self.device.meter()
            assert isinstance(meter, CudaMeter)
            torch.cuda.synchronize(self.device.torch)
            meter.restart()
            done = run()
            torch.cuda.synchronize(self.device.torch)
            return meter.most, done
        from tests.budgeted import Counting

        self._allocator.peak = self._allocator.live
        with Counting(self._allocator):
            done = run()
        return self._allocator.peak, done


def run(bench: Bench) -> None:
    """Both cases, SDXL first."""
    for family in ("sdxl", "sd1"):
        _one(bench, bench.case(family))


def _one(bench: Bench, case: Case) -> None:
    if bench.size == "tiny":
        case = dataclasses.replace(case, side=128)  # more than one tile
    images: dict[int, np.ndarray] = {}
    for rung in RUNGS:
        if bench.is_cuda and bench.left < 40:
            bench.leave_out(f"{SECTION}, {case.name}, {rung}: no time left")
            continue
        counted = Counted(bench)
        gc.collect()
        before = counted.live()
        count = 2 if codec_of(rung) == "sliced" else 1
        request = case.request(steps=_STEPS, offload=offload_of(rung), images=count)
        with (
            bench.engine(None, counted.device, counted.loader) as engine,
            counted.watching(engine),
            forced(engine, rung),
        ):
            counted.peak(lambda: engine.generate(request))  # noqa: B023 which teaches
            peak, done = counted.peak(lambda: engine.generate(request))  # noqa: B023
            took = milliseconds(lambda: engine.generate(request))  # noqa: B023
            assert done.meta["placement"] == rung, done.meta["placement"]
            foretold = predicted(engine, request, rung, guided=case.guided)
        peak -= before
        off = np.abs(done.images[:1].astype(int) - images.setdefault(0, done.images[:1])).astype(float)
        ratio = foretold / peak
        bench.add(
            Row(
                SECTION, f"{case.name}, {rung}{', 2 images' if count > 1 else ''}", peak / 1e9, "GB", foretold / 1e9,
                "predicted: weights by the books, calls as learned", ratio, f"within {WITHIN:.0%}",
                abs(1 - ratio) <= WITHIN, more={"off_full_mean": float(off.mean()), "off_full_most": float(off.max()),
                                                "ms": took, "steps": _STEPS},
            )
        )  # fmt: skip
