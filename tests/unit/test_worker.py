"""The worker's inside, with stand-ins for the engine and the socket."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from api.engine.executor import Executor
from api.engine.generate import Generated
from api.schema.generation import GenerationRequest, ModelRef
from api.schema.messages import Computed, Done, Failed, FromWorker
from api.worker import worker as workers
from api.worker.worker import Worker

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

    def forget(self, job_id: str) -> None: ...

    def of(self, kind: type) -> list[Any]:
        return [message for message in self.sent if isinstance(message, kind)]


class FakeEngine:
    """Generates black images, or does what a test says."""

    def __init__(self) -> None:
        self.device = self.cache = self
        self.executor = Executor()
        self.generating: Callable[[], None] = lambda: None
        self.loading: Callable[[], None] = lambda: None
        self.measuring: Callable[[], None] = lambda: None

    def generate(self, request: GenerationRequest, **_: Any) -> Generated:
        self.generating()
        side = request.inputs["side"]
        return Generated(np.zeros((1, side, side, 3), np.uint8), {}, {}, None)

    def load(self, ref: ModelRef) -> None:
        self.loading()

    def sizes(self) -> dict[str, int]:
        return {}

    def mem_usage(self) -> float:
        self.measuring()
        return 0.0


class Inside:
    """A worker, its engine, what it sent, and the exit status with which it ended."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.link, self.engine = FakeLink(), FakeEngine()
        self.exits: list[int] = []
        monkeypatch.setattr(workers.os, "_exit", self._exit)
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
