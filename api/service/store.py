"""The jobs that outlive the process: an SQLite database in STATE_DIR.

One thread at a time. Nothing here knows of workers or of HTTP: it holds what was accepted, hands it out in
order, and sees to it that a job that is over stays as it is: every change of a state is an ``UPDATE`` that
names the states it may come from.

**What is safe when.** The database is in WAL mode (https://www.sqlite.org/wal.html). There, ``synchronous=NORMAL``
syncs at checkpoints only, so that a transaction that was committed can be gone after a power cut, though never
after the death of this process. A client that was told "accepted", or how a job ended, throws its own copy away:
these transactions are committed with ``synchronous=FULL``, which syncs the log at every commit. That a job began,
and how far it is, is NORMAL: it would only be done once more.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import msgspec

from api.schema.generation import GenerationResult
from api.schema.videos import format_of
from api.service.database import Database
from api.service.entries import NATIVE, SELECT, Accepted, Entry, StoredResult, Terms, Turn, entry_of
from api.service.job_tables import JOBS
from api.service.jobs import JobState
from api.service.results import Images

RETRIABLE = frozenset({JobState.FAILED, JobState.TIMED_OUT})
"""What a job of RunPod's routes ended in that may be sent once more: its inputs are kept as long as it is."""
MAX_TRIES = 3
"""A job that was running so often when the server died is FAILED."""
_WAITING, _RUNNING = JobState.IN_QUEUE.value, JobState.IN_PROGRESS.value
_LEAST_KEPT = 60.0
"""Seconds for which a job is known after its end, however soon it was to be forgotten: its client may still ask."""


