"""What an engine counts: calls and their batches, loads by where they came from, what left, and lacks of memory."""

from __future__ import annotations

from typing import Any

import torch

from api.engine.cache import ModelCache
from api.engine.calls import Ticket
from api.engine.executor import Executor
from api.engine.line import Line
from api.engine.tally import Tally
from api.engine.tiers import Tiers
from tests.unit.test_cache import FakeLoader, ref
from tests.unit.test_executor import Recorder, run_job, together

FORWARD = "Recorder.forward"


def test_calls_are_counted_with_the_jobs_and_rows_that_shared_them() -> None:
    tally, module = Tally(), Recorder(0.01)
    executor = Executor(tally=tally)
    jobs = [lambda n=n: run_job(executor, module, [float(n)] * 12) for n in range(6)]  # type: ignore[misc]
    together(*jobs)
    executor.close()
    (calls,) = tally.counts().calls.values()
    assert list(tally.counts().calls) == [FORWARD]
    assert sum(calls.jobs.counts) == sum(calls.seconds.counts) == executor.runs == len(module.rows) < 72
    assert calls.jobs.sum == calls.rows == 72
    assert calls.jobs.counts[0] == module.rows.count(1)
    assert calls.seconds.sum >= 0.01 * len(module.rows)


def test_calls_that_do_not_fit_are_counted_as_lacks_of_memory() -> None:
    tally, module = Tally(), Recorder()
    executor = Executor(tally=tally)
    module.most = 2
    with executor.job(Ticket()) as ticket:
        executor.run(ticket, module.forward, (torch.zeros(4, 1),), {})
    executor.close()
    counts = tally.counts()
    assert counts.shortages == {"halves": 1}
    assert counts.calls[FORWARD].rows == 4
    assert sum(counts.calls[FORWARD].jobs.counts) == 2  # what failed was no call


class Kept:
    """A cache of fake models of 15 bytes, of which two parts of 10 and the one of 5 that they share fit on the device."""

    def __init__(self, device: int, host: int) -> None:
        self.tally, self.executor = Tally(), Executor()
        run, alone = self.executor.on_device, self.executor.exclusively
        tiers = Tiers(device, host, shared=False)
        self.loader = FakeLoader()
        self.cache = ModelCache(tiers, self.loader, run, alone, lambda: None, self.tally)
        self.line = Line(self.cache, 10.0)

    def use(self, *names: str) -> Any:
        for name in names:
            with self.line.lease(ref(name), lambda: False):
                pass
        return self.tally.counts()


def test_loads_are_counted_by_where_the_model_came_from() -> None:
    it = Kept(device=15, host=100)
    counts = it.use("a", "a", "b", "a")
    it.executor.close()
    assert {source: sum(spread.counts) for source, spread in counts.loads.items()} == {"disk": 2, "host": 1}
    assert counts.moved_bytes == {"read": 25, "copy": 35}  # the shared part is read and copied once
    assert counts.evictions == {"device": 2}


def test_what_leaves_the_hosts_memory_is_counted() -> None:
    it = Kept(device=100, host=100)
    it.use("a")
    it.cache.unload(ref("a").key)
    it.executor.close()
    assert it.tally.counts().evictions == {"device": 2, "host": 2}


def test_a_model_that_is_loaded_once_more_is_a_lack_of_memory() -> None:
    it = Kept(device=100, host=100)
    it.loader.faults["place unet-a"] = torch.OutOfMemoryError("no")
    counts = it.use("a")
    it.executor.close()
    assert counts.shortages == {"reload": 1}
    assert [sum(spread.counts) for spread in counts.loads.values()] == [1]  # the one that came
