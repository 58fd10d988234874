"""Peaks of memory that are learned: what will not fit is not tried, and what is not known is."""

from __future__ import annotations

import concurrent.futures
import gc
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from api.engine.calls import Ticket
from api.engine.device import Device
from api.engine.executor import Executor
from api.engine.generate import Engine
from api.engine.peaks import About, Peaks
from api.engine.placement import build_of
from api.schema.generation import ModelRef
from tests.tiny import save_wide
from tests.unit.test_offload import Setup, a_request


class Gauge:
    def __init__(self) -> None:
        self.size, self.left = 0, 1000

    def begin(self) -> None: ...

    def end(self) -> int:
        return self.size

    def free(self) -> int:
        return self.left


def about(pixels: int, codec: str = "full", encodes: bool = False) -> About:
    return About("b", codec, pixels, encodes)


def test_between_and_beyond_the_sizes_that_were_seen() -> None:
    peaks = Peaks(Gauge(), 100)
    assert peaks.most(about(10)) == 0
    peaks.note(about(10), "VAE", "decode", 1, 20)
    assert [peaks.most(about(n)) for n in (5, 10, 20)] == [0, 20, 20]
    peaks.note(about(20), "VAE", "decode", 1, 50)
    # it may have grown ever faster, so that a line between two sizes would be too high
    assert [peaks.most(about(n)) for n in (5, 10, 15, 20, 30)] == [0, 20, 20, 50, 80]
    peaks.note(about(30), "VAE", "decode", 1, 40)  # it never shrinks beyond what is known
    assert peaks.most(about(40)) == 40
    assert peaks.exceeds(about(15), lambda: 81)
    assert not peaks.exceeds(about(15), lambda: 80)
    assert not peaks.exceeds(about(0), lambda: 1000)


def test_what_is_shared_by_a_batch_makes_nothing_grow() -> None:
    """A row takes 1 for each pixel, and each call 30: of a batch at one size and a single row at another."""
    peaks = Peaks(Gauge(), 100)
    peaks.note(about(10), "VAE", "decode", 1, 40)
    peaks.note(about(10), "VAE", "decode", 10, 130)
    peaks.note(about(20), "VAE", "decode", 1, 50)
    assert peaks.most(about(10)) == 13
    assert peaks.most(about(40)) == 70


def test_nothing_is_learned_while_jobs_compute_beside_a_call() -> None:
    peaks, gauge = Peaks(Gauge(), 100), Gauge()
    peaks.meter, gauge.size = gauge, 10
    executor = Executor(peaks=peaks)
    busy, stop = threading.Event(), threading.Event()

    def other() -> None:
        with executor.job(Ticket()):
            busy.set()
            stop.wait()

    def call() -> float:
        module = nn.Linear(2, 2)
        with executor.job(Ticket(about=about(10))) as ticket:
            executor.run(ticket, module.forward, (torch.zeros(1, 2),), {})
        return peaks.most(about(10))

    thread = threading.Thread(target=other)
    thread.start()
    busy.wait()
    assert call() == 0
    stop.set()
    thread.join()
    assert call() == 10
    executor.close()


def test_what_a_job_does_not_call_does_not_count() -> None:
    peaks = Peaks(Gauge(), 100)
    peaks.note(about(10), "VAE", "encode", 1, 90)
    peaks.note(about(10, "tiled"), "VAE", "decode", 1, 5)
    peaks.note(about(10), "VAE", "decode", 1, 30)
    peaks.note(about(10), "UNet", "forward", 2, 40)
    assert peaks.most(about(10)) == 30
    assert peaks.most(about(10, encodes=True)) == 90
    assert peaks.most(about(10, "tiled")) == 20
    peaks.note(about(10, "sliced"), "VAE", "decode", 4, 30)  # of one at a time
    assert peaks.most(about(10, "sliced")) == 30
    assert peaks.most(About("other", "full", 10)) == 0


