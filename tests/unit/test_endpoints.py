"""What RunPod's routes ask of the store: queues by endpoint and owner, once more, the stream, ends that are to be told."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from api.schema.generation import GenerationResult
from api.service.endpoints import EndpointStore
from api.service.entries import NATIVE, Terms
from api.service.job_tables import JOBS
from api.service.jobs import JobState
from api.service.store import Store
from api.settings import SettingsError

LONG = 1e6
HOOK = "https://example.com/hook?token=hippopotamus"
FAILED = {"code": "PIPELINE_ERROR", "message": "why"}


@pytest.fixture
def store(tmp_path: Path) -> Iterator[EndpointStore]:
    opened = EndpointStore(tmp_path, persist_inputs=True)
    opened.open()
    yield opened
    opened.close()


def accept(store: EndpointStore, job_id: str, endpoint: str = "e", owner: str = "", **more: Any) -> Any:
    terms = Terms(endpoint=endpoint, owner=owner, **more)
    return store.accept(
        job_id, "r", b'{"secret": 1}', priority=1, now=0.0, ttl=LONG, events=[event("IN_QUEUE")], terms=terms
    )


def event(state: str) -> dict[str, str]:
    return {"type": "state", "state": state}


def fail(store: EndpointStore, job_id: str, state: JobState = JobState.FAILED, now: float = 1.0) -> Any:
    return store.fail(job_id, state, FAILED, [event(state.value)], now=now, ttl=9.0)


def count(folder: Path, table: str) -> int:
    with sqlite3.connect(folder / "jobs.sqlite3") as other:
        counted = other.execute("SELECT count(*) FROM " + table)  # noqa: S608
        return int(counted.fetchone()[0])


def test_what_is_purged_waits_at_that_endpoint_and_is_its_owners(store: EndpointStore) -> None:
    accept(store, "runs")
    store.take(0.0, [])
    for job_id, endpoint, owner in (("a", "e", ""), ("b", "e", ""), ("other", "f", ""), ("theirs", "e", "bob")):
        accept(store, job_id, endpoint, owner)
    store.accept("native", "r", b"{}", priority=1, now=0.0, ttl=LONG, events=[])
    assert store.purge("e", "", {"code": "CANCELLED"}, [event("CANCELLED")], now=1.0, ttl=9.0) == ["a", "b"]
    assert store.purge("e", "", {"code": "CANCELLED"}, [event("CANCELLED")], now=1.0, ttl=9.0) == []
    states = {job_id: store.get(job_id).state.value for job_id in ("runs", "a", "b", "other", "theirs", "native")}
    assert [job_id for job_id, state in states.items() if state == "CANCELLED"] == ["a", "b"]
    assert states["runs"] == "IN_PROGRESS"
    assert store.counts("e", "").states == {JobState.IN_PROGRESS: 1, JobState.CANCELLED: 2}
    assert store.counts("e", "bob").states == {JobState.IN_QUEUE: 1}
    assert store.counts("", "").states == {JobState.IN_QUEUE: 1}


@pytest.mark.parametrize("state", sorted(JobState))
def test_only_what_failed_or_ran_out_of_time_is_retried(store: EndpointStore, tmp_path: Path, state: JobState) -> None:
    accept(store, "a", webhook=HOOK, ttl=100.0)
    if state != JobState.IN_QUEUE:
        store.take(0.5, [event("IN_PROGRESS")])
    if state == JobState.COMPLETED:
        store.complete("a", GenerationResult([b"x"], {}, {}, 0.0), [event(state.value)], now=1.0, ttl=9.0)
    elif state not in (JobState.IN_QUEUE, JobState.IN_PROGRESS):
        fail(store, "a", state)
    before = [seq for seq, _ in store.events("a", 0)]
    again = store.retry("a", [event("IN_QUEUE")], now=5.0, ttl=LONG)
    assert again == (state in (JobState.FAILED, JobState.TIMED_OUT))
    if not again:
        assert store.get("a").state == state
        assert count(tmp_path, "inputs") == (state in (JobState.IN_QUEUE, JobState.IN_PROGRESS))
        return
    entry = store.get("a")
    assert (entry.state, entry.tries, entry.retries, entry.error, entry.created) == (JobState.IN_QUEUE, 0, 1, None, 5.0)
    assert store.events("a", 0) == [(before[-1] + 1, event("IN_QUEUE"))]  # nothing follows an end, also not here
    assert store.to_tell() == []
    turn = store.take(6.0, [])
    assert (turn.inputs, turn.tries, turn.terms.webhook) == (b'{"secret": 1}', 1, HOOK)
    fail(store, "a", now=7.0)
    assert store.counts("e", "").retried == 1
    assert store.to_tell() == ["a"]
    store.told("a", 7.0)
    assert store.remove_old(1000.0) == 1
    assert count(tmp_path, "inputs") == count(tmp_path, "terms") == 0


def test_inputs_of_native_jobs_are_gone_when_they_fail(store: EndpointStore, tmp_path: Path) -> None:
    store.accept("a", "r", b"{}", priority=1, now=0.0, ttl=LONG, events=[])
    store.take(0.0, [])
    fail(store, "a")
    assert count(tmp_path, "inputs") == 0
    assert not store.retry("a", [], now=1.0, ttl=LONG)


def test_the_stream_tells_everything_once(store: EndpointStore) -> None:
    accept(store, "a")
    assert store.stream("a")[1] == [event("IN_QUEUE")]
    store.append({"a": [{"n": 1}, {"n": 2}]})
    assert [body["n"] for body in store.stream("a")[1]] == [1, 2]
    assert store.stream("a") == (store.get("a"), [])
    fail(store, "a")
    entry, told = store.stream("a")
    assert (entry.state, told) == (JobState.FAILED, [event("FAILED")])
    store.retry("a", [event("IN_QUEUE")], now=1.0, ttl=LONG)
    assert store.stream("a")[1] == [event("IN_QUEUE")]
    assert store.stream("unknown") == (None, [])


def test_an_end_is_to_be_told_until_it_was(store: EndpointStore, tmp_path: Path) -> None:
    for job_id in "abc":
        accept(store, job_id, webhook=HOOK if job_id != "c" else "")
    assert store.to_tell() == []
    for job_id in "cba":
        fail(store, job_id, now=1.0 if job_id == "b" else 2.0)
    assert store.to_tell() == ["b", "a"]
    assert store.remove_old(1e9) == 1  # it is not forgotten before it is told
    store.close()
    store = EndpointStore(tmp_path, persist_inputs=True)
    store.open()
    store.told("b", 1.0)
    store.told("a", 1.0)  # another end than this one was told
    assert store.to_tell() == ["a"]
    store.told("a", 2.0)
    assert store.remove_old(1e9) == 2
    store.close()


def test_how_long_a_job_is_known(store: EndpointStore) -> None:
    accept(store, "keep", keep=60.0)
    accept(store, "ttl", ttl=100.0)
    accept(store, "short", ttl=10.0)
    for job_id in ("keep", "ttl", "short"):
        store.fail(job_id, JobState.FAILED, FAILED, [], now=50.0, ttl=1800.0)
    gone = []
    for now in (109.0, 110.0, 1850.0):
        store.remove_old(now)
        gone.append({job_id for job_id in ("keep", "ttl", "short") if store.get(job_id) is None})
    assert gone == [set(), {"keep", "short", "ttl"}, {"keep", "short", "ttl"}]


def test_an_id_that_is_taken_is_nobody_elses(store: EndpointStore) -> None:
    assert accept(store, "a", owner="alice").is_new
    assert accept(store, "a", owner="bob") is None
    assert store.get("a").owner == "alice"
    assert [entry.id for entry in store.newest(9, "bob")] == []
    assert [entry.id for entry in store.newest(9, "alice")] == [entry.id for entry in store.newest(9)] == ["a"]


def test_without_persistence_neither_webhook_nor_terms_are_in_the_folder(tmp_path: Path) -> None:
    store = EndpointStore(tmp_path, persist_inputs=False)
    store.open()
    accept(store, "a", webhook=HOOK)
    accept(store, "b", webhook=HOOK)
    fail(store, "a")
    assert store.to_tell() == ["a"]
    assert store.get("a").terms.webhook == HOOK
    assert store.retry("a", [], now=2.0, ttl=LONG)
    store.close()
    assert b"hippopotamus" not in b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    store = EndpointStore(tmp_path, persist_inputs=False)
    store.open()
    assert store.without_inputs() == ["a", "b"]
    assert store.get("a").terms == NATIVE
    store.close()


def test_terms_outlive_persistence_for_as_long_as_the_process_does(store: EndpointStore, tmp_path: Path) -> None:
    accept(store, "a", webhook=HOOK)
    store.close()
    store = EndpointStore(tmp_path, persist_inputs=False)
    store.open()
    assert b"hippopotamus" not in b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    assert store.take(1.0, []).terms.webhook == store.get("a").terms.webhook == HOOK
    store.close()


VERSION_1 = """
CREATE TABLE jobs (
  number INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT NOT NULL UNIQUE, request_id TEXT NOT NULL,
  state TEXT NOT NULL CHECK (state IN ('IN_QUEUE', 'IN_PROGRESS', 'COMPLETED', 'FAILED', 'CANCELLED', 'TIMED_OUT')),
  over INTEGER GENERATED ALWAYS AS (state IN ('COMPLETED', 'FAILED', 'CANCELLED', 'TIMED_OUT')) STORED,
  priority INTEGER NOT NULL, created REAL NOT NULL, started REAL, finished REAL,
  tries INTEGER NOT NULL DEFAULT 0, expires REAL NOT NULL
);
CREATE INDEX jobs_by_turn ON jobs (state, priority DESC, number);
CREATE TABLE events (id TEXT NOT NULL, seq INTEGER NOT NULL, body BLOB NOT NULL, PRIMARY KEY (id, seq)) WITHOUT ROWID;
CREATE TABLE inputs (id TEXT PRIMARY KEY, body BLOB NOT NULL);
CREATE TABLE outcomes (id TEXT PRIMARY KEY, result BLOB, error BLOB);
CREATE TABLE keys (key TEXT PRIMARY KEY, id TEXT NOT NULL, digest TEXT NOT NULL);
INSERT INTO jobs (id, request_id, state, priority, created, tries, expires) VALUES
  ('waits', 'r', 'IN_QUEUE', 2, 1.0, 0, 1e12), ('ran', 'r', 'IN_PROGRESS', 1, 2.0, 1, 1e12),
  ('done', 'r', 'FAILED', 1, 3.0, 1, 1e12);
