"""What the readers of a job's events get."""

from __future__ import annotations

from typing import Any

import pytest

from api.schema.messages import Phase, Preview, Progress
from api.schema.transfers import Transfer
from api.service.reports import Report


class Told:
    """A report with a clock that the test moves."""

    def __init__(self) -> None:
        self.now = 0.0
        self.events: list[dict[str, Any]] = []
        self.report = Report("id", self.events.append, lambda: self.now)

    def step(self, step: int, total: int, after: float) -> dict[str, Any] | None:
        self.now += after
        self.report(Progress("id", step, total))
        return self.report.progress


def test_the_eta_is_what_the_measured_steps_take() -> None:
    told = Told()
    assert told.step(1, 10, 5.0) == {"step": 1, "total": 10, "eta": None}
    assert told.step(2, 10, 2.0) == {"step": 2, "total": 10, "eta": 16.0}
    for step in range(3, 10):
        told.step(step, 10, 4.0)
    assert 3.5 < told.report.progress["eta"] < 4.0  # the steps became slower: it follows
    assert told.step(10, 10, 4.0)["eta"] == 0.0


def test_steps_that_were_not_told_count() -> None:
    told = Told()
    told.step(1, 9, 0.0)
    assert told.step(5, 9, 4.0)["eta"] == pytest.approx(4.0)


def test_a_job_that_begins_anew_is_measured_anew() -> None:
    told = Told()
    told.step(1, 9, 0.0)
    told.step(8, 9, 7.0)
    assert told.step(1, 9, 30.0) == {"step": 1, "total": 9, "eta": None}
    assert told.step(2, 9, 2.0)["eta"] == 14.0


def test_fast_steps_are_told_now_and_then_and_the_last_one_always() -> None:
    told = Told()
    for step in range(1, 101):
        told.step(step, 100, 0.01)
    steps = [event["step"] for event in told.events]
    assert 9 <= len(steps) <= 12
    assert steps == sorted(steps)
    assert (steps[0], steps[-1]) == (1, 100)


def test_a_preview_is_a_link_to_the_newest() -> None:
    told = Told()
    for step in (1, 2, 3):
        told.step(step, 3, 1.0)
        told.report(Preview("id", step, 3, [b"jpeg %d" % step, b"other"]))
    for event in told.events:
        event.pop("time")
    assert told.events[-2:] == [
        {"type": "inference", "status": "progress", "step": 3, "total": 3, "eta": 0.0},
        {"type": "inference", "status": "preview", "step": 3, "total": 3, "image_urls": ["/jobs/id/previews/0", "/jobs/id/previews/1"]},
    ]  # fmt: skip
    assert "jpeg" not in str(told.events)
    assert told.report.preview == Preview("id", 3, 3, [b"jpeg 3", b"other"])
    told.step(1, 3, 5.0)  # its worker died: what it showed is not what comes
    assert told.report.preview is None


def test_fast_previews_are_told_now_and_then_and_the_newest_is_there() -> None:
    told = Told()
    for step in range(1, 101):
        told.step(step, 100, 0.01)
        told.report(Preview("id", step, 100, [b"%d" % step]))
        assert told.report.preview.images == [b"%d" % step]
    steps = [event["step"] for event in told.events if event["status"] == "preview"]
    assert 9 <= len(steps) <= 12
    assert (steps[0], steps[-1]) == (1, 100)


def test_phases_and_transfers_are_told_as_they_are() -> None:
    told = Told()
    told.report(Phase("id", "loadModel", "start"))
    told.report(Transfer("m", "download", "progress", 5, 10, 2, 2.5))
    for event in told.events:
        assert event.pop("time") > 1e12
    assert told.events == [
        {"type": "loadModel", "status": "start"},
        {"type": "download", "status": "progress", "model": "m", "bytes": 5, "total": 10, "rate": 2, "eta": 2.5},
    ]
