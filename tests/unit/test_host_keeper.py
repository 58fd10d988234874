"""One copy of the weights for all workers of a container, and what becomes of it whoever dies: with real memory."""

from __future__ import annotations

import concurrent.futures
import gc
import os
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from api.engine import common_host, loader
from api.engine.budgets import Budgets
from api.engine.common_host import Room
from api.engine.device import Device
from api.engine.generate import Engine
from api.errors import ApiError
from api.schema.generation import ModelRef
from api.service.dispatch import Dispatcher
from api.service.spawning import command
from api.settings import Settings
from tests.sharing import cast_model, draw, sharing


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[ModelRef]:
    return [cast_model(tmp_path_factory.mktemp("cast") / str(seed), seed) for seed in range(2)]


@pytest.fixture(scope="module")
def alone(models: list[ModelRef]) -> list[np.ndarray]:
    """What the models draw on a worker that shares nothing."""
    engine = Engine(Device("cpu"), Budgets(2**30, 2**30, shared=True))
    try:
        return [draw(engine, model) for model in models]
    finally:
        engine.close()


def size_of(engine: Engine, model: ModelRef) -> int:
    return sum(spec.bytes for spec in {spec.key: spec for spec in engine.cache.parts(model)}.values())


def read_by(engine: Engine) -> int:
    """Bytes that a worker has read from the disk."""
    return engine.tally.counts().moved_bytes.get("read", 0)


def until(true: Callable[[], Any]) -> None:
    """Wait for what must come."""
    while not true():
        gc.collect()
        time.sleep(0.01)


@pytest.mark.parametrize("shared", [True, False], ids=["in the host's memory", "copied to the device"])
def test_two_workers_have_one_copy_that_was_read_once(
    models: list[ModelRef], alone: list[np.ndarray], shared: bool
) -> None:
    with sharing(2**28, shared=shared) as container:
        one, two = container.worker(), container.worker()
        size = size_of(one, models[0])
        for engine in (one, two):
            assert np.array_equal(draw(engine, models[0]), alone[0])
        assert (read_by(one), read_by(two)) == (size, 0)
        assert two.tally.counts().moved_bytes["share"] == size
        assert container.keeper.use().held == size
        assert sorted(map(len, container.mappings())) == [2, 2, 2], "three parts, each mapped by both"


@pytest.mark.slow
def test_what_one_worker_writes_no_other_one_sees(models: list[ModelRef]) -> None:
    with sharing(2**28) as container:
        one, two = container.worker(), container.worker()
        before = draw(one, models[0])
        draw(two, models[0])
        loaded = two.cache.lease(models[0])
        with torch.no_grad():
            for parameter in loaded.components["unet"].parameters():
                parameter.fill_(0.5)
        two.cache.release(models[0])
        assert not np.array_equal(draw(two, models[0], "spoilt"), before)
        assert np.array_equal(draw(one, models[0], "again"), before)
        assert np.array_equal(draw(container.worker(), models[0]), before)


def test_the_next_incarnation_finds_its_parts_there(models: list[ModelRef], alone: list[np.ndarray]) -> None:
    with sharing(2**28) as container:
        first = container.worker()
        size = size_of(first, models[0])
        draw(first, models[0])
        container.kill(first)
        until(lambda: container.keeper.use().held == 0)
        assert container.keeper.use().kept == size
        second = container.worker()
        assert np.array_equal(draw(second, models[0]), alone[0])
        assert read_by(second) == 0


def test_what_is_unloaded_everywhere_is_given_back(models: list[ModelRef]) -> None:
    with sharing(2**28) as container:
        one, two = container.worker(), container.worker()
        for engine in (one, two):
            draw(engine, models[0])
        one.cache.unload(models[0].key)
        until(lambda: sorted(map(len, container.mappings())) == [1, 1, 1])
        assert container.keeper.use().held == size_of(two, models[0])
        two.cache.unload(models[0].key)
        until(lambda: container.keeper.use().held == 0)
        two.cache.loader.release()
        until(lambda: container.keeper.use().kept == 0)
        assert not container.keeper._memory


