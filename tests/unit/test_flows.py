"""Flows of several generations: each gives what the plain calls of diffusers give, alone, as a batch and in company."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional

from api.engine import generate
from api.engine.budgets import Budgets
from api.engine.device import Device
from api.engine.generate import Engine
from api.errors import ApiError
from api.models.library import Library
from api.schema.generation import GenerationRequest
from api.service.admission import Admission
from api.service.fetcher import Fetcher
from api.settings import Settings
from tests.families import save_family, save_refiner
from tests.tiny import save_tiny

TOLERANCE = 2e-4
SIDE = 64
STEPS = 5
SCHEDULER = "EulerDiscreteScheduler"


def model_inputs(seed: Any = 0, images: int = 1, **more: Any) -> dict[str, Any]:
    return {
        "prompt": f"a drawing of thing number {seed}", "num_inference_steps": STEPS, "seed": seed, "width": SIDE,
        "height": SIDE, "num_images_per_prompt": images, "guidance_scale": 4.0, **more,
    }  # fmt: skip


def generators(seed: Any) -> Any:
    if isinstance(seed, list):
        return [torch.Generator().manual_seed(one) for one in seed]
    return torch.Generator().manual_seed(seed)


class Flows:
    """The models, an engine, and diffusers beside it."""

    def __init__(self, root: Path) -> None:
        self.root = root
        save_family("sdxl", root / "tiny--sdxl")
        save_refiner(root / "tiny--refiner")
        save_refiner(root / "tiny--stranger", scaling_factor=0.5)
        save_tiny(root / "tiny--sd", seed=3, nsfw=False)
        save_family("pixart", root / "tiny--pixart")
        settings = Settings.from_env({"MODELS_DIR": str(root), "RUNTIME_DOWNLOADS": "0", "MAX_PIXELS": "65536"})
        library = Library(settings)
        self.admission = Admission(settings, library, Fetcher(settings, library, set), has_gpu=False)
        self.engine = Engine(Device("cpu"), Budgets(2**40, 2**40, shared=True))
        self._plain: dict[str, Any] = {}
        self.last: dict[int, np.ndarray] = {}

    def request(self, inputs: dict[str, Any], model: str = "sdxl", **options: Any) -> GenerationRequest:
        sent = {"MODEL_ID": f"tiny/{model}", "SCHEDULER": SCHEDULER, **options}
        return asyncio.run(self.admission.admit("test", inputs, sent)).request

    def refused(self, inputs: dict[str, Any], model: str = "sdxl", **options: Any) -> ApiError:
        with pytest.raises(ApiError) as found:
            self.request(inputs, model, **options)
        return found.value

    def plain(self, model: str, pipeline: str) -> Any:
        if model not in self._plain:
            self._plain[model] = diffusers.DiffusionPipeline.from_pretrained(self.root / f"tiny--{model}")
        pipe = getattr(diffusers, pipeline).from_pipe(self._plain[model])
        pipe.scheduler = diffusers.EulerDiscreteScheduler.from_config(pipe.scheduler.config)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def run(self, requests: list[GenerationRequest]) -> list[np.ndarray]:
        """Images in [0, 1], before they become bytes; all at once."""
        found: dict[int, np.ndarray] = {}

        def run(number: int) -> None:
            self.engine.generate(requests[number])
            found[number] = self.last[threading.get_ident()]

        threads = [threading.Thread(target=run, args=(number,)) for number in range(len(requests))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return [found[number] for number in range(len(requests))]


@pytest.fixture(scope="module")
def flows(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Flows]:
    made = Flows(tmp_path_factory.mktemp("flows"))
    before = generate.to_uint8

    def noted(images: Any) -> np.ndarray:
        as_it_was = images.permute(0, 2, 3, 1).numpy() if isinstance(images, torch.Tensor) else np.asarray(images)
        made.last[threading.get_ident()] = as_it_was
        return before(images)

    generate.to_uint8 = noted  # type: ignore[assignment]
    yield made
    generate.to_uint8 = before
    made.engine.close()


def shared(inputs: dict[str, Any]) -> dict[str, Any]:
    return {name: inputs[name] for name in ("prompt", "num_images_per_prompt", "guidance_scale", "num_inference_steps")}


def ensemble(flows: Flows, inputs: dict[str, Any], switch: float = 0.6) -> np.ndarray:
    """As diffusers' guide to SDXL has it."""
    base, refiner = (
        flows.plain("sdxl", "StableDiffusionXLPipeline"),
        flows.plain("refiner", "StableDiffusionXLImg2ImgPipeline"),
    )
    generator = generators(inputs["seed"])
    latents = base(
        **shared(inputs), width=SIDE, height=SIDE, generator=generator, denoising_end=switch, output_type="latent"
    ).images
    return refiner(
        **shared(inputs), image=latents, denoising_start=switch, generator=generator, output_type="np"
    ).images


