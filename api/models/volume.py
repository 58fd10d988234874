"""The folder of installed models. A model is there whole, or not there.

::

    <key>/                 an installed model, with .manifest.json, whose mtime is the model's last use
    .staging/<key>/        what was downloaded so far
    .trash/                what was moved out of the way and is being deleted
    .locks/<key>.lock      held while the key is installed; says how many bytes that will take

Nothing is written into ``<key>/``: a model is put together in staging, checked, written through to the disk,
and renamed into place. It leaves by being renamed into the trash. Folders without a manifest belong to
somebody else: they are neither counted nor evicted.
"""

from __future__ import annotations

import builtins
import contextlib
import errno
import hashlib
import os
import re
import shutil
import stat
import time
import uuid
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import msgspec

from api.errors import ApiError
from api.models.eviction import key_of, last_written, make_room
from api.models.installation import Installation, corrupt
from api.models.locks import FileLock
from api.models.manifest import (
    MANIFEST_NAME,
    Manifest,
    examine,
    fsync,
    list_files,
    missing_parts,
    read_manifest,
    size_problems,
    sizes_match,
    walk,
    write_manifest,
)

KEEP_FREE = 256 * 2**20
"""Bytes of the disk that an installation leaves free for others."""
KEEP_STAGING = 3 * 86_400.0
"""Seconds that an interrupted download is kept for being resumed."""

_KEY = re.compile(r"[A-Za-z0-9_@=+-][A-Za-z0-9._@=+-]{0,199}")
_TRIES = 20


class InstalledEntry(msgspec.Struct, frozen=True):
    """A model on the volume.

    Attributes:
        key: the name of its folder.
        bytes: size of its files.
        last_used: seconds since 1970, UTC.
        manifest: what it consists of.
    """

    key: str
    bytes: int
    last_used: float
    manifest: Manifest