def test_rows_that_fit_in_what_is_free() -> None:
    gauge = Gauge()
    peaks = Peaks(gauge)
    gauge.size = 600
    with peaks.measuring(about(10), "UNet", "forward", 2):
        pass
    assert peaks.rows(about(10), "UNet", "forward") == 3
    gauge.left = 100
    assert peaks.rows(about(10), "UNet", "forward") == 1
    assert peaks.rows(about(5), "UNet", "forward") is None
    assert peaks.rows(about(10), "UNet", "decode") is None
    with pytest.raises(ZeroDivisionError), peaks.measuring(about(20), "UNet", "forward", 2):
        gauge.size //= 0
    assert peaks.rows(about(20), "UNet", "forward") == 1  # nothing was learned of that size
    assert Peaks().rows(about(10), "UNet", "forward") is None


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> ModelRef:
    folder: Path = tmp_path_factory.mktemp("wide")
    save_wide(folder)
    return ModelRef("tiny/wide", "main", "fp32", str(folder))


@pytest.fixture
def make() -> Iterator[Callable[[], Setup]]:
    made: list[Setup] = []

    def build() -> Setup:
        it = Setup()
        made.append(it)
        return it

    yield build
    for it in made:
        it.engine.close()


def peak_of(it: Setup, model: ModelRef, side: int, **more: bool) -> int:
    it.generate(a_request(model, side=side, **more))
    gc.collect()
    it.allocator.peak = it.allocator.live
    it.generate(a_request(model, side=side, **more))
    return it.allocator.peak


def test_a_size_that_will_not_fit_is_not_tried(make: Callable[[], Setup], model: ModelRef) -> None:
    probe = make()
    with probe.allocator.inside(probe.engine):
        whole = peak_of(probe, model, 256)
        tiled = peak_of(probe, model, 256, low_vram=True)
    assert tiled < 0.8 * whole
    it = make()
    with it.allocator.inside(it.engine):
        it.allocator.budget = it.engine.peaks.room = (tiled + whole) // 2
        for side in (64, 96, 128):  # which fit, and teach
            assert it.generate(a_request(model, side=side)).meta["placement"] == "full"
        refused = it.allocator.refused
        plan = it.engine.plan(a_request(model, side=256))
        done = it.generate(a_request(model, side=256))
        assert (plan.placement, done.meta["placement"], it.allocator.refused) == ("tiled", "tiled", refused)
        # it says what trying would have said: without it the same request ends there too, after a try in vain
        other = make()
        with other.allocator.inside(other.engine):
            other.allocator.budget = it.allocator.budget
            tried = other.generate(a_request(model, side=256))
        assert tried.meta["placement"] == "tiled"
        assert other.allocator.refused
        assert np.array_equal(tried.images, done.images)
        # and what fits is what it was
        assert it.generate(a_request(model, side=128)).meta["placement"] == "full"


def test_what_no_tile_makes_fit_goes_to_the_host(make: Callable[[], Setup], model: ModelRef) -> None:
    it = make()
    with it.allocator.inside(it.engine):
        for side in (64, 96, 128):
            it.generate(a_request(model, side=side))
        built = build_of(it.engine.cache._models[model.key])
        whole, elsewhere = (it.engine.peaks.most(About(built, codec, 128 * 128)) for codec in ("full", "tiled"))
        assert whole > elsewhere > 0
        it.engine.peaks.room = it.rooms(model)["model"] + int(elsewhere) + 1
        assert it.engine.plan(a_request(model, side=128)).placement == "model+tiled"
        refused = it.allocator.refused
        assert it.generate(a_request(model, side=128)).meta["placement"] == "model+tiled"
        assert it.allocator.refused == refused


def test_a_batch_that_will_not_fit_is_not_formed(make: Callable[[], Setup], model: ModelRef) -> None:
    expected = Engine(Device("cpu")).generate(a_request(model, 0, side=128)).images
    it = make()
    with it.allocator.inside(it.engine), concurrent.futures.ThreadPoolExecutor(4) as pool:
        most = peak_of(it, model, 128)
        it.allocator.budget = int(most * 1.4)
        done = list(pool.map(it.generate, [a_request(model, 0, side=128) for _ in range(4)]))
    assert {one.meta["placement"] for one in done} == {"full"}
    assert max(int(np.abs(one.images.astype(int) - expected).max()) for one in done) <= 1


def test_kernels_of_attention_are_learned_apart() -> None:
    """What one of them takes says nothing of a request for another."""
    peaks = Peaks()
    peaks.note(About("b", "full", 100, attention="_native_math"), "UNet", "forward", 1, 1000)
    assert peaks.most(About("b", "full", 100, attention="_native_math")) == 1000
    assert peaks.most(About("b", "full", 100)) == 0
