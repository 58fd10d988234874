"""What each key has had of the server: kept in STATE_DIR, so that a restart does not forget it."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import time
from pathlib import Path
from typing import Any

import msgspec

from api.errors import ApiError
from api.schema.generation import GenerationResult

log = logging.getLogger("api.usage")

_EVERY = 30.0
"""Seconds between two writes: what is lost where the process is killed."""
_NOT_ITS_OWN = frozenset({"QUEUE_FULL", "NOT_READY"})
"""The server could not: the request was not run, and a job for later comes again."""


class Used(msgspec.Struct):
    """What one key has had.

    Attributes:
        requests: jobs that came to their end, well or not.
        images: that were made.
        device_seconds: for which its jobs were computed; those that share the device are each counted in full.
        load_seconds: for which models were loaded for its jobs.
        failures: jobs that failed or took too long; cancelled ones are none.
    """

    requests: int = 0
    images: int = 0
    device_seconds: float = 0.0
    load_seconds: float = 0.0
    failures: int = 0


class _Book(msgspec.Struct):
    since: float
    keys: dict[str, Used]


class Usage:
    """Counts, and writes what it counted now and then.

    Args:
        folder: STATE_DIR.

    Attributes:
        since: when it began to count, seconds since the epoch.
    """

    def __init__(self, folder: Path) -> None:
        self._file = folder / "usage.json"
        self.since = time.time()
        self._keys: dict[str, Used] = {}
        self._changed = False
        self._writing: asyncio.Task[None] | None = None

    def load(self) -> None:
        """Go on where the last process ended. A file that cannot be read is put aside, and counting begins anew."""
        try:
            book = msgspec.json.decode(self._file.read_bytes(), type=_Book)
        except FileNotFoundError:
            return
        except (OSError, msgspec.MsgspecError) as fault:
            log.error("%s cannot be read and is put aside: %s", self._file, fault)
            with contextlib.suppress(OSError):
                self._file.replace(self._file.with_suffix(".broken"))
            return
        self.since, self._keys = book.since, book.keys

    def start(self) -> None:
        """Begin to write."""
        self._writing = asyncio.get_running_loop().create_task(self._write_for_ever())

    async def stop(self) -> None:
        """Write what there is."""
        if self._writing:
            self._writing.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._writing
            await self._write()

    def note(self, owner: str, outcome: GenerationResult | ApiError, images: int = 0) -> None:
        """Count a job that is over.

        Args:
            owner: whose it was.
            outcome: how it ended.
            images: how many it made.
        """
        if isinstance(outcome, ApiError) and outcome.code in _NOT_ITS_OWN:
            return
        used = self._keys.setdefault(owner, Used())
        used.requests += 1
        if isinstance(outcome, ApiError):
            used.failures += outcome.code != "CANCELLED"
        else:
            used.images += images
            used.device_seconds += outcome.timings.get("inference", 0) / 1000
            used.load_seconds += outcome.timings.get("loadModel", 0) / 1000
        self._changed = True

    def of(self, owner: str) -> dict[str, Any]:
        """What one key has had."""
        return {"owner": owner, **_told(self._keys.get(owner, Used()))}

    def snapshot(self) -> list[dict[str, Any]]:
        """What each key has had: ``owner`` and the attributes of ``Used``."""
        return [self.of(owner) for owner in self._keys]

    async def _write_for_ever(self) -> None:
        while True:
            await asyncio.sleep(_EVERY)
            await self._write()

    async def _write(self) -> None:
        if not self._changed:
            return
        self._changed = False
        data = msgspec.json.encode(_Book(self.since, self._keys))
        try:
            await asyncio.to_thread(self._replace, data)
        except OSError as fault:
            self._changed = True
            log.error("what was used cannot be written to %s, which is tried again: %s", self._file, fault)

    def _replace(self, data: bytes) -> None:
        part = self._file.with_suffix(".part")
        with part.open("wb") as out:
            out.write(data)
            out.flush()
            os.fsync(out.fileno())
        part.replace(self._file)


def _told(used: Used) -> dict[str, Any]:
    fields = msgspec.structs.asdict(used)
    return {name: round(value, 3) if isinstance(value, float) else value for name, value in fields.items()}
