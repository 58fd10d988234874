"""Memory that processes share, and the sockets by which they hear of it. Imports next to nothing."""

from __future__ import annotations

import fcntl
import logging
import mmap
import os
import socket

log = logging.getLogger("api.host")

NAME = "host-tier"
"""What the memory is called in ``/proc/PID/maps`` and ``/proc/PID/fd``."""


def new_memory(size: int) -> int:
    """A descriptor of memory (memfd_create(2)), which is never shorter or longer than it is now.

    It needs no room in /dev/shm, counts as the container's, and lives as long as a descriptor or mapping of it.

    Args:
        size: bytes.

    Raises:
        OSError: there are no descriptors.
    """
    descriptor = os.memfd_create(NAME, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(descriptor, size)
        fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def is_possible() -> bool:
    """Whether this kernel has such memory."""
    try:
        os.close(new_memory(mmap.PAGESIZE))
    except (OSError, AttributeError) as fault:
        log.warning("workers cannot share weights: %s; each gets an equal part of RAM_LIMIT", fault)
        return False
    return True


def pair() -> tuple[socket.socket, socket.socket]:
    """The keeper's and a worker's end of a connection."""
    return socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
