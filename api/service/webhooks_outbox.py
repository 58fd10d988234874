"""The webhooks that have not arrived: an SQLite database in STATE_DIR/webhooks. One thread at a time.

What was given to it is on the disk when ``add`` returns. That one has arrived is only committed: after a power cut it
might be sent once more, which receivers see by its id.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from api.service.database import Database, Layout
from api.service.webhooks_lines import Waiting

_COLUMNS = """(
  number INTEGER PRIMARY KEY AUTOINCREMENT,
  id TEXT NOT NULL UNIQUE,
  kind TEXT NOT NULL,
  job TEXT NOT NULL,
  url TEXT NOT NULL,
  owner TEXT NOT NULL,
  body BLOB NOT NULL,
  sign_key TEXT NOT NULL,
  created REAL NOT NULL,
  due REAL NOT NULL,
  tries INTEGER NOT NULL DEFAULT 0,
  error TEXT,
  given_up REAL
)"""
_TABLES = f"CREATE TABLE IF NOT EXISTS webhooks {_COLUMNS};"
_MOVED = """
BEGIN IMMEDIATE;
INSERT INTO temp.webhooks SELECT * FROM main.webhooks;
DELETE FROM main.webhooks;
COMMIT;
PRAGMA wal_checkpoint(TRUNCATE);
"""
_LAYOUT = Layout("webhooks.sqlite3", 1, _TABLES, f"CREATE TEMP TABLE webhooks {_COLUMNS};{_MOVED}")
_KEPT, _KEPT_FOR = 1000, 7 * 86400.0
"""How many that were given up are kept, and for how many seconds."""
STATES = ("waiting", "failed")
_WHERE = {"waiting": "given_up IS NULL", "failed": "given_up IS NOT NULL", None: "1"}
_SELECT = "SELECT id, kind, job, url, owner, created, due, tries, error, given_up FROM webhooks "


class New(NamedTuple):
    """A webhook that is to be sent.

    Attributes:
        id: as the receiver is told it.
        kind: ``native`` or ``runpod``.
        job: whose it is.
        url: the receiver.
        owner: name of the API key that the job came with.
        body: JSON.
        sign_key: what it is signed with; empty: the server's.
        created: seconds since the epoch.
        refused: why it is not sent; empty: it is.
    """

    id: str
    kind: str
    job: str
    url: str
    owner: str
    body: bytes
    sign_key: str
    created: float
    refused: str = ""


class Entry(NamedTuple):
    """A webhook that has not arrived, as it is told of. Times are seconds since the epoch.

    Attributes:
        error: why the last try did not succeed.
        given_up: when; None: it waits.
    """

    id: str
    kind: str
    job: str
    url: str
    owner: str
    created: float
    due: float
    tries: int
    error: str | None
    given_up: float | None


class Outbox:
    """Webhooks on disk.

    Args:
        folder: made if it is not there.
        persist: False keeps all of it in memory.
    """

    def __init__(self, folder: Path, *, persist: bool) -> None:
        self._db = Database(folder, _LAYOUT, persist_inputs=persist)

    def open(self) -> None:
        """Take the folder for this process.

        Raises:
            SettingsError: it cannot be used, or another server uses it.
        """
        self._db.open()

    def close(self) -> None:
        """Let the folder go. Does nothing where it is not open."""
        self._db.close()

    def add(self, webhooks: Sequence[New], *, durable: bool) -> list[int]:
        """Take some in, in their order.

        Args:
            webhooks: which.
            durable: they survive a power cut as well, not only the end of this process.

        Returns:
            Their numbers.
        """
        numbers = []
        with self._db.transaction(durable=durable):
            for new in webhooks:
                cursor = self._db.execute(
                    "INSERT INTO webhooks (id, kind, job, url, owner, body, sign_key, created, due, error, given_up)"
                    " VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
                    (*new[:8], new.created, new.refused or None, new.created if new.refused else None),
                )
                numbers.append(int(cursor.lastrowid or 0))
        return numbers

    def waiting(self) -> list[Waiting]:
        """All that are to be sent, in their order."""
        rows = self._db.execute(
            "SELECT number, id, url, job, created, due, tries FROM webhooks WHERE given_up IS NULL ORDER BY number"
        )
        return [
            Waiting(number=number, id=id_, url=url, job=job, created=created, due=due, tries=tries)
            for number, id_, url, job, created, due, tries in rows.fetchall()
        ]

    def body(self, number: int) -> tuple[bytes, str]:
        """What is sent, and what it is signed with."""
        row = self._db.execute("SELECT body, sign_key FROM webhooks WHERE number = ?", (number,)).fetchone()
        if row is None:
            raise KeyError(number)
        return row[0], row[1]

    def arrived(self, number: int) -> None:
        """One has arrived: nothing is kept of it."""
        with self._db.transaction():
            self._db.execute("DELETE FROM webhooks WHERE number = ?", (number,))

    def failed(self, event: Waiting, error: str) -> None:
        """One is tried again, when it is due."""
        with self._db.transaction():
            self._db.execute(
                "UPDATE webhooks SET tries = ?, due = ?, error = ? WHERE number = ?",
                (event.tries, event.due, error, event.number),
            )

    def give_up(self, events: Sequence[Waiting], error: str, now: float) -> None:
        """Send some no more.

        Args:
            events: which.
            error: why.
            now: seconds since the epoch.
        """
        with self._db.transaction(durable=True):
            for event in events:
                self._db.execute(
                    "UPDATE webhooks SET tries = ?, error = ?, given_up = ? WHERE number = ?",
                    (event.tries, error, now, event.number),
                )

    def get(self, webhook_id: str) -> Entry | None:
        """One that has not arrived."""
        row = self._db.execute(_SELECT + "WHERE id = ?", (webhook_id,)).fetchone()
        return Entry(*row) if row else None

    def newest(self, state: str | None, owner: str | None, limit: int) -> list[Entry]:
        """Those that have not arrived, newest first.

        Args:
            state: one of ``STATES``; None: all.
            owner: only those of this one; None: everybody's.
            limit: how many, at most.
        """
        where, values = _WHERE[state], list[Any]()
        if owner is not None:
            where += " AND owner = ?"
            values = [owner]
        rows = self._db.execute(_SELECT + f"WHERE {where} ORDER BY number DESC LIMIT ?", [*values, limit])
        return [Entry(*row) for row in rows.fetchall()]

    def send_again(self, webhook_id: str, now: float) -> Waiting | None:
        """Have one that was given up wait again, as if it were new.

        Returns:
            It; None where there is none that was given up.
        """
        with self._db.transaction(durable=True):
            row = self._db.execute(
                "UPDATE webhooks SET given_up = NULL, tries = 0, created = ?, due = ?"
                " WHERE id = ? AND given_up IS NOT NULL RETURNING number, url, job",
                (now, now, webhook_id),
            ).fetchone()
        if row is None:
            return None
        return Waiting(number=row[0], id=webhook_id, url=row[1], job=row[2], created=now, due=now)

    def remove_old(self, now: float) -> None:
        """Forget those that were given up long ago, or that are too many."""
        with self._db.transaction():
            self._db.execute("DELETE FROM webhooks WHERE given_up < ?", (now - _KEPT_FOR,))
            self._db.execute(
                "DELETE FROM webhooks WHERE given_up IS NOT NULL AND number NOT IN"
                " (SELECT number FROM webhooks WHERE given_up IS NOT NULL ORDER BY given_up DESC, number DESC LIMIT ?)",
                (_KEPT,),
            )
