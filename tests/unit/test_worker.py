"""The worker's inside, with stand-ins for the engine and the socket."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch

from api.engine.budgets import Budgets
from api.engine.device import Device
from api.engine.executor import Executor
from api.engine.generate import Engine, Generated
from api.engine.refusals import is_of_inputs
from api.engine.tally import Tally
from api.errors import ApiError
from api.schema.generation import GenerationRequest, ModelRef
from api.schema.messages import Answer, Computed, Done, Due, Failed, FromWorker, Held, Load, Memory, Unload
from api.worker.worker import Worker
from tests.unit.test_cache import FakeLoader
from tests.unit.test_cache import ref as a_ref

REF = ModelRef("m", "r", "fp32", "/m")


def a_request(side: int = 8) -> GenerationRequest:
    meta = {"modelInputs": {}, "SCHEDULER": "S", "MODEL_ID": "m", "MODEL_REVISION": "r"}
    return GenerationRequest(
        id="1", request_id="1", model=REF, pipeline="P", scheduler="S", inputs={"side": side}, pictures={}, seed=1,
        images=1, image_format="PNG", image_quality=95, attention="sdpa", safety_checker=True, meta=meta,
    )  # fmt: skip


class FakeLink:
    """Remembers what is sent."""

    def __init__(self) -> None:
        self.sent: list[FromWorker] = []

    def send(self, message: FromWorker) -> None:
        self.sent.append(message)

    def is_cancelled(self, job_id: str) -> bool:
        return False

    def due(self, job_id: str) -> Due:
        return Due(job_id, math.inf, math.inf)

    def forget(self, job_id: str) -> None: ...

    def of(self, kind: type) -> list[Any]:
        return [message for message in self.sent if isinstance(message, kind)]


class FakeEngine:
    """Generates black images, or does what a test says."""

    def __init__(self) -> None:
        self.device = self.cache = self.tiers = self
        self.version = 0
        self.executor = Executor()
        self.generating: Callable[[], None] = lambda: None
        self.loading: Callable[[], None] = lambda: None
        self.measuring: Callable[[], None] = lambda: None
        self.tally = Tally()

    def allocations(self) -> None: ...

    def generate(self, request: GenerationRequest, **_: Any) -> Generated:
        self.generating()
        side = request.inputs["side"]
        return Generated(np.zeros((1, side, side, 3), np.uint8), {}, {}, None)

    def load(self, ref: ModelRef, tier: str, **_: Any) -> None:
        self.loading()

    def held(self) -> dict[str, Held]:
        return {}

    def memory(self) -> Memory:
        return Memory(0, 0, 0, 0, 0)

    def mem_usage(self) -> float:
        self.measuring()
        return 0.0


class Inside:
    """A worker, its engine, what it sent, and the exit status with which it ended."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.link, self.engine = FakeLink(), FakeEngine()
        self.exits: list[int] = []
        monkeypatch.setattr("os._exit", self._exit)
        self.worker = Worker(self.link, self.engine, 2, 1)  # type: ignore[arg-type]

    def _exit(self, status: int) -> None:
        self.exits.append(status)
        raise SystemExit(status)

    def run(self, side: int = 8) -> None:
        try:
            self.worker._generate(a_request(side), False)
        except SystemExit:
            assert self.exits


@pytest.fixture
def inside(monkeypatch: pytest.MonkeyPatch) -> Inside:
    return Inside(monkeypatch)


def raises(fault: BaseException) -> Callable[[], None]:
    def call() -> None:
        raise fault

    return call


