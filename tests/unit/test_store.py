"""The store of jobs: nothing accepted is lost, nothing that is over changes, whatever happens in which order."""

from __future__ import annotations

import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from api.schema.generation import GenerationResult
from api.service.jobs import TERMINAL, JobState
from api.service.store import Store
from api.settings import SettingsError

ROOT = Path(__file__).resolve().parents[2]
HIPPO = "a very particular hippopotamus"
LONG = 1e6


def result_of(text: str = "", images: int = 1) -> GenerationResult:
    return GenerationResult([f"{text}{n}".encode() for n in range(images)], {"prompt": text}, {"inference": 5}, 0.5)


def accept(store: Store, job_id: str, *, priority: int = 1, now: float = 0.0, **more: Any) -> Any:
    inputs = b'{"prompt": "%s"}' % HIPPO.encode()
    return store.accept(job_id, "r", inputs, priority=priority, now=now, ttl=LONG, events=[{"n": "in"}], **more)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    opened = Store(tmp_path, persist_inputs=True)
    opened.open()
    yield opened
    opened.close()


def test_the_highest_priority_goes_first_and_the_oldest_of_it(store: Store) -> None:
    for job_id, priority in (("a", 0), ("b", 1), ("c", 2), ("d", 1), ("e", 2)):
        accept(store, job_id, priority=priority)
    places = {job_id: store.get(job_id).position for job_id in "abcde"}
    taken = [store.take(1.0, []).id for _ in range(5)]
    assert taken == ["c", "e", "b", "d", "a"]
    assert sorted(places, key=places.__getitem__) == taken
    assert store.take(1.0, []) is None


def test_a_job_that_is_given_back_has_its_old_place(store: Store) -> None:
    for job_id in "abc":
        accept(store, job_id)
    assert store.take(1.0, []).tries == 1
    assert store.give_back("a", [], counts=True)
    again = store.take(2.0, [])
    assert (again.id, again.tries) == ("a", 2)
    store.give_back("a", [], counts=False)
    assert store.take(2.0, []).tries == 2


def test_a_job_that_waited_too_long_has_no_turn(store: Store) -> None:
    accept(store, "a")
    assert store.expired(LONG - 1) == []
    assert store.expired(LONG) == ["a"]
    assert store.take(LONG, []) is None


def test_inputs_are_gone_when_the_job_is_over(store: Store, tmp_path: Path) -> None:
    accept(store, "a")
    store.take(0.0, [])
    store.complete("a", result_of(), [], now=1.0, ttl=9.0)
    with sqlite3.connect(tmp_path / "jobs.sqlite3") as other:
        assert other.execute("SELECT count(*) FROM inputs").fetchone() == (0,)


def test_results_are_files_and_are_removed_with_the_job(store: Store, tmp_path: Path) -> None:
    accept(store, "a", key="k", digest="d")
    store.take(0.0, [])
    store.complete("a", result_of("x", 2), [], now=1.0, ttl=9.0)
    folder = tmp_path / "results" / "a"
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == {"0.png": b"x0", "1.png": b"x1"}
    (tmp_path / "results" / "of-a-death").mkdir()
    assert store.remove_old(9.9) == 0
    assert folder.exists()
    assert not (tmp_path / "results" / "of-a-death").exists()
    assert store.remove_old(10.0) == 1
    assert (store.get("a"), store.events("a", 0), store.by_key("k"), folder.exists()) == (None, [], None, False)


def test_the_same_key_is_the_same_job(store: Store) -> None:
    first = accept(store, "a", key="k", digest="1")
    second = accept(store, "b", key="k", digest="2")
    assert (first.is_new, second.is_new, second.entry.id, second.digest) == (True, False, "a", "1")
    assert store.get("b") is None


