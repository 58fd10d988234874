"""What the operating system says and is told about files: faults as errors of ours, space, write-back.

Sources: Linux manual pages fallocate(2), sync_file_range(2).
"""

from __future__ import annotations

import ctypes
import errno
import os
import sys
from collections.abc import Callable
from pathlib import Path

from api.errors import ApiError

_START_WRITING = 2  # SYNC_FILE_RANGE_WRITE


def disk_fault(fault: OSError, folder: Path) -> Exception:
    """The error to raise for an operating system's error in writing: DISK_FULL, or the same again."""
    if fault.errno in (errno.ENOSPC, errno.EDQUOT):
        return ApiError("DISK_FULL", f"There is no space left for {folder.name}; remove models, or set VOLUME_LIMIT.")
    return fault


def _libc(name: str, *types: type[ctypes.c_int] | type[ctypes.c_int64]) -> Callable[..., int]:
    """A function of the C library; where it is not there, one that fails as an old kernel does."""
    try:
        if sys.maxsize < 2**32:
            raise AttributeError  # off_t may have 32 bits
        function = getattr(ctypes.CDLL(None, use_errno=True), name)
    except (AttributeError, OSError):
        return lambda *arguments: ctypes.set_errno(errno.ENOSYS) or -1
    function.argtypes, function.restype = types, ctypes.c_int
    return function  # type: ignore[no-any-return]


_fallocate = _libc("fallocate", ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
_sync_file_range = _libc("sync_file_range", ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_int)


def reserve(fd: int, size: int) -> None:
    """Make a file ``size`` bytes long, with its space set aside where the file system can do that.

    Not ``os.posix_fallocate``: where the file system cannot (NFSv3, FUSE), that writes into every block.

    Raises:
        OSError: ENOSPC or EDQUOT where the space is not there.
    """
    os.ftruncate(fd, size)
    if size and _fallocate(fd, 0, 0, size) and ctypes.get_errno() in (errno.ENOSPC, errno.EDQUOT):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def start_writing(fd: int, offset: int, count: int) -> None:
    """Have the kernel begin to write these bytes to the disk, so that a later fsync finds little to do.

    Promises nothing, and leaves the bytes in the page cache.
    """
    _sync_file_range(fd, offset, count, _START_WRITING)
