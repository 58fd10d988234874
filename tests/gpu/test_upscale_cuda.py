"""Upscalers on CUDA.

Not part of ``scripts/test``: ``python -m pytest tests/gpu/test_upscale_cuda.py -m gpu`` on a machine with a GPU of 4 GB
or more. It has been written without one and not been run yet.
"""

from __future__ import annotations

import concurrent.futures
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from api.engine.budgets import Budgets
from api.engine.device import Device
from api.engine.generate import Engine
from api.engine.spandrel_import import import_spandrel
from api.engine.upscale import Order
from api.engine.upscalers import kind_of
from tests import upscalers
from tests.upscalers import a_picture, plainly, ref_of, upscale_by

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]


@pytest.fixture
def engine() -> Iterator[Engine]:
    made = Engine(Device("cuda"))
    yield made
    made.close()


@pytest.fixture(scope="module")
def real_size(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The architecture of RealESRGAN_x4plus, with random weights."""
    import_spandrel()
    from spandrel.architectures.ESRGAN import ESRGAN

    torch.manual_seed(0)
    net = ESRGAN(in_nc=3, out_nc=3, num_filters=64, num_blocks=23, scale=4)
    return upscalers.save(net, tmp_path_factory.mktemp("real") / "x4plus.safetensors")


@pytest.mark.parametrize(("precision", "levels"), [("fp32", 1), ("fp16", 4), ("bf16", 24)])
@pytest.mark.parametrize("tile", [64, 256])
def test_it_is_what_spandrel_makes_on_a_cpu(
    engine: Engine, tmp_path: Path, precision: str, levels: int, tile: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Within levels of 255; without TF32, which convolutions of float32 use unless told otherwise."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    picture = a_picture(150, 203)
    for name, net in (("compact", upscalers.compact()), ("esrgan", upscalers.esrgan())):
        path = upscalers.save(net, tmp_path / f"{name}.safetensors")
        made, told = engine.upscaling.run(picture[None], Order(upscale_by(path, tile=tile, precision=precision)))
        assert told["upscaler"]["dtype"] == {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}[precision]
        assert np.abs(made[0].astype(int) - plainly(path, picture).astype(int)).max() <= levels


def test_the_bytes_are_those_that_the_header_says(engine: Engine, real_size: Path) -> None:
    ref = ref_of(real_size, "fp16")
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    model = engine.cache.lease(ref)
    assert model is not None
    took, said = torch.cuda.memory_allocated() - before, engine.cache.device_bytes(ref)
    assert said == kind_of(real_size).floats * 2
    assert took == pytest.approx(said, rel=0.1)  # blocks of 512 bytes, for each of several hundred weights
    engine.cache.release(ref)


def test_the_size_of_a_picture_does_not_count_for_memory(engine: Engine, real_size: Path) -> None:
    """What is on the device is a piece, not the picture."""
    peaks = []
    for side in (512, 2048):
        order = Order(upscale_by(real_size, tile=256, precision="fp16"))
        engine.upscaling.run(a_picture(256, 256)[None], order)
        torch.cuda.reset_peak_memory_stats()
        engine.upscaling.run(a_picture(side, side)[None], order)
        torch.cuda.synchronize()
        peaks.append(torch.cuda.max_memory_allocated())
    assert peaks[1] <= 1.5 * peaks[0]


def test_upscalers_leave_the_device_for_each_other(tmp_path: Path) -> None:
    paths = [upscalers.save(upscalers.compact(n), tmp_path / f"{n}.safetensors") for n in range(3)]
    one = kind_of(paths[0]).floats * 2
    engine = Engine(Device("cuda"), Budgets(device=2 * one, host=8 * one, shared=False))
    try:
        picture = a_picture(90, 100)
        for n in (0, 1, 2, 0, 1, 2):
            made, _ = engine.upscaling.run(picture[None], Order(upscale_by(paths[n], precision="fp16")))
            assert np.abs(made[0].astype(int) - plainly(paths[n], picture).astype(int)).max() <= 4
            assert engine.cache.memory().device <= 2 * one
    finally:
        engine.close()


def test_eight_at_once_are_merged_and_each_as_alone(engine: Engine, tmp_path: Path) -> None:
    path = upscalers.save(upscalers.esrgan(), tmp_path / "esrgan.safetensors")
    pictures = [a_picture(300, 300, seed=n) for n in range(8)]

    def larger(picture: np.ndarray) -> np.ndarray:
        return engine.upscaling.run(picture[None], Order(upscale_by(path, tile=128, precision="fp16")))[0][0]

    alone = [larger(picture) for picture in pictures]
    calls, runs = engine.executor.calls, engine.executor.runs
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        together = list(pool.map(larger, pictures))
    assert engine.executor.runs - runs < engine.executor.calls - calls
    for one, other in zip(alone, together, strict=True):
        assert np.abs(one.astype(int) - other.astype(int)).max() <= 4