def test_nothing_follows_the_last_event(store: Store) -> None:
    accept(store, "a")
    store.append({"a": [{"n": 1}, {"n": 2}], "unknown": [{"n": 0}]})
    store.fail("a", JobState.CANCELLED, {"code": "CANCELLED"}, [{"n": "end"}], now=1.0, ttl=9.0)
    store.append({"a": [{"n": 3}]})
    assert store.fail("a", JobState.FAILED, {}, [{"n": "end"}], now=1.0, ttl=9.0) is None
    assert store.events("a", 0) == [(1, {"n": "in"}), (2, {"n": 1}), (3, {"n": 2}), (4, {"n": "end"})]
    assert store.events("a", 3) == [(4, {"n": "end"})]
    assert store.events("unknown", 0) == []


def test_what_a_client_is_told_is_synced_at_its_commit(store: Store) -> None:
    """A power cut cannot be made here: that SQLite is told to sync is what can be seen."""
    said: list[str] = []
    store._db._connection.set_trace_callback(said.append)

    def levels(call: Any) -> set[str]:
        said.clear()
        call()
        assert "COMMIT" in said
        return {line.split()[-1] for line in said if line.startswith("PRAGMA synchronous")}

    assert levels(lambda: accept(store, "a")) == {"FULL"}
    assert levels(lambda: store.take(0.0, [])) == {"NORMAL"}
    assert levels(lambda: store.append({"a": [{"n": 1}]})) == {"NORMAL"}
    assert levels(lambda: store.complete("a", result_of(), [], now=1.0, ttl=9.0)) == {"FULL"}


def test_two_servers_cannot_share_a_folder_and_are_told_so(store: Store, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"STATE_DIR=.*another server"):
        Store(tmp_path, persist_inputs=True).open()
    store.close()
    second = Store(tmp_path, persist_inputs=True)
    second.open()
    second.close()


def test_a_folder_that_cannot_be_used_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(SettingsError, match="STATE_DIR"):
        Store(tmp_path / "file" / "state", persist_inputs=True).open()
    (tmp_path / "jobs.sqlite3").write_bytes(b"not a database" * 100)
    with pytest.raises(SettingsError, match=r"jobs\.sqlite3"):
        Store(tmp_path, persist_inputs=True).open()


def everything_in(folder: Path) -> bytes:
    return b"".join(path.read_bytes() for path in folder.rglob("*") if path.is_file())


def test_without_persistence_nothing_of_a_request_is_in_the_folder(tmp_path: Path) -> None:
    store = Store(tmp_path, persist_inputs=False)
    store.open()
    for job_id in "abc":
        accept(store, job_id, key=HIPPO + job_id, digest=HIPPO)
    assert HIPPO.encode() in store.take(0.0, []).inputs
    store.complete("a", result_of(HIPPO), [], now=1.0, ttl=LONG)
    store.fail("b", JobState.FAILED, {"message": HIPPO}, [], now=1.0, ttl=LONG)
    assert store.images.read("a", 0, "png") == HIPPO.encode() + b"0"
    assert store.get("b").error == {"message": HIPPO}
    assert HIPPO.encode() not in everything_in(tmp_path)
    store.close()
    assert HIPPO.encode() not in everything_in(tmp_path)
    store = Store(tmp_path, persist_inputs=False)
    store.open()
    assert [store.get(job_id) for job_id in "ab"] == [None, None]
    assert store.without_inputs() == ["c"]  # it is known that there was one
    store.close()


def test_what_was_kept_before_persistence_was_switched_off_is_done_but_not_kept(store: Store, tmp_path: Path) -> None:
    for job_id in "ab":
        accept(store, job_id)
    store.take(0.0, [])
    store.complete("a", result_of(HIPPO), [], now=1.0, ttl=LONG)
    store.close()
    store = Store(tmp_path, persist_inputs=False)
    store.open()
    assert HIPPO.encode() not in everything_in(tmp_path)
    assert HIPPO.encode() in store.take(0.0, []).inputs
    store.close()


