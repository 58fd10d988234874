"""Out of memory: right images or a clear error, the ladder's choices in the log, and every byte comes back."""

from __future__ import annotations

import concurrent.futures
import gc
import logging
import random
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline

from api.engine.budgets import Budgets
from api.engine.device import Device
from api.engine.generate import Engine, Generated
from api.engine.placement import codec_of
from api.errors import ApiError
from api.schema.generation import GenerationRequest, ModelRef, Picture
from tests.budgeted import Allocator, Apart, Counting, Outside
from tests.tiny import save_wide

TOLERANCE = 1
"""Levels of 255: kernels sum in another order for another number of rows."""
TOGETHER = 4


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[ModelRef]:
    found = []
    for seed in range(2):
        folder = tmp_path_factory.mktemp(f"tiny-{seed}")
        save_wide(folder, seed)
        found.append(ModelRef(f"tiny/{seed}", "main", "fp32", str(folder)))
    return found


def a_request(model: ModelRef, seed: int = 1, side: int = 128, images: int = 1, **more: Any) -> GenerationRequest:
    image2image = more.pop("image2image", False)
    inputs: dict[str, Any] = {"prompt": f"a circle {seed}", "num_inference_steps": 2, "num_images_per_prompt": images}
    pictures = {}
    if image2image:
        pixels = np.random.default_rng(seed).integers(0, 255, (side, side, 3), np.uint8).tobytes()
        pictures = {"image": Picture("RGB", side, side, pixels, "")}
    else:
        inputs |= {"width": side, "height": side}
    return GenerationRequest(
        id=str(seed), request_id=str(seed), model=model,
        pipeline="StableDiffusionImg2ImgPipeline" if image2image else "StableDiffusionPipeline",
        scheduler="EulerDiscreteScheduler", inputs=inputs, pictures=pictures, seed=seed, images=images,
        image_format="PNG", image_quality=95, attention="sdpa", safety_checker=False, meta={}, **more,
    )  # fmt: skip


@dataclass
class Setup:
    engine: Engine
    allocator: Allocator

    def generate(self, request: GenerationRequest) -> Generated:
        with Counting(self.allocator):
            return self.engine.generate(request)

    def settled(self) -> int:
        """Bytes there are when every model has left."""
        for key in self.engine.cache.refs():
            self.engine.cache.unload(key)
        self.engine.executor.on_device(gc.collect)
        return self.allocator.live


@pytest.fixture
def it() -> Iterator[Setup]:
    engine, allocator = Engine(Device("cpu")), Allocator()
    with allocator.inside(engine):
        yield Setup(engine, allocator)
    engine.close()


def peak_of(it: Setup, request: GenerationRequest) -> tuple[int, Generated]:
    it.generate(request)  # what is made once
    gc.collect()
    it.allocator.peak = it.allocator.live
    done = it.generate(request)
    return it.allocator.peak, done


def far(one: np.ndarray, other: np.ndarray) -> int:
    return int(np.abs(one.astype(int) - other).max()) if one.shape == other.shape else 256


def between_placements(it: Setup, model: ModelRef, side: int = 256) -> tuple[Generated, Generated]:
    """Leaves memory for a tiled decoder of this size, and not for a whole one; images of both."""
    lowest, tiled = peak_of(it, a_request(model, side=side, low_vram=True))
    whole, full = peak_of(it, a_request(model, side=side))
    assert lowest < 0.8 * whole
    it.allocator.budget = (lowest + whole) // 2
    return full, tiled


