"""How the database of the jobs for later is laid out."""

from __future__ import annotations

from api.service.database import Layout

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
_INDEXES = "CREATE INDEX IF NOT EXISTS jobs_to_tell ON jobs (finished) WHERE NOT told"
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
JOBS = Layout("jobs.sqlite3", 2, _TABLES, _IN_MEMORY, {"jobs": _ADDED}, _INDEXES)