@settings(max_examples=60, stateful_step_count=40, deadline=None)
class Sequences(RuleBasedStateMachine):
    """Any sequence of operations, reopenings among them, against a dictionary."""

    @initialize()
    def begin(self) -> None:
        self.folder = Path(tempfile.mkdtemp())
        self.store = Store(self.folder, persist_inputs=True)
        self.store.open()
        self.now = 0.0
        self.jobs: dict[str, dict[str, Any]] = {}

    def teardown(self) -> None:
        self.store.close()
        shutil.rmtree(self.folder)

    def some(self, number: int) -> str:
        return list(self.jobs)[number % len(self.jobs)] if self.jobs else "none"

    @rule(priority=st.integers(0, 2))
    def accept(self, priority: int) -> None:
        job_id = f"j{len(self.jobs)}"
        accept(self.store, job_id, priority=priority, now=self.now)
        state = JobState.IN_QUEUE
        self.jobs[job_id] = {"state": state, "priority": priority, "tries": 0, "events": ["in"], "result": None}

    @rule()
    def take(self) -> None:
        waiting = [job_id for job_id, job in self.jobs.items() if job["state"] == JobState.IN_QUEUE]
        turn = self.store.take(self.now, [{"n": "take"}])
        if not waiting:
            assert turn is None
            return
        first = max(waiting, key=lambda job_id: (self.jobs[job_id]["priority"], -int(job_id[1:])))
        assert turn.id == first
        job = self.jobs[first]
        job.update(state=JobState.IN_PROGRESS, tries=job["tries"] + 1)
        job["events"].append("take")
        assert turn.tries == job["tries"]

    @precondition(lambda self: self.jobs)
    @rule(number=st.integers(0, 99), counts=st.booleans())
    def give_back(self, number: int, counts: bool) -> None:
        job = self.jobs[self.some(number)]
        changed = self.store.give_back(self.some(number), [{"n": "back"}], counts=counts)
        assert changed == (job["state"] == JobState.IN_PROGRESS)
        if changed:
            job.update(state=JobState.IN_QUEUE, tries=job["tries"] - (not counts))
            job["events"].append("back")

    @precondition(lambda self: self.jobs)
    @rule(number=st.integers(0, 99))
    def event(self, number: int) -> None:
        self.store.append({self.some(number): [{"n": "e"}]})
        if self.jobs[self.some(number)]["state"] not in TERMINAL:
            self.jobs[self.some(number)]["events"].append("e")

    @precondition(lambda self: self.jobs)
    @rule(number=st.integers(0, 99), state=st.sampled_from(sorted(TERMINAL)))
    def end(self, number: int, state: JobState) -> None:
        job_id = self.some(number)
        job = self.jobs[job_id]
        if state == JobState.COMPLETED:
            before = self.store.complete(job_id, result_of(job_id), [{"n": "end"}], now=self.now, ttl=LONG)
        else:
            before = self.store.fail(job_id, state, {"code": "X"}, [{"n": "end"}], now=self.now, ttl=LONG)
        if job["state"] in TERMINAL:
            assert before is None
            return
        assert before == job["state"]
        job.update(state=state, result=job_id if state == JobState.COMPLETED else None)
        job["events"].append("end")

    @rule()
    def sweep_and_pass_time(self) -> None:
        self.now += 1
        assert self.store.remove_old(self.now) == 0

    @rule()
    def reopen(self) -> None:
        self.store.close()
        self.store = Store(self.folder, persist_inputs=True)
        self.store.open()
        running = [job_id for job_id, job in self.jobs.items() if job["state"] == JobState.IN_PROGRESS]
        assert [job_id for job_id, _ in self.store.running()] == running
        assert self.store.without_inputs() == []

    @invariant()
    def as_the_model_says(self) -> None:
        for job_id, job in self.jobs.items():
            entry = self.store.get(job_id)
            assert (entry.state, entry.tries) == (job["state"], job["tries"])
            events = self.store.events(job_id, 0)
            assert [seq for seq, _ in events] == list(range(1, len(events) + 1))
            assert [body["n"] for _, body in events] == job["events"]
            if job["result"]:
                assert self.store.images.read(job_id, 0, entry.result.extension) == f"{job_id}0".encode()
        assert [entry.id for entry in self.store.newest(1000)] == list(self.jobs)[::-1]
        assert self.store.waiting() == sum(job["state"] == JobState.IN_QUEUE for job in self.jobs.values())


