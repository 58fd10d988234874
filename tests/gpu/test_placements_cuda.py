"""Every placement on CUDA: the image of ``full`` within its distance, and the bytes that were predicted.

Real architecture of SD 1.5 with random weights in fp16, 2.1 GB of files. Written without a GPU and not been run yet.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from api.engine.placement import codec_of
from scripts.benchmarks.gpu.bench import Bench
from scripts.benchmarks.gpu.places import RUNGS, WITHIN, Counted, forced, offload_of, predicted
from scripts.benchmarks.gpu.rows import Table

pytestmark = [pytest.mark.gpu]


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BENCH_MODELS", str(tmp_path_factory.mktemp("models")))
        yield Bench("cuda:0", "real", 600.0, Table({}))


def test_bytes_and_images(bench: Bench) -> None:
    case, full, peaks = bench.case("sd1"), np.zeros(0), {}
    for placement in RUNGS:
        counted = Counted(bench)
        gc.collect()
        torch.cuda.empty_cache()
        before = counted.live()
        request = case.request(steps=2, offload=offload_of(placement), images=2 if placement == "sliced" else 1)
        with bench.engine(None, counted.device, counted.loader) as engine, forced(engine, placement):
            engine.generate(request)
            peak, done = counted.peak(lambda: engine.generate(request))  # noqa: B023 called at once
            foretold = predicted(engine, request, placement, guided=case.guided)
        assert done.meta["placement"] == placement
        peaks[placement] = peak - before
        assert abs(foretold / peaks[placement] - 1) < WITHIN, (placement, foretold, peaks)
        image = done.images[0].astype(int)
        if placement == "full":
            full = image
        elif placement in ("model", "sequential"):
            assert np.array_equal(image, full), placement
        elif codec_of(placement) == "sliced":
            assert np.abs(image - full).mean() < 1, placement  # other kernels for two images than for one, in fp16
    assert peaks["sequential"] < peaks["model"] < peaks["full"]
