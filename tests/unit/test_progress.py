from __future__ import annotations

import pytest

from api.schema.transfers import Transfer
from api.service import progress
from api.service.progress import Tracker


class Clock:
    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 100.0
        monkeypatch.setattr(progress.time, "monotonic", lambda: self.now)


def test_a_few_events_with_rate_and_time_to_go(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, told = Clock(monkeypatch), list[Transfer]()
    tracker = Tracker("org/name", told.append)
    for tenth in range(41):
        clock.now = 100 + tenth / 10
        tracker.report("download", 1000 * tenth, 8000 * 10)
    statuses = [event.status for event in told]
    assert statuses == ["start", "progress", "progress", "progress", "progress"]
    assert told[-1].rate == pytest.approx(10_000, rel=0.01)
    assert told[-1].eta == pytest.approx(4.0, abs=0.1)
    tracker.report("download", 80_000, 80_000)
    tracker.end()
    assert told[-1].status == "done"
    assert told[-1].eta == 0
    assert tracker.now() == []
    assert tracker.timings == {"download": 4000}


def test_what_an_earlier_attempt_left_is_no_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, told = Clock(monkeypatch), list[Transfer]()
    tracker = Tracker("m", told.append)
    tracker.report("download", 10**9, 2 * 10**9)
    clock.now += 2
    tracker.report("download", 10**9 + 200, 2 * 10**9)
    assert told[-1].rate == 100


def test_phases_side_by_side_end_each_for_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, told = Clock(monkeypatch), list[Transfer]()
    tracker = Tracker("m", told.append)
    for step in range(3):
        clock.now += 1
        tracker.report("download", step, 2)
        tracker.report("extract", step * 2, None)
    assert [(t.kind, t.done, t.eta) for t in tracker.now()] == [("extract", 4, None)]
    tracker.end()
    assert [(e.kind, e.status) for e in told if e.status != "progress"] == [
        ("download", "start"),
        ("extract", "start"),
        ("download", "done"),
        ("extract", "done"),
    ]
