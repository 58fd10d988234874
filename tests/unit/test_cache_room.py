"""The cache where memory is short: what is given up is free, nobody waits for ever, and nothing is read in vain."""

from __future__ import annotations

import concurrent.futures
import threading
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from api.engine.books import State
from api.engine.calls import Cancelled
from api.engine.headers import file_identity
from api.engine.parts import HostPart, PartSpec
from api.engine.staging import Stager
from api.errors import ApiError
from api.schema.generation import ModelRef
from tests.unit.test_cache import FakeLoader, Setup, ref, until

Table = dict[str, list[tuple[str, int]]]


class TableLoader(FakeLoader):
    """Models of the parts that a table says, by key and size; what comes before the dash is the architecture."""

    def __init__(self, table: Table) -> None:
        super().__init__()
        self.table = table

    def parts(self, ref: Any) -> list[PartSpec]:
        return [
            PartSpec(key.split("-")[0], key, key.split("-")[0], size, Path(), "", "", torch.float32, (), False)
            for key, size in self.table[ref.model_id]
        ]


@pytest.fixture
def make() -> Iterator[Callable[..., Setup]]:
    made: list[Setup] = []

    def build(table: Table, *args: Any, **kwargs: Any) -> Setup:
        made.append(Setup(*args, loader=TableLoader(table), **kwargs))
        return made[-1]

    yield build
    for each in made:
        each.close()


