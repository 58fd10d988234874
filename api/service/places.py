"""Which jobs for later count for their keys: from when they are taken in until they are over, also over a restart."""

from __future__ import annotations

from collections.abc import Iterable

from api.service.limits import Limits


class Places:
    """The places that keys have taken for their jobs.

    Args:
        limits: how many jobs a key may have.
    """

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._owners: dict[str, str] = {}

    def take(self, owner: str) -> None:
        """Take a place for a job that has no id yet; ``keep`` or ``give_back`` follows.

        Raises:
            ApiError: TOO_MANY_JOBS, RATE_LIMITED.
        """
        self._limits.take(owner)

    def give_back(self, owner: str) -> None:
        """There is no such job after all."""
        self._limits.release(owner)

    def keep(self, job_id: str, owner: str) -> None:
        """The place that was taken is this job's, until ``leave``."""
        self._owners[job_id] = owner

    def leave(self, job_id: str) -> None:
        """A job is over."""
        if (owner := self._owners.pop(job_id, None)) is not None:
            self._limits.release(owner)

    def recover(self, owners: Iterable[tuple[str, str]]) -> None:
        """Count what an earlier process took in; they have their places, however many there may be.

        Args:
            owners: ids and owners of the jobs that are not over. May be called again.
        """
        for job_id, owner in owners:
            if job_id not in self._owners:
                self._limits.count(owner)
                self.keep(job_id, owner)
