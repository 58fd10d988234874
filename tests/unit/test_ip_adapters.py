"""IP-Adapters through the engine: the pictures of plain diffusers at every scale, over weights that stay what they are."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import diffusers
import numpy as np
import pytest
import torch
from transformers import CLIPVisionModelWithProjection

from api.engine.budgets import Budgets
from api.engine.device import Device
from api.engine.generate import Engine
from api.engine.ip_adapters import _made, clear
from api.errors import ApiError
from api.schema.generation import Addition, GenerationRequest, IpAdapter, Lora, ModelRef, Pictures
from tests.adapters import lora, random_halves, save_peft
from tests.budgeted import Allocator, Apart, Outside
from tests.controlled import (
    SIZE,
    as_picture,
    as_pil,
    control_picture,
    save_controlnet,
    save_image_encoder,
    save_ip_adapter,
    weights_hash,
)
from tests.generating import a_request
from tests.unit.test_precisions import FAMILIES

TOLERANCE = 1
"""Levels of 255, float32."""
Adapters = Sequence[tuple[str, float, Sequence[int]]]
"""For each: its file, its scale, its pictures."""


class Made(NamedTuple):
    """A family's model, files for it, and an engine."""

    name: str
    folder: Path
    files: Path
    engine: Engine

    def request(
        self, adapters: Adapters, task: str = "", images: int = 1, loras: Sequence[Lora] = (), **more: Any
    ) -> GenerationRequest:
        added = [Addition("image_encoder", "1", str(self.files), "image_encoder")] if adapters else []
        pictures: Pictures = {}
        if task == "Img2Img":
            pictures["image"] = as_picture(control_picture(9))
        if task == "ControlNet":
            added.append(Addition("controlnet", "1", str(self.files / "controlnet")))
            pictures["control_image"] = [as_picture(control_picture(8))]
        if adapters:
            looked_at = [picture for _, _, some in adapters for picture in some]
            pictures["ip_adapter_image"] = [as_picture(control_picture(picture)) for picture in looked_at]
        files = tuple(
            IpAdapter(str(self.files / f"{file}.safetensors"), str(self.files), "1", scale, len(some))
            for file, scale, some in adapters
        )
        return a_request(
            f"{adapters}", ModelRef(self.name, "main", "fp32", str(self.folder), tuple(added)),
            f"{self.name}{task}Pipeline", "EulerDiscreteScheduler", self.inputs(task, images, **more),
            pictures=pictures, images=images, ip_adapters=files, loras=tuple(loras),
        )  # fmt: skip

    def inputs(self, task: str, images: int, **more: Any) -> dict[str, Any]:
        size = {} if task == "Img2Img" else {"width": SIZE, "height": SIZE}
        usual = {"prompt": "a circle", "num_inference_steps": 3, "num_images_per_prompt": images, **size}
        return {**usual, **({"strength": 0.8} if task == "Img2Img" else {}), **more}

    def draw(self, request: GenerationRequest) -> np.ndarray:
        return self.engine.generate(request).images

    def plain(
        self, adapters: Adapters, task: str = "", images: int = 1, loras: Sequence[Lora] = (), **more: Any
    ) -> np.ndarray:
        """As diffusers alone draws it."""
        given: dict[str, Any] = {}
        if task == "ControlNet":
            given["controlnet"] = diffusers.ControlNetModel.from_pretrained(self.files / "controlnet")
        pipe = getattr(diffusers, f"{self.name}{task}Pipeline").from_pretrained(self.folder, **given)
        pipe.set_progress_bar_config(disable=True)
        pipe.scheduler = diffusers.EulerDiscreteScheduler.from_config(pipe.scheduler.config)
        arguments = self.inputs(task, images, **more)
        if adapters:
            names = [f"{file}.safetensors" for file, _, _ in adapters]
            pipe.load_ip_adapter(str(self.files), subfolder="", weight_name=names, image_encoder_folder="image_encoder")
            pipe.set_ip_adapter_scale([scale for _, scale, _ in adapters])
            arguments["ip_adapter_image"] = [[as_pil(control_picture(n)) for n in looked] for _, _, looked in adapters]
        for number, each in enumerate(loras):
            pipe.load_lora_weights(each.path, adapter_name=f"lora{number}")
        if loras:
            pipe.set_adapters([f"lora{number}" for number in range(len(loras))], [each.scale for each in loras])
        if task == "Img2Img":
            arguments["image"] = as_pil(control_picture(9))
        if task == "ControlNet":
            arguments["image"] = as_pil(control_picture(8))
        out = pipe(**arguments, generator=torch.Generator().manual_seed(1), output_type="np").images
        return (out * 255).round().astype(np.uint8)