class FileLoader(FakeLoader):
    """Models of one part, called what is in their file."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder

    def replace(self, name: str, key: str) -> None:
        (self.folder / "new").write_text(key)
        (self.folder / "new").replace(self.folder / name)

    def parts(self, ref: Any) -> list[PartSpec]:
        path = self.folder / ref.model_id
        key, was = path.read_text(), (file_identity(path),)
        return [PartSpec("unet", key, "unet", 10, Path(), "", "", torch.float32, (path,), False, was)]

    def read(self, spec: PartSpec) -> HostPart:
        if spec.identities != (file_identity(spec.files[0]),):
            raise ApiError("MODEL_BROKEN", "changed")
        return super().read(spec)


def use(it: Setup, name: str, cancelled: Callable[[], bool] = lambda: False) -> str:
    with it.line.lease(ref(name), cancelled) as model:
        assert {model[key.split("-")[0]].key for key, _ in it.loader.table[name]} == {
            key for key, _ in it.loader.table[name]
        }
        return name


@pytest.mark.parametrize("fails", ["te-B", "unet-B"])
def test_what_was_to_be_taken_over_is_free_when_a_load_is_tried_again(make: Callable[..., Setup], fails: str) -> None:
    """The memory of the model that left is the very one that the second try needs."""
    it = make({"A": [("unet-A", 10)], "B": [("te-B", 3), ("unet-B", 10)]}, 13, 100, shared=False)
    with it.line.lease(ref("A"), lambda: False) as model:
        old = weakref.ref(model["unet"])
    del model
    it.loader.faults[f"place {fails}"] = torch.OutOfMemoryError("no")
    real, alive = it.loader.place, list[bool]()

    def place(spec: PartSpec, host: HostPart, onto: nn.Module | None) -> nn.Module:
        if f"place {fails}" not in it.loader.faults:
            alive.append(old() is not None)
        return real(spec, host, onto)

    it.loader.place = place
    known = []
    with it.line.lease(ref("B"), lambda: False, on_load=known.append):
        assert len(known) == 2  # and are still known
    assert alive
    assert not any(alive)


def test_a_part_that_is_being_read_ahead_does_not_stand_in_the_way_of_the_model_it_is_for(
    make: Callable[..., Setup],
) -> None:
    """It holds its room until it is placed, and the part before it needs that room."""
    it = make({"S": [("vae-x", 2)], "A": [("te-A", 9), ("vae-x", 2)]}, 100, 10, shared=False)
    it.loader.gates["vae-x"] = threading.Event()
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        ahead = pool.submit(it.cache.stage, ref("S"))
        until(lambda: it.loader.reads["vae-x"])
        gone = threading.Event()
        job = pool.submit(use, it, "A", gone.is_set)
        until(lambda: it.tiers.part("te-A") and it.tiers.part("te-A").device is State.COMING)
        it.loader.gates["vae-x"].set()
        try:
            assert job.result(5) == "A"
        finally:
            gone.set()
        assert ahead.result(5) is True
    assert it.loader.reads == {"vae-x": 1, "te-A": 1}


def test_who_is_cancelled_while_its_model_is_read_leaves_at_once(make: Callable[..., Setup]) -> None:
    it = make({"A": [("te-A", 4), ("unet-A", 4)]}, 100, 10, shared=False)
    gate = it.loader.gates["te-A"] = threading.Event()
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        gone = threading.Event()
        job = pool.submit(use, it, "A", gone.is_set)
        until(lambda: it.loader.reads["te-A"])
        other = pool.submit(use, it, "A")
        until(lambda: it.tiers.models()[ref("A").key].leases == 2)
        gone.set()
        it.line.wake()
        try:
            assert isinstance(job.exception(5), Cancelled)
        finally:
            gate.set()
        assert other.result(5) == "A"  # with what the first had begun to read
    assert it.loader.reads == {"te-A": 1, "unet-A": 1}


def test_who_is_cancelled_before_the_device_has_begun_with_its_model_leaves_at_once(make: Callable[..., Setup]) -> None:
    """The device may be at a long call of another."""
    it = make({"A": [("te-A", 4)]}, 100, 100, shared=False)
    busy, begun, gone = threading.Event(), threading.Event(), threading.Event()
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        other = pool.submit(it.executor.on_device, lambda: begun.set() or busy.wait(10))
        assert begun.wait(10)
        job = pool.submit(use, it, "A", gone.is_set)
        until(lambda: it.executor._calls)
        gone.set()
        it.executor.wake()
        try:
            assert isinstance(job.exception(5), Cancelled)
        finally:
            busy.set()
        other.result(5)
    assert not it.loader.places
    assert it.tiers.device_bytes == 0


def test_who_waits_for_a_part_that_another_brings_leaves_at_once_when_it_is_cancelled(
    make: Callable[..., Setup],
) -> None:
    it = make({"A": [("te-A", 4)], "B": [("te-A", 4), ("unet-B", 4)]}, 100, 100, shared=False)
    gate = it.loader.gates["te-A"] = threading.Event()
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        gone = threading.Event()
        first = pool.submit(use, it, "A")
        until(lambda: it.loader.reads["te-A"])
        job = pool.submit(use, it, "B", gone.is_set)
        until(lambda: it.tiers.part("unet-B") and it.tiers.part("unet-B").device is State.HELD)
        gone.set()
        it.line.wake()
        try:
            assert isinstance(job.exception(5), Cancelled)
        finally:
            gate.set()
        assert first.result(5) == "A"


@pytest.mark.parametrize("shared", [True, False])
def test_what_does_not_fit_whole_is_not_read_ahead_again_and_again(make: Callable[..., Setup], shared: bool) -> None:
    """Its second part takes no room from its first."""
    it = make({"A": [("unet-A", 6)], "M": [("te-M", 4), ("unet-M", 4)]}, 10, 10, shared=shared)
    with it.line.lease(ref("A"), lambda: False):
        for _ in range(3):
            assert it.cache.stage(ref("M"), [ref("A").key]) is False
        assert it.loader.reads == {"unet-A": 1, "te-M": 1}
    assert use(it, "M") == "M"
    assert it.loader.reads == {"unet-A": 1, "te-M": 1, "unet-M": 1}


def test_what_is_unloaded_while_it_is_read_ahead_is_gone_when_it_is_read(make: Callable[..., Setup]) -> None:
    it = make({"A": [("te-A", 4), ("unet-A", 4)]}, 100, 100, shared=False)
    gate = it.loader.gates["unet-A"] = threading.Event()
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        ahead = pool.submit(it.cache.stage, ref("A"))
        until(lambda: it.loader.reads["unet-A"])
        it.cache.unload(ref("A").key)
        gate.set()
        assert ahead.result(5) is False
    assert (it.tiers.host_bytes, it.cache.held(), it.cache._host._parts) == (0, {}, {})


def test_what_found_no_room_is_not_tried_again_before_something_has_changed(make: Callable[..., Setup]) -> None:
    it = make({"A": [("unet-A", 6)], "M": [("te-M", 4), ("unet-M", 4)]}, 10, 10, shared=False)
    wanted, looks, tried, real = [ref("M")], [0], list[str](), it.cache.stage

    def wishes() -> list[ModelRef]:
        looks[0] += 1
        return list(wanted)

    def stage(one: ModelRef, ahead_of: list[str]) -> bool:
        tried.append(one.model_id)
        return real(one, ahead_of)

    it.cache.stage = stage
    stager = Stager(it.cache, wishes)

    def poke() -> None:
        before = looks[0]
        stager.poke()
        until(lambda: looks[0] > before)

    try:
        with it.line.lease(ref("A"), lambda: False):
            it.tiers.pin(ref("A").key, "host")
            poke()
            until(lambda: tried)
            for _ in range(5):
                poke()
            assert tried == ["M"]
            wanted.insert(0, ref("A"))
            poke()
            until(lambda: tried == ["M"] * 2)
            del wanted[0]
        it.cache.unload(ref("A").key)
        poke()
        until(lambda: it.tiers.warm(ref("M").key))
    finally:
        stager.close()


def test_a_pin_comes_after_an_unload_that_waits_for_a_job(make: Callable[..., Setup]) -> None:
    it = make({"A": [("unet-A", 10)]}, 100, 100)
    with it.line.lease(ref("A"), lambda: False):
        it.cache.unload(ref("A").key)
        it.cache.pin(ref("A"), "device")
    assert it.cache.held()[ref("A").key].pin == "device"
    with it.line.lease(ref("A"), lambda: False):
        it.cache.unload(ref("A").key)
        it.cache.keep(ref("A"))
    assert ref("A") in it.cache


def test_the_devices_memory_is_given_back_after_every_eviction(make: Callable[..., Setup]) -> None:
    """But for what is taken over: that is not free."""
    it = make({"A": [("unet-A", 10)], "B": [("unet-B", 10)], "C": [("te-C", 10)]}, 10, 100, shared=False)
    use(it, "A")
    use(it, "B")
    assert it.freed == 0  # in the place of A
    use(it, "C")
    assert it.freed == 1
    with it.line.lease(ref("C"), lambda: False):
        it.cache.unload(ref("C").key)
        assert it.freed == 1
    it.cache.give_back()
    it.cache.give_back()
    assert it.freed == 2
    use(it, "A")
    it.loader.faults["place unet-B"] = ApiError("MODEL_BROKEN", "cut")
    with pytest.raises(ApiError):
        use(it, "B")
    assert it.freed == 3
    use(it, "B")
    it.cache.unload(ref("B").key, "host")
    assert it.freed == 4


@pytest.fixture
def files(tmp_path: Path) -> Iterator[Setup]:
    loader = FileLoader(tmp_path)
    for name in "AB":
        loader.replace(name, "one")
    it = Setup(100, 100, shared=False, loader=loader)
    yield it
    it.close()


def made_of(it: Setup, name: str) -> str:
    with it.line.lease(ref(name), lambda: False) as model:
        return model["unet"].key


def test_a_model_whose_files_were_replaced_is_read_anew(files: Setup) -> None:
    assert (made_of(files, "A"), made_of(files, "B")) == ("one", "one")
    files.loader.replace("A", "other")
    assert (made_of(files, "A"), made_of(files, "B")) == ("other", "one")  # what another has stays with it
    files.loader.replace("B", "other")
    assert made_of(files, "B") == "other"
    assert files.tiers.device_bytes == files.tiers.host_bytes == 10
    assert files.loader.reads == {"one": 1, "other": 1}
    files.loader.replace("A", "other")
    (files.loader.folder / "B").unlink()
    assert (made_of(files, "A"), made_of(files, "B")) == ("other", "other")
    assert files.loader.reads == {"one": 1, "other": 1}


def test_jobs_keep_the_model_that_they_have_when_its_files_are_replaced(files: Setup) -> None:
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        with files.line.lease(ref("A"), lambda: False) as model:
            files.cache.pin(ref("A"), "device")
            files.loader.replace("A", "other")
            jobs = [pool.submit(made_of, files, "A"), pool.submit(files.cache.load_host, ref("A"))]
            until(files.line.wishes)
            assert files.cache.stage(ref("A")) is False
            assert not any(job.done() for job in jobs)
            assert model["unet"].key == "one"
        assert [job.result(5) for job in jobs] == ["other", True]
    held = files.cache.held()[ref("A").key]
    assert (held.tier, held.pin, held.leases) == ("device", "device", 0)
    assert files.tiers.part("one") is None


def test_what_is_read_ahead_is_what_is_there_now(files: Setup) -> None:
    assert files.cache.stage(ref("A"))
    files.loader.replace("A", "other")
    assert files.cache.stage(ref("A"))
    assert files.loader.reads == {"one": 1, "other": 1}
    assert files.tiers.host_bytes == 10


def test_who_looked_before_the_files_were_replaced_gets_what_is_there_now(files: Setup) -> None:
    before = files.cache.parts(ref("A"))
    files.loader.replace("A", "other")
    assert made_of(files, "A") == "other"
    reservation = files.cache.reserve(ref("A"), before)
    assert files.cache.complete(reservation)["unet"].key == "other"


def test_what_is_pinned_to_the_hosts_memory_is_there(make: Callable[..., Setup]) -> None:
    """Also what was on the device alone when it was asked for."""
    it = make({"A": [("unet-A", 10)], "B": [("unet-B", 10)]}, 20, 10, shared=False)
    use(it, "A")
    use(it, "B")
    assert it.cache.held()[ref("A").key].host == 0
    assert it.cache.load_host(ref("A"), pin=True)
    it.cache.clear_idle()
    held = it.cache.held()[ref("A").key]
    assert (held.tier, held.pin, held.host, held.leases) == ("host", "host", 10, 0)
