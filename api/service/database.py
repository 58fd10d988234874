"""An SQLite database in STATE_DIR: whose it is, how an older one becomes a new one, when a commit is on the disk."""

from __future__ import annotations

import contextlib
import fcntl
import os
import sqlite3
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from api.settings import SettingsError


class Layout(NamedTuple):
    """What a database holds.

    Attributes:
        name: of its file.
        version: of the layout; files of earlier ones are brought up to it.
        tables: SQL that makes them, as they were in version 1, where they are not there.
        in_memory: SQL that takes what clients sent or got into memory.
        added: columns that came later, by table.
        indexes: SQL that makes them, over such columns.
    """

    name: str
    version: int
    tables: str
    in_memory: str
    added: Mapping[str, Mapping[str, str]] = MappingProxyType({})
    indexes: str = ""


class Database:
    """A folder and the database in it, for one process.

    Args:
        folder: made if it is not there.
        layout: what is in it.
        persist_inputs: False keeps what clients sent or got out of the folder.
    """

    def __init__(self, folder: Path, layout: Layout, *, persist_inputs: bool) -> None:
        self._folder = folder
        self._layout = layout
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
            message = (
                f"{said}: its {self._layout.name} cannot be used ({fault}); move it away to start without what it holds"
            )
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

    def wipe(self) -> None:
        """Have what was deleted leave the log as well; until then it may be read there."""
        before = self.execute("PRAGMA busy_timeout").fetchone()[0]
        self.execute("PRAGMA busy_timeout = 0")  # somebody who reads it from outside is not waited for
        try:
            self.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
        finally:
            self.execute(f"PRAGMA busy_timeout = {before}")

    def _connect(self) -> None:
        # opened by one thread and used by another, never by two at once
        layout = self._layout
        path = self._folder / layout.name
        self._connection = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
        path.chmod(0o600)
        for pragma in ("journal_mode = WAL", "synchronous = FULL", "temp_store = MEMORY", "secure_delete = ON"):
            self.execute(f"PRAGMA {pragma}").fetchall()
        (version,) = self.execute("PRAGMA user_version").fetchone()
        if not 0 <= version <= layout.version:
            later = f"it was made by a later version of this server: {version}, not {layout.version}"
            raise sqlite3.DatabaseError(later)
        self._connection.executescript(layout.tables)
        # one that is cut off here is gone on with at the next start
        for table, columns in layout.added.items():
            there = {row[1] for row in self.execute(f"PRAGMA table_xinfo({table})")}
            for name, kind in columns.items():
                if name not in there:
                    self.execute(f"ALTER TABLE {table} ADD COLUMN {name} {kind}")
        self._connection.executescript(layout.indexes)
        self.execute(f"PRAGMA user_version = {layout.version}")
        if not self._persist:
            self._connection.executescript(layout.in_memory)

    def _unlock(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None
