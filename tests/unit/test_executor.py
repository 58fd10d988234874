"""The device's one thread: what is merged, in which order, and what happens when a call fails."""

from __future__ import annotations

import concurrent.futures
import functools
import gc
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn

from api.engine import calls
from api.engine.calls import Cancelled, Ticket
from api.engine.curve import Curve
from api.engine.executor import Executor


class Recorder(nn.Module):
    """Remembers the rows of each call, and the thread that made it."""

    def __init__(self, seconds: float = 0.0) -> None:
        super().__init__()
        self.rows: list[int] = []
        self.threads: set[str] = set()
        self.seconds = seconds
        self.most = 10**9
        self.gate: threading.Event | None = None

    def forward(self, sample: torch.Tensor, timestep: Any = 0, flag: bool = False) -> torch.Tensor:
        if sample.shape[0] > self.most:
            raise torch.OutOfMemoryError
        if bool((sample == -1).any()):
            raise ValueError("minus one")
        self.rows.append(sample.shape[0])
        self.threads.add(threading.current_thread().name)
        if self.gate:
            self.gate.wait(5)
        time.sleep(self.seconds)
        steps = torch.as_tensor(timestep).reshape(-1, 1)
        return sample * 2 + steps


@pytest.fixture
def executor() -> Iterator[Executor]:
    running = Executor()
    yield running
    running.close()


def run_job(executor: Executor, module: Recorder, values: list[float], ticket: Ticket | None = None) -> list[float]:
    """One job that makes a call for each value, in a thread of its own."""
    out = []
    with executor.job(ticket or Ticket()) as held:
        for value in values:
            result = executor.run(held, module.forward, (torch.full((1, 1), value),), {"timestep": 0})
            out.append(float(result))
    return out


def together(*jobs: Callable[[], Any]) -> list[Any]:
    with concurrent.futures.ThreadPoolExecutor(len(jobs)) as pool:
        return [future.result(20) for future in [pool.submit(job) for job in jobs]]


def test_jobs_share_calls_and_each_gets_its_own_rows(executor: Executor) -> None:
    module = Recorder(0.01)
    jobs = [lambda n=n: run_job(executor, module, [n + k / 10 for k in range(12)]) for n in range(6)]  # type: ignore[misc]
    results = together(*jobs)
    for n, result in enumerate(results):
        assert result == pytest.approx([2 * (n + k / 10) for k in range(12)])
    assert executor.calls == 72
    assert executor.runs == len(module.rows) <= 36  # at least two at a time on average
    assert sum(module.rows) == 72
    assert module.threads == {"device"}


def test_one_job_alone_never_waits(executor: Executor, monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float | None] = []
    choose = executor._choose

    def noted(now: float) -> Any:
        batch, wait = choose(now)
        waits.append(wait)
        return batch, wait

    monkeypatch.setattr(executor, "_choose", noted)
    run_job(executor, Recorder(0.01), [1.0] * 20)
    assert waits == [None] * 20


def test_a_job_that_arrives_behind_a_long_one_goes_first(executor: Executor) -> None:
    """Its own calls and one of the other's, not the other's whole length."""
    long, short = Recorder(0.03), Recorder(0.03)
    order: list[str] = []
    done = threading.Event()

    def long_job() -> None:
        run_job(executor, long, [1.0] * 30)
        order.append("long")

    def short_job() -> None:
        time.sleep(0.2)
        before = len(long.rows)
        run_job(executor, short, [1.0] * 3)
        order.append("short")
        assert len(long.rows) - before <= 2
        done.set()

    together(long_job, short_job)
    assert order == ["short", "long"]


def test_a_call_that_fails_in_company_fails_for_its_job_only(executor: Executor) -> None:
    module = Recorder(0.01)

    def bad() -> str:
        with pytest.raises(ValueError, match="minus one"):
            run_job(executor, module, [5.0, 5.0, 5.0, -1.0])
        return "bad"

    good = [lambda: run_job(executor, module, [3.0] * 8) for _ in range(3)]
    assert together(bad, *good) == ["bad", [6.0] * 8, [6.0] * 8, [6.0] * 8]


def test_out_of_memory_makes_smaller_batches_and_splits_what_is_too_large(executor: Executor) -> None:
    module = Recorder()
    module.most = 2
    with executor.job(Ticket()) as ticket:
        sample = torch.arange(7.0).reshape(7, 1)
        result = executor.run(ticket, module.forward, (sample,), {"timestep": torch.arange(7)})
    assert result.flatten().tolist() == [3.0 * k for k in range(7)]
    assert max(module.rows) <= 2
    jobs = [lambda n=n: run_job(executor, module, [float(n)] * 5) for n in range(5)]  # type: ignore[misc]
    assert together(*jobs) == [[2.0 * n] * 5 for n in range(5)]
    module.most = 0
    with pytest.raises(torch.OutOfMemoryError):
        run_job(executor, module, [1.0])