TestSequences = Sequences.TestCase

WRITER = """
import sys
from pathlib import Path
from api.schema.generation import GenerationResult
from api.service.store import Store
store = Store(Path(sys.argv[1]), persist_inputs=True)
store.open()
start = store.newest(1)[0].number if store.newest(1) else 0
for number in range(start, 10**6):
    store.accept(f"j{number}", "r", b"{}", priority=1, now=0.0, ttl=1e6, events=[{"n": 1}])
    print("accepted", f"j{number}", flush=True)
    if number % 2:
        job_id = store.take(0.0, []).id
        store.complete(job_id, GenerationResult([b"x" * 5000], {}, {}, 0.0), [{"n": 2}], now=0.0, ttl=1e6)
        print("completed", job_id, flush=True)
"""


def test_what_a_killed_process_acknowledged_is_there(tmp_path: Path) -> None:
    accepted: set[str] = set()
    completed: set[str] = set()
    for round_ in range(6):
        process = subprocess.Popen(
            [sys.executable, "-c", WRITER, str(tmp_path)], cwd=ROOT, stdout=subprocess.PIPE, text=True
        )
        assert process.stdout
        for _ in range(20 + 17 * round_):
            word, job_id = process.stdout.readline().split()
            (accepted if word == "accepted" else completed).add(job_id)
        os.kill(process.pid, signal.SIGKILL)
        for line in process.stdout:  # what it said before it died counts too
            if line.endswith("\n"):
                (accepted if line.startswith("accepted") else completed).add(line.split()[1])
        process.wait()
        store = Store(tmp_path, persist_inputs=True)
        store.open()
        states = {job_id: store.get(job_id) for job_id in accepted | completed}
        assert all(states.values())
        assert {states[job_id].state for job_id in completed} == {JobState.COMPLETED}
        for job_id in completed:
            assert store.images.read(job_id, 0, "png") == b"x" * 5000
            assert store.events(job_id, 0)[-1][1] == {"n": 2}
        begun = [job_id for job_id, state in states.items() if state.state != JobState.IN_QUEUE]
        assert len(set(begun) - completed) <= round_ + 1, "at most the one that each death interrupted"
        store.close()
    assert len(accepted) > 200


def test_inputs_of_a_job_that_is_over_are_nowhere_any_more(store: Store, tmp_path: Path) -> None:
    accept(store, "a")
    store.take(1.0, [])
    store.fail("a", JobState.CANCELLED, {"code": "CANCELLED"}, [], now=2.0, ttl=LONG)
    store.remove_old(3.0)
    left = b"".join(file.read_bytes() for file in tmp_path.iterdir())
    assert store.get("a") is not None
    assert HIPPO.encode() not in left


def test_of_images_that_do_not_fit_on_the_disk_none_stays(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    accept(store, "a")
    store.take(1.0, [])
    rename, renamed = Path.rename, []

    def full(path: Path, target: Path) -> Path:
        if renamed:
            raise OSError(28, "No space left on device")
        renamed.append(target)
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", full)
    with pytest.raises(OSError, match="No space"):
        store.complete("a", result_of("x", images=3), [], now=2.0, ttl=LONG)
    assert renamed
    assert not list((tmp_path / "results").rglob("*.*"))


def test_old_images_make_room_on_a_disk_that_is_full(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    accept(store, "a")
    store.take(1.0, [])
    store.complete("a", result_of("x"), [], now=2.0, ttl=1.0)

    def write(*_: Any) -> int:
        if list((tmp_path / "results").rglob("*.*")):
            raise sqlite3.OperationalError("database or disk is full")
        return 1

    monkeypatch.setattr(store, "_remove", write)
    assert store.remove_old(4.0) == 1