INSERT INTO inputs VALUES ('waits', '{}'), ('ran', '{}');
INSERT INTO outcomes VALUES ('done', NULL, '{"code": "X", "message": "y"}');
INSERT INTO events VALUES ('waits', 1, '{"n": 1}');
INSERT INTO keys VALUES ('order-1', 'waits', 'digest');
PRAGMA user_version = 1;
"""


@pytest.mark.parametrize("cut_off", [False, True])
def test_jobs_of_version_1_are_taken_over(tmp_path: Path, cut_off: bool) -> None:
    with sqlite3.connect(tmp_path / "jobs.sqlite3") as old:
        old.executescript(VERSION_1)
        if cut_off:  # by a death in the midst of an earlier start
            old.execute("ALTER TABLE jobs ADD COLUMN owner TEXT NOT NULL DEFAULT ''")
    for _ in range(2):
        store = EndpointStore(tmp_path, persist_inputs=True)
        store.open()
        waits = store.get("waits")
        assert (waits.state, waits.owner, waits.endpoint, waits.terms) == (JobState.IN_QUEUE, "", "", NATIVE)
        assert store.get("done").error == {"code": "X", "message": "y"}
        known = store.by_key("order-1")
        assert known and (known.entry.id, known.digest) == ("waits", "digest")
        assert store.events("waits", 0) == [(1, {"n": 1})]
        assert [job_id for job_id, _ in store.running()] == ["ran"]
        assert (store.waiting(), store.to_tell()) == (1, [])
        store.close()
    store.open()
    assert accept(store, "new", webhook=HOOK).is_new
    assert [store.take(5.0, []).id for _ in range(2)] == ["waits", "new"]
    store.close()


def test_jobs_of_version_1_are_done_where_nothing_is_to_be_kept(tmp_path: Path) -> None:
    with sqlite3.connect(tmp_path / "jobs.sqlite3") as old:
        old.executescript(VERSION_1)
    store = EndpointStore(tmp_path, persist_inputs=False)
    store.open()
    assert store.without_inputs() == []
    assert store.take(5.0, []).id == "waits"
    store.close()


def test_a_later_version_is_left_alone(tmp_path: Path) -> None:
    store = Store(tmp_path, persist_inputs=True)
    store.open()
    store._db.execute(f"PRAGMA user_version = {JOBS.version + 1}")
    store.close()
    with pytest.raises(SettingsError, match="later version"):
        store.open()