@pytest.fixture(scope="module", params=["StableDiffusion", "StableDiffusionXL"])
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Made:
    torch.manual_seed(0)
    folder, files = tmp_path_factory.mktemp(request.param), tmp_path_factory.mktemp("files")
    FAMILIES[request.param](folder)
    save_image_encoder(files / "image_encoder", 3)
    for seed, name in enumerate(("one", "two")):
        save_ip_adapter(files / f"{name}.safetensors", folder, seed)
    save_ip_adapter(files / "plus.safetensors", folder, 5, plus=True)
    save_controlnet(files / "controlnet", folder, 6)
    return Made(request.param, folder, files, Engine(Device("cpu")))


def differ(one: np.ndarray, other: np.ndarray) -> int:
    assert one.shape == other.shape
    return int(np.abs(one.astype(int) - other.astype(int)).max())


def test_as_diffusers_draws_it(made: Made) -> None:
    """One adapter and two, one picture and several, over a prompt, an image and with a ControlNet."""
    cases: list[tuple[Adapters, str, int]] = [
        ([("one", 0.6, [1])], "", 1),
        ([("one", 1.0, [1])], "", 2),
        ([("one", 0.5, [1, 2, 3])], "", 1),
        ([("one", 0.5, [1]), ("two", 0.8, [2, 3])], "", 1),
        ([("plus", 0.7, [2])], "", 1),
        ([("two", 0.7, [1])], "Img2Img", 1),
        ([("two", 0.7, [1])], "ControlNet", 1),
    ]
    drawn = []
    for adapters, task, images in cases:
        expected = made.plain(adapters, task, images)
        drawn.append(made.draw(made.request(adapters, task, images)))
        assert differ(drawn[-1], expected) <= TOLERANCE, (adapters, task, images)
        assert differ(expected, made.plain([], task, images)) > 3 * TOLERANCE, (adapters, task)
    assert differ(drawn[0], drawn[2]) > TOLERANCE


def test_side_by_side_at_different_scales_and_without(made: Made) -> None:
    """Also one that takes no part; afterwards the weights are what they were, and nothing is left on the denoiser."""
    orders: list[Adapters] = [[("one", 0.3, [1])], [("one", 0.9, [1])], [], [("two", 0.6, [2])], [("one", 0.0, [1])]]
    model = made.engine.cache.lease(made.request([]).model)
    modules = [part for part in model.components.values() if isinstance(part, torch.nn.Module)]
    before, processors = weights_hash(modules), dict(model.components["unet"].attn_processors)
    requests = [made.request(adapters) for adapters in orders]
    with ThreadPoolExecutor(2 * len(orders)) as pool:
        drawn = list(pool.map(made.draw, requests * 2))
    for adapters, image, again in zip(orders * 2, drawn, [*drawn[len(orders) :], *drawn], strict=False):
        expected = made.plain(adapters)
        assert differ(image, expected) <= TOLERANCE, adapters
        assert differ(again, image) <= TOLERANCE, adapters
    assert differ(drawn[4], drawn[2]) <= TOLERANCE  # unheard
    assert weights_hash(modules) == before
    assert model.components["unet"].attn_processors == processors
    assert model.components["unet"].encoder_hid_proj is None
    assert model.components["unet"].config.encoder_hid_dim_type is None
    made.engine.cache.release(made.request([]).model)


