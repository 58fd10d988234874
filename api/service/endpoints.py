"""What RunPod's routes ask of the store beside what native jobs do: its queue by endpoint, once more, the stream."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import msgspec

from api.service.entries import Entry
from api.service.jobs import JobState
from api.service.store import RETRIABLE, Store

_WAITING = JobState.IN_QUEUE.value


class Counts(NamedTuple):
    """Jobs of an endpoint that are known.

    Attributes:
        states: how many there are in each state.
        retried: how often one was sent once more.
    """

    states: dict[JobState, int]
    retried: int


class EndpointStore(Store):
    """A store that knows of endpoints: words in the addresses of RunPod's routes that tell queues apart."""

    def counts(self, endpoint: str, owner: str) -> Counts:
        """How many jobs an owner has at an endpoint."""
        rows = self._db.execute(
            "SELECT state, count(*), sum(retries) FROM jobs WHERE endpoint = ? AND owner = ? GROUP BY state",
            (endpoint, owner),
        ).fetchall()
        return Counts({JobState(state): number for state, number, _ in rows}, sum(retried for *_, retried in rows))

    def purge(
        self, endpoint: str, owner: str, error: dict[str, Any], events: Iterable[dict[str, Any]], **times: float
    ) -> list[str]:
        """Cancel what waits at an endpoint, and nothing that runs.

        Args:
            endpoint: its word.
            owner: whose jobs.
            error: the ``$error`` of each.
            events: the last ones of each.
            times: as ``complete`` has them.

        Returns:
            The ids of those that waited.
        """
        last = list(events)
        with self._db.transaction(durable=True):
            rows = self._db.execute(
                "SELECT id FROM jobs WHERE endpoint = ? AND owner = ? AND state = ? ORDER BY number",
                (endpoint, owner, _WAITING),
            ).fetchall()
            for (job_id,) in rows:
                self._end(job_id, JobState.CANCELLED, last, None, error, **times)
        return [row[0] for row in rows]

    def retry(self, job_id: str, events: Iterable[dict[str, Any]], *, now: float, ttl: float) -> bool:
        """Let a job that failed or ran out of time wait again, as if it had just come.

        Its old events make room for the new ones, whose numbers go on.

        Args:
            events: the first ones.
            now: when it is.
            ttl: seconds that it may wait.

        Returns:
            Whether it waits now.
        """
        with self._db.transaction(durable=True):
            found = self._db.execute(
                "SELECT state, endpoint FROM jobs WHERE id = ? AND id IN (SELECT id FROM inputs)", (job_id,)
            ).fetchone()
            if found is None or JobState(found[0]) not in RETRIABLE or not found[1]:
                return False
            terms = self._terms(job_id)
            self._db.execute(
                "UPDATE jobs SET state = ?, created = ?, started = NULL, finished = NULL, tries = 0, expires = ?,"
                " dies = ?, told = ?, retries = retries + 1 WHERE id = ?",
                (_WAITING, now, now + ttl, None if terms.ttl is None else now + terms.ttl, not terms.webhook, job_id),
            )
            self._db.execute("DELETE FROM outcomes WHERE id = ?", (job_id,))
            self._append(job_id, events)
            self._db.execute(
                "DELETE FROM events WHERE id = ? AND seq <= (SELECT max(seq) FROM events WHERE id = ?) - ?",
                (job_id, job_id, len(list(events))),
            )
            return True

    def stream(self, job_id: str) -> tuple[Entry | None, list[dict[str, Any]]]:
        """A job as it is now, and those of its events that no call of this has given yet."""
        with self._db.transaction():
            rows = self._db.execute(
                "SELECT seq, body FROM events WHERE id = ? AND seq > (SELECT streamed FROM jobs WHERE jobs.id = ?)"
                " ORDER BY seq",
                (job_id, job_id),
            ).fetchall()
            if rows:
                self._db.execute("UPDATE jobs SET streamed = ? WHERE id = ?", (rows[-1][0], job_id))
            return self.get(job_id), [msgspec.json.decode(body) for _, body in rows]

    def to_tell(self) -> list[str]:
        """Jobs that are over and whose webhooks have not been told, the first to end first."""
        rows = self._db.execute("SELECT id FROM jobs WHERE NOT told AND over ORDER BY finished").fetchall()
        return [row[0] for row in rows]

    def told(self, job_id: str, finished: float | None) -> None:
        """Note that the webhook of a job has been told that it ended then, and not of an end since."""
        with self._db.transaction(durable=True):
            self._db.execute("UPDATE jobs SET told = 1 WHERE id = ? AND over AND finished IS ?", (job_id, finished))