def test_what_does_not_fit_is_tiled_and_says_so(
    it: Setup, models: list[ModelRef], caplog: pytest.LogCaptureFixture
) -> None:
    full, tiled = between_placements(it, models[0])
    assert (full.meta["placement"], tiled.meta["placement"]) == ("full", "tiled")
    assert far(full.images, tiled.images) > TOLERANCE
    before = it.allocator.live
    with caplog.at_level(logging.INFO, "api.engine"):
        done = it.generate(a_request(models[0], side=256))
    assert it.engine.tally.counts().shortages == {"evict": 1, "alone": 1, "lower_placement": 1}
    assert np.array_equal(done.images, tiled.images)
    assert (done.meta["placement"], done.meta["numerics"]) == ("tiled", "cpu/float32/sdpa/eager/tiled")
    assert "decode of tiny/0 at 256x256 does not fit as full: tiled from now on" in caplog.text
    del done  # numpy has the tensor's own memory
    assert it.allocator.live == before
    # it was learned: the next one does not try in vain, and other sizes are what they were
    refused = it.allocator.refused
    assert np.array_equal(it.generate(a_request(models[0], side=256)).images, tiled.images)
    assert it.generate(a_request(models[0], side=64)).meta["placement"] == "full"
    assert it.allocator.refused == refused
    # and a model of the same build needs no less
    assert it.generate(a_request(models[1], side=256)).meta["placement"] == "tiled"
    assert it.allocator.refused == refused


def test_without_the_ladder_it_is_an_error_with_the_numbers(it: Setup, models: list[ModelRef]) -> None:
    between_placements(it, models[0])
    before = it.allocator.live
    with pytest.raises(ApiError) as error:
        it.generate(a_request(models[0], side=256, offload="none"))
    assert (error.value.code, error.value.requested) == ("OUT_OF_MEMORY", "256x256")
    assert error.value.available["placements"] == ["full"]
    assert error.value.available["model_bytes"] > 0
    assert "leave OFFLOAD out" in error.value.message
    assert "Tried to allocate" in error.value.message
    del error
    assert it.allocator.live == before
    assert it.generate(a_request(models[0], side=64)).meta["placement"] == "full"


def test_what_is_short_elsewhere_is_not_tiled(it: Setup, models: list[ModelRef]) -> None:
    it.generate(a_request(models[0], side=64))
    it.allocator.budget = it.allocator.live + 100_000
    with pytest.raises(ApiError) as error:
        it.generate(a_request(models[0], side=256))
    assert (error.value.code, error.value.available["placements"]) == ("OUT_OF_MEMORY", ["full"])
    it.allocator.budget = None
    assert it.generate(a_request(models[0], side=256)).meta["placement"] == "full"


def test_others_in_the_way_do_not_change_pixels(it: Setup, models: list[ModelRef]) -> None:
    """Each fits alone, several do not: all of them are whole in the end."""
    whole, full = peak_of(it, a_request(models[0], side=256))
    it.allocator.budget = int(whole * 1.1)
    with concurrent.futures.ThreadPoolExecutor(TOGETHER) as pool:
        done = list(pool.map(it.generate, [a_request(models[0], side=256) for _ in range(TOGETHER)]))
    assert {each.meta["placement"] for each in done} == {"full"}
    assert max(far(each.images, full.images) for each in done) <= TOLERANCE
    assert it.allocator.refused


