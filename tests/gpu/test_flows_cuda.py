"""Flows of two models on CUDA: the plain calls' images, with latents that stay on the device.

Not part of ``scripts/test``: ``python -m pytest tests/gpu -m gpu`` on a machine with a GPU. It has been written without
one and not been run yet.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch

from api.engine import run
from api.engine.budgets import Budgets
from api.engine.device import Device
from api.engine.generate import Engine
from api.models.library import Library
from api.schema.generation import GenerationRequest
from api.service.admission import Admission
from api.service.fetcher import Fetcher
from api.settings import Settings
from tests.families import save_family, save_refiner

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]

INPUTS = {
    "prompt": "a red circle", "num_inference_steps": 5, "guidance_scale": 4.0, "width": 64, "height": 64, "seed": 3,
    "num_images_per_prompt": 2,
}  # fmt: skip
REFINER = {"MODEL_ID": "tiny/refiner", "switch_at": 0.6}
LEVELS = {"fp32": 1.0, "fp16": 8.0}
"""Of 255: how far a pixel may be from the plain call's; in fp16, the mean of all a tenth of that."""


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("flows")
    save_family("sdxl", made / "tiny--sdxl")
    save_refiner(made / "tiny--refiner")
    return made


@pytest.fixture
def small(root: Path) -> Iterator[Engine]:
    """Has room for one of the two models."""
    sizes = [sum(p.stat().st_size for p in (root / f"tiny--{n}").rglob("*.safetensors")) for n in ("sdxl", "refiner")]
    engine = Engine(Device("cuda"), Budgets(int(max(sizes) * 1.1), 2**32, shared=False))
    yield engine
    engine.close()


def a_request(root: Path, precision: str, **options: Any) -> GenerationRequest:
    settings = Settings.from_env({"MODELS_DIR": str(root), "RUNTIME_DOWNLOADS": "0"})
    library = Library(settings)
    admission = Admission(settings, library, Fetcher(settings, library, set), has_gpu=True)
    sent = {"MODEL_ID": "tiny/sdxl", "MODEL_PRECISION": precision, "SCHEDULER": "EulerDiscreteScheduler", **options}
    return asyncio.run(admission.admit("test", dict(INPUTS), sent)).request


def plain(root: Path, dtype: torch.dtype) -> np.ndarray:
    shared = {
        name: INPUTS[name] for name in ("prompt", "num_inference_steps", "guidance_scale", "num_images_per_prompt")
    }
    base, refiner = (
        diffusers.DiffusionPipeline.from_pretrained(root / f"tiny--{name}", torch_dtype=dtype).to("cuda")
        for name in ("sdxl", "refiner")
    )
    generator = torch.Generator().manual_seed(3)
    latents = base(
        **shared, width=64, height=64, generator=generator, denoising_end=0.6, output_type="latent"
    ).images  # fmt: skip
    images = refiner(**shared, image=latents, denoising_start=0.6, generator=generator, output_type="np").images
    return (images * 255).round().astype(np.uint8)


@pytest.mark.parametrize("precision", LEVELS)
def test_a_refiner_takes_over_on_the_device(
    root: Path, small: Engine, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    request = a_request(root, precision, refiner=REFINER)
    handed: list[torch.Tensor] = []
    before = run.pictures_of

    def noted(job: Any) -> dict[str, Any]:
        handed.extend(job.handed.values())
        return before(job)

    monkeypatch.setattr(run, "pictures_of", noted)
    found = small.generate(request)
    dtype = torch.float16 if precision == "fp16" else torch.float32
    assert [(latents.is_cuda, latents.dtype) for latents in handed] == [(True, dtype)]
    apart = np.abs(found.images.astype(int) - plain(root, dtype))
    assert apart.max() <= LEVELS[precision]
    assert precision == "fp32" or apart.mean() <= LEVELS[precision] / 10
    assert small.cache.held()[request.model.key].tier == "host"


def test_a_second_pass_of_latents(root: Path, small: Engine) -> None:
    images = small.generate(a_request(root, "fp16", hires={"strength": 0.6, "upscaler": "latent"})).images
    assert images.shape == (2, 128, 128, 3)
    assert np.ptp(images) > 10