def test_different_modules_shapes_and_flags_are_never_one_call(executor: Executor) -> None:
    first, second = Recorder(0.005), Recorder(0.005)

    def job(module: Recorder, width: int, flag: bool) -> bool:
        with executor.job(Ticket()) as ticket:
            return all(
                torch.equal(
                    executor.run(ticket, module.forward, (torch.full((2, width), 3.0),), {"timestep": 1, "flag": flag}),
                    torch.full((2, width), 7.0),
                )
                for _ in range(6)
            )

    kinds = [(first, 1, False), (first, 2, False), (first, 1, True), (second, 1, False)]
    assert all(together(*[lambda kind=kind: job(*kind) for kind in kinds]))  # type: ignore[misc]
    assert set(first.rows) == set(second.rows) == {2}


def test_a_cancelled_job_leaves_at_its_next_call_also_while_it_waits(executor: Executor) -> None:
    module = Recorder()
    module.gate = threading.Event()
    stop = threading.Event()

    def waits() -> str:
        with pytest.raises(Cancelled):
            run_job(executor, module, [1.0, 1.0], Ticket(stop.is_set))
        return "left"

    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        other = pool.submit(run_job, executor, module, [2.0])
        while not module.rows:
            time.sleep(0.001)
        waiting = pool.submit(waits)
        time.sleep(0.05)
        stop.set()
        module.gate.set()
        executor.wake()
        assert waiting.result(5) == "left"
        assert other.result(5) == [4.0]
    assert module.rows == [1]


def test_what_runs_exclusively_runs_while_every_job_is_parked(executor: Executor) -> None:
    module = Recorder(0.002)
    awake = 0
    seen: list[int] = []
    lock = threading.Lock()

    def job() -> None:
        nonlocal awake
        with executor.job(Ticket()) as ticket:
            for _ in range(40):
                with lock:
                    awake += 1
                time.sleep(0.0005)
                with lock:
                    awake -= 1
                executor.run(ticket, module.forward, (torch.ones(1, 1),), {})

    def load() -> None:
        for _ in range(10):
            executor.exclusively(lambda: (seen.append(awake), time.sleep(0.002), seen.append(awake)))
            time.sleep(0.003)

    together(job, job, job, load)
    assert seen == [0] * 20


def test_a_job_may_have_something_run_on_the_device_while_another_wants_it_exclusively(executor: Executor) -> None:
    order, inside = list[str](), threading.Event()

    def job() -> None:
        with executor.job(Ticket()):
            inside.set()
            while not executor._alone:
                time.sleep(0.001)
            executor.on_device(lambda: order.append("its own"))

    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        running = pool.submit(job)
        inside.wait(5)
        loading = pool.submit(executor.exclusively, lambda: order.append("exclusively"))
        try:
            running.result(5)
            loading.result(5)
        finally:
            executor.close()
    assert order == ["its own", "exclusively"]


def test_a_job_that_begins_meanwhile_waits_for_what_runs_exclusively(executor: Executor) -> None:
    """And begins then, though nothing else happens that would wake it."""
    begun, finish, order = threading.Event(), threading.Event(), list[str]()

    def load() -> None:
        begun.set()
        finish.wait(5)
        order.append("loaded")
        raise LookupError("gone")

    def job() -> None:
        begun.wait(5)
        with executor.job(Ticket()):
            order.append("begun")

    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        loading, running = pool.submit(executor.exclusively, load), pool.submit(job)
        begun.wait(5)
        time.sleep(0.1)
        finish.set()
        running.result(5)
        assert isinstance(loading.exception(5), LookupError)
    assert order == ["loaded", "begun"]


def test_an_error_of_something_exclusive_is_its_callers(executor: Executor) -> None:
    def fails() -> None:
        raise LookupError("gone")

    with pytest.raises(LookupError):
        executor.exclusively(fails)
    assert executor.exclusively(lambda: 5) == 5


def test_what_runs_on_the_device_comes_between_the_calls_of_jobs_that_go_on(executor: Executor) -> None:
    module = Recorder()
    begun, go_on, seen = threading.Event(), threading.Event(), list[str]()

    def between() -> int:
        seen.append(threading.current_thread().name)
        return 5

    def job() -> None:
        with executor.job(Ticket()) as ticket:
            begun.set()
            go_on.wait(5)  # not parked: whoever runs exclusively would wait for it
            executor.run(ticket, module.forward, (torch.ones(1, 1),), {})

    def fails() -> None:
        raise torch.OutOfMemoryError("gone")

    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        running = pool.submit(job)
        begun.wait(5)
        assert pool.submit(executor.on_device, between).result(5) == 5
        with pytest.raises(torch.OutOfMemoryError):
            executor.on_device(fails)
        go_on.set()
        running.result(5)
    assert seen == ["device"]
    assert module.rows == [1]


