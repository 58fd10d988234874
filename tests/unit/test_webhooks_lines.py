"""Whose webhook is sent next, by a clock that the tests move."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from api.service.webhooks_lines import _IN_A_ROW, _LONGEST, _TOGETHER, Lines, Waiting, backoff

A, B = "https://a.test/hook", "https://b.test/hook"


def longest(low: float, high: float) -> float:
    return high


def event(number: int, job: str = "j", url: str = A) -> Waiting:
    return Waiting(number=number, id=f"msg_{number}", url=url, job=job, created=0.0)


def lines_with(*events: Waiting, draw: Callable[[float, float], float] = longest) -> Lines:
    lines = Lines(draw)
    for one in events:
        lines.add(one)
    return lines


def taken(lines: Lines, now: float) -> Waiting:
    found = lines.take(now)
    assert found is not None
    return found


def fail(lines: Lines, one: Waiting, now: float, at_least: float = 0.0) -> float:
    one.tries += 1
    return lines.failed(one, now, at_least)


def test_one_event_of_a_job_is_on_its_way_at_a_time() -> None:
    lines = lines_with(event(1), event(2), event(3, job="other"))
    first, other = taken(lines, 0), taken(lines, 0)
    assert (first.number, other.number) == (1, 3)
    assert lines.take(0) is None
    lines.arrived(first, 0)
    assert taken(lines, 0).number == 2


def test_what_comes_behind_waits_for_what_did_not_arrive() -> None:
    lines = lines_with(event(1), event(2))
    assert fail(lines, taken(lines, 0), 0) == 1.0
    assert lines.take(0.9) is None
    assert lines.opens() == 1.0
    assert taken(lines, 1.0).number == 1


def test_pauses_grow_up_to_a_limit_and_are_drawn_from_the_whole() -> None:
    assert [backoff(n, _LONGEST, longest) for n in (1, 2, 3, 4, 9, 10, 10_000)] == [1, 2, 4, 8, 256, 300, 300]
    assert [backoff(n, _LONGEST, lambda low, high: low) for n in (1, 9)] == [0, 0]


def test_a_receiver_that_asks_for_time_gets_it() -> None:
    lines = lines_with(event(1))
    assert fail(lines, taken(lines, 0), 0, at_least=60.0) == 60.0


def test_what_is_given_up_lets_the_next_one_go() -> None:
    lines = lines_with(event(1), event(2))
    lines.given_up(taken(lines, 0), 0)
    assert taken(lines, 0).number == 2


def test_a_dead_receiver_gets_one_at_a_time_and_the_others_all_they_can_take() -> None:
    dead = [event(n, job=f"d{n}") for n in range(20)]
    alive = [event(100 + n, job=f"a{n}", url=B) for n in range(20)]
    lines = lines_with(*dead, *alive)
    now = 0.0
    for _ in range(_IN_A_ROW):
        one = taken(lines, now)
        while one.url == B:
            lines.arrived(one, now)
            one = taken(lines, now)
        fail(lines, one, now)
    sent_to_dead, tries = 0, sum(one.tries for one in dead)
    for second in range(600):
        now = float(second)
        on_its_way = []
        while one := lines.take(now):
            on_its_way.append(one)
        assert sum(one.url == A for one in on_its_way) <= 1
        for one in on_its_way:
            if one.url == A:
                sent_to_dead += 1
                fail(lines, one, now)
            else:
                lines.arrived(one, now)
    assert lines.waiting(B) == 0
    assert 8 < sent_to_dead < 30  # 1, 2, 4 … 60, 60 … seconds apart
    assert sum(one.tries for one in dead) == tries + sent_to_dead  # nobody's tries are used up by waiting


def test_the_first_that_arrives_ends_the_trouble_for_all() -> None:
    events = [event(n, job=f"d{n}") for n in range(_TOGETHER + 4)]
    for one in events:
        one.tries = 8  # so that its own pause is minutes
    lines, now = lines_with(*events), 0.0
    for _ in events:
        now = max(now, lines.opens() or 0.0)
        fail(lines, taken(lines, now), now)
    opens = lines.opens() or 0.0
    assert min(one.due for one in events) <= opens < max(one.due for one in events) - 60
    assert opens > now
    lines.arrived(taken(lines, opens), opens)
    assert sum(lines.take(opens) is not None for _ in events) == _TOGETHER


def test_a_path_that_is_not_there_is_no_trouble_for_its_host() -> None:
    lines = lines_with(event(0, job="lost", url=A + "/lost"), *(event(n, job=f"j{n}") for n in range(1, 6)))
    lost = taken(lines, 0)
    for _ in range(3 * _IN_A_ROW):
        lost.tries += 1
        now = lines.failed(lost, 0, is_down=False)
        while (lost_again := taken(lines, now)) is not lost:
            lines.arrived(lost_again, now)
    assert lines.waiting(A) == 1


def test_a_receiver_gets_no_more_than_a_few_at_once() -> None:
    lines = lines_with(*(event(n, job=f"j{n}") for n in range(_TOGETHER + 5)))
    sent = [taken(lines, 0) for _ in range(_TOGETHER)]
    assert lines.take(0) is None
    assert lines.opens() is None
    lines.arrived(sent[3], 0)
    assert taken(lines, 0).number == _TOGETHER


def test_one_that_is_sent_again_goes_before_those_that_came_later() -> None:
    lines = lines_with(event(2), event(3))
    second = taken(lines, 0)
    lines.add(event(1))
    lines.arrived(second, 0)
    assert [n.number for n in (taken(lines, 0),)] == [1]


def test_one_that_waits_can_be_hurried() -> None:
    lines = lines_with(event(1))
    for _ in range(9):
        opens = lines.opens()
        assert opens is not None
        fail(lines, taken(lines, opens), opens)
    soon = (lines.opens() or 0.0) - 1
    assert lines.take(soon) is None
    assert lines.hurry("msg_1", soon)
    assert taken(lines, soon).number == 1
    assert not lines.hurry("msg_7", soon)


def test_old_ones_leave_but_for_the_one_on_its_way() -> None:
    lines = lines_with(event(1), event(2), event(3, job="other"))
    first = taken(lines, 0)
    assert [one.number for one in lines.older(1.0)] == [2, 3]
    lines.arrived(first, 0)
    assert list(lines) == []
    assert lines.waiting(A) == 0


def test_what_an_address_asks_is_not_another_receiver() -> None:
    lines = lines_with(event(1, url=A + "?job=1"), event(2, url=A + "?job=2"))
    assert lines.waiting(A) == 2
    assert taken(lines, 0).url != taken(lines, 0).url  # but lines of their own


@given(st.lists(st.integers(0, 4), min_size=1, max_size=20), st.lists(st.integers(0, 3), max_size=60))
def test_whatever_fails_all_arrive_in_order_and_once(jobs: list[int], script: list[int]) -> None:
    lines = lines_with(*(event(n, job=f"j{job}", url=A if job % 2 else B) for n, job in enumerate(jobs)))
    now, sending, arrived = 0.0, list[Waiting](), list[Waiting]()
    while len(arrived) < len(jobs):
        if (one := lines.take(now)) is not None:
            assert one.job not in {other.job for other in sending}
            sending.append(one)
        elif sending:
            says = script.pop() if script else 0
            one = sending.pop(0 if says < 2 else -1)
            if says % 2 == 0:
                lines.arrived(one, now)
                arrived.append(one)
            else:
                fail(lines, one, now)
        else:
            opens = lines.opens()
            assert opens is not None
            assert opens >= now
            now = opens
    for job in set(jobs):
        numbers = [one.number for one in arrived if one.job == f"j{job}"]
        assert numbers == [n for n, other in enumerate(jobs) if other == job]
    assert list(lines) == []
    assert lines.opens() is None


@pytest.mark.parametrize("failures", [1, 5, 40])
def test_a_pause_is_never_negative_nor_endless(failures: int) -> None:
    assert 0 <= backoff(failures, _LONGEST, longest) <= _LONGEST
