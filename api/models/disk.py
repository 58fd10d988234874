"""Faults of the disk as errors of ours."""

from __future__ import annotations

import errno
from pathlib import Path

from api.errors import ApiError


def disk_fault(fault: OSError, folder: Path) -> Exception:
    """The error to raise for an operating system's error in writing: DISK_FULL, or the same again."""
    if fault.errno in (errno.ENOSPC, errno.EDQUOT):
        return ApiError("DISK_FULL", f"There is no space left for {folder.name}; remove models, or set VOLUME_LIMIT.")
    return fault
