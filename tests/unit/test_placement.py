"""The ladder: what a request begins with, what comes after, and what is expected of the next one."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL
from torch import nn

from api.engine.placement import Ladder, build_of, placed, rungs
from api.engine.spent import Rate
from api.schema.generation import GenerationRequest, ModelRef
from tests.unit.test_merging import vae


def model(name: str = "m", size: int = 1000, **components: Any) -> Any:
    ref = ModelRef(name, "1", "fp32", f"/{name}")
    components = {"unet": nn.Linear(1, 1), "vae": vae(), **components}
    return SimpleNamespace(ref=ref, components=components, bytes=size, dtype=torch.float32, variants={})


def ask(name: str = "m", side: int | None = 64, images: int = 1, **more: Any) -> GenerationRequest:
    inputs = {"width": side, "height": side} if side else {}
    return GenerationRequest(
        id="1", request_id="1", model=model(name).ref, pipeline="P", scheduler="S", inputs=inputs, pictures={}, seed=1,
        images=images, image_format="PNG", image_quality=95, attention="sdpa", safety_checker=True, meta={}, **more,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("request_", "expected"),
    [
        (ask(), ["full", "tiled"]),
        (ask(images=2), ["full", "sliced", "tiled"]),
        (ask(side=8, images=2), ["full", "sliced"]),
        (ask(side=8), ["full"]),
        (ask(side=None), ["full", "tiled"]),
        (ask(images=2, offload="none"), ["full"]),
    ],
)
def test_only_what_makes_a_difference_is_a_rung(request_: GenerationRequest, expected: list[str]) -> None:
    assert rungs(build_of(model()), request_) == expected
    assert rungs(build_of(model(vae=nn.Linear(1, 1))), request_) == ["full"]


def test_what_did_not_fit_is_remembered_for_its_size_and_build() -> None:
    ladder, it, request = Ladder(), model(), ask(images=2)
    assert ladder.start(it, request) == "full"
    assert ladder.lower(it, request, "full", "forward") is None
    assert ladder.start(it, request) == "full"
    assert ladder.lower(it, request, "full", "decode") == "sliced"
    assert ladder.start(it, request) == "sliced"
    assert ladder.lower(it, request, "sliced", "decode") == "tiled"
    assert ladder.lower(it, request, "tiled", "decode") is None
    assert ladder.start(it, request) == "tiled"
    # a model of the same build needs the same; another, another size and one image may not
    assert ladder.start(model("other"), request) == "tiled"
    assert ladder.start(model("larger", 2000), request) == "full"
    assert ladder.start(it, ask(side=96, images=2)) == "full"
    assert ladder.start(it, ask()) == "full"
    # and who wants it whole gets it so
    assert ladder.start(it, ask(images=2, offload="none")) == "full"


def test_what_is_expected() -> None:
    ladder, it, request = Ladder(), model(), ask()
    assert ladder.expected(request) == ("full", None)
    assert ladder.expected(ask(low_vram=True)) == (None, None)
    ladder.start(it, request)
    assert ladder.expected(ask(low_vram=True)) == ("tiled", None)
    ladder.lower(it, request, "full", "decode")
    ladder.note(it, request, fitted=True)
    assert ladder.expected(request) == ("tiled", True)
    ladder.note(it, request, fitted=False)
    assert ladder.expected(request) == ("tiled", False)
    assert ladder.expected(ask(images=2)) == ("full", None)


def test_the_shared_autoencoder_is_never_switched() -> None:
    it = model()
    shared: AutoencoderKL = it.components["vae"]
    for placement, tiling in (("sliced", False), ("tiled", True)):
        parts = placed(it, it.components, "sdpa", placement)
        assert parts["vae"] is not shared
        assert (parts["vae"].use_slicing, parts["vae"].use_tiling) == (True, tiling)
        assert next(parts["vae"].parameters()) is next(shared.parameters())
        assert placed(it, it.components, "sdpa", placement)["vae"] is parts["vae"]
        assert parts["unet"] is it.components["unet"]
    assert (shared.use_slicing, shared.use_tiling) == (False, False)
    assert placed(it, it.components, "sdpa", "full") is it.components


def test_a_rate_is_that_of_the_last_ones() -> None:
    rate = Rate()
    assert (rate.seconds(100), rate.seconds(0)) == (None, 0.0)
    rate.note(100, 1.0)
    assert rate.seconds(200) == pytest.approx(2.0)
    for _ in range(50):
        rate.note(100, 4.0)
    assert rate.seconds(100) == pytest.approx(4.0, rel=1e-3)