def refined(flows: Flows, inputs: dict[str, Any], strength: float = 0.6) -> np.ndarray:
    """The other way that the guide has: over what the base finished, as latents."""
    base, refiner = (
        flows.plain("sdxl", "StableDiffusionXLPipeline"),
        flows.plain("refiner", "StableDiffusionXLImg2ImgPipeline"),
    )
    generator = generators(inputs["seed"])
    latents = base(**shared(inputs), width=SIDE, height=SIDE, generator=generator, output_type="latent").images
    return refiner(
        **shared(inputs), image=latents, strength=strength, aesthetic_score=7.5, generator=generator, output_type="np"
    ).images


def hires(flows: Flows, inputs: dict[str, Any], upscaler: str, strength: float = 0.6) -> np.ndarray:
    """Two passes by hand."""
    base, again = (
        flows.plain("sdxl", "StableDiffusionXLPipeline"),
        flows.plain("sdxl", "StableDiffusionXLImg2ImgPipeline"),
    )
    generator = generators(inputs["seed"])
    kind = "latent" if upscaler == "latent" else "pil"
    images = base(**shared(inputs), width=SIDE, height=SIDE, generator=generator, output_type=kind).images
    if upscaler == "latent":
        images = functional.interpolate(images, scale_factor=2, mode="bilinear", antialias=False)
    else:
        images = [image.resize((2 * SIDE, 2 * SIDE), Image.Resampling[upscaler.upper()]) for image in images]
    return again(**shared(inputs), image=images, strength=strength, generator=generator, output_type="np").images


WAYS: dict[str, tuple[dict[str, Any], Any]] = {
    "switch": ({"refiner": {"MODEL_ID": "tiny/refiner", "switch_at": 0.6}}, ensemble),
    "refine": ({"refiner": {"MODEL_ID": "tiny/refiner", "strength": 0.6, "aesthetic_score": 7.5}}, refined),
    "latent": (
        {"hires": {"scale": 2, "strength": 0.6, "upscaler": "latent"}},
        lambda flows, inputs: hires(flows, inputs, "latent"),
    ),
    "lanczos": (
        {"hires": {"width": 128, "height": 128, "strength": 0.6, "upscaler": "lanczos"}},
        lambda flows, inputs: hires(flows, inputs, "lanczos"),
    ),
    "bicubic": (
        {"hires": {"strength": 0.6, "upscaler": "bicubic"}},
        lambda flows, inputs: hires(flows, inputs, "bicubic"),
    ),
}


def compare(flows: Flows, way: str, seed: Any, images: int, company: int = 0) -> None:
    options, plain = WAYS[way]
    inputs = model_inputs(seed, images)
    others = [model_inputs(100 + number) for number in range(company)]
    requests = [flows.request(inputs, **options)]
    requests += [flows.request(other, model="sd" if number % 2 else "sdxl") for number, other in enumerate(others)]
    expected = [plain(flows, inputs)]
    for number, other in enumerate(others):
        pipe = (
            flows.plain("sd", "StableDiffusionPipeline")
            if number % 2
            else flows.plain("sdxl", "StableDiffusionXLPipeline")
        )
        arguments = {**shared(other), "generator": generators(other["seed"]), "width": SIDE, "height": SIDE}
        expected.append(pipe(**arguments, output_type="np").images)
    found = flows.run(requests)
    assert len(expected[0]) == images
    for reference, image in zip(expected, found, strict=True):
        assert image.shape == reference.shape
        assert np.ptp(reference) > 0.05
        assert float(np.abs(image - reference).max()) <= TOLERANCE
    if images > 1:
        assert np.abs(expected[0][0] - expected[0][1]).max() > 100 * TOLERANCE


@pytest.mark.parametrize("way", WAYS)
def test_a_flow_equals_the_plain_calls(flows: Flows, way: str) -> None:
    compare(flows, way, seed=0, images=1)


@pytest.mark.parametrize("way", ["switch", "lanczos"])
def test_a_list_of_seeds_is_one_generator_for_each_image_through_both(flows: Flows, way: str) -> None:
    compare(flows, way, seed=[5, 6], images=2)


@pytest.mark.parametrize("way", ["refine", "latent"])
def test_a_batch_has_one_generator_through_both(flows: Flows, way: str) -> None:
    compare(flows, way, seed=1, images=3)


@pytest.mark.parametrize("way", ["switch", "lanczos"])
def test_in_company_of_four_jobs_of_two_models(flows: Flows, way: str) -> None:
    compare(flows, way, seed=2, images=1, company=4)
