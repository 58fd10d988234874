"""Convolutions with their channels last: the same image, in the same bytes, however the model is held."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from api.engine.device import Device
from api.engine.generate import Engine
from api.engine.layout import turn, turned
from api.engine.loader import PartLoader, module_bytes
from api.engine.rooms import Bound
from api.schema.generation import ModelRef
from tests.budgeted import Apart
from tests.tiny import save_tiny
from tests.unit.test_offload import a_request, leave_nothing, save_flux


class Turning(Apart):
    """A device with memory of its own, that has channels last in every precision."""

    def __init__(self, channels_last: str = "1") -> None:
        super().__init__()
        self._channels_last = channels_last


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, ModelRef]:
    found = {}
    for seed, name in enumerate(("sd", "other", "flux")):
        folder: Path = tmp_path_factory.mktemp(name)
        save_flux(folder) if name == "flux" else save_tiny(folder, seed)
        found[name] = ModelRef(f"tiny/{name}", "main", "fp32", str(folder))
    return found


@pytest.fixture
def engine() -> Iterator[Callable[..., Engine]]:
    made: list[Engine] = []

    def make(device: Device) -> Engine:
        made.append(Engine(device, embeddings_limit=0))
        return made[-1]

    yield make
    for each in made:
        each.close()


def convolutions(module: nn.Module) -> list[torch.Tensor]:
    found = [part.weight for part in module.modules() if isinstance(part, nn.Conv2d)]
    return [weight for weight in found if weight.shape[2:] != (1, 1) and weight.shape[1] > 1]


def is_turned(weight: torch.Tensor) -> bool:
    return not weight.is_contiguous() and weight.is_contiguous(memory_format=torch.channels_last)


def placed(loader: PartLoader, ref: ModelRef, onto: dict[str, nn.Module] | None = None) -> dict[str, nn.Module]:
    onto = onto or {}
    return {spec.name: loader.place(spec, loader.read(spec), onto.get(spec.name)) for spec in loader.parts(ref)}


def the_same(one: nn.Module, other: nn.Module) -> None:
    mine, theirs = one.state_dict(), other.state_dict()
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)


@pytest.mark.parametrize("shape", [(3, 5, 2, 4), (1, 1, 3, 3), (4, 2, 1, 1), (2, 1, 2, 2)])
def test_a_weight_is_turned_round_where_it_lies(shape: tuple[int, ...]) -> None:
    right = torch.randn(shape)
    flat = right.clone().view(-1)
    there = turned(flat.view(shape))
    turn(there)
    assert torch.equal(there, right)
    assert there.data_ptr() == flat.data_ptr()
    assert there.is_contiguous(memory_format=torch.channels_last)


def test_weights_are_what_the_files_hold_in_as_many_bytes(models: dict[str, ModelRef]) -> None:
    loader, plain = PartLoader(Turning()), PartLoader(Apart())
    mine, theirs = placed(loader, models["sd"]), placed(plain, models["sd"])
    sizes = {spec.name: spec.bytes for spec in loader.parts(models["sd"])}
    assert sizes == {spec.name: spec.bytes for spec in plain.parts(models["sd"])}
    for name, module in mine.items():
        the_same(module, theirs[name])
        assert module_bytes(module) == sizes[name]
        assert not any(map(is_turned, convolutions(theirs[name])))
        assert all(map(is_turned, convolutions(module)))
        storages = {p.untyped_storage().data_ptr() for p in module.parameters()}
        assert len(storages) == 1, "one buffer for a part"
    assert convolutions(mine["unet"]) and convolutions(mine["vae"])
    assert convolutions(theirs["unet"])


def test_a_module_is_taken_over_in_place(models: dict[str, ModelRef]) -> None:
    loader = PartLoader(Turning())
    resident, fresh = placed(loader, models["sd"]), placed(loader, models["other"])
    places = [p.data_ptr() for p in resident["unet"].parameters()]
    again = placed(loader, models["other"], resident)
    assert again["unet"] is resident["unet"]
    for name, module in again.items():
        the_same(module, fresh[name])
    assert all(map(is_turned, convolutions(again["unet"])))
    assert [p.data_ptr() for p in again["unet"].parameters()] == places
    moved = next(p for p in again["unet"].parameters() if p.dim() == 4)
    moved.data = moved.data.clone()  # somewhere else: copied tensor by tensor then
    the_same(placed(loader, models["sd"], again)["unet"], placed(loader, models["sd"])["unet"])


def test_the_image_is_the_same_however_the_model_is_held(
    models: dict[str, ModelRef], engine: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Bound, "leave", leave_nothing)
    plain = engine(Apart()).generate(a_request(models["sd"])).images
    it = engine(Turning())
    carrier: Any = it.cache.loader.offloading
    images = {}
    for way, ahead in (("none", False), ("model", False), ("sequential", False), ("sequential", True)):
        carrier._carrier.ahead = ahead
        for _ in range(2):
            done = it.generate(a_request(models["sd"], offload=way))
        assert done.meta["numerics"] == "cpu/float32/sdpa/eager/channels_last"
        images[way, ahead] = done.images
        assert int(np.abs(done.images.astype(int) - plain).max()) <= 1, way  # sums in another order
    assert all(np.array_equal(image, images["none", False]) for image in images.values())


def test_what_is_not_turned_does_not_say_so(models: dict[str, ModelRef], engine: Callable[..., Engine]) -> None:
    for device in (Turning("0"), Turning("auto"), Device("cpu", channels_last="1")):
        it = engine(device)
        assert it.generate(a_request(models["sd"])).meta["numerics"] == "cpu/float32/sdpa/eager"


def test_a_transformer_has_its_door_as_it_is(models: dict[str, ModelRef]) -> None:
    mine = placed(PartLoader(Turning()), models["flux"])
    assert not hasattr(mine["transformer"], "_channels_last")
    assert all(map(is_turned, convolutions(mine["vae"])))


def test_auto_is_half_precision_on_a_gpu() -> None:
    device = Device("cpu")
    assert not device.turns(torch.float16)
    device.is_cuda = True
    assert device.turns(torch.float16) and device.turns(torch.bfloat16) and not device.turns(torch.float32)
