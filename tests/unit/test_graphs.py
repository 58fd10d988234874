"""Recorded calls: what they give, when they are made, when they are forgotten. With a recorder that calls again."""

from __future__ import annotations

import concurrent.futures
import contextlib
import gc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from api.engine.budgets import Budgets
from api.engine.compiled.graphs import CudaBackend, Graphs, numbered
from api.engine.device import Device
from api.engine.generate import Engine
from api.schema.generation import GenerationRequest, ModelRef
from tests.tiny import save_tiny

GIB = 2**30


class Again:
    """What a graph does, as far as a CPU can: the same function over the same inputs, into the same outputs."""

    def __init__(self, function: Callable[[], Any], size: int) -> None:
        self.function, self.bytes, self.output = function, size, function()

    def replay(self) -> None:
        for old, new in zip(flat(self.output), flat(self.function()), strict=True):
            old.copy_(new)


def flat(value: Any) -> list[torch.Tensor]:
    return [value] if isinstance(value, torch.Tensor) else [each for item in value for each in flat(item)]


class Recorder:
    def __init__(self, size: int = 1000) -> None:
        self.size, self.fails = size, False

    def record(self, function: Callable[[], Any]) -> Again:
        if self.fails:
            raise RuntimeError("it waits for the device")
        return Again(function, self.size)


class Double(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([2.0]), requires_grad=False)

    def forward(self, sample: torch.Tensor, timestep: Any) -> tuple[torch.Tensor]:
        return (sample * self.weight + torch.as_tensor(timestep).reshape(-1, 1),)


class Caller:
    """Calls a module as ``Runs`` does."""

    def __init__(self, graphs: Graphs, module: nn.Module) -> None:
        self.graphs, self.module = graphs, module
        self.eager = 0

    def __call__(self, sample: torch.Tensor, step: float, seconds: float = 0.01, calm: bool = True) -> torch.Tensor:
        arguments = {"sample": sample, "timestep": step}

        def as_it_is() -> Any:
            self.eager += 1
            return self.module(**arguments)

        call = self.graphs.plan(self.module.forward, arguments, ("kind",), as_it_is, seconds, calm)
        return (call or as_it_is)()[0]  # type: ignore[no-any-return]


@pytest.fixture
def graphs() -> Graphs:
    return Graphs(Recorder(), torch.device("cpu"), limit=5000)


@pytest.fixture
def caller(graphs: Graphs) -> Caller:
    module = Double()
    graphs.allow(module)
    return Caller(graphs, module)


def warm(caller: Caller, rows: int = 2) -> None:
    for _ in range(4):
        caller(torch.ones(rows, 1), 1)


def test_a_kind_is_recorded_when_it_was_seen_and_gives_what_its_inputs_say(graphs: Graphs, caller: Caller) -> None:
    results = [caller(torch.full((2, 1), float(i)), i) for i in range(7)]
    assert [float(result[0]) for result in results] == [3.0 * i for i in range(7)]  # none was written over by a later
    assert (graphs.recorded, graphs.replayed, caller.eager) == (1, 4, 3)
    caller(torch.ones(3, 1), 1)
    assert caller.eager == 4  # another number of rows is another kind
    assert graphs.bytes >= 1000


def test_strides_are_part_of_the_kind(graphs: Graphs, caller: Caller) -> None:
    for _ in range(5):
        caller(torch.ones(2, 3), 1)
    eager = caller.eager
    assert torch.equal(caller(torch.arange(6.0).reshape(3, 2).T, 1), torch.arange(6.0).reshape(3, 2).T * 2 + 1)
    assert caller.eager == eager + 1


def test_what_is_not_allowed_long_or_beside_others_is_not_recorded(graphs: Graphs, caller: Caller) -> None:
    for _ in range(6):
        caller(torch.ones(2, 1), 1, seconds=0.5)
    for _ in range(6):
        caller(torch.ones(2, 1), 1, calm=False)
    other = Caller(graphs, Double())
    warm(other)
    warm(other)
    assert graphs.recorded == 0


def test_other_weights_at_the_same_addresses_and_at_others(graphs: Graphs, caller: Caller) -> None:
    warm(caller)
    caller.module.weight.copy_(torch.tensor([5.0]))  # type: ignore[operator,union-attr]
    graphs.moved()
    assert float(caller(torch.ones(2, 1), 1)[0]) == 6.0
    assert graphs.recorded == 1
    assert caller.eager == 3  # it is still good
    caller.module.weight.data = torch.tensor([7.0])
    graphs.moved()
    assert float(caller(torch.ones(2, 1), 1)[0]) == 8.0
    assert caller.eager == 4  # it was forgotten
    assert graphs.bytes == 0


def test_graphs_leave_with_their_module(graphs: Graphs, caller: Caller) -> None:
    warm(caller)
    graphs.moved()
    for graph in graphs._graphs.values():
        graph.recorded.function = None  # type: ignore[attr-defined]  # which a real one does not hold
    caller.module = Double()
    gc.collect()
    graphs.allow(caller.module)
    warm(caller)
    assert len(graphs._graphs) == 1


def test_they_are_bounded_and_the_one_used_last_stays(graphs: Graphs, caller: Caller) -> None:
    for rows in (1, 2, 3, 4):
        warm(caller, rows)
    caller(torch.ones(1, 1), 1)
    warm(caller, 5)  # 5000 bytes with their inputs are exceeded
    before = caller.eager
    caller(torch.ones(1, 1), 1)
    assert caller.eager == before
    caller(torch.ones(2, 1), 1)
    assert caller.eager == before + 1
    assert graphs.bytes <= 5000
    assert graphs.clear()
    assert graphs.bytes == 0