@pytest.mark.slow
def test_where_two_models_do_not_fit_workers_take_turns(
    models: list[ModelRef], alone: list[np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = Engine(Device("cpu"), Budgets(2**30, 2**30, shared=True))
    limit = int(size_of(engine, models[0]) * 1.3)
    engine.close()
    with sharing(limit) as container:
        tier, most = container.keeper._tier, 0
        do = container.keeper._do

        def watched(steps: Any) -> None:
            nonlocal most
            most = max(most, tier.bytes)
            do(steps)

        monkeypatch.setattr(container.keeper, "_do", watched)
        workers = [container.worker(), container.worker()]

        def run(number: int) -> None:
            for turn in range(4):
                which = (number + turn // 2) % 2
                assert np.array_equal(draw(workers[number], models[which], f"{number}-{turn}"), alone[which])

        with concurrent.futures.ThreadPoolExecutor(2) as pool:
            for done in [pool.submit(run, number) for number in range(2)]:
                done.result()
        assert 0 < most <= limit


def test_what_never_fits_is_refused_with_words(models: list[ModelRef]) -> None:
    with sharing(10_000) as container:
        with pytest.raises(ApiError) as raised:
            draw(container.worker(), models[0])
        assert raised.value.code == "OUT_OF_MEMORY"
        assert container.keeper.use().held == 0


def test_one_that_waits_too_long_is_told_so(models: list[ModelRef]) -> None:
    with sharing(100, patience=0.5) as container:
        one, two = container.link(), container.link()
        assert one.claim({"a": 80}, wait=True, over=lambda: False) is Room.GRANTED
        with pytest.raises(MemoryError, match="in use by other workers"):
            two.claim({"b": 80}, wait=True, over=lambda: False)
        assert two.claim({"b": 10}, wait=True, over=lambda: False) is Room.GRANTED


def test_one_that_is_cancelled_waits_no_longer() -> None:
    with sharing(100) as container:
        one, two = container.link(), container.link()
        one.claim({"a": 80}, wait=True, over=lambda: False)
        assert two.claim({"b": 80}, wait=True, over=lambda: True) is Room.LATER


def test_one_that_talks_all_the_time_keeps_nobody_waiting() -> None:
    with sharing(100) as container:
        one, two = container.link(), container.link()
        one.claim({"a": 80}, wait=True, over=lambda: False)
        paused = threading.Event()
        one.on_pause = lambda on: paused.set()
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            waits = pool.submit(two.claim, {"b": 80}, wait=True, over=lambda: False)
            until = time.monotonic() + 10
            while not paused.is_set() and time.monotonic() < until:
                one.claim({"c": 80}, wait=False, over=lambda: False)
                time.sleep(0.01)
            assert paused.is_set()
            one.release("a")
            assert waits.result(10) is Room.GRANTED


def test_a_fault_of_the_keeper_is_not_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    with sharing(100) as container:
        one, two = container.link(), container.link()
        one.claim({"a": 80}, wait=True, over=lambda: False)
        tick, faults = container.keeper._tier.tick, [KeyError("a"), KeyError("b")]

        def failing() -> Any:
            if faults:
                raise faults.pop()
            return tick()

        monkeypatch.setattr(container.keeper._tier, "tick", failing)
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            waits = pool.submit(two.claim, {"b": 80}, wait=True, over=lambda: False)
            until(lambda: not faults)
            one.release("a")
            assert waits.result(10) is Room.GRANTED


def test_what_is_read_ahead_leaves_a_job_its_room() -> None:
    with sharing(100) as container:
        link = container.link()
        rooms = common_host.Rooms(link, lambda spec: spec.name)
        spec: Any = SimpleNamespace(name="a", bytes=80)
        assert rooms.take([spec], wait=True, over=lambda: False)
        assert rooms.need(spec, wait=False, over=lambda: False)
        assert container.keeper._tier._parts["a"].holders.total() == 2
        link.release("a")  # it could not be read
        link.claim = lambda *args, **more: pytest.fail("its room is gone")
        assert rooms.need(spec, wait=True, over=lambda: False)


def test_a_load_into_ram_waits_for_its_turn(models: list[ModelRef]) -> None:
    with sharing(2**28) as container:
        engine, one, two = container.worker(), container.link(), container.link()
        one.claim({"a": 2**28}, wait=True, over=lambda: False)
        claim, answers = container.links[0].claim, []
        container.links[0].claim = lambda *args, **more: answers.append(claim(*args, **more)) or answers[-1]
        with concurrent.futures.ThreadPoolExecutor(2) as pool:
            first = pool.submit(two.claim, {"b": 2**28}, wait=True, over=lambda: False)
            until(lambda: container.keeper._tier._head)
            load = pool.submit(engine.cache.load_host, models[0])
            until(lambda: answers)
            assert answers[0] is Room.LATER
            one.release("a")
            assert first.result(10) is Room.GRANTED
            two.release("b")
            assert load.result(30)


def test_a_job_that_is_cancelled_waits_for_no_room(models: list[ModelRef]) -> None:
    with sharing(2**28, shared=False) as container:
        engine, one = container.worker(), container.link()
        one.claim({"a": 2**28}, wait=True, over=lambda: False)
        specs = engine.cache.parts(models[0])
        engine.cache._entered(models[0], specs)
        engine.cache.tiers.lease(models[0].key)
        assert not engine.cache._host.bring(models[0], specs, specs[0], None, lambda: True)


def test_what_a_worker_half_read_when_it_died_is_read_anew_by_who_waits() -> None:
    with sharing(10**6) as container:
        one, two = container.link(), container.link()
        for link in (one, two):
            assert link.claim({"a": 8192}, wait=False, over=lambda: False) is Room.GRANTED
        half, there = one.open("a", 8192)
        assert not there
        os.pwrite(half, b"x" * 4096, 0)
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            waits = pool.submit(two.open, "a", 8192)
            until(lambda: two.waiting)
            one._sock.shutdown(socket.SHUT_RDWR)
            fresh, there = waits.result()
        assert not there
        assert os.pread(fresh, 8192, 0) == bytes(8192)
        assert os.fstat(fresh).st_ino != os.fstat(half).st_ino
        two.read("a", well=True)
        again, there = two.open("a", 8192)
        assert there
        for descriptor in (half, fresh, again):
            os.close(descriptor)


@pytest.mark.slow
def test_files_that_change_while_they_are_read_are_nobodys_part(
    models: list[ModelRef], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = cast_model(tmp_path / "changing", 7)
    real, touched = loader.copied, threading.Event()

    def copied(headers: Any, *rest: Any) -> Any:
        found = real(headers, *rest)
        if not touched.is_set():
            touched.set()
            os.utime(headers[0].path)
        return found

    monkeypatch.setattr(loader, "copied", copied)
    with sharing(2**28) as container:
        engine = container.worker()
        with pytest.raises(ApiError) as raised:
            draw(engine, model)
        assert raised.value.code == "MODEL_BROKEN"
        draw(engine, model, "again")
        assert container.keeper.use().held <= size_of(engine, model)


def test_for_a_gpu_pages_are_registered_and_then_closed_to_writing(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []

    def register(address: int, size: int, flags: int) -> int:
        said.append(f"register {container.mappings()} {flags}")
        return 0

    runtime = SimpleNamespace(
        cudaHostRegister=register, cudaHostUnregister=lambda address: said.append("unregister") or 0
    )
    monkeypatch.setattr(torch.cuda, "cudart", lambda: runtime)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    with sharing(10**6) as container:
        link = container.link()
        link.claim({"a": 8192}, wait=False, over=lambda: False)
        descriptor, _ = link.open("a", 8192)
        os.pwrite(descriptor, b"\x07" * 8192, 0)
        pages = common_host._view(descriptor, 8192, pin=True)
        os.close(descriptor)
        assert said == ["register [['rw-s']] 1"]
        assert container.mappings() == [["r--s"]]
        assert torch.frombuffer(pages, dtype=torch.uint8).eq(7).all()
        del pages
        gc.collect()
        assert said[1:] == ["unregister"] and not container.mappings()


def test_readers_of_one_worker_do_not_hear_of_another(models: list[ModelRef]) -> None:
    """Ends of sockets are one for each worker: a name that only one has claimed cannot be opened by the other."""
    with sharing(10**6) as container:
        one, two = container.link(), container.link()
        one.claim({"a": 8192}, wait=False, over=lambda: False)
        with pytest.raises(MemoryError):
            two.open("a", 8192)


def test_without_such_memory_each_worker_has_a_part_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> int:
        raise OSError(38, "Function not implemented")

    settings = Settings.from_env({"MAX_CONCURRENCY": "1"})
    assert Dispatcher(settings, ("cpu", "cpu")).keeper is not None
    monkeypatch.setattr(os, "memfd_create", refuse)
    assert Dispatcher(settings, ("cpu", "cpu")).keeper is None
    assert command("cpu", 7, 2)[-2:] == ["--workers", "2"]


def test_one_worker_shares_with_nobody() -> None:
    assert Dispatcher(Settings.from_env({}), ("cpu",)).keeper is None
