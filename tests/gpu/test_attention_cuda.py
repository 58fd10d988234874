"""Attention kernels, channels last and TF32 on CUDA.

Not part of ``scripts/test``: ``python -m pytest tests/gpu -m gpu`` on a machine with a GPU of 4 GB or more. It has been
written without one and not been run yet.
"""

from __future__ import annotations

import concurrent.futures
import gc
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch

from api.engine.attention import missing, usable_for
from api.engine.budgets import Budgets
from api.engine.device import Device
from api.engine.generate import Engine, Generated
from api.engine.settled import CANDIDATES, FILE, SHAPES, settle
from api.schema.attention import ATTENTIONS, LOSSY, PACKAGES
from api.schema.generation import GenerationRequest, ModelRef
from tests.gpu.test_offload_cuda import GIB, a_request, model

__all__ = ["model"]

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]

NEAR = 24
"""Of 255: fp16, and kernels that sum in another order."""


@pytest.fixture
def engines() -> Iterator[list[Engine]]:
    made: list[Engine] = []
    yield made
    for engine in made:
        engine.close()
    made.clear()
    gc.collect()
    torch.cuda.empty_cache()


def an_engine(engines: list[Engine], device: Device | None = None) -> Engine:
    engines.append(Engine(device or Device("cuda:0"), Budgets(2 * GIB, 8 * GIB, False), embeddings_limit=0))
    return engines[-1]


def asking(model: ModelRef, attention: str, seed: int = 1, **more: object) -> GenerationRequest:
    return msgspec.structs.replace(a_request(model, seed, side=256, **more), attention=attention)


def away(one: Generated, other: Generated) -> int:
    return int(np.abs(one.images.astype(int) - other.images.astype(int)).max())


@pytest.mark.parametrize("name", [name for name in ATTENTIONS if name not in ("auto", "native", "sdpa")])
def test_a_kernel_gives_nearly_the_same_image_or_is_not_there(
    name: str, engines: list[Engine], model: ModelRef
) -> None:
    engine = an_engine(engines)
    plain = engine.generate(asking(model, "sdpa"))
    assert plain.meta["numerics"] == "cuda/float16/sdpa/eager/channels_last"
    done = engine.generate(asking(model, name))
    print(f"{name}: {done.meta['attention']}, {away(done, plain)} of 255 away")
    if missing(name):
        assert name in PACKAGES
        assert (done.meta["attention"], away(done, plain)) == ("sdpa", 0)
    elif name == "_native_efficient" or torch.cuda.get_device_capability() >= (8, 0):
        assert done.meta["attention"] == name
        assert done.meta["numerics"].endswith("/lossy/channels_last") is (name in LOSSY)
    if name not in LOSSY:
        assert away(done, plain) <= NEAR


def test_jobs_with_different_kernels_at_once(engines: list[Engine], model: ModelRef) -> None:
    """Torch's switches are the process's: they are turned for one call of the device's thread after the other."""
    engine = an_engine(engines)
    names = ["sdpa", "_native_math", "_native_efficient", *(n for n in ("xformers", "flash") if not missing(n))]
    wanted = [asking(model, name, seed) for seed in (1, 2) for name in names]
    alone = [engine.generate(request) for request in wanted]
    with concurrent.futures.ThreadPoolExecutor(len(wanted)) as pool:
        for request, one, expected in zip(wanted, pool.map(engine.generate, wanted), alone, strict=True):
            assert one.meta["attention"] == request.attention
            assert away(one, expected) <= NEAR
    assert torch.backends.cuda.flash_sdp_enabled() and torch.backends.cuda.math_sdp_enabled()


def test_auto_is_settled_and_kept(tmp_path: Path, engines: list[Engine], model: ModelRef) -> None:
    device = Device("cuda:0")
    torch.cuda.synchronize()
    before, began = torch.cuda.memory_allocated(), time.perf_counter()
    first = settle(device, tmp_path)
    print(f"settled as {first or 'sdpa'} in {time.perf_counter() - began:.2f} s: {(tmp_path / FILE).read_text()}")
    assert set(first.values()) <= set(CANDIDATES)
    assert torch.cuda.memory_allocated() == before
    assert settle(device, tmp_path) == first
    engine = Engine(device, Budgets(2 * GIB, 8 * GIB, False), attention=first)
    engines.append(engine)
    done = engine.generate(asking(model, "auto"))
    assert done.meta["attention"] == first.get(torch.float16, "sdpa")


def test_operators_are_looked_for_at_every_size_that_is_measured() -> None:
    device = torch.device("cuda:0")
    for size in sorted({shape[-1] for shape in SHAPES}):
        assert usable_for("_native_math", device, torch.float16, size)
        found = [name for name in CANDIDATES if usable_for(name, device, torch.float16, size)]
        print(f"heads of {size}: {', '.join(found)}")
        assert "_native_efficient" in found


def test_channels_last_in_as_many_bytes_however_it_is_held(engines: list[Engine], model: ModelRef) -> None:
    allocated, images = {}, {}
    for way in ("0", "auto"):
        engine = an_engine(engines, Device("cuda:0", channels_last=way))
        engine.load(model)
        engine.cache.give_back()
        gc.collect()
        torch.cuda.synchronize()
        allocated[way] = torch.cuda.memory_allocated()
        images[way] = engine.generate(asking(model, "sdpa"))
        if way == "auto":
            for offload in ("model", "sequential"):
                done = engine.generate(asking(model, "sdpa", offload=offload))
                assert done.meta["numerics"] == "cuda/float16/sdpa/eager/channels_last"
                assert np.array_equal(done.images, images[way].images), offload
        for key in engine.cache.held():
            engine.cache.unload(key)
        engines.pop().close()
        del engine
        gc.collect()
    assert abs(allocated["auto"] - allocated["0"]) < 2**20
    assert images["0"].meta["numerics"] == "cuda/float16/sdpa/eager"
    assert away(images["auto"], images["0"]) <= NEAR


def test_fp32_is_exact_unless_tf32_is_asked_for(engines: list[Engine], model: ModelRef) -> None:
    exact = ModelRef(model.model_id, model.revision, "fp32", model.folder)
    try:
        done = {}
        for tf32 in (False, True):
            engine = an_engine(engines, Device("cuda:0", tf32=tf32))
            assert torch.backends.cudnn.allow_tf32 is tf32
            done[tf32] = engine.generate(asking(exact, "sdpa"))
            engines.pop().close()
        assert done[False].meta["numerics"] == "cuda/float32/sdpa/eager"
        assert done[True].meta["numerics"] == "cuda/float32/sdpa/eager/tf32"
        assert away(done[True], done[False]) <= NEAR
    finally:
        Device("cuda:0")
