"""Jobs together, and one alone."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import pytest

from api.engine.calls import Cancelled
from api.engine.company import Company


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.002)


def start(function: Callable[[], None]) -> threading.Thread:
    thread = threading.Thread(target=function, daemon=True)
    thread.start()
    return thread


def test_nobody_is_there_with_one_who_is_alone() -> None:
    company, inside, most, log = Company(), [0], [0], list[int]()
    lock = threading.Lock()

    def stay(alone: bool) -> None:
        for _ in range(30):
            with company.alone() if alone else company.together():
                with lock:
                    inside[0] += 1
                    most[0] = max(most[0], inside[0])
                time.sleep(0.0005)
                with lock:
                    if alone:
                        log.append(inside[0])
                    inside[0] -= 1

    threads = [start(lambda alone=alone: stay(alone)) for alone in (False, False, False, True, True)]
    for thread in threads:
        thread.join(20)
        assert not thread.is_alive()
    assert log == [1] * 60
    assert most[0] > 1


def test_one_who_wants_to_be_alone_is_not_kept_waiting_by_those_who_come() -> None:
    company, order = Company(), list[str]()
    with company.together() as visit:

        def be_alone() -> None:
            with company.alone():
                order.append("alone")

        def come() -> None:
            with company.together():
                order.append("late")

        first = start(be_alone)
        until(lambda: company._wanting == 1)
        second = start(come)
        time.sleep(0.02)
        assert order == []
        assert not visit.had_company
    first.join(10)
    second.join(10)
    assert order == ["alone", "late"]


def test_who_had_company() -> None:
    company = Company()
    with company.together() as one:
        assert not one.had_company
        with company.together() as other:
            pass
        assert one.had_company
        assert other.had_company


@pytest.mark.parametrize("alone", [False, True])
def test_one_who_is_cancelled_leaves_and_is_in_nobodys_way(alone: bool) -> None:
    company, cancelled, ended = Company(), threading.Event(), list[type[BaseException]]()
    wait = company.alone if alone else company.together

    def come() -> None:
        try:
            with wait(cancelled.is_set):
                pass
        except Cancelled as fault:
            ended.append(type(fault))

    with company.together() if alone else company.alone():
        thread = start(come)
        time.sleep(0.01)
        cancelled.set()
        company.wake()
        thread.join(10)
    assert ended == [Cancelled]
    with company.together(), company.together():
        pass
    with company.alone():
        pass
