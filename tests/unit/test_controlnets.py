"""ControlNets through the engine: the pictures of plain diffusers, whatever runs beside, and nothing left behind."""

from __future__ import annotations

import itertools
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import diffusers
import numpy as np
import pytest
import torch

from api.engine.budgets import Budgets
from api.engine.device import Device
from api.engine.generate import Engine
from api.engine.offload import Offloaded, held_as
from api.schema.generation import Addition, GenerationRequest, ModelRef, Pictures
from tests.budgeted import Allocator, Apart, Outside
from tests.controlled import SIZE, as_picture, as_pil, control_picture, save_controlnet, weights_hash
from tests.generating import a_request
from tests.unit.test_precisions import FAMILIES

TOLERANCE = 1
"""Levels of 255, float32."""
CLASSES = {"StableDiffusion": "ControlNetModel", "StableDiffusionXL": "ControlNetModel",
           "StableDiffusion3": "SD3ControlNetModel", "Flux": "FluxControlNetModel"}  # fmt: skip
MASK = np.where(np.arange(SIZE)[None, :] < SIZE // 2, 255, 0).astype(np.uint8).repeat(SIZE, 0)


class Made(NamedTuple):
    """A family's model, its ControlNets, and an engine."""

    name: str
    folder: Path
    nets: list[Path]
    engine: Engine

    @property
    def flow(self) -> bool:
        return self.name in ("StableDiffusion3", "Flux")

    def ref(self, nets: list[int]) -> ModelRef:
        names = ["controlnet", "controlnet_1"]
        added = tuple(Addition(names[i], "1", str(self.nets[net])) for i, net in enumerate(nets))
        return ModelRef(self.name, "main", "fp32", str(self.folder), added)

    def inputs(self, task: str, **more: Any) -> dict[str, Any]:
        usual: dict[str, Any] = {"prompt": "a circle", "num_inference_steps": 3, "guidance_scale": 4.0}
        usual |= {"width": SIZE, "height": SIZE}
        if task:
            usual["strength"] = 0.7
        if self.flow:
            usual["max_sequence_length"] = 16
        return {**usual, **more}

    def request(self, nets: list[int], task: str = "", images: int = 1, **more: Any) -> GenerationRequest:
        control: Pictures = {"control_image": [as_picture(control_picture(net)) for net in nets]} if nets else {}
        given = {"image": as_picture(control_picture(7)), "mask_image": as_picture(MASK)}
        names = {"": (), "Img2Img": ("image",), "Inpaint": ("image", "mask_image")}[task]
        pictures: Pictures = {**{name: given[name] for name in names}, **control}
        pipeline = f"{self.name}{'ControlNet' if nets else ''}{task}Pipeline"
        scheduler = "FlowMatchEulerDiscreteScheduler" if self.flow else "EulerDiscreteScheduler"
        inputs = self.inputs(task, num_images_per_prompt=images, **more)
        name = f"{nets}{task}{images}{sorted(more.items())}"
        return a_request(name, self.ref(nets), pipeline, scheduler, inputs, pictures=pictures, images=images)

    def draw(self, request: GenerationRequest) -> np.ndarray:
        return self.engine.generate(request).images

    def plain(self, nets: list[int], task: str = "", images: int = 1, **more: Any) -> np.ndarray:
        """As diffusers alone draws it."""
        cls = getattr(diffusers, f"{self.name}{'ControlNet' if nets else ''}{task}Pipeline")
        net_class = getattr(diffusers, CLASSES[self.name])
        loaded = [net_class.from_pretrained(self.nets[net]) for net in nets]
        given: dict[str, Any] = {"controlnet": loaded[0] if len(loaded) == 1 else loaded} if nets else {}
        pipe = cls.from_pretrained(self.folder, **given)
        pipe.set_progress_bar_config(disable=True)
        scheduler = diffusers.FlowMatchEulerDiscreteScheduler if self.flow else diffusers.EulerDiscreteScheduler
        pipe.scheduler = scheduler.from_config(pipe.scheduler.config)
        arguments = self.inputs(task, num_images_per_prompt=images, **more)
        pictures = [as_pil(control_picture(net)) for net in nets]
        argument = "control_image" if task or self.flow else "image"
        if nets:
            arguments[argument] = pictures if len(pictures) > 1 else pictures[0]
        scale = arguments.get("controlnet_conditioning_scale")
        if len(nets) > 1 and isinstance(scale, float):
            arguments["controlnet_conditioning_scale"] = [scale] * len(nets)
        if len(nets) > 1 and self.name == "Flux":
            arguments["control_mode"] = [-1] * len(nets)  # the pipelines over a picture fail without it
        if task:
            arguments["image"] = as_pil(control_picture(7))
        if task == "Inpaint":
            arguments["mask_image"] = as_pil(MASK)
        torch.manual_seed(1)  # SD3's draws the latents of the ControlNet's picture from torch's global numbers
        out = pipe(**arguments, generator=torch.Generator().manual_seed(1), output_type="np").images
        return (out * 255).round().astype(np.uint8)


@pytest.fixture(scope="module", params=FAMILIES)
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Made:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp(request.param)
    FAMILIES[request.param](folder)
    nets = [save_controlnet(tmp_path_factory.mktemp(f"net{seed}"), folder, seed) for seed in (1, 2)]
    return Made(request.param, folder, nets, Engine(Device("cpu")))


def differ(one: np.ndarray, other: np.ndarray) -> int:
    assert one.shape == other.shape
    return int(np.abs(one.astype(int) - other.astype(int)).max())


def tasks(made: Made) -> tuple[str, ...]:
    return ("",) if made.name == "StableDiffusion3" else ("", "Img2Img", "Inpaint")


def test_as_diffusers_draws_it(made: Made) -> None:
    """For every task, one image and two, one ControlNet and two; and it does make a difference."""
    for task in tasks(made):
        for nets, images, more in (
            ([0], 1, {"controlnet_conditioning_scale": 0.7}),
            ([0], 2, {"control_guidance_start": 0.3}),
            ([1, 0], 1, {"controlnet_conditioning_scale": [0.5, 0.9]}),
        ):
            expected = made.plain(nets, task, images, **more)
            assert differ(made.draw(made.request(nets, task, images, **more)), expected) <= TOLERANCE, (task, nets)
        assert differ(expected, made.plain([], task)) > 20 * TOLERANCE


def test_jobs_side_by_side_with_and_without_it(made: Made) -> None:
    """Each gets what it gets alone, and the weights that they share are what they were."""
    orders: list[tuple[list[int], dict[str, Any]]] = [
        ([0], {"controlnet_conditioning_scale": 0.4}),
        ([0], {"controlnet_conditioning_scale": 1.0}),
        ([], {}),
        ([1], {"controlnet_conditioning_scale": 0.8}),
        ([0, 1], {"controlnet_conditioning_scale": 0.6}),
        ([0], {"controlnet_conditioning_scale": 0.4, "num_inference_steps": 5}),
        ([0], {"controlnet_conditioning_scale": 1.0, "guidance_scale": 6.0}),
    ]
    requests = [made.request(nets, **more) for nets, more in orders]
    model = made.engine.cache.lease(made.ref([0, 1]))
    modules = [part for part in model.components.values() if isinstance(part, torch.nn.Module)]
    before = weights_hash(modules)
    with ThreadPoolExecutor(len(requests)) as pool:
        drawn = list(pool.map(made.draw, requests * 2))
    for (nets, more), image, again in zip(orders, drawn, drawn[len(orders) :], strict=False):
        expected = made.plain(nets, **more)
        assert differ(image, expected) <= TOLERANCE and differ(again, expected) <= TOLERANCE, (nets, more)
    assert weights_hash(modules) == before
    made.engine.cache.release(made.ref([0, 1]))


def test_only_the_controlnet_is_brought_for_it(made: Made) -> None:
    engine = Engine(Device("cpu"))
    engine.load(made.ref([]))
    net = sum(spec.bytes for spec in engine.cache.parts(made.ref([0])) if spec.name == "controlnet")
    assert net > 0
    taken = engine.cache.memory().device
    assert engine.cache.missing(made.ref([0]))[2] == net
    engine.load(made.ref([0]))
    assert engine.cache.memory().device == taken + net
    plain, controlled = engine.cache.lease(made.ref([])), engine.cache.lease(made.ref([0]))
    denoiser = "transformer" if made.flow else "unet"
    assert plain.components[denoiser] is controlled.components[denoiser]
    assert "controlnet" not in plain.components
    engine.cache.release(made.ref([0]))
    engine.cache.release(made.ref([]))
    engine.cache.unload(made.ref([0]).key)
    assert made.ref([]) in engine.cache and made.ref([0]) not in engine.cache
    assert engine.cache.memory().device == taken


def test_an_offloaded_model_keeps_what_was_added(made: Made) -> None:
    held = held_as(made.ref([0]), "model")
    assert isinstance(held, Offloaded)
    assert held.plain == made.ref([0])
    assert held.full == made.ref([0]).key != made.ref([]).key
    assert held.key == f"{held.full}#model"


def test_guess_mode(made: Made) -> None:
    if made.name not in ("StableDiffusion", "StableDiffusionXL"):
        pytest.skip("these have none")
    expected = made.plain([0], guess_mode=True)
    assert differ(made.draw(made.request([0], guess_mode=True)), expected) <= TOLERANCE
    assert differ(expected, made.plain([0])) > TOLERANCE


def test_one_that_knows_several_kinds_of_pictures(tmp_path: Path) -> None:
    """ControlNet-Union: two pictures for one of them, each with its mode."""
    FAMILIES["StableDiffusionXL"](tmp_path / "model")
    net = save_controlnet(tmp_path / "net", tmp_path / "model", 3, union=True)
    ref = ModelRef("xl", "1", "fp32", str(tmp_path / "model"), (Addition("controlnet", "1", str(net)),))
    arrays = [control_picture(1), control_picture(2)]
    inputs = {"prompt": "a circle", "num_inference_steps": 3, "width": SIZE, "height": SIZE, "control_mode": [1, 0]}
    union = diffusers.ControlNetUnionModel.from_pretrained(net)
    pipe = diffusers.StableDiffusionXLControlNetUnionPipeline.from_pretrained(tmp_path / "model", controlnet=union)
    pictures = [as_pil(array) for array in arrays]
    seeded = torch.Generator().manual_seed(1)
    expected = pipe(**inputs, control_image=pictures, generator=seeded, output_type="np").images
    control: Pictures = {"control_image": [as_picture(array) for array in arrays]}
    request = a_request(
        "union", ref, "StableDiffusionXLControlNetUnionPipeline", "EulerDiscreteScheduler", inputs, pictures=control
    )
    drawn = Engine(Device("cpu")).generate(request).images
    assert differ(drawn, (expected * 255).round().astype(np.uint8)) <= TOLERANCE


def test_they_leave_in_any_order(made: Made) -> None:
    """A model whose parts all belong to others as well was sent away, and keeps none of them there."""
    engine = Engine(Device("cpu"))
    refs = [made.ref(nets) for nets in ([], [0], [1], [0, 1])]
    for order in itertools.permutations(refs):
        for ref in refs:
            engine.load(ref)
        for ref in order[:-1]:
            engine.cache.unload(ref.key)
        assert order[-1] in engine.cache
        assert engine.cache.memory().device == sum({s.key: s.bytes for s in engine.cache.parts(order[-1])}.values())
        engine.cache.unload(order[-1].key)
        assert (engine.cache.memory().device, engine.cache.memory().host) == (0, 0), order
    engine.close()


@pytest.mark.parametrize("way", ["model", "sequential"])
def test_offloaded(made: Made, way: str) -> None:
    """With a device of its own memory the ControlNet comes to the room that its model's parts take turns at."""
    apart = Apart(Allocator())
    engine = Engine(apart, Budgets(10**9, 10**9, shared=False, capacity=10**9), Outside(apart))
    request = made.request([0, 1], controlnet_conditioning_scale=0.6)
    fields = {name: getattr(request, name) for name in request.__struct_fields__}
    done = engine.generate(GenerationRequest(**{**fields, "offload": way}))
    assert done.meta["placement"] == way
    assert differ(done.images, made.plain([0, 1], controlnet_conditioning_scale=0.6)) <= TOLERANCE
    everything = sum({spec.key: spec.bytes for spec in engine.cache.parts(request.model)}.values())
    assert engine.cache.memory().device < everything
    engine.close()
