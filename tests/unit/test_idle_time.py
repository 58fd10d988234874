"""With models read ahead, the device hardly waits between the jobs of different models."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Sequence

import pytest

from api.engine.parts import HostPart, PartSpec
from api.engine.staging import Stager
from tests.unit.test_cache import FakeLoader, Setup, ref

READING = 0.15
"""Seconds for one part, of which each model has one of its own."""
CALL = 0.06
CALLS = 6


class SlowLoader(FakeLoader):
    def read(self, spec: PartSpec) -> HostPart:
        time.sleep(READING)
        return super().read(spec)


def idle_seconds(names: Sequence[str], *, ahead: bool) -> float:
    """Run jobs one after the other, the next one waiting meanwhile; the time between their device calls."""
    it = Setup(16, 27, loader=SlowLoader())  # one model on the device, two in the host's memory
    if not ahead:
        it.stager.close()
        it.stager = Stager(it.cache, lambda: [])
        it.line.on_change = it.stager.poke
    began, ended = dict[int, float](), dict[int, float]()
    running = [threading.Event() for _ in names]

    def job(number: int) -> None:
        with it.line.lease(ref(names[number]), lambda: False):
            began[number] = time.perf_counter()
            running[number].set()
            for _ in range(CALLS):
                it.executor.on_device(lambda: time.sleep(CALL))
            ended[number] = time.perf_counter()

    threads = []
    try:
        for number in range(len(names)):
            threads.append(threading.Thread(target=job, args=(number,)))
            threads[-1].start()
            running[max(0, number - 1)].wait(30)
            running[max(0, number - 1)].wait(30)
        for thread in threads:
            thread.join(30)
    finally:
        it.close()
    assert it.loader.reads["unet-a"] > 1, "everything fitted: nothing had to be read again"
    order = sorted(began, key=began.__getitem__)
    return sum(began[later] - ended[earlier] for earlier, later in itertools.pairwise(order))


@pytest.mark.slow
def test_reading_ahead_takes_the_waiting_away() -> None:
    names = "abcabcabc"
    without = idle_seconds(names, ahead=False)
    with_it = min(idle_seconds(names, ahead=True) for _ in range(3))  # threads that wait for a core look idle
    print(f"idle between jobs: {without:.3f} s without reading ahead, {with_it:.3f} s with it: {with_it / without:.3f}")
    assert with_it <= without / 10
