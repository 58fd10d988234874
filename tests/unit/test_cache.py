"""The cache and the line of those who wait for it, over a loader that moves numbers."""

from __future__ import annotations

import concurrent.futures
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from api.engine.cache import ModelCache
from api.engine.calls import Cancelled, Ticket
from api.engine.executor import Executor
from api.engine.line import Line
from api.engine.parts import HostPart, PartSpec
from api.engine.staging import Stager
from api.engine.tiers import Tiers
from api.errors import ApiError
from api.schema.generation import ModelRef


def ref(name: str) -> ModelRef:
    return ModelRef(name, "1", "fp32", f"/{name}")


def spec(name: str, key: str, size: int = 10, by_library: bool = False) -> PartSpec:
    return PartSpec(name, key, name, size, Path(), "", "", torch.float32, (), by_library)


class FakeLoader:
    """Models of two parts: ``unet``, their own, and ``vae``, which all of them share."""

    def __init__(self) -> None:
        self.reads, self.places, self.assembled = Counter[str](), list[tuple[str, str | None]](), Counter[str]()
        self.threads, self.faults = set[str](), dict[str, BaseException]()
        self.gates: dict[str, threading.Event] = {}
        self.by_library = False
        self.released, self.vacated = 0, list[str]()

    def release(self) -> None:
        self.released += 1

    def parts(self, ref: ModelRef) -> list[PartSpec]:
        return [
            spec("unet", f"unet-{ref.model_id}", by_library=self.by_library),
            spec("vae", "vae", 5, self.by_library),
        ]

    def read(self, spec: PartSpec) -> HostPart:
        self.reads[spec.key] += 1
        if gate := self.gates.get(spec.key):
            assert gate.wait(10)
        if fault := self.faults.pop(f"read {spec.key}", None):
            raise fault
        return HostPart({"weight": torch.tensor([float(len(spec.key))])}, spec.bytes)

    def vacate(self, spec: PartSpec, onto: nn.Module) -> None:
        self.vacated.append(spec.key)

    def place(self, spec: PartSpec, host: HostPart, onto: nn.Module | None) -> nn.Module:
        self.threads.add(threading.current_thread().name)
        self.places.append((spec.key, getattr(onto, "key", None)))
        if fault := self.faults.pop(f"place {spec.key}", None):
            raise fault
        module = onto or nn.Module()
        module.key = spec.key
        return module

    def assemble(self, ref: ModelRef, modules: dict[str, nn.Module]) -> dict[str, Any]:
        self.assembled[ref.model_id] += 1
        return {"ref": ref, **modules}


class Setup:
    def __init__(
        self, device: int, host: int, shared: bool = True, longest: float = 10.0, loader: FakeLoader | None = None
    ) -> None:
        self.executor, self.loader = Executor(), loader or FakeLoader()
        self.tiers = Tiers(device, host, shared=shared)
        self.freed = 0
        self.cache = ModelCache(
            self.tiers, self.loader, self.executor.on_device, self.executor.exclusively, self.note_freed
        )
        self.line = Line(self.cache, longest)
        self.stager = Stager(self.cache, self.line.wishes)
        self.line.on_change = self.stager.poke

    def note_freed(self) -> None:
        assert not self.tiers.lock._is_owned(), "everybody waits for the device to give memory back"
        self.freed += 1

    def use(self, name: str, cancelled: Callable[[], bool] = lambda: False, seconds: float = 0.0, **more: Any) -> str:
        with self.line.lease(ref(name), cancelled, **more) as model:
            time.sleep(seconds)
            assert model["unet"].key == f"unet-{name}"
            assert model["vae"].key == "vae"
            return model["ref"].model_id

    def close(self) -> None:
        self.stager.close()
        self.executor.close()


@pytest.fixture
def make() -> Iterator[Callable[..., Setup]]:
    made: list[Setup] = []

    def build(*args: Any, **kwargs: Any) -> Setup:
        made.append(Setup(*args, **kwargs))
        return made[-1]

    yield build
    for each in made:
        each.close()


