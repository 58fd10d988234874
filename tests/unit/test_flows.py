"""Flows of several generations: each gives what the plain calls of diffusers give, alone, as a batch and in company."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import diffusers
import msgspec
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load
from torch.nn import functional

from api.engine import run
from api.engine.budgets import Budgets
from api.engine.calls import Cancelled
from api.engine.device import Device
from api.engine.flows import told_of
from api.engine.generate import Engine
from api.errors import ApiError
from api.models.library import Library
from api.schema.generation import GenerationRequest
from api.service.admission import Admission
from api.service.fetcher import Fetcher
from api.service.jobs import Job
from api.settings import Settings
from tests.budgeted import Allocator, Apart, Outside
from tests.controlled import control_picture, save_controlnet, save_image_encoder, save_ip_adapter
from tests.families import save_family, save_refiner
from tests.running import as_base64
from tests.tiny import save_tiny
from tests.unit.test_dispatch import Pool, a_job, ref_of

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
        settings = Settings.from_env(
            {"MODELS_DIR": str(root), "RUNTIME_DOWNLOADS": "0", "MAX_PIXELS": "65536", "MAX_UPSCALED_PIXELS": "2000000"}
        )
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
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # for models as small as these, more of them wait for each other
    made = Flows(tmp_path_factory.mktemp("flows"))
    before = run.to_uint8

    def noted(images: Any) -> np.ndarray:
        as_it_was = images.permute(0, 2, 3, 1).numpy() if isinstance(images, torch.Tensor) else np.asarray(images)
        made.last[threading.get_ident()] = as_it_was
        return before(images)

    run.to_uint8 = noted  # type: ignore[assignment]
    yield made
    run.to_uint8 = before
    made.engine.close()
    torch.set_num_threads(threads)


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


SLOW = pytest.mark.slow


@pytest.mark.parametrize("way", [way if way in ("switch", "latent") else pytest.param(way, marks=SLOW) for way in WAYS])
def test_a_flow_equals_the_plain_calls(flows: Flows, way: str) -> None:
    compare(flows, way, seed=0, images=1)


@pytest.mark.parametrize("way", ["switch", pytest.param("lanczos", marks=SLOW)])
def test_a_list_of_seeds_is_one_generator_for_each_image_through_both(flows: Flows, way: str) -> None:
    compare(flows, way, seed=[5, 6], images=2)


@pytest.mark.parametrize("way", ["refine", pytest.param("latent", marks=SLOW)])
def test_a_batch_has_one_generator_through_both(flows: Flows, way: str) -> None:
    compare(flows, way, seed=1, images=3)


@pytest.mark.parametrize("way", ["switch", pytest.param("lanczos", marks=SLOW)])
def test_in_company_of_four_jobs_of_two_models(flows: Flows, way: str) -> None:
    compare(flows, way, seed=2, images=1, company=4)


BOTH = {
    "hires": {"strength": 0.6, "upscaler": "bicubic"},
    "refiner": {"MODEL_ID": "tiny/refiner", "switch_at": 0.6},
}


def all_three(flows: Flows, inputs: dict[str, Any]) -> np.ndarray:
    """The refiner takes over in the second pass."""
    base, again, refiner = (
        flows.plain("sdxl", "StableDiffusionXLPipeline"),
        flows.plain("sdxl", "StableDiffusionXLImg2ImgPipeline"),
        flows.plain("refiner", "StableDiffusionXLImg2ImgPipeline"),
    )
    generator = generators(inputs["seed"])
    images = base(**shared(inputs), width=SIDE, height=SIDE, generator=generator).images
    larger = [image.resize((2 * SIDE, 2 * SIDE), Image.Resampling.BICUBIC) for image in images]
    latents = again(
        **shared(inputs), image=larger, strength=0.6, denoising_end=0.6, generator=generator, output_type="latent"
    ).images
    return refiner(**shared(inputs), image=latents, denoising_start=0.6, generator=generator, output_type="np").images


class Told:
    """What an engine tells of a job; cancels it after a step of all."""

    def __init__(self, last: int | None = None) -> None:
        self.steps: list[tuple[int, int]] = []
        self.previews: list[tuple[int, int]] = []
        self.phases: list[tuple[str, str]] = []
        self._last = last

    def generate(self, engine: Engine, request: GenerationRequest) -> Any:
        return engine.generate(
            request,
            on_step=lambda step, total: self.steps.append((step, total)),
            on_phase=lambda kind, status: self.phases.append((kind, status)),
            cancelled=lambda: self._last is not None and len(self.steps) >= self._last,
            on_preview=lambda step, total, images: self.previews.append((step, total)),
        )


def test_three_generations_tell_what_they_did(flows: Flows) -> None:
    inputs, told = model_inputs(3), Told()
    request = msgspec.structs.replace(flows.request(inputs, **BOTH), preview=1)
    request = msgspec.structs.replace(
        request, then=tuple(msgspec.structs.replace(stage, preview=1) for stage in request.then)
    )
    done = told.generate(flows.engine, request)
    assert np.abs(flows.last[threading.get_ident()] - all_three(flows, inputs)).max() <= TOLERANCE
    assert [step for step, _ in told.steps] == list(range(1, len(told.steps) + 1))
    assert told.steps[-1][0] == told.steps[-1][1] == 5 + 1 + 2
    assert {total for _, total in told.steps} == {8}
    assert told.previews == told.steps
    assert [phase for phase in told.phases if phase[0] == "inference"] == [
        ("inference", "start"),
        ("inference", "done"),
    ]
    assert told.phases[-1] == ("inference", "done")
    assert done.timings["inference"] == sum(done.timings[name] for name in ("base", "hires", "refiner"))
    names = [(stage["name"], stage["MODEL_ID"], stage.get("takes")) for stage in done.meta["stages"]]
    assert names == [
        ("base", "tiny/sdxl", None), ("hires", "tiny/sdxl", "images"), ("refiner", "tiny/refiner", "latents"),
    ]  # fmt: skip
    assert done.meta["numerics"] == "cpu/float32/sdpa/eager"
    assert request.meta["modelInputs"]["width"] == SIDE
    assert "denoising_end" not in request.meta["modelInputs"]


def test_what_was_lossy_in_any_generation_is_told_of_all(flows: Flows) -> None:
    request = flows.request(model_inputs(3), **BOTH)
    plain = {"dtype": "float32", "placement": "full", "attention": "sdpa", "numerics": "cpu/float32/sdpa/eager"}
    quantized = {**plain, "quantize": "int8", "quantized": ["unet"], "lossy": ["quantize"]}
    told = told_of(request, [plain, plain, quantized])
    assert told["lossy"] == ["quantize"]
    assert [stage.get("quantized") for stage in told["stages"]] == [None, None, ["unet"]]
    assert "lossy" not in told_of(request, [plain] * 3)


def test_what_meta_says_makes_the_same_again(flows: Flows) -> None:
    request = flows.request(model_inputs(4), **BOTH)
    meta = request.meta
    assert meta["refiner"]["MODEL_REVISION"] == request.then[1].model.revision
    assert meta["hires"]["width"] == 2 * SIDE
    names = ("MODEL_ID", "MODEL_REVISION", "PIPELINE", "SCHEDULER", "hires", "refiner")
    again = flows.request(meta["modelInputs"], **{name: meta[name] for name in names if name != "MODEL_ID"})
    one, other = (flows.engine.generate(each).images for each in (request, again))
    assert np.array_equal(one, other)
    assert again.meta["refiner"] == meta["refiner"]
    assert again.meta["hires"] == meta["hires"]


@pytest.mark.parametrize("last", [2, 6, 7])
def test_a_job_can_be_cancelled_in_each_generation(flows: Flows, last: int) -> None:
    told = Told(last)
    with pytest.raises(Cancelled):
        told.generate(flows.engine, flows.request(model_inputs(5), **BOTH))
    assert len(told.steps) == last
    assert flows.engine.line.soon == []
    assert not any(held.leases for held in flows.engine.cache.held().values())


@SLOW
def test_steps_are_counted_to_the_last_also_where_a_scheduler_makes_more_of_them(flows: Flows) -> None:
    told = Told()
    told.generate(flows.engine, flows.request(model_inputs(6), SCHEDULER="HeunDiscreteScheduler", **BOTH))
    shares = [step / total for step, total in told.steps]
    assert shares == sorted(shares)
    assert shares[-1] == 1.0
    assert [step for step, _ in told.steps] == list(range(1, len(told.steps) + 1))


def weights(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*.safetensors"))


def test_memory_for_one_of_the_two_models_suffices(flows: Flows) -> None:
    request = flows.request(model_inputs(7), **WAYS["switch"][0])
    expected = flows.engine.generate(request).images
    sizes = [weights(flows.root / f"tiny--{name}") for name in ("sdxl", "refiner")]
    limit = int(max(sizes) * 1.1)
    assert limit < sum(sizes)
    apart = Apart(Allocator())
    engine = Engine(apart, Budgets(limit, 2**40, shared=False), Outside(apart), embeddings_limit=0)
    try:
        told = Told()
        for _ in range(2):
            assert np.array_equal(told.generate(engine, request).images, expected)
        tiers = {held.ref.model_id: held.tier for held in engine.cache.held().values()}
        assert tiers == {"tiny/sdxl": "host", "tiny/refiner": "device"}
        assert engine.cache.memory().device <= limit
        loads = [phase for phase in told.phases if phase == ("loadModel", "start")]
        assert len(loads) == 4
    finally:
        engine.close()


def test_the_next_model_is_read_while_the_first_runs(flows: Flows) -> None:
    request = flows.request(model_inputs(8), **WAYS["switch"][0])
    apart = Apart(Allocator())
    engine = Engine(apart, Budgets(2**40, 2**40, shared=False), Outside(apart))
    refiner, read = request.then[0].model.key, list[bool]()

    def look(step: int, total: int) -> None:
        if step == 1:
            for _ in range(6000):
                if engine.cache.tiers.warm(refiner):
                    break
                time.sleep(0.01)
            read.append(engine.cache.held()[refiner].tier == "host")

    try:
        engine.generate(request, on_step=look)
        assert read == [True]
    finally:
        engine.close()


def test_a_plan_has_all_models(flows: Flows) -> None:
    request = flows.request(model_inputs(9), **BOTH)
    plans = [flows.engine.plan(msgspec.structs.replace(stage, then=())) for stage in request.stages]
    assert flows.engine.plan(request).model == plans[0].model + plans[2].model
    assert plans[0].model == plans[1].model


REFUSED: list[tuple[dict[str, Any], dict[str, Any], str, str]] = [
    ({}, {"refiner": "tiny/none"}, "MODEL_MISMATCH", "callInputs.refiner.MODEL_ID"),
    ({}, {"refiner": "tiny/pixart"}, "PIPELINE_NOT_SUPPORTED", "callInputs.refiner"),
    ({}, {"refiner": {"MODEL_ID": "tiny/stranger", "switch_at": 0.6}}, "INVALID_INPUTS", "callInputs.refiner.switch_at"),
    ({}, {"refiner": {"MODEL_ID": "tiny/sd", "switch_at": 0.6}}, "INVALID_INPUTS", "callInputs.refiner.switch_at"),
    ({}, {"refiner": {"MODEL_ID": "tiny/refiner", "switch_at": 0.9}}, "INVALID_INPUTS", "callInputs.refiner.switch_at"),
    ({}, {"refiner": {"MODEL_ID": "tiny/refiner", "strength": 0.1}}, "INVALID_INPUTS", "callInputs.refiner.strength"),
    ({}, {"refiner": {"MODEL_ID": "tiny/refiner", "num_inference_steps": 10**6}}, "LIMIT_EXCEEDED",
     "callInputs.refiner.num_inference_steps"),
    ({}, {"refiner": {"MODEL_ID": "tiny/sd", "aesthetic_score": 6}}, "INVALID_INPUTS",
     "callInputs.refiner.aesthetic_score"),
    ({}, {"refiner": {"MODEL_ID": "tiny/sdxl", "aesthetic_score": 6}}, "INVALID_INPUTS",
     "callInputs.refiner.aesthetic_score"),
    ({}, {"refiner": {"MODEL_ID": "tiny/refiner", "SCHEDULER": "Nothing"}}, "NO_SUCH_SCHEDULER",
     "callInputs.refiner.SCHEDULER"),
    ({"denoising_end": 0.5}, {"refiner": {"MODEL_ID": "tiny/refiner", "switch_at": 0.6}}, "INVALID_INPUTS",
     "modelInputs.denoising_end"),
    ({}, {"refiner": {"MODEL_ID": "tiny/refiner", "swich_at": 0.6}}, "INVALID_INPUTS", "callInputs.refiner.swich_at"),
    ({}, {"refiner": {"switch_at": 0.6}}, "INVALID_INPUTS", "callInputs.refiner"),
    ({"nonsense": 1}, {"refiner": "tiny/none"}, "UNKNOWN_INPUT", "modelInputs.nonsense"),
    ({}, {"refiner": {"MODEL_ID": "tiny/sd", "strength": 10**400}}, "INVALID_INPUTS", "callInputs.refiner.strength"),
    ({}, {"hires": {"scale": 2}, "upscale": {"model": "by/hand/x.safetensors", "scale": 16}}, "LIMIT_EXCEEDED",
     "callInputs.upscale.scale"),
    ({}, {"hires": {"scale": 5}}, "LIMIT_EXCEEDED", "callInputs.hires.width"),
    ({}, {"hires": {"width": 100, "height": 128}}, "INVALID_INPUTS", "callInputs.hires.width"),
    ({}, {"hires": {"upscaler": "nearest"}}, "INVALID_INPUTS", "callInputs.hires.upscaler"),
    ({}, {"hires": {"strength": 0.1}}, "INVALID_INPUTS", "callInputs.hires.strength"),
    ({}, {"hires": {"scale": 2, "width": 128, "height": 128}}, "INVALID_INPUTS", "callInputs.hires"),
    ({}, {"hires": {"strength": 0.3}, **{"refiner": {"MODEL_ID": "tiny/refiner", "switch_at": 0.6}}}, "INVALID_INPUTS",
     "callInputs.refiner.switch_at"),
]  # fmt: skip


@pytest.mark.parametrize(("inputs", "options", "code", "field"), REFUSED)
def test_what_cannot_be_is_said_before_anything_runs(
    flows: Flows, inputs: dict[str, Any], options: dict[str, Any], code: str, field: str
) -> None:
    error = flows.refused(model_inputs(**inputs), **options)
    assert (error.code, error.field) == (code, field), error.message


def test_a_model_without_image_to_image_has_no_second_pass(flows: Flows) -> None:
    error = flows.refused(model_inputs(), model="pixart", hires={}, SCHEDULER="DPMSolverMultistepScheduler")
    assert (error.code, error.field) == ("PIPELINE_NOT_SUPPORTED", "callInputs.hires")


def test_only_what_is_answered_is_seen_by_a_safety_checker(flows: Flows) -> None:
    request = flows.request(model_inputs(), model="sd", hires={})
    assert [stage.safety_checker for stage in request.stages] == [False, True]
    assert flows.engine.generate(request).nsfw == [False]
    request = flows.request(model_inputs(), model="sd", refiner={"MODEL_ID": "tiny/stranger", "strength": 0.6})
    assert request.then[0].takes and request.then[0].takes.what == "images"  # their latents mean something else
    assert flows.engine.generate(request).nsfw is None
    error = flows.refused(model_inputs(), refiner={"MODEL_ID": "tiny/sd", "strength": 0.6}, output=["latents"])
    assert (error.code, error.field) == ("INVALID_INPUTS", "callInputs.output")


def test_latents_beside_the_images_are_the_last_ones(flows: Flows) -> None:
    request = flows.request(model_inputs(), hires={}, output=["latents"])
    assert [stage.output for stage in request.stages] == [(), ("latents",)]
    data = load(flows.engine.generate(request).extras["latents"])
    assert data["latents"].shape[-2:] == (SIDE, SIDE)  # twice the side, with two pixels for each latent


def test_after_inpainting_it_is_inpainted(flows: Flows) -> None:
    picture = np.random.default_rng(1).integers(0, 256, (SIDE, SIDE, 3), np.uint8)
    mask = np.zeros((SIDE, SIDE, 3), np.uint8)
    mask[:, SIDE // 2 :] = 255
    sent = model_inputs(11, image=as_base64(picture), mask_image=as_base64(mask), strength=0.9)
    request = flows.request(sent, **WAYS["switch"][0], output=["mask"])
    assert [stage.pipeline for stage in request.stages] == ["StableDiffusionXLInpaintPipeline"] * 2
    done = flows.engine.generate(request)
    assert list(done.extras) == ["mask"]
    base, refiner = (flows.plain(name, "StableDiffusionXLInpaintPipeline") for name in ("sdxl", "refiner"))
    generator = generators(11)
    given = {**shared(sent), "mask_image": Image.fromarray(mask).convert("L"), "width": SIDE, "height": SIDE}
    latents = base(
        **given, image=Image.fromarray(picture), strength=0.9, denoising_end=0.6, generator=generator,
        output_type="latent",
    ).images  # fmt: skip
    expected = refiner(**given, image=latents, denoising_start=0.6, generator=generator, output_type="np").images
    assert np.abs(flows.last[threading.get_ident()] - expected).max() <= TOLERANCE


@pytest.mark.parametrize("syntax", ["a1111", pytest.param("compel", marks=SLOW)])
def test_prompts_with_weights_reach_the_refiner(flows: Flows, syntax: str) -> None:
    sent = model_inputs(12, prompt="a (red:1.4) circle" if syntax == "a1111" else "a red++ circle")
    weighted = flows.request(sent, **WAYS["refine"][0], prompt_syntax=syntax)
    assert [stage.prompt_syntax for stage in weighted.stages] == [syntax, syntax]
    plain = flows.request({**sent, "prompt": "a red circle"}, **WAYS["refine"][0])
    one, other = (flows.engine.generate(each).images.astype(int) for each in (weighted, plain))
    assert np.abs(one - other).max() > 0


@SLOW
def test_a_second_pass_has_what_changes_the_model_and_no_controlnet(flows: Flows, tmp_path: Path) -> None:
    """ControlNets are of the first pass; LoRAs and IP-Adapters of both, and of no refiner."""
    if not (flows.root / "tiny--net").exists():
        save_controlnet(flows.root / "tiny--net", flows.root / "tiny--sd")
        save_image_encoder(flows.root / "tiny--eyes" / "image_encoder")
        save_ip_adapter(flows.root / "tiny--eyes" / "adapter.safetensors", flows.root / "tiny--sd")
    control = as_base64(control_picture(1))
    sent = model_inputs(13, control_image=control, ip_adapter_image=as_base64(control_picture(2)))
    options: dict[str, Any] = {"hires": {"strength": 0.6}, "refiner": {"MODEL_ID": "tiny/refiner", "strength": 0.6}}
    options |= {
        "controlnets": ["tiny/net"],
        "ip_adapters": ["tiny/eyes/adapter.safetensors#encoder=tiny/eyes/image_encoder"],
    }
    request = flows.request(sent, model="sd", safety_checker=False, **options)
    added = [[part.name for part in stage.model.additions] for stage in request.stages]
    assert added == [["controlnet", "image_encoder"], ["image_encoder"], []]
    assert [len(stage.ip_adapters) for stage in request.stages] == [1, 1, 0]
    assert [stage.pipeline for stage in request.stages] == [
        "StableDiffusionControlNetPipeline", "StableDiffusionImg2ImgPipeline", "StableDiffusionXLImg2ImgPipeline",
    ]  # fmt: skip
    assert flows.engine.generate(request).images.shape == (1, 2 * SIDE, 2 * SIDE, 3)


FAMILY = {"sd3": ("latent", {"max_sequence_length": 16}), "flux": ("lanczos", {"max_sequence_length": 16})}


@SLOW
@pytest.mark.parametrize("family", FAMILY)
def test_a_second_pass_of_other_families(flows: Flows, family: str) -> None:
    upscaler, more = FAMILY[family]
    if not (flows.root / f"tiny--{family}").exists():
        save_family(family, flows.root / f"tiny--{family}")
    inputs = model_inputs(14, images=2, **more)
    hires = {"strength": 0.6, "upscaler": upscaler}
    request = flows.request(inputs, model=family, hires=hires, SCHEDULER="FlowMatchEulerDiscreteScheduler")
    (found,) = flows.run([request])
    pipe = diffusers.DiffusionPipeline.from_pretrained(flows.root / f"tiny--{family}")
    again = getattr(diffusers, type(pipe).__name__.replace("Pipeline", "Img2ImgPipeline")).from_pipe(pipe)
    generator, given = generators(14), {**shared(inputs), **more}
    kind = "latent" if upscaler == "latent" else "pil"
    images = pipe(**given, width=SIDE, height=SIDE, generator=generator, output_type=kind).images
    if upscaler == "latent":
        images = functional.interpolate(images, scale_factor=2, mode="bilinear", antialias=False)
    else:
        images = [image.resize((2 * SIDE, 2 * SIDE), Image.Resampling.LANCZOS) for image in images]
    expected = again(
        **given, image=images, strength=0.6, width=2 * SIDE, height=2 * SIDE, generator=generator, output_type="np"
    ).images
    assert np.abs(found - expected).max() <= TOLERANCE
    if family == "flux":  # which packs its latents
        error = flows.refused(inputs, model=family, hires={"upscaler": "latent"}, SCHEDULER="")
        assert (error.field, error.available) == ("callInputs.hires.upscaler", ["lanczos", "bicubic"])


async def test_the_dispatcher_knows_every_model_of_a_job() -> None:
    def with_refiner(name: str, strength: float = 0.3) -> Job:
        first = a_job(name, "a", prompt="p").request
        last = msgspec.structs.replace(first, model=ref_of("b"), inputs={"strength": strength}, then=())
        return Job(msgspec.structs.replace(first, then=(last,)))

    pool = Pool()
    one, other, different = with_refiner("1"), with_refiner("2"), with_refiner("3", 0.4)
    assert one.fingerprint == other.fingerprint != different.fingerprint
    pool.submit(one, other)
    assert pool.running() == [{"1"}]
    assert pool.dispatcher.folders() == {"a", "b"}
    assert [ref.model_id for ref in pool.workers[0].staged] == ["a", "b"]
    pool.done(pool.workers[0], one, loadModel=7000)
    assert pool.running() == [{"2"}]


def test_what_any_of_them_lost_is_told_of_all(flows: Flows) -> None:
    request = flows.request(model_inputs(9), hires={"scale": 1})
    whole = {"dtype": "fp32", "placement": "full", "attention": "sdpa", "numerics": "cpu/float32/sdpa/eager"}
    less = {
        **whole,
        "numerics": "cpu/float32/sdpa/int8",
        "quantize": "int8",
        "quantized": ["unet"],
        "lossy": ["quantize"],
    }
    told = told_of(request, [whole, less])
    assert (told["lossy"], told["stages"][1]["quantize"], "quantize" in told["stages"][0]) == (
        ["quantize"],
        "int8",
        False,
    )