class Volume:
    """Installs, finds and evicts models. Safe among threads, and among processes and containers that share it.

    Args:
        root: the folder; made when something is installed.
        limit: bytes that models and downloads may take together; None: as much as the disk has.
        clock: seconds since 1970, UTC.
        keep_free: bytes of the disk to leave free.
    """

    def __init__(
        self, root: Path, limit: int | None, clock: Callable[[], float] = time.time, *, keep_free: int = KEEP_FREE
    ) -> None:
        self.root = root
        self.limit = limit
        self.keep_free = keep_free
        self.staging_root = root / ".staging"
        self._trash = root / ".trash"
        self._locks = root / ".locks"
        self._clock = clock

    def find(self, key: str) -> Path | None:
        """The folder of an installed model, or None; every file is there with its size.

        Records the use, where the volume can be written.

        Raises:
            ApiError: INVALID_INPUTS for a key that is not a safe folder name.
        """
        folder = self._folder(key)
        manifest = None if folder.is_symlink() else read_manifest(folder)
        if manifest is None or not sizes_match(folder, manifest.files):
            return None
        self._touch(folder)
        return folder

    def install(
        self,
        key: str,
        *,
        accept: Callable[[Manifest], bool] | None = None,
        on_wait: Callable[[], None] | None = None,
    ) -> Installation:
        """A context that installs a model, one at a time per key among threads, processes and containers::

            with volume.install(key) as installation:
                if installation.installed is None:
                    installation.reserve(total, leased)
                    ...  # write into installation.staging
                    installation.commit(manifest)

        Args:
            key: the model's folder name.
            accept: whether what is installed is what is wanted; None: whatever is there whole.
            on_wait: called about ten times a second while another one installs the key; may raise to stop waiting.

        Raises:
            ApiError: INVALID_INPUTS for a key that is not a safe folder name; on entering, DISK_FULL, or
                MODEL_NOT_FOUND when the volume is read-only.
        """
        self._folder(key)
        return Installation(self, key, accept, on_wait)

    def adopt(
        self,
        folder: Path,
        key: str,
        model_id: str,
        *,
        source: str = "",
        variant: str = "",
        prepare: Callable[[], None] = lambda: None,
    ) -> Path:
        """Take over a diffusers folder that something else saved, such as an old ``models--org--name``.

        It is checked, hashed, and renamed; what is wrong with it leaves it as it was. ``verified`` is False.

        Args:
            folder: on the same file system.
            key: the name it gets.
            model_id: the model's name.
            source: where it came from; its own name by default.
            variant: which weight files it has.
            prepare: called before it is looked at, while nobody else takes it over.

        Returns:
            The model's folder.

        Raises:
            ApiError: MODEL_CORRUPT when it is not a whole diffusers folder of plain files.
            OSError: it cannot be read, or the volume cannot be written.
        """
        self._folder(key)
        self.prepare()
        lock = FileLock(self.lock_path(key))
        lock.acquire()
        try:
            if found := self.find(key):
                return found
            prepare()
            problems = [
                f"{path} is not a plain file"
                for path, status in walk(folder)
                if not stat.S_ISREG(status.st_mode) and not stat.S_ISDIR(status.st_mode)
            ] + missing_parts(folder)
            files = list_files(folder)
            if not problems:
                files, problems = examine(folder, files, {}, sync=True)
            if problems:
                raise corrupt(model_id, f"in {folder.name}", problems)
            digest = hashlib.sha256(msgspec.json.encode(files)).hexdigest()
            manifest = Manifest(model_id, source or folder.name, digest, variant, files, False, self._now())
            write_manifest(folder, manifest)
            return self.place(folder, key, manifest)
        finally:
            lock.release()

    def capacity(self) -> int:
        """Bytes that models could take if there were no others."""
        self.prepare()
        total = shutil.disk_usage(self.root).total - self.keep_free
        return total if self.limit is None else min(total, self.limit)

    def reserve(
        self, bytes_needed: int, leased: Callable[[], set[str]], installation: Installation | None = None
    ) -> None:
        """Make room for an installation: within the limit, and on the disk.

        When it is short, the trash is emptied, then interrupted downloads go, then the least recently used
        models; never one that is leased or being installed, and nothing at all when it would not be enough.

        Args:
            bytes_needed: size of the whole model.
            leased: the keys that are in use; asked again before each eviction.
            installation: keeps the room for itself until it ends, and has what it staged counted toward it.

        Raises:
            ApiError: DISK_FULL, with the numbers.
        """
        self.prepare()
        lock = FileLock(self.lock_path(".reserve"))
        lock.acquire()
        try:
            make_room(self, bytes_needed, leased, installation)
            if installation is not None:
                installation.note(bytes_needed)
        finally:
            lock.release()

    def remove(self, key: str) -> bool:
        """Delete an installed model; whether it was there.

        Raises:
            ApiError: INVALID_INPUTS for a key that is not a safe folder name.
            OSError: the volume cannot be written.
        """
        folder = self._folder(key)
        return (folder / MANIFEST_NAME).exists() and self.discard(folder)

    def verify(self, key: str) -> builtins.list[str]:
        """Read an installed model from end to end; what is wrong with it, in words.

        Raises:
            ApiError: INVALID_INPUTS for a key that is not a safe folder name.
            OSError: its folder cannot be read.
        """
        folder = self._folder(key)
        manifest = read_manifest(folder)
        if manifest is None:
            return ["it is not installed: there is no manifest that can be read"]
        problems = size_problems(folder, manifest.files)
        if not problems:
            problems = examine(folder, manifest.files, {}, sync=False)[1]
            problems += [] if manifest.adapter else missing_parts(folder, manifest.part)
        listed = {entry.path for entry in manifest.files}
        return problems + [f"{e.path} is not in the manifest" for e in list_files(folder) if e.path not in listed]

    def sweep(self, keep_staging: float = KEEP_STAGING) -> None:
        """Clean up at start: empty the trash, and delete interrupted downloads that nobody continued.

        Args:
            keep_staging: seconds since the last write after which a download is given up.
        """
        # a read-only volume stays as it is
        with contextlib.suppress(OSError):
            self.empty_trash()
            for folder in self.stagings():
                lock = FileLock(self.lock_path(key_of(folder)))
                if self._clock() - last_written(folder) > keep_staging and lock.acquire(wait=False):
                    try:
                        self.discard(folder)
                    finally:
                        lock.release()

    def list(self) -> builtins.list[InstalledEntry]:
        """Every model that is installed whole, by key. This is not a use of them."""
        entries = []
        for folder in self.models():
            manifest = read_manifest(folder)
            if manifest is not None and sizes_match(folder, manifest.files):
                size = sum(entry.size for entry in manifest.files)
                entries.append(InstalledEntry(folder.name, size, self.last_used(folder), manifest))
        return entries

    # for installations and evictions

    def prepare(self) -> None:
        """Make the volume's own folders.

        Raises:
            OSError: the volume cannot be written.
        """
        for folder in (self.staging_root, self._trash, self._locks):
            folder.mkdir(parents=True, exist_ok=True)

    def lock_path(self, key: str) -> Path:
        """The lock file of a key."""
        return self._locks / f"{key}.lock"

    def place(self, folder: Path, key: str, manifest: Manifest) -> Path:
        """Rename a finished folder into place, where it replaces what is there.

        Raises:
            OSError: the volume cannot be written.
        """
        target = self._folder(key)
        replaced: builtins.list[Path | None] = []
        for _ in range(_TRIES):
            if target.exists() and target.samefile(folder):
                break
            there = read_manifest(target)
            same = there is not None and (there.revision, there.files) == (manifest.revision, manifest.files)
            if same and sizes_match(target, manifest.files):
                # where there are no locks, another process may have done the same
                self.discard(folder)
                break
            try:
                folder.rename(target)
                break
            except OSError as fault:
                if fault.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                    raise
                replaced.append(self._set_aside(target))
        else:
            raise OSError(errno.EBUSY, "others replace it again and again", str(target))
        fsync(self.root)
        self._touch(target)
        for old in replaced:
            if old is not None:
                _delete(old)
        return target

    def discard(self, path: Path) -> bool:
        """Move something out of the way at once, then delete it; whether it was there.

        Raises:
            OSError: the volume cannot be written.
        """
        aside = self._set_aside(path)
        if aside is not None:
            _delete(aside)
        return aside is not None

    def empty_trash(self) -> None:
        """Delete what a deletion that was interrupted left."""
        if self._trash.is_dir():
            for path in self._trash.iterdir():
                _delete(path)

    def models(self) -> builtins.list[Path]:
        """The folders with a manifest, whole or not."""
        return [f for f in _folders(self.root) if _KEY.fullmatch(f.name) and (f / MANIFEST_NAME).exists()]

    def stagings(self) -> builtins.list[Path]:
        """The folders of downloads, under way or interrupted."""
        return _folders(self.staging_root)

    def last_used(self, folder: Path) -> float:
        """When a model was last used, in seconds since 1970, UTC."""
        try:
            return (folder / MANIFEST_NAME).stat().st_mtime
        except OSError:
            return 0.0

    def _set_aside(self, path: Path) -> Path | None:
        self._trash.mkdir(parents=True, exist_ok=True)
        aside = self._trash / uuid.uuid4().hex
        try:
            return path.rename(aside)
        except FileNotFoundError:
            return None

    def _folder(self, key: str) -> Path:
        if not _KEY.fullmatch(key):
            raise ApiError("INVALID_INPUTS", "A model's key is not a safe folder name.", requested=key[:200])
        return self.root / key

    def _touch(self, folder: Path) -> None:
        now = self._clock()
        with contextlib.suppress(OSError):
            os.utime(folder / MANIFEST_NAME, (now, now))

    def _now(self) -> str:
        return datetime.fromtimestamp(self._clock(), UTC).isoformat(timespec="seconds")


def _folders(parent: Path) -> list[Path]:
    try:
        return sorted(p for p in parent.iterdir() if p.is_dir() and not p.is_symlink())
    except (FileNotFoundError, NotADirectoryError):
        return []


def _delete(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
