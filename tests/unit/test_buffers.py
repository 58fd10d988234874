"""The memory that models leave is used by the next, never counts beyond the budget, and is given back when asked."""

from __future__ import annotations

import gc
from pathlib import Path

import pytest
import torch

from api.engine import buffers
from api.engine.budgets import Budgets
from api.engine.device import Device
from api.engine.generate import Engine
from api.engine.loader import PartLoader
from api.schema.generation import ModelRef
from tests.tiny import save_tiny


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[ModelRef]:
    """Files that have to be cast, so that they are copied into buffers."""
    found = []
    for seed in range(3):
        folder: Path = tmp_path_factory.mktemp(f"tiny-{seed}")
        save_tiny(folder, seed)
        found.append(ModelRef(f"tiny/{seed}", "main", "fp16", str(folder)))
    return found


class HalfDevice(Device):
    """Computes in fp16, so that files in fp32 are cast; nothing is run on it."""

    def dtype(self, precision: str) -> torch.dtype:
        return torch.float16


def test_a_switch_reads_into_the_memory_of_the_model_that_left(
    models: list[ModelRef], monkeypatch: pytest.MonkeyPatch
) -> None:
    device = HalfDevice("cpu")
    size = sum(spec.bytes for spec in PartLoader(device).parts(models[0]))
    books, pages = int(size * 2.1), 3 * size  # two models, and what they take in whole pages
    fresh: list[int] = []
    of = buffers.Pages.of
    monkeypatch.setattr(buffers.Pages, "of", lambda size, pin: fresh.append(size) or of(size, pin))
    engine = Engine(device, Budgets(books, books, shared=True), PartLoader(device, pages))
    spare = engine.cache.loader._spare  # type: ignore[attr-defined]
    try:
        for number in range(12):
            engine.load(models[number % 3])
            gc.collect()
            assert engine.cache.memory().host + spare.bytes <= pages
            if number == 2:
                fresh.clear()
        assert not fresh, "nine switches took new memory"
        for ref in models:
            engine.cache.unload(ref.key)
        gc.collect()
        assert engine.cache.memory().host == spare.bytes == 0
    finally:
        engine.close()


def test_what_is_kept_yields_to_what_comes() -> None:
    spare = buffers.Spare(10 * 2**20)
    first = buffers.buffer(8 * 2**20, pin=False, spare=spare)
    del first
    assert spare.bytes == 8 * 2**20
    second = buffers.buffer(3 * 2**20, pin=False, spare=spare)
    assert spare.bytes == 0
    del second
    assert spare.bytes == 3 * 2**20

    class Part:
        pass

    mapped = Part()
    spare.count(mapped, 8 * 2**20)
    assert spare.bytes == 0
    del mapped
    third = buffers.buffer(9 * 2**20, pin=False, spare=spare)
    del third
    assert spare.bytes == 9 * 2**20
    spare.clear()
    assert spare.bytes == 0


def test_pinned_memory_is_freed_after_the_copies_from_it(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []

    class Runtime:
        def cudaHostRegister(self, address: int, size: int, flags: int) -> int:
            told.append("register")
            return 0

        def cudaHostUnregister(self, address: int) -> None:
            told.append("unregister")

    monkeypatch.setattr(torch.cuda, "cudart", Runtime)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: told.append("synchronize"))
    spare = buffers.Spare(2**20)
    held = buffers.buffer(4096, pin=True, spare=spare)
    del held
    assert told == ["register"]
    spare.clear()
    assert told == ["register", "synchronize", "unregister"]
