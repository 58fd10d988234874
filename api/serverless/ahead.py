"""Has the system read weights into its page cache while nobody has time for them yet.

A worker imports its libraries for seconds before it reads the first byte; the disk, or the network behind it, has
nothing to do meanwhile. It takes neither memory of ours nor time of a processor.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterable
from pathlib import Path

_CHUNK = 512 * 2**10
"""The kernel reads no more ahead than a device's read-ahead at each call; see force_page_cache_ra, mm/readahead.c."""


def read_ahead(folders: Iterable[str]) -> None:
    """Begin with the weights below these folders, in a thread."""
    threading.Thread(target=_read_all, args=(list(folders),), name="ahead", daemon=True).start()


def _read_all(folders: list[str]) -> None:
    for folder in folders:
        for path in sorted(Path(folder).rglob("*.safetensors")):
            with contextlib.suppress(OSError):
                read(path)


def read(path: Path) -> None:
    """Ask for all of a file; where it is in the page cache this does nothing.

    Raises:
        OSError: it cannot be opened.
    """
    with path.open("rb", buffering=0) as file:
        for begin in range(0, os.fstat(file.fileno()).st_size, _CHUNK):
            os.posix_fadvise(file.fileno(), begin, _CHUNK, os.POSIX_FADV_WILLNEED)