def until(condition: Callable[[], Any]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_a_model_that_left_the_device_comes_back_without_a_read(make: Callable[..., Setup]) -> None:
    it = make(25, 100)
    for name in "abcabc":
        assert it.use(name) == name
    assert it.loader.reads == {"unet-a": 1, "unet-b": 1, "unet-c": 1, "vae": 1}
    assert it.tiers.peak <= 25
    assert it.loader.threads == {"device"}
    # what leaves gives its place to what comes
    assert it.loader.places[-1] == ("unet-c", "unet-a")
    assert [key for key, _ in it.loader.places].count("vae") == 1


def test_two_who_want_the_same_load_it_once(make: Callable[..., Setup]) -> None:
    it = make(100, 100)
    it.loader.gates["unet-a"] = threading.Event()
    with concurrent.futures.ThreadPoolExecutor(3) as pool:
        jobs = [pool.submit(it.use, "a") for _ in range(2)]
        until(lambda: it.tiers.models() and it.tiers.models()[ref("a").key].leases == 2)
        other = pool.submit(it.use, "b")  # shares a part with it
        until(lambda: it.loader.reads["unet-b"])
        it.loader.gates["unet-a"].set()
        assert [job.result(10) for job in [*jobs, other]] == ["a", "a", "b"]
    assert set(it.loader.reads.values()) == {1}
    assert set(it.loader.assembled.values()) == {1}


def test_jobs_go_on_while_a_model_is_read(make: Callable[..., Setup]) -> None:
    it = make(100, 100)
    it.loader.gates["unet-a"] = threading.Event()
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        loading = pool.submit(it.use, "a")
        until(lambda: it.loader.reads["unet-a"])
        with it.executor.job(Ticket()) as ticket:
            assert float(it.executor.run(ticket, nn.ReLU().forward, (torch.ones(1, 1),), {})) == 1
        it.loader.gates["unet-a"].set()
        assert loading.result(10) == "a"


@pytest.mark.parametrize("where", ["read unet-a", "place unet-a", "read vae", "place vae"])
@pytest.mark.parametrize("shared", [True, False])
def test_a_fault_leaves_the_books_right_and_is_told(make: Callable[..., Setup], where: str, shared: bool) -> None:
    it = make(100, 100, shared)
    it.loader.faults[where] = ApiError("MODEL_BROKEN", "cut")
    with pytest.raises(ApiError, match="cut"):
        it.use("a")
    assert it.use("b") == "b"
    assert it.use("a") == "a"
    it.cache.unload(ref("a").key)
    it.cache.unload(ref("b").key)
    memory = it.cache.memory()
    assert (memory.device, memory.host, it.cache.held()) == (0, 0, {})


def test_one_who_waits_for_a_part_that_another_could_not_bring_brings_it(make: Callable[..., Setup]) -> None:
    it = make(100, 100)
    it.loader.gates["vae"] = threading.Event()
    it.loader.faults["read vae"] = ApiError("MODEL_BROKEN", "cut")
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        first = pool.submit(it.use, "a")
        until(lambda: it.loader.reads["vae"])
        second = pool.submit(it.use, "b")
        until(lambda: it.loader.reads["unet-b"])
        it.loader.gates["vae"].set()
        assert isinstance(first.exception(10), ApiError)
        assert second.result(10) == "b"


def test_out_of_memory_sends_idle_models_away_and_tries_once_more(make: Callable[..., Setup]) -> None:
    it = make(100, 100)
    it.use("a")
    it.loader.faults["place unet-b"] = torch.OutOfMemoryError("no")
    assert it.use("b") == "b"
    assert ref("a") not in it.cache
    assert it.freed

    def never(spec: PartSpec, host: HostPart, onto: nn.Module | None) -> nn.Module:
        raise torch.OutOfMemoryError("no")

    it.loader.place = never
    with pytest.raises(ApiError) as fault:
        it.use("c")
    assert fault.value.code == "OUT_OF_MEMORY"
    assert it.tiers.device_bytes == 0


def test_a_cancelled_one_leaves_the_line_at_once(make: Callable[..., Setup]) -> None:
    """Also when others stand before it."""
    it = make(15, 100)
    hold, gone = threading.Event(), threading.Event()
    with concurrent.futures.ThreadPoolExecutor(3) as pool:

        def job() -> None:
            with it.line.lease(ref("a"), lambda: False):
                hold.wait(10)

        running = pool.submit(job)
        until(lambda: ref("a") in it.cache)
        before = pool.submit(it.use, "b")
        waiting = pool.submit(it.use, "c", gone.is_set)
        until(lambda: len(it.line.wishes()) == 2)
        gone.set()
        it.line.wake()
        assert isinstance(waiting.exception(10), Cancelled)
        assert [wish.model_id for wish in it.line.wishes()] == ["b"]
        assert not running.done()
        hold.set()
        assert before.result(10) == "b"


def test_who_waits_has_its_weights_in_the_hosts_memory_when_its_turn_comes(make: Callable[..., Setup]) -> None:
    it = make(15, 100, shared=False)
    hold = threading.Event()
    with concurrent.futures.ThreadPoolExecutor(2) as pool:

        def job() -> None:
            with it.line.lease(ref("a"), lambda: False):
                hold.wait(10)

        running = pool.submit(job)
        until(lambda: ref("a") in it.cache)
        it.line.wanted = (ref("c"),)
        waiting = pool.submit(it.use, "b")
        until(lambda: {"unet-b", "unet-c"} <= set(it.loader.reads))
        until(lambda: it.tiers.warm(ref("c").key))
        assert not waiting.done()
        hold.set()
        assert waiting.result(10) == "b"
        running.result(10)
    assert it.use("c") == "c"
    assert it.loader.reads == {"unet-a": 1, "vae": 1, "unet-b": 1, "unet-c": 1}


def test_what_only_a_library_can_read_is_not_read_ahead_and_parks_the_jobs(make: Callable[..., Setup]) -> None:
    it = make(15, 100)
    it.loader.by_library = True
    assert it.cache.stage(ref("b")) is False
    assert not it.loader.reads
    assert it.cache.stage(ref("b"), by_library=True)
    assert it.use("a") == "a"


def test_in_one_line_a_resident_model_serves_all_who_want_it_before_the_switch(make: Callable[..., Setup]) -> None:
    it = make(15, 100)
    names = ["ab"[n % 2] for n in range(40)]
    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        done = [pool.submit(it.use, name, seconds=0.005) for name in names]
        assert [job.result(20) for job in done] == names
    assert sum(key.startswith("unet") for key, _ in it.loader.places) <= 10


def test_a_steady_stream_does_not_starve_who_waits(make: Callable[..., Setup]) -> None:
    it = make(15, 100, longest=0.2)
    over = threading.Event()

    def stream() -> None:
        while not over.is_set():
            it.use("a", seconds=0.01)

    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        streams = [pool.submit(stream) for _ in range(3)]
        until(lambda: ref("a") in it.cache)
        try:
            assert pool.submit(it.use, "b").result(20) == "b"
        finally:
            over.set()
        for each in streams:
            each.result(10)


def test_what_never_fits_is_told_at_once_with_the_numbers(make: Callable[..., Setup]) -> None:
    it = make(20, 100)
    it.use("a")
    it.cache.pin(ref("a"), "device")
    with pytest.raises(ApiError, match="pinned by other models") as fault:
        it.use("b")
    assert fault.value.code == "OUT_OF_MEMORY"
    assert it.use("a") == "a"


def test_an_idle_model_leaves_the_device_after_its_time(make: Callable[..., Setup]) -> None:
    it = make(100, 100)
    stager = Stager(it.cache, it.line.wishes, idle_timeout=0.1)
    try:
        it.use("a")
        until(lambda: ref("a") not in it.cache)
        assert it.tiers.host_bytes == 15
    finally:
        stager.close()


@pytest.mark.parametrize("shared", [True, False])
def test_many_at_once_with_faults_anywhere(make: Callable[..., Setup], shared: bool) -> None:
    it = make(26, 36, shared)
    names = ["abcdef"[n % 6] for n in range(120)]
    lock, count = threading.Lock(), [0]
    real = it.loader.read

    def sometimes(spec: PartSpec) -> HostPart:
        with lock:
            count[0] += 1
            bad = count[0] % 7 == 0
        if bad:
            raise ApiError("MODEL_BROKEN", "now and then")
        return real(spec)

    it.loader.read = sometimes

    def job(name: str) -> str:
        try:
            return it.use(name, seconds=0.001)
        except ApiError as fault:
            assert fault.message == "now and then"
            return name

    with concurrent.futures.ThreadPoolExecutor(12) as pool:
        assert list(pool.map(job, names)) == names
    until(lambda: not it.line.wishes())
    assert it.tiers.peak <= 26
    assert it.tiers.host_bytes <= 36
    assert all(held.leases == 0 for held in it.cache.held().values())
    for name in "abcdef":
        it.cache.unload(ref(name).key)
    assert (it.tiers.device_bytes, it.tiers.host_bytes) == (0, 0)
    assert not it.cache._host._parts
    assert not it.cache._modules
    assert not it.cache._models