def test_with_loras(made: Made, tmp_path: Path) -> None:
    """A request with both gets both, beside others with one or with other scales; what is shared stays what it is."""
    pipe = getattr(diffusers, f"{made.name}Pipeline").from_pretrained(made.folder)
    a, b = (save_peft(tmp_path / f"{seed}.safetensors", random_halves(pipe.components, seed)) for seed in (1, 2))
    orders: list[tuple[Adapters, str, list[Lora]]] = [
        ([("one", 0.6, [1])], "", [lora(a)]),
        ([("one", 0.2, [1])], "", [lora(a)]),
        ([("one", 0.6, [1])], "", [lora(b, 0.5), lora(a, -0.4)]),
        ([("two", 0.6, [2])], "ControlNet", [lora(a)]),
        ([], "", [lora(a)]),
        ([("one", 0.6, [1])], "", []),
    ]
    model = made.engine.cache.lease(made.request([]).model)
    modules = [part for part in model.components.values() if isinstance(part, torch.nn.Module)]
    before = weights_hash(modules)
    requests = [made.request(adapters, task, loras=loras) for adapters, task, loras in orders]
    with ThreadPoolExecutor(len(orders)) as pool:
        drawn = list(pool.map(made.draw, requests * 2))
    expected = [made.plain(adapters, task, loras=loras) for adapters, task, loras in orders]
    for number, (adapters, task, loras) in enumerate(orders):
        for image in (drawn[number], drawn[number + len(orders)]):
            assert differ(image, expected[number]) <= TOLERANCE, number
        for less in ((adapters, task, []), ([], task, loras)):
            if less != orders[number]:
                assert differ(expected[number], made.plain(*less[:2], loras=less[2])) > 3 * TOLERANCE, (number, less)
    assert differ(expected[0], expected[1]) > TOLERANCE
    assert weights_hash(modules) == before
    made.engine.cache.release(made.request([]).model)


def test_the_encoder_is_a_part_like_any_other(made: Made) -> None:
    specs = {spec.name: spec for spec in made.engine.cache.parts(made.request([("one", 1.0, [1])]).model)}
    module = CLIPVisionModelWithProjection.from_pretrained(made.files / "image_encoder")
    weights = sum(tensor.numel() * 4 for tensor in module.parameters())
    assert weights <= specs["image_encoder"].bytes <= weights + 4096
    assert not specs["image_encoder"].by_library


def test_one_for_another_model_is_refused(made: Made, tmp_path: Path) -> None:
    other = "StableDiffusionXL" if made.name == "StableDiffusion" else "StableDiffusion"
    FAMILIES[other](tmp_path / "other")
    file = save_ip_adapter(tmp_path / "wrong.safetensors", tmp_path / "other")
    request = made.request([("one", 1.0, [1])])
    wrong = (IpAdapter(str(file), str(tmp_path), "1", 1.0),)
    fields = {name: getattr(request, name) for name in request.__struct_fields__}
    with pytest.raises(ApiError, match="another kind of model") as caught:
        made.draw(GenerationRequest(**{**fields, "ip_adapters": wrong}))
    assert caught.value.code == "INVALID_INPUTS"
    assert differ(made.draw(request), made.plain([("one", 1.0, [1])])) <= TOLERANCE


def test_copies_leave_when_memory_is_short(made: Made) -> None:
    made.draw(made.request([("one", 1.0, [1])]))
    assert any(_made.values())
    assert made.engine._clear()
    assert not any(_made.values())
    assert not clear()
    assert differ(made.draw(made.request([("one", 1.0, [1])])), made.plain([("one", 1.0, [1])])) <= TOLERANCE


@pytest.mark.parametrize("way", ["model", "sequential"])
def test_offloaded(made: Made, way: str) -> None:
    """The weights that come and go are the model's; the adapter's stay."""
    apart = Apart(Allocator())
    engine = Engine(apart, Budgets(10**9, 10**9, shared=False, capacity=10**9), Outside(apart))
    adapters: Adapters = [("one", 0.6, [1]), ("two", 0.4, [2])]
    request = made.request(adapters)
    fields = {name: getattr(request, name) for name in request.__struct_fields__}
    for _ in range(2):
        done = engine.generate(GenerationRequest(**{**fields, "offload": way}))
        assert done.meta["placement"] == way
        assert differ(done.images, made.plain(adapters)) <= TOLERANCE
    engine.close()
