"""Makes room on the volume: what goes, in which order, and what never does."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from api.errors import ApiError
from api.models.locks import FileLock, note_of_holder
from api.models.manifest import list_files, walk

if TYPE_CHECKING:
    from api.models.installation import Installation
    from api.models.volume import Volume


class _Removable(msgspec.Struct, frozen=True):
    """Something that may go when room is needed; interrupted downloads go before models."""

    is_model: bool
    last_used: float
    bytes: int
    key: str
    folder: Path


def make_room(
    volume: Volume, bytes_needed: int, leased: Callable[[], set[str]], installation: Installation | None
) -> None:
    """Evict until an installation fits; see ``Volume.reserve``. One caller at a time.

    Raises:
        ApiError: DISK_FULL, with the numbers.
    """
    shortage = _shortage(volume, bytes_needed, installation)
    if shortage <= 0:
        return
    volume.empty_trash()
    shortage = _shortage(volume, bytes_needed, installation)
    found = list(_removable(volume, leased(), installation))
    freeable = sum(each.bytes for each in found)
    if freeable >= shortage:
        for each in sorted(found, key=lambda e: (e.is_model, e.last_used)):
            if shortage > 0 and _evict(volume, each, leased, installation):
                shortage = _shortage(volume, bytes_needed, installation)
        freeable = 0
    if shortage > 0:
        limit = "none" if volume.limit is None else _words(volume.limit)
        free = shutil.disk_usage(volume.root).free
        raise ApiError(
            "DISK_FULL",
            f"The model takes {_words(bytes_needed)}, and {_words(shortage)} are missing: VOLUME_LIMIT is {limit}, "
            f"{_words(free)} of the disk are free ({_words(volume.keep_free)} are kept), and what is not in use "
            f"holds {_words(freeable)}.",
            requested=bytes_needed,
            available=max(0, bytes_needed - shortage + freeable),
        )


def _shortage(volume: Volume, bytes_needed: int, installation: Installation | None) -> int:
    """Bytes that are missing, for this and for what the installations under way will still take."""
    staged = {folder: _size(folder) for folder in volume.stagings()}
    own = installation.staging if installation else None
    coming = max(0, bytes_needed - staged.get(own, 0) if own else bytes_needed)
    for folder, size in staged.items():
        if folder != own:
            note = note_of_holder(volume.lock_path(key_of(folder))) or ""
            coming += max(0, int(note) - size) if note.isdigit() else 0
    shortage = coming + volume.keep_free - shutil.disk_usage(volume.root).free if coming else 0
    if volume.limit is not None:
        used = sum(_size(folder) for folder in volume.models()) + sum(staged.values())
        shortage = max(shortage, used + coming - volume.limit)
    return shortage


def _removable(volume: Volume, leased: set[str], installation: Installation | None) -> Iterator[_Removable]:
    for folder in volume.stagings():
        if note_of_holder(volume.lock_path(key_of(folder))) is None:
            yield _Removable(False, last_written(folder), _size(folder), key_of(folder), folder)
    for folder in volume.models():
        key = folder.name
        # the version that the installation itself replaces may go, too
        own = installation is not None and key == installation.key
        if key not in leased and (own or note_of_holder(volume.lock_path(key)) is None):
            yield _Removable(True, volume.last_used(folder), _size(folder), key, folder)


def _evict(volume: Volume, each: _Removable, leased: Callable[[], set[str]], installation: Installation | None) -> bool:
    lock = FileLock(volume.lock_path(each.key))
    own = installation is not None and each.key == installation.key
    if not own and not lock.acquire(wait=False):
        return False
    try:
        return not (each.is_model and each.key in leased()) and volume.discard(each.folder)
    finally:
        lock.release()


def key_of(staging: Path) -> str:
    """The key that a staging folder is for; what follows ``~`` makes one private to its process."""
    return staging.name.partition("~")[0]


def last_written(folder: Path) -> float:
    """When something under a folder was last written, in seconds since 1970, UTC."""
    return max([folder.lstat().st_mtime, *(status.st_mtime for _, status in walk(folder))])


def _size(folder: Path) -> int:
    return sum(entry.size for entry in list_files(folder))


def _words(size: int) -> str:
    return f"{size / 2**30:.2f} GiB" if size >= 2**30 else f"{size / 2**20:.2f} MiB"
