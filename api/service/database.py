"""The SQLite database in STATE_DIR: whose it is, how it is laid out, when a commit is on the disk."""

from __future__ import annotations

import contextlib
import fcntl
import os
import sqlite3
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from api.settings import SettingsError

_VERSION = 2
_TABLES = """
CREATE TABLE IF NOT EXISTS jobs (
  number INTEGER PRIMARY KEY AUTOINCREMENT,
  id TEXT NOT NULL UNIQUE,
  request_id TEXT NOT NULL,
  state TEXT NOT NULL
    CHECK (state IN ('IN_QUEUE', 'IN_PROGRESS', 'COMPLETED', 'FAILED', 'CANCELLED', 'TIMED_OUT')),
  over INTEGER GENERATED ALWAYS AS (state IN ('COMPLETED', 'FAILED', 'CANCELLED', 'TIMED_OUT')) STORED,
  priority INTEGER NOT NULL,
  created REAL NOT NULL,
  started REAL,
  finished REAL,
  tries INTEGER NOT NULL DEFAULT 0,
  expires REAL NOT NULL
);
CREATE INDEX IF NOT EXISTS jobs_by_turn ON jobs (state, priority DESC, number);
CREATE TABLE IF NOT EXISTS events (
  id TEXT NOT NULL, seq INTEGER NOT NULL, body BLOB NOT NULL, PRIMARY KEY (id, seq)
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS inputs (id TEXT PRIMARY KEY, body BLOB NOT NULL);
CREATE TABLE IF NOT EXISTS terms (id TEXT PRIMARY KEY, body BLOB NOT NULL);
CREATE TABLE IF NOT EXISTS outcomes (id TEXT PRIMARY KEY, result BLOB, error BLOB);
CREATE TABLE IF NOT EXISTS keys (key TEXT PRIMARY KEY, id TEXT NOT NULL, digest TEXT NOT NULL);
"""
_ADDED = {
    "owner": "TEXT NOT NULL DEFAULT ''",
    "endpoint": "TEXT NOT NULL DEFAULT ''",
    "retries": "INTEGER NOT NULL DEFAULT 0",
    "keep": "REAL",
    "dies": "REAL",
    "told": "INTEGER NOT NULL DEFAULT 1",
    "streamed": "INTEGER NOT NULL DEFAULT 0",
}
"""Columns of jobs since version 2: seconds that the result is kept, and when the job is to be forgotten, where it says
so itself; whether its end was told to its webhook; the last event that went into its stream."""
_INDEX = "CREATE INDEX IF NOT EXISTS jobs_to_tell ON jobs (finished) WHERE NOT told"
_IN_MEMORY = """
CREATE TEMP TABLE inputs (id TEXT PRIMARY KEY, body BLOB NOT NULL);
CREATE TEMP TABLE terms (id TEXT PRIMARY KEY, body BLOB NOT NULL);
CREATE TEMP TABLE outcomes (id TEXT PRIMARY KEY, result BLOB, error BLOB);
CREATE TEMP TABLE keys (key TEXT PRIMARY KEY, id TEXT NOT NULL, digest TEXT NOT NULL);
BEGIN IMMEDIATE;
INSERT INTO temp.inputs SELECT * FROM main.inputs;
INSERT INTO temp.terms SELECT * FROM main.terms;
INSERT INTO temp.keys SELECT * FROM main.keys;
DELETE FROM main.inputs;
DELETE FROM main.terms;
DELETE FROM main.outcomes;
DELETE FROM main.keys;
COMMIT;
PRAGMA wal_checkpoint(TRUNCATE);
"""
"""The tables that hold what clients sent or got, in memory; a name without a schema means the temporary table.
What an earlier start left on the disk is still done, but does not stay there."""


class Database:
    """A folder and the database in it, for one process.

    Args:
        folder: made if it is not there.
        persist_inputs: False keeps what clients sent or got out of the folder.
    """

    def __init__(self, folder: Path, *, persist_inputs: bool) -> None:
        self._folder = folder
        self._persist = persist_inputs
        self._lock: int | None = None
        self._connection: sqlite3.Connection

    def open(self) -> None:
        """Take the folder, and open the database. Does nothing where it is open.

        Raises:
            SettingsError: the folder cannot be used, or another server uses it.
        """
        if self._lock is not None:
            return
        said = f"STATE_DIR={str(self._folder)!r}"
        try:
            self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            self._lock = os.open(self._folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._connect()
        except BlockingIOError:
            self._unlock()
            raise SettingsError(f"{said}: another server uses this folder; give each server one of its own") from None
        except OSError as fault:
            self._unlock()
            why = fault.strerror or fault
            raise SettingsError(f"{said}: {why}; set it to a folder that can be written to") from None
        except sqlite3.Error as fault:
            self._unlock()
            message = f"{said}: its jobs.sqlite3 cannot be used ({fault}); move it away to start without its jobs"
            raise SettingsError(message) from None

    def close(self) -> None:
        """Let the folder go. Does nothing where it is not open."""
        if self._lock is not None:
            self._connection.close()
            self._unlock()

    def execute(self, statement: str, values: Iterable[Any] = ()) -> sqlite3.Cursor:
        """Run one statement."""
        return self._connection.execute(statement, tuple(values))

    @contextlib.contextmanager
    def transaction(self, *, durable: bool = False) -> Iterator[None]:
        """All or nothing.

        Args:
            durable: on the disk when it ends, so that it survives a power cut as well.
        """
        self.execute("PRAGMA synchronous = FULL" if durable else "PRAGMA synchronous = NORMAL")
        self.execute("BEGIN IMMEDIATE")
        try:
            yield
            self.execute("COMMIT")
        except BaseException:
            if self._connection.in_transaction:
                self.execute("ROLLBACK")
            raise

    def _connect(self) -> None:
        # opened by one thread and used by another, never by two at once
        path = self._folder / "jobs.sqlite3"
        self._connection = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
        path.chmod(0o600)
        for pragma in ("journal_mode = WAL", "synchronous = FULL", "temp_store = MEMORY", "secure_delete = ON"):
            self.execute(f"PRAGMA {pragma}").fetchall()
        (version,) = self.execute("PRAGMA user_version").fetchone()
        if not 0 <= version <= _VERSION:
            raise sqlite3.DatabaseError(f"it was made by a later version of this server: {version}, not {_VERSION}")
        self._connection.executescript(_TABLES)
        # one that is cut off here is gone on with at the next start
        there = {row[1] for row in self.execute("PRAGMA table_xinfo(jobs)")}
        for name, kind in _ADDED.items():
            if name not in there:
                self.execute(f"ALTER TABLE jobs ADD COLUMN {name} {kind}")
        self.execute(_INDEX)
        self.execute(f"PRAGMA user_version = {_VERSION}")
        if not self._persist:
            self._connection.executescript(_IN_MEMORY)

    def _unlock(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None
