"""Finds parts of equal content where nobody has written down what the content is.

A manifest knows the hash of every file. For folders that were put there by hand, to hash a model costs more than to
load it; but parts that could be equal have files of the same sizes and layout, and those that are not differ almost
anywhere: a few samples tell them apart, and only what agrees in these is compared as a whole.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from pathlib import Path

from api.engine.headers import file_identity
from api.errors import ApiError

_SAMPLES = 32
_SAMPLE = 2**16
_BLOCK = 2**23
_KEPT = 64

_Files = tuple[Path, ...]
_Identities = tuple[tuple[str, int, int, int], ...]


class Twins:
    """The parts that were seen, by architecture."""

    def __init__(self) -> None:
        self._known: dict[str, list[tuple[_Files, _Identities, list[str]]]] = {}
        self._lock = threading.Lock()

    def content(self, architecture: str, files: _Files, identity: list[str]) -> list[str]:
        """What the content of a part's files is known by: the same for a part of equal content that was seen before.

        Args:
            architecture: of the part; parts of different ones are never equal.
            files: its weight files.
            identity: what they are known by otherwise (``specs.weights_identity``).

        Raises:
            ApiError: MODEL_BROKEN: a file is gone.
        """
        now = _identities(files)
        with self._lock:
            known = list(self._known.get(architecture, ()))
        for _, identities, content in known:
            if identities == now:
                return content
        hashed = all(name.startswith("sha256:") for name in identity)
        content = next(
            (
                content
                for others, identities, content in known
                if content == identity
                or (not (hashed and content[0].startswith("sha256:")) and _are_equal(files, others, identities))
            ),
            identity,
        )
        with self._lock:
            kept = self._known.setdefault(architecture, [])
            kept.append((files, now, content))
            del kept[:-_KEPT]
        return content


def _identities(files: Sequence[Path]) -> _Identities:
    return tuple(file_identity(path) for path in files)


def _are_equal(files: _Files, others: _Files, were: _Identities) -> bool:
    try:
        if _identities(others) != were:
            return False
        return len(files) == len(others) and all(map(_is_equal, files, others))
    except (ApiError, OSError):  # the other one is gone
        return False


def _is_equal(one: Path, other: Path) -> bool:
    with one.open("rb", buffering=0) as a, other.open("rb", buffering=0) as b:
        size = os.fstat(a.fileno()).st_size
        if size != os.fstat(b.fileno()).st_size:
            return False
        apart = max(_SAMPLE, size // _SAMPLES)
        return all(
            os.pread(a.fileno(), length, at) == os.pread(b.fileno(), length, at)
            for length, step in ((_SAMPLE, apart), (_BLOCK, _BLOCK))
            for at in range(0, size, step)
        )
