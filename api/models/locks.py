"""Locks between processes and threads, which end with their holder however it ends."""

from __future__ import annotations

import errno
import fcntl
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

_NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS)
_POLL = 0.1

_GUARD = threading.Lock()
_THREADS: dict[Path, threading.Lock] = {}


def _thread_lock(path: Path) -> threading.Lock:
    with _GUARD:
        return _THREADS.setdefault(path.absolute(), threading.Lock())


class FileLock:
    """One holder per file, among threads and processes (``flock(2)``; a crash releases it).

    Where the file system gives no locks, it holds among the threads of this process only.
    The file stays when the lock is released: removing it would let two processes lock two files of one name.

    Args:
        path: the lock file; made where it is not there.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.between_processes = False
        """Whether the lock that is held keeps other processes out too."""
        self._thread = _thread_lock(path)
        self._descriptor: int | None = None

    def acquire(self, *, wait: bool = True, on_wait: Callable[[], None] | None = None) -> bool:
        """Take the lock.

        Args:
            wait: until it is free; else only try.
            on_wait: called about ten times a second while waiting; what it raises ends the wait.

        Returns:
            Whether it is held now.

        Raises:
            OSError: the lock file cannot be made.
        """
        # polled, so that a wait can be ended and a holder that a network file system forgot does no harm
        while not self._thread.acquire(timeout=_POLL if wait else 0):
            if not wait:
                return False
            if on_wait:
                on_wait()
        try:
            while not self._lock_file():
                if not wait:
                    self._thread.release()
                    return False
                if on_wait:
                    on_wait()
                time.sleep(_POLL)
        except BaseException:
            self._thread.release()
            raise
        return True

    def _lock_file(self) -> bool:
        descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self.between_processes = True
            # somebody may have removed the file between opening and locking it
            held = os.fstat(descriptor).st_nlink > 0
        except BlockingIOError:
            held = False
        except OSError as fault:
            held, self.between_processes = fault.errno in _NO_LOCKS, False
            if not held:
                os.close(descriptor)
                raise
        if held:
            os.ftruncate(descriptor, 0)  # what the holder before had written
            self._descriptor = descriptor
        else:
            os.close(descriptor)
        return held

    def write_note(self, text: str) -> None:
        """Leave a word for others in the lock file; it counts as long as the lock is held.

        Raises:
            OSError: the disk is full.
        """
        assert self._descriptor is not None
        os.ftruncate(self._descriptor, 0)
        os.pwrite(self._descriptor, text.encode(), 0)

    def release(self) -> None:
        """Give the lock back; harmless when it is not held."""
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is not None:
            os.close(descriptor)
            self._thread.release()


def note_of_holder(path: Path) -> str | None:
    """What the holder of a lock left in its file; None when nobody holds it.

    Without locks between processes only those of this process are seen.
    """
    if not _thread_lock(path).locked():
        lock = FileLock(path)
        if not path.exists() or lock.acquire(wait=False):
            lock.release()
            return None
    try:
        return path.read_text()
    except OSError:
        return None
