"""Offloading and shortages of memory on CUDA.

Not part of ``scripts/test``: ``python -m pytest tests/gpu -m gpu`` on a machine with a GPU of 4 GB or more. It has been
written without one and not been run yet.
"""

from __future__ import annotations

import concurrent.futures
import gc
from collections.abc import Iterator
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from api.engine.budgets import Budgets
from api.engine.device import Device
from api.engine.generate import Engine
from api.engine.peaks import CudaMeter
from api.engine.placement import codec_of, weights_of
from api.errors import ApiError
from api.schema.generation import GenerationRequest, ModelRef
from tests.running import ROOT

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]

GIB = 2**30


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> ModelRef:
    """A denoiser of some hundred MB, so that weights count beside activations."""
    folder: Path = tmp_path_factory.mktemp("large")
    torch.manual_seed(0)
    tokenizer = CLIPTokenizer.from_pretrained(ROOT / "models" / "shapes" / "tokenizer")
    text = CLIPTextConfig(
        hidden_size=256, intermediate_size=512, num_attention_heads=4, num_hidden_layers=4, vocab_size=len(tokenizer),
        eos_token_id=tokenizer.eos_token_id, bos_token_id=tokenizer.bos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    unet = diffusers.UNet2DConditionModel(
        block_out_channels=(160, 320, 640), layers_per_block=2, sample_size=64, in_channels=4, out_channels=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=256, attention_head_dim=8, transformer_layers_per_block=2,
    )  # fmt: skip
    vae = diffusers.AutoencoderKL(
        block_out_channels=[64, 128, 128], down_block_types=["DownEncoderBlock2D"] * 3,
        up_block_types=["UpDecoderBlock2D"] * 3, latent_channels=4, layers_per_block=2, sample_size=256,
    )  # fmt: skip
    diffusers.StableDiffusionPipeline(
        vae=vae, text_encoder=CLIPTextModel(text), tokenizer=tokenizer, unet=unet,
        scheduler=diffusers.EulerDiscreteScheduler(), safety_checker=None, feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)  # fmt: skip
    return ModelRef("large/random", "main", "fp16", str(folder))


def a_request(model: ModelRef, seed: int = 1, side: int = 512, **more: object) -> GenerationRequest:
    inputs = {"prompt": "a circle", "num_inference_steps": 4, "width": side, "height": side}
    return GenerationRequest(
        id=str(seed), request_id=str(seed), model=model, pipeline="StableDiffusionPipeline",
        scheduler="EulerDiscreteScheduler", inputs=inputs, pictures={}, seed=seed, images=1, image_format="PNG",
        image_quality=95, attention="sdpa", safety_checker=False, meta={}, **more,  # type: ignore[arg-type]
    )  # fmt: skip


@pytest.fixture
def engines() -> Iterator[list[Engine]]:
    made: list[Engine] = []
    yield made
    for engine in made:
        engine.close()
    made.clear()
    torch.cuda.set_per_process_memory_fraction(1.0)
    gc.collect()
    torch.cuda.empty_cache()


def an_engine(engines: list[Engine], device: int = 2 * GIB, strict: bool = False) -> Engine:
    gc.collect()
    torch.cuda.empty_cache()
    engines.append(Engine(Device("cuda:0"), Budgets(device, 8 * GIB, False, device if strict else None, strict)))
    return engines[-1]


def allocated(engine: Engine) -> int:
    """Bytes when every model has left."""
    for key in engine.cache.held():
        engine.cache.unload(key)
    engine.executor.on_device(gc.collect)
    torch.cuda.synchronize()
    return torch.cuda.memory_allocated()


def test_the_same_images_in_less_memory(engines: list[Engine], model: ModelRef) -> None:
    peaks, images = {}, {}
    for way in ("none", "model", "sequential"):
        engine = an_engine(engines)
        engine.generate(a_request(model, offload=way))
        torch.cuda.synchronize()
        meter = engine.device.meter()
        assert isinstance(meter, CudaMeter)
        meter._most = 0  # torch's own counter begins anew with every call
        torch.cuda.reset_peak_memory_stats()
        for _ in range(2):
            images[way] = engine.generate(a_request(model, offload=way)).images
        peaks[way] = meter.most
        assert np.array_equal(images[way], images["none"])
        allocated(engine)
        engines.pop().close()
    assert peaks["sequential"] < peaks["model"] < peaks["none"]


def test_a_model_larger_than_the_budget(engines: list[Engine], model: ModelRef) -> None:
    probe = an_engine(engines)
    expected, specs = probe.generate(a_request(model)).images, probe.cache.parts(model)
    offloading = probe.cache.loader.offloading
    rooms = {way: offloading.room(specs, way) for way in ("model", "sequential")}
    allocated(probe)
    for way, budget in (("model", rooms["model"]), ("sequential", rooms["sequential"])):
        engine = an_engine(engines, budget, strict=True)
        done = engine.generate(a_request(model))
        assert done.meta["placement"] == way
        assert np.array_equal(done.images, expected)
        assert engine.cache.tiers.peak <= budget
        allocated(engine)


def test_two_jobs_of_one_offloaded_model(engines: list[Engine], model: ModelRef) -> None:
    engine = an_engine(engines)
    requests = [a_request(model, seed, offload=way) for seed in range(3) for way in ("model", "sequential", "none")]
    alone = [engine.generate(request).images for request in requests]
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        done = list(pool.map(engine.generate, requests))
    for one, expected in zip(done, alone, strict=True):
        assert np.abs(one.images.astype(int) - expected).max() <= 24  # fp16: kernels sum in another order


def test_shortages_leave_no_bytes_behind(engines: list[Engine], model: ModelRef) -> None:
    """Sizes that do not fit, again and again, in a process that may have less and less of the device."""
    engine = an_engine(engines)
    total = torch.cuda.get_device_properties(0).total_memory
    engine.generate(a_request(model))
    before = allocated(engine)
    good = errors = 0
    for number in range(40):
        share = (1.5 - 0.025 * number) * GIB / total
        torch.cuda.set_per_process_memory_fraction(min(1.0, share))
        try:
            done = engine.generate(a_request(model, number, side=(512, 768, 1024)[number % 3]))
            assert weights_of(done.meta["placement"]) in ("full", "model", "sequential")
            assert codec_of(done.meta["placement"]) in ("full", "tiled")
            good += 1
        except ApiError as fault:
            assert fault.code == "OUT_OF_MEMORY", fault
            errors += 1
    torch.cuda.set_per_process_memory_fraction(1.0)
    assert good
    assert engine.generate(a_request(model)).images.shape == (1, 512, 512, 3)
    assert allocated(engine) == before
    print(f"{good} images, {errors} errors")


def test_a_size_that_will_not_fit_is_not_tried(engines: list[Engine], model: ModelRef) -> None:
    engine = an_engine(engines)
    for side in (256, 384, 512):
        engine.generate(a_request(model, side=side))
    assert engine.attempts.ladder.expected(a_request(model, side=1024))[0] == "full"
    engine.peaks.room = sum(spec.bytes for spec in engine.cache.parts(model)) + 64 * 2**20
    assert engine.plan(a_request(model, side=1024)).placement != "full"
