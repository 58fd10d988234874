"""What counts as progress of a worker, and what as a hang."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn

from api.engine.calls import Cancelled, Ticket
from api.engine.executor import Executor
from api.schema.generation import ModelRef
from api.schema.messages import Alive, Load
from api.worker import worker as workers
from api.worker.pulse import Pulse
from tests.unit.test_worker import FakeEngine, FakeLink, a_request


class Module(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate: threading.Event | None = None

    def forward(self, sample: torch.Tensor) -> torch.Tensor:
        if self.gate:
            self.gate.wait(30)
        time.sleep(0.01)
        return sample


class Scene:
    """An executor with jobs that a test plays, and its pulse."""

    def __init__(self) -> None:
        self.executor = Executor()
        self.pulse = Pulse(self.executor)
        self.over = threading.Event()
        self._threads: list[threading.Thread] = []

    def thread(self, work: Callable[[], Any]) -> None:
        def run() -> None:
            with self.pulse.working():
                work()

        self._threads.append(threading.Thread(target=run, daemon=True))
        self._threads[-1].start()

    def job(self, calls: int | None, then: threading.Event | None = None, module: Module | None = None) -> None:
        """One that makes so many calls, or goes on until the end, and then waits in its own thread."""
        module, made = module or Module(), 0
        with contextlib.suppress(Cancelled), self.executor.job(Ticket(self.over.is_set)) as ticket:
            while calls is None or made < calls:
                self.executor.run(ticket, module.forward, (torch.zeros(1, 1),), {})
                made += 1
            if then:
                then.wait(30)

    def end(self) -> None:
        self.over.set()
        self.executor.wake()
        for thread in self._threads:
            thread.join(30)
        self.executor.close()

    def reaches(self, seconds: float) -> None:
        deadline = time.monotonic() + 20
        while self.pulse.stalled() < seconds:
            assert time.monotonic() < deadline, "the hang is not seen"
            time.sleep(0.02)

    def stays_below(self, seconds: float) -> None:
        """Comes back below it again and again, long after a clock that stands still would be beyond."""
        for _ in range(5):
            time.sleep(seconds)
            deadline = time.monotonic() + 20
            while self.pulse.stalled() >= seconds:
                assert time.monotonic() < deadline, "progress is not seen"
                time.sleep(0.005)


@pytest.fixture
def scene() -> Iterator[Scene]:
    made = Scene()
    yield made
    made.end()


def test_a_job_that_hangs_between_two_calls_is_seen_though_others_go_on(scene: Scene) -> None:
    scene.thread(lambda: scene.job(None))
    scene.stays_below(0.3)
    scene.thread(lambda: scene.job(1, then=scene.over))
    scene.reaches(0.6)


def test_a_job_that_hangs_before_its_first_call_is_seen_once_it_keeps_the_others(scene: Scene) -> None:
    scene.thread(lambda: scene.job(0, then=scene.over))
    scene.thread(lambda: scene.executor.exclusively(lambda: None))
    scene.thread(lambda: scene.job(1))
    assert scene.executor.since is None
    scene.reaches(0.6)


def test_a_call_that_hangs_is_seen_while_jobs_wait_behind_it(scene: Scene) -> None:
    module = Module()
    module.gate = scene.over
    scene.thread(lambda: scene.job(1, module=module))
    scene.thread(lambda: scene.job(None))
    scene.reaches(0.6)


def test_waiting_for_others_that_go_on_is_no_hang(scene: Scene) -> None:
    scene.thread(lambda: scene.job(None))
    scene.thread(lambda: scene.over.wait(30))  # such as for room, for a turn
    scene.stays_below(0.3)


def test_nothing_to_do_is_no_hang(scene: Scene) -> None:
    time.sleep(0.3)
    assert scene.pulse.stalled() == 0.0
    scene.thread(lambda: scene.job(3))
    time.sleep(0.3)
    assert scene.pulse.stalled() == 0.0


@pytest.mark.parametrize("what", ["load", "encode"])
def test_a_worker_tells_of_a_load_that_hangs_and_not_of_images_that_take_long(
    monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    monkeypatch.setattr(workers, "_ALIVE", 0.05)
    over = threading.Event()
    link, engine = FakeLink(), FakeEngine()
    engine.loading = lambda: over.wait(30)  # type: ignore[assignment, return-value]
    monkeypatch.setattr(workers, "encode", lambda *_: over.wait(30) and b"")
    worker = workers.Worker(link, engine, 2, 1)  # type: ignore[arg-type]
    worker.tell_alive()
    if what == "load":
        thread = threading.Thread(target=worker.warm, args=(Load(ModelRef("m", "r", "fp32", "/m")),))
    else:
        thread = threading.Thread(target=worker._run, args=(a_request(512), False))
    thread.start()
    deadline = time.monotonic() + 20
    if what == "load":
        while link.of(Alive)[-1].stalled < 0.5:
            assert time.monotonic() < deadline
            time.sleep(0.02)
    else:
        thread.join(20)
        before = len(link.of(Alive))
        while len(link.of(Alive)) < before + 10:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        assert link.of(Alive)[-1].stalled == 0.0
    over.set()
    thread.join(20)
