"""Compiled blocks and CUDA graphs on CUDA.

Not part of ``scripts/test``: ``python -m pytest tests/gpu -m gpu`` on a machine with a GPU of 8 GB or more and a C
compiler. It has been written without one and not been run yet.
"""

from __future__ import annotations

import concurrent.futures
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from api.engine.budgets import Budgets
from api.engine.compiled.blocks import Blocks
from api.engine.device import Device
from api.engine.generate import Engine, Generated
from api.schema.generation import GenerationRequest, ModelRef
from tests.running import ROOT

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]

GIB = 2**30
Make = Callable[[str], Engine]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[ModelRef]:
    """Two of Stable Diffusion 1.5's own size, with random weights."""
    return [save(tmp_path_factory.mktemp(f"sd{seed}"), seed) for seed in range(2)]


def save(folder: Path, seed: int) -> ModelRef:
    torch.manual_seed(seed)
    tokenizer = CLIPTokenizer.from_pretrained(ROOT / "models" / "shapes" / "tokenizer")
    text = CLIPTextConfig(
        hidden_size=768, intermediate_size=3072, num_attention_heads=12, num_hidden_layers=12,
        vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id, bos_token_id=tokenizer.bos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    unet = diffusers.UNet2DConditionModel(cross_attention_dim=768, attention_head_dim=8, sample_size=64)
    vae = diffusers.AutoencoderKL(
        block_out_channels=[64, 128, 128, 128], down_block_types=["DownEncoderBlock2D"] * 4,
        up_block_types=["UpDecoderBlock2D"] * 4, latent_channels=4, sample_size=512,
    )  # fmt: skip
    diffusers.StableDiffusionPipeline(
        vae=vae, text_encoder=CLIPTextModel(text), tokenizer=tokenizer, unet=unet,
        scheduler=diffusers.DDIMScheduler(), safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    ).to(torch.float16).save_pretrained(folder)  # fmt: skip
    return ModelRef(folder.name, "main", "fp16", str(folder))


def a_request(model: ModelRef, seed: int = 1, steps: int = 20, **more: object) -> GenerationRequest:
    inputs = {"prompt": f"a circle {seed}", "num_inference_steps": steps, "width": 512, "height": 512}
    return GenerationRequest(
        id=str(seed), request_id=str(seed), model=model, pipeline="StableDiffusionPipeline", scheduler="DDIMScheduler",
        inputs=inputs, pictures={}, seed=seed, images=1, image_format="PNG", image_quality=95, attention="sdpa",
        safety_checker=False, meta={}, **more,  # type: ignore[arg-type]
    )  # fmt: skip


@pytest.fixture
def make(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Make]:
    made: list[Engine] = []
    kept = tmp_path_factory.getbasetemp() / "compiled"

    def one(compiled: str) -> Engine:
        made.append(Engine(Device("cuda:0"), Budgets(8 * GIB, 8 * GIB, False), compiled=compiled, compile_cache=kept))
        return made[-1]

    yield one
    for engine in made:
        engine.close()


def settled(engine: Engine) -> Blocks:
    assert engine.blocks is not None
    while engine.blocks.counts()["preparing"]:
        time.sleep(0.2)
    assert engine.blocks.preparer.failed == {}
    return engine.blocks


def seconds(engine: Engine, request: GenerationRequest, times: int = 5) -> list[float]:
    taken = []
    for _ in range(times):
        began = time.perf_counter()
        engine.generate(request)
        taken.append(time.perf_counter() - began)
    return taken


def word(done: Generated) -> str:
    return str(done.meta["numerics"].split("/")[3])


def test_graphs_change_no_pixel_and_survive_a_switch(make: Make, models: list[ModelRef]) -> None:
    plain, engine = make("off"), make("graphs")
    for model in (models[0], models[1], models[0]):
        for seed in (1, 2):
            one, other = (each.generate(a_request(model, seed)) for each in (plain, engine))
            assert np.array_equal(one.images, other.images)
            assert one.meta["numerics"] == other.meta["numerics"]
    assert engine.graphs is not None
    assert engine.graphs.replayed > 60
    assert engine.graphs.bytes > 0
    eager, recorded = (statistics.median(seconds(each, a_request(models[0]))) for each in (plain, engine))
    print(
        f"SD 1.5, 512 x 512, 20 steps: {eager:.3f} s as it is, {recorded:.3f} s with graphs ({eager / recorded:.2f}x)"
    )


def test_graphs_give_their_memory_back(make: Make, models: list[ModelRef]) -> None:
    engine = make("graphs")
    for seed in range(3):
        engine.generate(a_request(models[0], seed))
    assert engine.graphs is not None
    held = engine.graphs.bytes
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved()
    engine.executor.on_device(engine.graphs.clear)
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    assert held > 0
    assert torch.cuda.memory_reserved() < before


def test_graphs_of_jobs_that_come_together(make: Make, models: list[ModelRef]) -> None:
    plain, engine = make("off"), make("graphs")
    requests = [a_request(models[0], seed) for seed in range(8)]
    alone = [plain.generate(request).images for request in requests]
    for _ in range(3):
        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            together = [done.images for done in pool.map(engine.generate, requests)]
        for one, other in zip(alone, together, strict=True):
            assert np.abs(one.astype(int) - other.astype(int)).mean() < 1.0  # batches of fp16 sum in other orders


@pytest.mark.parametrize("how", ["blocks", "both"])
def test_compiled_blocks(make: Make, models: list[ModelRef], how: str) -> None:
    """That code is as near to float32 as the block itself is what ``artifacts.check`` has seen to before it is used."""
    plain, engine = make("off"), make(how)
    request = a_request(models[0])
    alone = plain.generate(request)
    usual = seconds(plain, request)
    assert word(engine.generate(request)) == "eager"
    assert engine.blocks is not None
    meanwhile = []
    while engine.blocks.counts()["preparing"]:
        meanwhile += seconds(engine, request, 1)
    blocks = settled(engine)
    after = engine.generate(request)
    assert word(after) == "compiled"
    assert np.abs(alone.images.astype(int) - after.images.astype(int)).mean() < 2.0
    other = engine.generate(a_request(models[1]))  # another checkpoint, and nothing is compiled for it
    made = blocks.preparer.compiled
    assert word(other) == "compiled"
    assert made == blocks.preparer.compiled
    taken = seconds(engine, request)
    print(f"{how}: {statistics.median(usual):.3f} s as it is, {statistics.median(taken):.3f} s compiled")
    if len(meanwhile) >= 20:
        late = sorted(meanwhile)[int(len(meanwhile) * 0.95)] / statistics.median(usual)
        print(f"p95 while it was prepared: {late:.2f} of what it takes otherwise, of {len(meanwhile)} requests")


def test_a_second_server_loads_what_the_first_has_made(make: Make, models: list[ModelRef]) -> None:
    first = make("blocks")
    first.generate(a_request(models[0]))
    settled(first)
    first.close()
    began = time.perf_counter()
    second = make("blocks")
    second.generate(a_request(models[0]))
    blocks = settled(second)
    print(f"compiled {time.perf_counter() - began:.1f} s after a start with a kept folder")
    assert blocks.preparer.compiled == 0
    assert word(second.generate(a_request(models[0]))) == "compiled"
