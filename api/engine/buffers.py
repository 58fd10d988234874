"""The host's memory for parts that are copied into it: of exact size, in large pages, and used again.

Memory that is new to a process comes in slowly: each page is zeroed, on a virtual machine often fetched from its host,
and for a GPU registered. What one part has left is therefore kept for the next, as far as the budget has room.
"""

from __future__ import annotations

import ctypes
import errno
import logging
import mmap
import os
import threading
import weakref
from collections.abc import Callable

import torch

log = logging.getLogger("api.engine")

PAGE = mmap.PAGESIZE
_SLACK = 8
"""A part may take memory that is larger than it by one part in so many."""

_libc = ctypes.CDLL(None, use_errno=True)
_libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
_libc.mprotect.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)


def buffer(size: int, pin: bool, spare: Spare | None = None) -> torch.Tensor:
    """Bytes of an exact size; torch's own pinned memory is rounded up to a power of two.

    Args:
        size: bytes.
        pin: for a GPU.
        spare: where the memory comes from, and goes back to with the last tensor over it.

    Raises:
        MemoryError: there is no room.
    """
    if not size:
        return torch.empty(0, dtype=torch.uint8)
    if spare is None:
        return torch.frombuffer(Pages.of(size, pin), dtype=torch.uint8)[:size]
    pages = spare.take(size, pin)
    # an object of its own for each use, so that its end is the end of the use and not of the memory
    use = (ctypes.c_char * len(pages)).from_address(address_of(pages))
    weakref.finalize(use, spare.leave, pages).atexit = False
    return torch.frombuffer(use, dtype=torch.uint8)[:size]


class Spare:
    """Memory that parts have left, for those that come.

    Args:
        limit: bytes of the host's memory that parts may take, those that were left included.
    """

    def __init__(self, limit: int = 0) -> None:
        self._limit = limit
        self._used = 0
        self._pages: list[Pages] = []
        self._lock = threading.RLock()  # memory may be left by a collection within any of these lines

    @property
    def bytes(self) -> int:
        """What is kept now."""
        with self._lock:
            return sum(len(pages) for pages in self._pages)

    def fits(self, size: int) -> bool:
        """Whether there is memory for so many bytes, little larger than that."""
        with self._lock:
            return any(_suits(pages, size) for pages in self._pages)

    def take(self, size: int, pin: bool) -> Pages:
        """Memory of at least that size, from what is kept or new.

        Raises:
            MemoryError: there is no room.
        """
        with self._lock:
            found = min((pages for pages in self._pages if _suits(pages, size)), key=len, default=None)
            if found is not None:
                self._pages.remove(found)
                self._count(len(found))
                return found
            size = whole_pages(size)
            self._count(size)  # what it takes the place of goes first
        try:
            return Pages.of(size, pin)
        except BaseException:
            self._count(-size)
            raise

    def leave(self, pages: Pages) -> None:
        """Nobody uses it any more."""
        with self._lock:
            self._pages.append(pages)
            self._count(-len(pages))

    def count(self, part: object, size: int) -> None:
        """Memory of a part that comes from elsewhere, for as long as that part lives."""
        self._count(size)
        weakref.finalize(part, self._count, -size).atexit = False

    def clear(self) -> None:
        """Free all of it."""
        with self._lock:
            self._pages.clear()

    def _count(self, size: int) -> None:
        with self._lock:
            self._used += size
            while self._pages and self._used + sum(len(kept) for kept in self._pages) > self._limit:
                self._pages.pop(0)  # what is kept longest


def _suits(pages: Pages, size: int) -> bool:
    return size <= len(pages) <= size + size // _SLACK + PAGE


class Pages(mmap.mmap):
    """Memory that is known to CUDA until it is freed."""

    release: Callable[[], None] | None = None

    @classmethod
    def of(cls, size: int, pin: bool) -> Pages:
        """New memory.

        Raises:
            MemoryError: there is no room.
        """
        try:
            pages = cls(-1, whole_pages(size), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        except OSError as fault:
            raise MemoryError(f"no room for {size} bytes") from fault
        # to fault in pages of 4 KiB takes longer than to read a file
        advise(pages, 0, len(pages), mmap.MADV_HUGEPAGE)
        if pin:
            pin_pages(pages)
        return pages

    @classmethod
    def over(cls, descriptor: int, size: int, flags: int) -> Pages:
        """The memory behind a descriptor, whole pages of it; ``flags`` as mmap(2) has them.

        Raises:
            MemoryError: there is no room.
        """
        try:
            return cls(descriptor, size, flags=flags, prot=mmap.PROT_READ | mmap.PROT_WRITE)
        except OSError as fault:
            raise MemoryError(f"no room for {size} bytes") from fault

    def __del__(self) -> None:
        if self.release:
            self.release()


def whole_pages(size: int) -> int:
    """Bytes of the pages that so many bytes lie in."""
    return -(-size // PAGE) * PAGE


def address_of(pages: mmap.mmap) -> int:
    """Where it is."""
    return ctypes.addressof(ctypes.c_char.from_buffer(pages))


def advise(pages: mmap.mmap, begin: int, length: int, advice: int) -> int:
    """``madvise`` without the GIL.

    Returns:
        The error's number, 0 for none; what this kernel does not know is none.

    Raises:
        MemoryError: there is no room.
    """
    if _libc.madvise(address_of(pages) + begin, length, advice) == 0:
        return 0
    number = ctypes.get_errno()
    if number == errno.ENOMEM:
        raise MemoryError(f"no room for {length} bytes")
    return 0 if number in (errno.EINVAL, errno.EPERM, errno.EAGAIN) else number


def protect(pages: Pages) -> None:
    """Have whatever writes to this memory from now on end with SIGSEGV.

    Raises:
        OSError: the kernel refuses.
    """
    if _libc.mprotect(address_of(pages), len(pages), mmap.PROT_READ):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def pin_pages(pages: Pages) -> None:
    """Let CUDA copy from this memory by itself; it stays as it is where CUDA refuses, and copies are slower then."""
    address, runtime = address_of(pages), torch.cuda.cudart()
    refusal = int(runtime.cudaHostRegister(address, len(pages), 1))
    if refusal:
        log.warning("%d bytes of host memory cannot be pinned (CUDA error %d)", len(pages), refusal)
        return

    def release() -> None:
        torch.cuda.synchronize()  # a job that was cancelled may have left copies from it behind that are yet to begin
        runtime.cudaHostUnregister(address)

    pages.release = release
