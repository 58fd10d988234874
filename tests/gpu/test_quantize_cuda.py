"""Quantized models on CUDA: bytes on the device, distance from full precision, and speed.

Not part of ``scripts/test``: ``python -m pytest tests/gpu/test_quantize_cuda.py -m gpu -s`` on a machine with a GPU of 8 GB
or more. It has been written without one and not been run yet.
"""

from __future__ import annotations

import concurrent.futures
import gc
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch

from api.engine.budgets import Budgets
from api.engine.device import Device
from api.engine.generate import Engine
from api.engine.loader import PartLoader
from api.engine.quantization import word
from api.schema.generation import GenerationRequest, ModelRef, StepCache
from tests.families import clip, clip_tokenizer, t5, vae
from tests.generating import a_request
from tests.quantized import KINDS

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]

GIB = 2**30
FAR = {"int8": 0.02, "fp8": 0.06, "nf4": 0.15}
"""Relative errors of a call of the denoiser; bf16 itself is about 0.005 from fp32."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A FLUX of 0.7 GB in bf16: wide enough for the product's own rule, and for matrices to count."""
    found: Path = tmp_path_factory.mktemp("wide")
    torch.manual_seed(0)
    encoder, tokenizer = t5()
    transformer = diffusers.FluxTransformer2DModel(
        patch_size=1, in_channels=4, num_layers=4, num_single_layers=8, attention_head_dim=128, num_attention_heads=12,
        joint_attention_dim=32, pooled_projection_dim=32, guidance_embeds=True,
    ).to(torch.bfloat16)  # fmt: skip
    diffusers.FluxPipeline(
        transformer=transformer, scheduler=diffusers.FlowMatchEulerDiscreteScheduler(), vae=vae(1, shift_factor=0.0),
        text_encoder=clip(), tokenizer=clip_tokenizer(), text_encoder_2=encoder, tokenizer_2=tokenizer,
    ).save_pretrained(found)  # fmt: skip
    return found


@pytest.fixture
def engine() -> Iterator[Engine]:
    made = Engine(Device("cuda:0"), Budgets(6 * GIB, 8 * GIB, False, None, False))
    yield made
    made.close()
    del made
    gc.collect()
    torch.cuda.empty_cache()


def a_ref(folder: Path, kind: str) -> ModelRef:
    return ModelRef("wide/flux", "main", "bf16", str(folder), quantize=kind)


def a_job(folder: Path, kind: str, seed: int = 1, side: int = 256, **more: Any) -> GenerationRequest:
    inputs = {"prompt": "a circle", "num_inference_steps": 8, "width": side, "height": side, "guidance_scale": 3.5}
    scheduler = "FlowMatchEulerDiscreteScheduler"
    return a_request(f"{kind}{seed}", a_ref(folder, kind), "FluxPipeline", scheduler, inputs, seed=seed, **more)


@pytest.mark.parametrize("kind", KINDS)
def test_bytes_on_the_device(kind: str, folder: Path) -> None:
    loader = PartLoader(Device("cuda:0"))
    for spec in loader.parts(a_ref(folder, kind)):
        if not spec.quantize:
            continue
        host = loader.read(spec)
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        module = loader.place(spec, host, None)
        torch.cuda.synchronize()
        assert torch.cuda.memory_allocated() - before == pytest.approx(spec.bytes, rel=0.01)
        assert module.dtype == torch.bfloat16
        del module
        gc.collect()
        assert torch.cuda.memory_allocated() == before


def call(side: int = 32) -> dict[str, Any]:
    def drawn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to("cuda", torch.bfloat16)

    tokens = side * side
    return {
        "hidden_states": drawn(2, tokens, 4), "encoder_hidden_states": drawn(2, 64, 32),
        "pooled_projections": drawn(2, 32), "timestep": torch.full((2,), 0.5, device="cuda", dtype=torch.bfloat16),
        "guidance": torch.full((2,), 3.5, device="cuda"), "img_ids": torch.zeros(tokens, 3, device="cuda"),
        "txt_ids": torch.zeros(64, 3, device="cuda"), "return_dict": False,
    }  # fmt: skip


def seconds(module: Any, arguments: dict[str, Any]) -> float:
    for _ in range(3):
        module(**arguments)
    torch.cuda.synchronize()
    began = time.perf_counter()
    for _ in range(10):
        module(**arguments)
    torch.cuda.synchronize()
    return (time.perf_counter() - began) / 10


def test_distance_and_speed(folder: Path) -> None:
    loader = PartLoader(Device("cuda:0"))
    made = {}
    for kind in ("", *KINDS):
        spec = next(spec for spec in loader.parts(a_ref(folder, kind)) if spec.name == "transformer")
        made[kind] = loader.place(spec, loader.read(spec), None)
    arguments, alone = (
        call(),
        {k: v[:1] if v.dim() and len(v) == 2 else v for k, v in call().items() if k != "return_dict"},
    )
    with torch.no_grad():
        exact, usual = made[""](**arguments)[0].float(), seconds(made[""], arguments)
        for kind in KINDS:
            found = made[kind](**arguments)[0].float()
            far = float((found - exact).norm() / exact.norm())
            row = made[kind](**alone, return_dict=False)[0].float()
            assert (
                float((found[:1] - row).norm() / row.norm()) < 0.01
            )  # another row changes nothing but the order of sums
            took = seconds(made[kind], arguments)
            print(f"{kind}: {far:.4f} from bf16, {took * 1e3:.1f} ms against {usual * 1e3:.1f} ms")
            assert 0 < far < FAR[kind]


@pytest.mark.parametrize("kind", KINDS)
def test_images(kind: str, folder: Path, engine: Engine) -> None:
    whole = engine.generate(a_job(folder, ""))
    done = engine.generate(a_job(folder, kind, offload="none"))
    told = word(kind, torch.device("cuda:0"), torch.bfloat16)
    assert done.meta["numerics"] == f"{whole.meta['numerics']}/{told}"
    assert (done.meta["quantized"], done.meta["lossy"]) == (["transformer"], ["quantize"])
    assert np.abs(done.images.astype(int) - whole.images).mean() < 20
    for way in ("model", "sequential"):
        offloaded = engine.generate(a_job(folder, kind, offload=way))
        assert offloaded.meta["placement"] == way
        assert np.array_equal(offloaded.images, done.images)
    jobs = [a_job(folder, kind, seed) for seed in range(4)]
    alone = [engine.generate(job).images for job in jobs]
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        together = list(pool.map(engine.generate, jobs))
    for one, expected in zip(together, alone, strict=True):
        assert np.abs(one.images.astype(int) - expected).max() <= 24  # bf16: kernels sum in another order


def test_step_caching(folder: Path, engine: Engine) -> None:
    plain = engine.generate(a_job(folder, ""))
    none = engine.generate(a_job(folder, "", step_cache=StepCache("first_block", 0.0)))
    assert np.array_equal(none.images, plain.images)
    engine.generate(a_job(folder, "", step_cache=StepCache("first_block", 1.0)))
    gc.collect()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    for cache in (StepCache("first_block", 1.0), StepCache("taylorseer", 3)):
        began = time.perf_counter()
        done = engine.generate(a_job(folder, "", step_cache=cache))
        print(f"{cache.word}: {time.perf_counter() - began:.2f} s, {done.timings}")
        assert done.meta["lossy"] == ["step_cache"]
    torch.cuda.synchronize()
    assert torch.cuda.memory_allocated() <= before + 2**20
