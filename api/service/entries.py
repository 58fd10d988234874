"""What is known of a job for later: how it was accepted, where it stands, how it ended."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import msgspec

from api.service.jobs import JobState

SELECT = (
    "SELECT number, id, request_id, state, priority, created, started, finished, tries, owner, endpoint, retries"
    " FROM jobs "
)
"""Rows as ``entry_of`` takes them."""


class Terms(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What was agreed on with a job beside its inputs.

    Attributes:
        owner: name of the API key that it came with; empty: none was needed.
        endpoint: word in the address of RunPod's routes that it came to; empty: a native job.
        sync: it came by ``runsync``.
        simple: its input had the simple form.
        webhook: where its end is to be told; empty: nowhere.
        execution_timeout: seconds that it may run; None: as the server has it.
        ttl: seconds that it may wait, and for which it is known at most; None: as the server has it.
        keep: seconds that its result is kept; None: as the server has it.
    """

    owner: str = ""
    endpoint: str = ""
    sync: bool = False
    simple: bool = False
    webhook: str = ""
    execution_timeout: float | None = None
    ttl: float | None = None
    keep: float | None = None


NATIVE = Terms()


class StoredResult(msgspec.Struct):
    """A result without its images."""

    meta: dict[str, Any]
    timings: dict[str, int]
    mem_usage: float
    nsfw: list[bool] | None
    images: int
    extension: str
    extras: dict[str, bytes] = {}
    urls: list[str] = []


class Entry(NamedTuple):
    """A job as it is known. Times are seconds since the epoch.

    Attributes:
        number: counts up in the order in which jobs were accepted.
        position: 1 for the job whose turn is next; None unless it waits.
        result: of a COMPLETED job.
        error: the ``$error`` of one that ended otherwise.
        owner: as ``Terms.owner``.
        endpoint: as ``Terms.endpoint``.
        retries: how often it was sent once more after it had failed.
        terms: of a job of RunPod's routes.
    """

    number: int
    id: str
    request_id: str
    state: JobState
    priority: int
    created: float
    started: float | None
    finished: float | None
    tries: int
    owner: str
    endpoint: str
    retries: int
    position: int | None = None
    result: StoredResult | None = None
    error: dict[str, Any] | None = None
    terms: Terms = NATIVE


class Accepted(NamedTuple):
    """What became of a request to accept a job.

    Attributes:
        entry: the job; where the key was known, the one that it stands for.
        is_new: whether it was accepted just now.
        digest: what the job was accepted with.
    """

    entry: Entry
    is_new: bool
    digest: str


class Turn(NamedTuple):
    """A job whose turn it is."""

    id: str
    request_id: str
    tries: int
    inputs: bytes
    terms: Terms = NATIVE


def entry_of(row: Sequence[Any]) -> Entry:
    """The job of a row of ``SELECT``, without what other tables say of it."""
    number, job_id, request_id, state, *rest = row
    return Entry(number, job_id, request_id, JobState(state), *rest)
