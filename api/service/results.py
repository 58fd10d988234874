"""The images of jobs for later: files beside the database, or in memory where nothing is to be kept."""

from __future__ import annotations

import contextlib
import os
import shutil
from pathlib import Path


class Images:
    """Images by job.

    A file has its final name only once its bytes are on the disk, so what has the name is whole.

    Args:
        folder: made when it is needed; None keeps everything in memory.
    """

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder
        self._kept: dict[str, list[bytes]] = {}

    @property
    def in_memory(self) -> bool:
        """Whether nothing is written."""
        return self._folder is None

    def write(self, job_id: str, images: list[bytes], extension: str) -> None:
        """Keep the images of a job, on the disk before this returns.

        Raises:
            OSError: the disk is full, or cannot be written to.
        """
        if self._folder is None:
            self._kept[job_id] = images
            return
        folder = self._folder / job_id
        folder.mkdir(parents=True, exist_ok=True)
        for number, image in enumerate(images):
            path = folder / f"{number}.{extension}"
            temporary = path.with_suffix(".tmp")
            with temporary.open("wb") as file:
                file.write(image)
                file.flush()
                os.fsync(file.fileno())
            temporary.rename(path)
        for changed in (folder, self._folder):
            _sync_folder(changed)

    def read(self, job_id: str, number: int, extension: str) -> bytes:
        """One image. May be called from any thread.

        Raises:
            FileNotFoundError: it is not here any more.
        """
        if self._folder is not None:
            return (self._folder / job_id / f"{number}.{extension}").read_bytes()
        try:
            return self._kept[job_id][number]
        except (KeyError, IndexError):
            raise FileNotFoundError(job_id) from None

    def remove(self, job_id: str) -> None:
        """Forget the images of a job; does nothing where there are none."""
        self._kept.pop(job_id, None)
        if self._folder is not None:
            shutil.rmtree(self._folder / job_id, ignore_errors=True)

    def ids(self) -> set[str]:
        """The jobs that there is something of."""
        if self._folder is None:
            return set(self._kept)
        with contextlib.suppress(FileNotFoundError):
            return {entry.name for entry in self._folder.iterdir()}
        return set()


def _sync_folder(folder: Path) -> None:
    """Names are part of the folder, and are on the disk when it is."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
