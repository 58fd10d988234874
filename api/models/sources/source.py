"""What every source of weights can do."""

from __future__ import annotations

import shutil
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path

import msgspec

from api.models.manifest import FileEntry, OnProgress, list_files

CONTENT = ".content"
"""Folder in a staging folder into which a model is unpacked or converted before it is moved up."""
MAX_FILES = 10_000


class Got(msgspec.Struct, frozen=True):
    """What a fetch brought.

    Attributes:
        files: every file of the model, with hashes where they are known.
        verified: each was compared with a hash that the source gave.
    """

    files: Sequence[FileEntry]
    verified: bool


class Source(ABC):
    """One model at one place, found but not fetched.

    Attributes:
        key: the name of its folder on the volume.
        origin: where it lies, without credentials.
        revision: what identifies the content there; empty where the place says nothing.
        variant: which weight files: empty, ``fp16`` or ``bf16``.
        size: bytes that are to be fetched; None: the place does not say.
        bytes: that it will take on the disk while it is installed, as far as is known.
        is_known: the operator's own hub or storage says so, not a server that a request chose.
    """

    key: str
    origin: str
    revision: str
    variant: str = ""
    size: int | None
    bytes: int
    is_known: bool

    def configuration(self, folder: Path, on_progress: OnProgress) -> bool:
        """Bring the model's small files, without its weights; False where they cannot be had alone.

        Raises:
            ApiError: as ``fetch``.
        """
        return False

    @abstractmethod
    def fetch(self, folder: Path, on_progress: OnProgress) -> Got:
        """Bring all of it.

        Args:
            folder: the staging folder; may hold what an earlier attempt left.
            on_progress: called with the phase and bytes; raise in it to stop.

        Raises:
            ApiError: SOURCE_UNREACHABLE, SOURCE_DENIED, MODEL_NOT_FOUND, MODEL_CORRUPT, MODEL_BROKEN,
                ARCHIVE_UNSAFE, URL_NOT_ALLOWED, DISK_FULL.
        """


def move_up(folder: Path) -> tuple[FileEntry, ...]:
    """Move what lies in ``CONTENT`` into the folder itself; what is there by the same name gives way."""
    content = folder / CONTENT
    for path in list(content.iterdir()):
        target = folder / path.name
        if target.is_dir():
            shutil.rmtree(target)
        path.rename(target)
    content.rmdir()
    return tuple(entry for entry in list_files(folder) if not entry.path.startswith("."))