def test_a_shortage_by_another_name(it: Setup, models: list[ModelRef], monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokenizers and processors say that the input is at fault, whatever went wrong."""

    def refusing(*args: Any) -> Any:
        try:
            raise torch.OutOfMemoryError("Tried to allocate 3 bytes")
        except torch.OutOfMemoryError as fault:
            raise ValueError("Unable to create tensor") from fault

    monkeypatch.setattr(StableDiffusionPipeline, "check_inputs", refusing)
    with pytest.raises(ApiError, match="Tried to allocate 3 bytes") as error:
        it.generate(a_request(models[0]))
    assert error.value.code == "OUT_OF_MEMORY"


def test_what_leaves_with_its_last_job_is_free_when_the_memory_is_given_back(
    it: Setup, models: list[ModelRef], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The job still holds the model when its lease ends."""
    cache, model, alive = it.engine.cache, models[0], list[bool]()
    it.engine.load(model)
    held = cache.hold(model)
    weights = weakref.ref(held.components["unet"])
    del held
    cache.release(model)
    monkeypatch.setattr(cache, "_freed", lambda: alive.append(weights() is not None))
    it.engine.generate(a_request(model), on_step=lambda step, total: cache.unload(model.key))
    assert alive == [False]


def test_slices_are_the_same_image(it: Setup, models: list[ModelRef]) -> None:
    request = a_request(models[0], side=32, images=3)
    full = it.generate(request)
    sliced = it.generate(a_request(models[0], side=32, images=3, low_vram=True))
    assert (full.meta["placement"], sliced.meta["placement"]) == ("full", "sliced")
    assert sliced.meta["numerics"] == full.meta["numerics"]
    assert far(full.images, sliced.images) <= TOLERANCE
    # one image of one tile has nothing to be made smaller
    assert it.generate(a_request(models[0], side=32, low_vram=True)).meta["placement"] == "full"


def mixed(models: list[ModelRef], rng: random.Random) -> GenerationRequest:
    """One of a few dozen different requests."""
    return a_request(
        rng.choice(models),
        rng.randrange(3),
        rng.choice((32, 64, 128)),
        rng.choice((1, 1, 2)),
        image2image=rng.random() < 0.3,
    )


EVENTS = pytest.mark.parametrize("events", [20, pytest.param(200, marks=[pytest.mark.slow, pytest.mark.timeout(1800)])])


@EVENTS
def test_faults_at_random_allocations(
    it: Setup, models: list[ModelRef], events: int, caplog: pytest.LogCaptureFixture
) -> None:
    faults_at_random(it, models, events, caplog)


@EVENTS
def test_faults_where_weights_can_leave(models: list[ModelRef], events: int, caplog: pytest.LogCaptureFixture) -> None:
    """The same on a device with memory of its own: whatever is chosen, the pixels are those of the autoencoder's way."""
    allocator = Allocator()
    device = Apart(allocator)
    setup = Setup(Engine(device, Budgets(10**9, 10**9, shared=False, capacity=10**9), Outside(device)), allocator)
    with allocator.inside(setup.engine):
        faults_at_random(setup, models, events, caplog)
    setup.engine.close()
    assert "model from now on" in caplog.text


def faults_at_random(it: Setup, models: list[ModelRef], events: int, caplog: pytest.LogCaptureFixture) -> None:
    rng, alone = random.Random(events), Engine(Device("cpu"))
    expected: dict[Any, np.ndarray] = {}

    def check(request: GenerationRequest, done: Generated) -> None:
        placement = codec_of(done.meta["placement"])
        kind = (request.model.key, request.pipeline, request.seed, str(request.inputs), len(request.pictures))
        size = next(((p.width, p.height) for p in request.pictures.values()), ())
        if (key := (*kind, size, placement)) not in expected:
            if placement == "full":
                expected[key] = alone.generate(request).images
            else:  # which is what the lowest placement is, unless there is one between
                lowest = a_request(
                    request.model, request.seed, size[0] if size else request.inputs["width"], request.images,
                    image2image=bool(size), low_vram=placement == "tiled",
                )  # fmt: skip
                expected[key] = alone.generate(lowest).images
        assert far(done.images, expected[key]) <= TOLERANCE, (kind, placement)

    for model in models:
        for image2image in (False, True):
            it.generate(a_request(model, image2image=image2image))
    before = it.settled()
    it.allocator.chance = 1 / 1500
    good = errors = 0
    with caplog.at_level(logging.INFO, "api.engine"), concurrent.futures.ThreadPoolExecutor(TOGETHER) as pool:
        while it.allocator.refused < events:
            requests = [mixed(models, rng) for _ in range(TOGETHER)]
            running = [pool.submit(it.generate, request) for request in requests]
            for request, job in zip(requests, running, strict=True):
                try:
                    check(request, job.result())
                    good += 1
                except ApiError as fault:
                    assert fault.code == "OUT_OF_MEMORY", fault
                    errors += 1
    it.allocator.chance = 0.0
    del running, job, requests, request
    assert good > errors
    assert "out of memory" in caplog.text
    request = a_request(models[0], 9, 96)
    check(request, it.generate(request))
    assert it.settled() == before
    assert it.engine.cache.memory().device == 0
    alone.close()
    print(f"{it.allocator.refused} refused: {good} images right, {errors} errors")