def test_what_takes_too_much_or_cannot_be_recorded_runs_as_it_is(graphs: Graphs, caller: Caller) -> None:
    for fault in ("size", "fails"):
        setattr(graphs._backend, fault, 10_000)
        warm(caller, 2 if fault == "size" else 3)
        warm(caller, 2 if fault == "size" else 3)
    assert caller.eager == 16
    assert graphs.recorded == 0
    assert graphs.bytes == 0


def test_a_module_that_cannot_be_recorded_is_not_tried_with_every_shape(graphs: Graphs, caller: Caller) -> None:
    graphs._backend.fails = True  # type: ignore[attr-defined]
    warm(caller, 2)
    graphs._backend.fails = False  # type: ignore[attr-defined]
    warm(caller, 3)
    assert graphs.recorded == 0


def test_a_recording_that_fails_leaves_the_thread_on_its_own_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    class Stream:
        def wait_stream(self, other: Any) -> None: ...

    class Graph(contextlib.AbstractContextManager[None]):
        """As torch's: where the end of a recording fails, the stream is not given back."""

        def __enter__(self) -> None:
            current[0] = side

        def __exit__(self, *_: object) -> None:
            raise RuntimeError("operation failed due to a previous error during capture")

    usual, side = Stream(), Stream()
    current = [usual]
    fakes = {
        "Stream": lambda device: side, "current_stream": lambda device: current[0], "CUDAGraph": object,
        "set_stream": lambda stream: current.__setitem__(0, stream), "graph": lambda *_, **__: Graph(),
        "stream": lambda stream: contextlib.nullcontext(), "synchronize": lambda device: None,
        "memory_reserved": lambda device: 0, "graph_pool_handle": lambda: (0, 1),
    }  # fmt: skip
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    with pytest.raises(RuntimeError):
        CudaBackend(torch.device("cpu")).record(lambda: torch.ones(1))
    assert current == [usual]


def test_a_timestep_that_is_a_number_is_an_input() -> None:
    made = numbered({"timestep": 3, "sample": torch.ones(1), "return_dict": False})
    assert made["timestep"].dtype == torch.int64
    assert made["return_dict"] is False


# --- in an engine ---


def a_request(model: ModelRef, seed: int, side: int = 64, scheduler: str = "DDIMScheduler", **more: Any) -> Any:
    inputs = {"prompt": f"a circle {seed}", "num_inference_steps": 5, "width": side, "height": side}
    return GenerationRequest(
        id=str(seed), request_id=str(seed), model=model, pipeline="StableDiffusionPipeline", scheduler=scheduler,
        inputs=inputs, pictures={}, seed=seed, images=1, image_format="PNG", image_quality=95, attention="sdpa",
        safety_checker=False, meta={}, **more,
    )  # fmt: skip


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[ModelRef]:
    folders = [tmp_path_factory.mktemp(f"tiny{seed}") for seed in range(2)]
    for seed, folder in enumerate(folders):
        save_tiny(folder, seed)
    return [ModelRef(folder.name, "main", "fp32", str(folder)) for folder in folders]


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[Engine]:
    made = Engine(Device("cpu"), Budgets(GIB, GIB, True), compiled="graphs", recorder=Recorder())
    yield made
    made.close()


def test_images_are_the_same_to_the_bit_also_after_a_switch(engine: Engine, models: list[ModelRef]) -> None:
    plain = Engine(Device("cpu"), Budgets(GIB, GIB, True))
    try:
        for model in (models[0], models[1], models[0]):
            for seed in (1, 2):
                one, other = (each.generate(a_request(model, seed)) for each in (plain, engine))
                assert np.array_equal(one.images, other.images)
                assert one.meta["numerics"] == other.meta["numerics"]
    finally:
        plain.close()
    assert engine.graphs is not None
    assert engine.graphs.replayed > 10


@pytest.mark.slow
def test_jobs_of_several_sizes_share_the_device(engine: Engine, models: list[ModelRef]) -> None:
    schedulers = ("DDIMScheduler", "EulerDiscreteScheduler")  # whose timesteps are whole numbers, and others
    requests = [a_request(models[0], i, 64 if i % 3 else 32, schedulers[i % 2]) for i in range(8)]
    plain = Engine(Device("cpu"), Budgets(GIB, GIB, True))
    alone = [plain.generate(request).images for request in requests]
    plain.close()
    for _ in range(3):
        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            together = list(pool.map(lambda request: engine.generate(request).images, requests))
        for one, other in zip(alone, together, strict=True):
            assert np.abs(one.astype(int) - other.astype(int)).max() <= 1
    assert engine.graphs is not None
    assert engine.graphs.replayed > 0


def test_a_request_may_ask_for_none(engine: Engine, models: list[ModelRef]) -> None:
    engine.generate(a_request(models[0], 1, compile=False))
    engine.generate(a_request(models[0], 2, compile=False))
    assert engine.graphs is not None
    assert engine.graphs.recorded == 0
    engine.generate(a_request(models[0], 2))
    replayed = engine.graphs.replayed
    assert replayed > 0
    engine.generate(a_request(models[0], 2, compile=False))  # nor those that others had recorded
    assert engine.graphs.replayed == replayed
