"""The cache where memory is short: what is given up is free, nobody waits for ever, and nothing is read in vain."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from api.engine.parts import HostPart, PartSpec
from tests.unit.test_cache import FakeLoader, Setup, ref

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
        it = Setup(*args, **kwargs)
        it.loader = it.cache.loader = TableLoader(table)
        made.append(it)
        return it

    yield build
    for each in made:
        each.close()


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