def until(condition: Callable[[], Any], seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize("side", [8, 512])
def test_a_fault_while_images_are_handed_over_ends_the_job(inside: Inside, side: int) -> None:
    inside.engine.measuring = raises(RuntimeError("no"))
    inside.run(side)
    (failed,) = inside.link.of(Failed)
    assert failed.code == "INTERNAL_ERROR"
    assert not inside.link.of(Computed)
    inside.engine.measuring = lambda: None
    inside.run(side)
    until(lambda: inside.link.of(Done))


def test_an_encoder_that_cannot_be_started_ends_the_job(inside: Inside, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inside.worker._encoders, "submit", lambda *_: raises(RuntimeError("can't start new thread"))())
    inside.run(512)
    assert [failed.code for failed in inside.link.of(Failed)] == ["INTERNAL_ERROR"]


def chained(outer: Exception, inner: Exception) -> Exception:
    outer.__cause__ = inner
    return outer


LOST = [
    RuntimeError("CUDA error: device-side assert triggered"),
    RuntimeError("cuDNN error: CUDNN_STATUS_EXECUTION_FAILED"),
    RuntimeError("CUDA driver error: unspecified launch failure"),
    torch.AcceleratorError("an illegal memory access was encountered"),
    chained(ApiError("MODEL_BROKEN", "cannot be loaded"), RuntimeError("CUDA error: unknown error")),
]
KEPT = [
    RuntimeError("shapes cannot be multiplied"),
    RuntimeError("CUDA error: out of memory"),
    RuntimeError("cuDNN error: CUDNN_STATUS_NOT_SUPPORTED"),
    torch.OutOfMemoryError("CUDA out of memory"),
    ApiError("PIPELINE_ERROR", "no"),
]


@pytest.mark.parametrize(("fault", "ends"), [*((f, True) for f in LOST), *((f, False) for f in KEPT)], ids=repr)
@pytest.mark.parametrize("where", ["generating", "loading", "measuring"])
def test_a_worker_whose_device_is_lost_ends_wherever_that_is_seen(
    inside: Inside, where: str, fault: Exception, ends: bool
) -> None:
    setattr(inside.engine, where, raises(fault))
    try:
        inside.worker.warm(Load(REF)) if where == "loading" else inside.run()
    except SystemExit:
        assert ends
    assert inside.exits == ([70] if ends else [])
    if not ends and where != "loading":
        assert inside.link.of(Failed)


@pytest.mark.parametrize("fault", LOST, ids=repr)
def test_rare_inputs_are_not_blamed_for_a_lost_device(fault: Exception) -> None:
    assert not is_of_inputs(fault, {"clip_skip": 1})
    assert is_of_inputs(RuntimeError("shapes"), {"clip_skip": 1})


@pytest.mark.parametrize(
    "call",
    [
        lambda: torch.ones(2, 3) @ torch.ones(4, 5),
        lambda: torch.ones(2, 3) + torch.ones(2, 4),
        lambda: torch.cat([torch.ones(2, 3), torch.ones(3, 4)]),
        lambda: torch.nn.Conv2d(4, 4, 1)(torch.ones(1, 9, 8, 8)),
        lambda: torch.ones(6).view(4, 2),
    ],
)
def test_sizes_that_do_not_go_together_are_of_the_request(call: Callable[[], Any]) -> None:
    with pytest.raises(RuntimeError) as caught:
        call()
    assert is_of_inputs(caught.value, {})
    assert not is_of_inputs(RuntimeError("something else"), {})


class Loading:
    """A worker over a real engine, and the answers that it gave, by id."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("os._exit", lambda status: None)
        self.link, self.loader = FakeLink(), FakeLoader()
        self.engine = Engine(Device("cpu"), Budgets(100, 100, shared=True), self.loader)
        self.worker = Worker(self.link, self.engine, 2, 1)  # type: ignore[arg-type]

    def answer(self, id: str) -> str:
        until(lambda: any(answer.id == id for answer in self.link.of(Answer)))
        return next(answer.code for answer in self.link.of(Answer) if answer.id == id)


@pytest.fixture
def loading(monkeypatch: pytest.MonkeyPatch) -> Iterator[Loading]:
    it = Loading(monkeypatch)
    yield it
    it.engine.close()


@pytest.mark.parametrize(("tier", "evict"), [("device", True), ("device", False), ("host", True)])
@pytest.mark.parametrize("part", ["unet-a", "vae"])
def test_an_unload_overtakes_the_loads_that_were_asked_for_before(
    loading: Loading, tier: str, evict: bool, part: str
) -> None:
    """What is being loaded, and what waits for that; not what is asked for later."""
    gate = loading.loader.gates[part] = threading.Event()
    for model in "ab":
        loading.worker._load(Load(a_ref(model), f"load {model}", tier, True, evict))
    until(lambda: loading.loader.reads[part])
    for model in "ab":
        loading.worker._unload(Unload(a_ref(model).key, f"unload {model}"))
        assert loading.answer(f"unload {model}") == ""
    gate.set()
    assert [loading.answer(f"load {model}") for model in "ab"] == ["CANCELLED"] * 2
    until(lambda: not loading.engine.cache.held())
    assert not loading.loader.reads["unet-b"]
    loading.worker._load(Load(a_ref("a"), "again", tier, True, evict))
    assert loading.answer("again") == ""
    (held,) = loading.engine.cache.held().values()
    assert (held.tier, held.pin) == (tier, tier)


def test_who_is_sent_to_the_hosts_memory_may_be_on_its_way_there(loading: Loading) -> None:
    gate = loading.loader.gates["vae"] = threading.Event()
    loading.worker._load(Load(a_ref("a"), "load", "host", True))
    until(lambda: loading.loader.reads["vae"])
    loading.worker._unload(Unload(a_ref("a").key, "unload", "host"))
    gate.set()
    assert loading.answer("load") == ""