class Store:
    """Jobs and their results on disk.

    Args:
        folder: STATE_DIR; made if it is not there.
        persist_inputs: False keeps all that clients sent or got out of the folder: such jobs end with the process.

    Attributes:
        images: the images of jobs that are COMPLETED.
    """

    def __init__(self, folder: Path, *, persist_inputs: bool) -> None:
        self.images = Images(folder / "results" if persist_inputs else None)
        self._folder = folder
        self._db = Database(folder, JOBS, persist_inputs=persist_inputs)

    def open(self) -> None:
        """Take the folder for this process.

        Raises:
            SettingsError: the folder cannot be used, or another server uses it.
        """
        self._db.open()
        # jobs that are over and whose outcome was in memory only: nothing can be said of them any more
        self._remove("SELECT id FROM jobs WHERE over AND id NOT IN (SELECT id FROM outcomes)", ())
        if self.images.in_memory:
            on_disk = Images(self._folder / "results")
            for job_id in on_disk.ids():
                on_disk.remove(job_id)

    def close(self) -> None:
        """Let the folder go. Does nothing where it is not open."""
        self._db.close()

    def accept(
        self, job_id: str, request_id: str, inputs: bytes, *, priority: int, now: float, ttl: float,
        events: Iterable[dict[str, Any]], key: str | None = None, digest: str = "", terms: Terms = NATIVE,
    ) -> Accepted | None:  # fmt: skip
        """Take a job in; on the disk before this returns.

        Args:
            inputs: what it is made from, as JSON.
            priority: higher ones have their turn first.
            ttl: seconds that it may wait.
            key: the client's name for this request: the same key means the same job.
            digest: of the inputs, to tell whether the same key came with other ones.
            terms: what else was agreed on.

        Returns:
            None where another job has that id.
        """
        with self._db.transaction(durable=True):
            if key is not None and (known := self._by_key(key)) is not None:
                return known
            if self._db.execute("SELECT 1 FROM jobs WHERE id = ?", (job_id,)).fetchone():
                return None
            dies = None if terms.ttl is None else now + terms.ttl
            self._db.execute(
                "INSERT INTO jobs (id, request_id, state, priority, created, expires, owner, endpoint, keep, dies,"
                " told) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
                (job_id, request_id, _WAITING, priority, now, now + ttl, terms.owner, terms.endpoint, terms.keep, dies,
                 not terms.webhook),
            )  # fmt: skip
            self._db.execute("INSERT INTO inputs VALUES (?, ?)", (job_id, inputs))
            if terms != NATIVE:
                self._db.execute("INSERT INTO terms VALUES (?, ?)", (job_id, msgspec.json.encode(terms)))
            if key is not None:
                self._db.execute("INSERT OR REPLACE INTO keys VALUES (?, ?, ?)", (key, job_id, digest))
            self._append(job_id, events)
            return Accepted(self._get(job_id), True, digest)

    def by_key(self, key: str) -> Accepted | None:
        """The job that a client's key stands for."""
        return self._by_key(key)

    def take(self, now: float, events: Iterable[dict[str, Any]]) -> Turn | None:
        """Begin with the job whose turn it is: the oldest of the highest priority."""
        with self._db.transaction():
            row = self._db.execute(
                "UPDATE jobs SET state = ?, started = ?, tries = tries + 1 WHERE number = (SELECT number FROM jobs"
                " WHERE state = ? AND expires > ? ORDER BY priority DESC, number LIMIT 1) AND state = ?"
                " RETURNING id, request_id, tries",
                (_RUNNING, now, _WAITING, now, _WAITING),
            ).fetchone()
            if row is None:
                return None
            self._append(row[0], events)
            (inputs,) = self._db.execute("SELECT body FROM inputs WHERE id = ?", (row[0],)).fetchone()
            job_id, request_id, tries = row
            return Turn(job_id, request_id, tries, inputs, self._terms(job_id))

    def give_back(self, job_id: str, events: Iterable[dict[str, Any]], *, counts: bool) -> bool:
        """Let a job that runs wait again, at its old place.

        Args:
            counts: whether this was a try of the job; False where it was the server that could not.

        Returns:
            Whether it waits now; False where it was over, or waited already.
        """
        with self._db.transaction():
            changed = self._db.execute(
                "UPDATE jobs SET state = ?, started = NULL, tries = tries - ? WHERE id = ? AND state = ?",
                (_WAITING, 0 if counts else 1, job_id, _RUNNING),
            )
            if changed.rowcount:
                self._append(job_id, events)
            return bool(changed.rowcount)

    def append(self, events: dict[str, list[dict[str, Any]]]) -> None:
        """Add to the events of jobs; nothing is added to those of a job that is over."""
        with self._db.transaction():
            for job_id, bodies in events.items():
                self._append(job_id, bodies)

    def complete(
        self, job_id: str, result: GenerationResult, events: Iterable[dict[str, Any]], **times: float
    ) -> JobState | None:
        """End a job well.

        Args:
            events: the last ones; no other can follow.
            times: ``now``, and ``ttl``: seconds until the result is removed.

        Returns:
            The state that it was in before; None where it was over already, or is not known: then nothing changes.

        Raises:
            OSError: the images cannot be written.
        """
        if not self._db.execute("SELECT 1 FROM jobs WHERE id = ? AND NOT over", (job_id,)).fetchone():
            return None
        found = format_of(result.meta)
        extension = found.extension if found else "png"
        try:
            self.images.write(job_id, result.images, extension)
        except OSError:
            self.images.remove(job_id)  # of some of them: the disk may be full
            raise
        stored = StoredResult(
            meta=result.meta,
            timings=result.timings,
            mem_usage=result.mem_usage,
            nsfw=result.nsfw,
            images=len(result.images),
            extension=extension,
            extras=result.extras,
            urls=result.urls,
        )
        return self._finish(job_id, JobState.COMPLETED, events, stored, None, **times)

    def fail(
        self, job_id: str, state: JobState, error: dict[str, Any], events: Iterable[dict[str, Any]], **times: float
    ) -> JobState | None:
        """End a job in another way; as ``complete``.

        Args:
            state: FAILED, CANCELLED or TIMED_OUT.
            error: the ``$error``.

        Returns:
            The state that it was in before; None where it was over already, or is not known.
        """
        return self._finish(job_id, state, events, None, error, **times)

    def get(self, job_id: str) -> Entry | None:
        """A job as it is now."""
        return self._get(job_id, missing_ok=True)

    def newest(self, limit: int, owner: str | None = None) -> list[Entry]:
        """The jobs that were accepted last, newest first, without results and errors.

        Args:
            limit: how many.
            owner: only that one's; None: everybody's.
        """
        which = "WHERE owner = ? OR ? ORDER BY number DESC LIMIT ?"
        rows = self._db.execute(SELECT + which, (owner, owner is None, limit)).fetchall()
        return [entry_of(row) for row in rows]

    def events(self, job_id: str, after: int) -> list[tuple[int, dict[str, Any]]]:
        """The events of a job whose sequence number is above ``after``, in order."""
        rows = self._db.execute("SELECT seq, body FROM events WHERE id = ? AND seq > ? ORDER BY seq", (job_id, after))
        return [(seq, msgspec.json.decode(body)) for seq, body in rows]

    def waiting(self) -> int:
        """How many jobs wait."""
        return int(self._db.execute("SELECT count(*) FROM jobs WHERE state = ?", (_WAITING,)).fetchone()[0])

    def running(self) -> list[tuple[str, int]]:
        """Ids and tries of the jobs that run; after a start: of those that ran when the process ended."""
        return self._db.execute("SELECT id, tries FROM jobs WHERE state = ? ORDER BY number", (_RUNNING,)).fetchall()

    def owners(self) -> list[tuple[str, str]]:
        """Ids and owners of the jobs that are not over."""
        return self._db.execute("SELECT id, owner FROM jobs WHERE NOT over").fetchall()

    def inputs(self, job_id: str) -> bytes | None:
        """What a job is made from; None where it is over, or its inputs were in memory only."""
        row = self._db.execute("SELECT body FROM inputs WHERE id = ?", (job_id,)).fetchone()
        return row[0] if row else None

    def without_inputs(self) -> list[str]:
        """Jobs that are not over and cannot be done, since their inputs were in memory only."""
        rows = self._db.execute("SELECT id FROM jobs WHERE NOT over AND id NOT IN (SELECT id FROM inputs)")
        return [row[0] for row in rows.fetchall()]

    def expired(self, now: float) -> list[str]:
        """Jobs that have waited too long."""
        rows = self._db.execute("SELECT id FROM jobs WHERE state = ? AND expires <= ?", (_WAITING, now))
        return [row[0] for row in rows.fetchall()]

    def remove_old(self, now: float) -> int:
        """Remove the jobs whose result was kept long enough, images that belong to nothing, and what is left of inputs.

        Returns:
            How many jobs were removed.
        """
        old = "SELECT id FROM jobs WHERE over AND told AND expires <= ?"
        for (job_id,) in self._db.execute(old, (now,)).fetchall():
            self.images.remove(job_id)  # first: on a disk that is full, nothing is written before there is room
        removed = self._remove(old, (now,))
        known = {row[0] for row in self._db.execute("SELECT id FROM jobs WHERE over")}
        for job_id in self.images.ids() - known:
            self.images.remove(job_id)
        self._db.wipe()
        return removed

    def _remove(self, which: str, values: tuple[Any, ...]) -> int:
        with self._db.transaction():
            old = self._db.execute(which, values).fetchall()
            for job in old:
                self._db.execute("DELETE FROM jobs WHERE id = ?", job)
                self._db.execute("DELETE FROM events WHERE id = ?", job)
                self._db.execute("DELETE FROM inputs WHERE id = ?", job)
                self._db.execute("DELETE FROM terms WHERE id = ?", job)
                self._db.execute("DELETE FROM outcomes WHERE id = ?", job)
                self._db.execute("DELETE FROM keys WHERE id = ?", job)
        return len(old)

    def _finish(
        self, job_id: str, state: JobState, events: Iterable[dict[str, Any]], result: StoredResult | None,
        error: dict[str, Any] | None, *, now: float, ttl: float,
    ) -> JobState | None:  # fmt: skip
        with self._db.transaction(durable=True):
            return self._end(job_id, state, events, result, error, now=now, ttl=ttl)

    def _end(
        self, job_id: str, state: JobState, events: Iterable[dict[str, Any]], result: StoredResult | None,
        error: dict[str, Any] | None, *, now: float, ttl: float,
    ) -> JobState | None:  # fmt: skip
        """``_finish`` within a transaction."""
        row = self._db.execute("SELECT state, endpoint, keep, dies FROM jobs WHERE id = ? AND NOT over", (job_id,))
        if (found := row.fetchone()) is None:
            return None
        before, endpoint, keep, dies = found
        self._append(job_id, events)
        expires = now + (ttl if keep is None else min(keep, ttl))
        if dies is not None:
            expires = min(expires, max(dies, now + _LEAST_KEPT))
        self._db.execute(
            "UPDATE jobs SET state = ?, finished = ?, expires = ? WHERE id = ?", (state.value, now, expires, job_id)
        )
        if not endpoint or state not in RETRIABLE:
            self._db.execute("DELETE FROM inputs WHERE id = ?", (job_id,))
        outcome = (msgspec.json.encode(result) if result else None, msgspec.json.encode(error) if error else None)
        self._db.execute("INSERT INTO outcomes VALUES (?, ?, ?)", (job_id, *outcome))
        return JobState(before)

    def _append(self, job_id: str, events: Iterable[dict[str, Any]]) -> None:
        for body in events:
            self._db.execute(
                "INSERT INTO events SELECT id, 1 + (SELECT coalesce(max(seq), 0) FROM events WHERE id = jobs.id), ?"
                " FROM jobs WHERE id = ? AND NOT over",
                (msgspec.json.encode(body), job_id),
            )

    def _by_key(self, key: str) -> Accepted | None:
        row = self._db.execute("SELECT id, digest FROM keys WHERE key = ?", (key,)).fetchone()
        entry = self._get(row[0], missing_ok=True) if row else None
        return Accepted(entry, False, row[1]) if entry else None

    def _get(self, job_id: str, *, missing_ok: bool = False) -> Any:
        row = self._db.execute(SELECT + "WHERE id = ?", (job_id,)).fetchone()
        if row is None:
            if missing_ok:
                return None
            raise KeyError(job_id)
        position = None
        if row[3] == _WAITING:
            (before,) = self._db.execute(
                "SELECT count(*) FROM jobs WHERE state = ? AND (priority > ? OR (priority = ? AND number < ?))",
                (_WAITING, row[4], row[4], row[0]),
            ).fetchone()
            position = before + 1
        entry = entry_of(row)._replace(position=position, terms=self._terms(job_id))
        outcome = self._db.execute("SELECT result, error FROM outcomes WHERE id = ?", (job_id,)).fetchone()
        if outcome is None:
            return entry
        result, error = outcome
        return entry._replace(
            result=msgspec.json.decode(result, type=StoredResult) if result else None,
            error=msgspec.json.decode(error) if error else None,
        )

    def _terms(self, job_id: str) -> Terms:
        row = self._db.execute("SELECT body FROM terms WHERE id = ?", (job_id,)).fetchone()
        return msgspec.json.decode(row[0], type=Terms) if row else NATIVE