def test_no_gradients_are_kept(executor: Executor) -> None:
    module = nn.Linear(1, 1)
    with executor.job(Ticket()) as ticket:
        result = executor.run(ticket, module.forward, (torch.ones(1, 1),), {})
    assert not result.requires_grad


def test_a_batch_grows_as_long_as_it_pays() -> None:
    curve = Curve()
    for rows, seconds in ((2, 0.10), (4, 0.12), (8, 0.16), (16, 0.40)):
        for _ in range(3):
            curve.note(rows, seconds)
    assert curve.limit == 8
    assert curve.seconds(4) == pytest.approx(0.12)
    curve.lower_cap(5)
    assert curve.limit == 5


def test_one_size_that_was_measured_in_a_bad_moment_keeps_no_larger_one_away() -> None:
    curve = Curve()
    for rows, seconds in ((2, 0.036), (6, 0.055), (8, 0.073), (16, 0.094)):
        for _ in range(3):
            curve.note(rows, seconds)
    assert curve.limit >= 16


def test_sizes_that_lie_close_to_each_other_need_not_gain_as_much_as_twice_the_size() -> None:
    """The demo model's denoiser on two cores; larger sizes were never tried."""
    measured = {2: 16.8, 4: 27.5, 6: 39.2, 8: 50.3, 10: 61.0, 12: 71.9, 14: 87.0, 16: 90.6}
    curve = Curve()
    for rows, milliseconds in measured.items():
        for _ in range(3):
            curve.note(rows, milliseconds / 1000)
    assert curve.limit >= 16


def test_a_device_that_gains_nothing_from_batches_forms_none() -> None:
    curve = Curve()
    for rows, seconds in ((2, 0.10), (4, 0.20)):
        for _ in range(3):
            curve.note(rows, seconds)
    assert curve.limit == 2


def test_many_jobs_at_once_end() -> None:
    """No deadlock and no thread left: random shapes, lengths and cancellations."""
    executor = Executor()
    module = Recorder()
    before = threading.active_count()

    def job(n: int) -> None:
        with executor.job(Ticket(lambda: n % 7 == 0 and len(module.rows) > 50)) as ticket:
            for k in range(n % 9):
                sample = torch.ones(1 + n % 3, 1 + k % 2)
                executor.run(ticket, module.forward, (sample,), {"timestep": k})

    with concurrent.futures.ThreadPoolExecutor(24) as pool:
        for future in [pool.submit(job, n) for n in range(400)]:
            assert future.exception(20) is None or isinstance(future.exception(), Cancelled)
    executor.close()
    assert threading.active_count() <= before


def test_a_call_without_rows_runs_and_ends_nobody(executor: Executor) -> None:
    module = Recorder()
    with executor.job(Ticket()) as ticket:
        out = executor.run(ticket, module.forward, (torch.empty(0, 1),), {})
    assert out.shape == (0, 1)
    assert run_job(executor, module, [1.0]) == [2.0]


def test_what_is_remembered_of_calls_is_bounded(executor: Executor, monkeypatch: pytest.MonkeyPatch) -> None:
    """Calls that the rule does not know, and calls of ever new shapes, as clients may ask for them."""
    monkeypatch.setattr("api.engine.runs._CURVES", 20)
    module = Recorder()
    with executor.job(Ticket()) as ticket:
        for size in range(1, 50):
            executor.run(ticket, module.forward, (torch.ones(1, size),), {})
            executor.run(ticket, module.forward, (torch.ones(1, 1),), {"flag": [size]})  # a list: it runs alone
    assert len(executor._runs._curves) == 20


