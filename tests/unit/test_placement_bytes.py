"""Each placement gives the image of ``full``, within its distance, and takes the memory that was predicted.

Architectures as real ones in small: latents an eighth of the image, an autoencoder whose activations are most of what a
run takes, denoisers and text encoders with weights of a few MB.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator

import numpy as np
import pytest

from api.engine.device import Device
from api.engine.generate import Engine
from api.schema.generation import ModelRef
from scripts.benchmarks import architectures
from scripts.benchmarks.gpu.places import WITHIN, forced, offload_of, predicted
from scripts.demo_model.checker import read
from tests.generating import a_request
from tests.running import ROOT
from tests.unit.test_offload import Setup

FAMILIES = {
    "sd1": ("StableDiffusionPipeline", "EulerDiscreteScheduler"),
    "sdxl": ("StableDiffusionXLPipeline", "EulerDiscreteScheduler"),
    "flux": ("FluxPipeline", "FlowMatchEulerDiscreteScheduler"),
}
EXACT = ("sliced", "model", "sequential", "model+sliced", "sequential+sliced")
TILED = ("tiled", "model+tiled", "sequential+tiled")
TILED_MEAN, TILED_MOST = 2.0, 32
"""Levels of 255 that tiles change in the demo model's images, as docs/speed.md says."""


@pytest.fixture(scope="module", autouse=True)
def models(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BENCH_MODELS", str(tmp_path_factory.mktemp("models")))
        yield


def run_as(family: str, placement: str, images: int) -> tuple[np.ndarray, int, float]:
    """The images, bytes at the most, and those that were predicted after one run."""
    pipeline, scheduler = FAMILIES[family]
    model = ModelRef(f"tiny/{family}", "main", "fp32", str(architectures.model(family, "fp32", 1, "tiny")))
    inputs = {"prompt": "a circle", "num_inference_steps": 2, "width": 128, "height": 128}
    if family == "flux":
        inputs["max_sequence_length"] = 64  # of 512, what its text encoder takes would hide the rest
    request = a_request(
        "1", model, pipeline, scheduler, {**inputs, "num_images_per_prompt": images, "guidance_scale": 5.0},
        images=images, offload=offload_of(placement),
    )  # fmt: skip
    it = Setup()
    with it.allocator.inside(it.engine), forced(it.engine, placement):
        it.generate(request)  # which teaches
        gc.collect()
        it.allocator.peak = it.allocator.live
        done = it.generate(request)
        peak = it.allocator.peak
        foretold = predicted(it.engine, request, placement, guided=family != "flux")
    it.engine.close()
    assert done.meta["placement"] == placement
    return done.images.astype(int), peak, foretold


def check_family(family: str, placements: tuple[str, ...], images: int) -> None:
    full, *_ = found = run_as(family, "full", images)
    peaks = {"full": found[1]}
    for placement in ("full", *placements):
        made, peak, foretold = found if placement == "full" else run_as(family, placement, images)
        assert abs(foretold / peak - 1) < WITHIN, (placement, foretold, peak)
        # the books of a job are exact here to what its own tensors take, of which there are few
        assert abs(foretold / peak - 1) < 0.04, (placement, foretold, peak)
        off = np.abs(made - full)
        if placement in TILED:
            assert off.max() > 1  # of random weights, which know no seams that do not show
            assert peak < peaks["full"]
        else:
            assert off.max() <= 1, placement  # sums in another order
        peaks[placement] = peak
    if images > 1 and "sliced" in peaks:
        assert peaks["sliced"] < peaks["full"]
    for way in ("model", "sequential"):
        assert peaks.get(way, 0) < peaks["full"]


def test_bytes_and_images_of_some() -> None:
    check_family("sd1", ("model+tiled",), 1)


@pytest.mark.slow
@pytest.mark.parametrize("images", [1, 2])
@pytest.mark.parametrize("family", FAMILIES)
def test_bytes_and_images_of_all(family: str, images: int) -> None:
    exact = EXACT if images > 1 else tuple(each for each in EXACT if "sliced" not in each)
    check_family(family, (*exact, *TILED), images)


def test_tiles_change_little_of_what_is_seen() -> None:
    """With weights that know what they draw: the picture is the same, and pixels are off by as much as is said."""
    model = ModelRef("demo/shapes", "main", "fp32", str(ROOT / "models" / "shapes"))
    inputs = {"prompt": "a red circle on a blue background", "num_inference_steps": 15, "guidance_scale": 5.0}
    request = a_request(
        "1", model, "StableDiffusionPipeline", "DDIMScheduler", {**inputs, "width": 96, "height": 96}
    )  # fmt: skip
    engine, made = Engine(Device("cpu")), {}
    for placement in ("full", "tiled"):
        with forced(engine, placement):
            done = engine.generate(request)
        assert done.meta["placement"] == placement
        made[placement] = done.images[0]
    engine.close()
    seen = {placement: read(image) for placement, image in made.items()}
    things = {
        placement: [(each.colour, each.shape, each.place) for each in it.things] for placement, it in seen.items()
    }
    assert seen["full"].background == seen["tiled"].background == "blue"
    assert [colour for colour, *_ in things["full"]] == ["red"]
    assert things["tiled"] == things["full"]
    off = np.abs(made["full"].astype(int) - made["tiled"])
    assert 0 < off.mean() <= TILED_MEAN
    assert off.max() <= TILED_MOST