def test_a_long_job_makes_a_step_for_each_bound_however_many_short_ones_come(
    executor: Executor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("api.engine.executor._LONGEST_WAIT", 0.1)
    long, short, over = Recorder(0.02), Recorder(0.02), threading.Event()
    waits: list[float] = []

    def long_job() -> None:
        with executor.job(Ticket()) as ticket:
            ticket.attained = 100.0
            for _ in range(10):
                began = time.monotonic()
                executor.run(ticket, long.forward, (torch.ones(1, 1),), {})
                waits.append(time.monotonic() - began)
        over.set()

    def stream(width: int) -> None:
        # ten at a time of different shapes, so that none is merged: a round of them takes longer than the bound
        while not over.is_set():
            with executor.job(Ticket()) as ticket:
                for _ in range(3):
                    executor.run(ticket, short.forward, (torch.ones(1, width),), {})

    together(long_job, *[functools.partial(stream, 2 + number) for number in range(10)])
    # the bound, and what had waited longer at that moment: a call of each of the others
    assert sorted(waits)[len(waits) // 2] < 2 * (0.1 + 11 * 0.02)


def test_a_job_that_is_cancelled_before_it_began_does_not_wait(executor: Executor) -> None:
    inside, leave, asked = threading.Event(), threading.Event(), threading.Event()

    def alone() -> None:
        executor.exclusively(lambda: (inside.set(), leave.wait(10)))

    def begin() -> None:
        inside.wait(5)
        with pytest.raises(Cancelled), executor.job(Ticket(asked.is_set)):
            pass
        with pytest.raises(Cancelled):
            executor.exclusively(lambda: None, asked.is_set)
        leave.set()

    def cancel() -> None:
        inside.wait(5)
        time.sleep(0.05)
        asked.set()
        executor.wake()

    together(alone, begin, cancel)


def test_after_the_end_nobody_waits_for_ever() -> None:
    executor = Executor()
    executor.close()
    for call in (
        lambda: executor.exclusively(lambda: None),
        lambda: run_job(executor, Recorder(), [1.0]),
    ):
        with pytest.raises(Cancelled):
            call()


def test_what_is_run_on_the_device_is_not_kept(executor: Executor) -> None:
    """What places a part of a model holds its weights."""
    held = []
    for run in (executor.on_device, executor.exclusively):
        weights = torch.zeros(8)
        held.append(weakref.ref(weights))
        run(lambda weights=weights: float(weights.sum()))
        del weights
    executor.on_device(gc.collect)
    gc.collect()
    assert [each() for each in held] == [None, None]


def test_what_is_no_modules_method_is_not_looked_into(executor: Executor, monkeypatch: pytest.MonkeyPatch) -> None:
    """It may hold the weights of a model, and be called like one that has rows."""
    seen = []
    real = calls.analyse
    monkeypatch.setattr(calls, "analyse", lambda function, *more: seen.append(function) or real(function, *more))
    executor.on_device(lambda: None)
    executor.exclusively(lambda: None)
    assert not seen
    assert run_job(executor, Recorder(), [1.0])
    assert seen


def test_what_a_failed_or_finished_call_held_is_free_at_once(executor: Executor) -> None:
    """Without waiting for a collection of circles: on a device these are the activations of whole batches."""
    held: list[weakref.ref[torch.Tensor]] = []

    class Failing(nn.Module):
        def forward(self, sample: torch.Tensor) -> torch.Tensor:
            activation = sample * 2
            held.append(weakref.ref(activation))
            if len(held) < 3:
                raise torch.OutOfMemoryError if len(held) == 1 else ValueError("no")
            assert [each() for each in held[:-1]] == [None, None]
            return activation

    module = Failing()
    gc.disable()
    try:
        for expected in (torch.OutOfMemoryError, ValueError):
            with pytest.raises(expected), executor.job(Ticket()) as ticket:
                executor.run(ticket, module.forward, (torch.ones(1, 1),), {})
        with executor.job(Ticket()) as ticket:
            executor.run(ticket, module.forward, (torch.ones(1, 1),), {})
        executor.exclusively(lambda: None)
        assert [each() for each in held] == [None] * 3
    finally:
        gc.enable()


def test_halves_begin_when_the_whole_is_forgotten(executor: Executor) -> None:
    whole: list[weakref.ref[torch.Tensor]] = []

    class Tight(nn.Module):
        def forward(self, sample: torch.Tensor) -> torch.Tensor:
            if whole:
                assert whole[-1]() is None
            activation = sample * 2
            if len(activation) > 2:
                whole.append(weakref.ref(activation))
                raise torch.OutOfMemoryError
            return activation

    gc.disable()
    try:
        with executor.job(Ticket()) as ticket:
            result = executor.run(ticket, Tight().forward, (torch.arange(7.0).reshape(7, 1),), {})
    finally:
        gc.enable()
    assert result.flatten().tolist() == [0.0, 2.0, 4.0, 6.0, 8.0, 10.0, 12.0]
    assert len(whole) == 3  # 7 rows, then 3 and 4


class Delayed:
    """A stopwatch that learns what a call took only later, as that of a GPU."""

    since = None

    def __init__(self) -> None:
        self.waiting: list[Callable[[float], None]] = []
        self.told = 0

    def time(self, call: Callable[[], Any], note: Callable[[float], None]) -> Any:
        result = call()
        self.waiting.append(note)
        return result

    def catch_up(self) -> None:
        while len(self.waiting) > 1:
            self.waiting.pop(0)(0.5)
            self.told += 1


def test_what_the_device_tells_later_is_noted_for_the_job_that_had_it() -> None:
    stopwatch = Delayed()
    executor, ticket = Executor(stopwatch=stopwatch), Ticket()
    run_job(executor, Recorder(), [1.0] * 5, ticket)
    executor.close()
    assert stopwatch.told == 4
    assert ticket.attained == pytest.approx(2.0)
