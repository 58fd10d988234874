"""A folder of plain files in S3 as a source: the layout that is read fastest, many files side by side."""

from __future__ import annotations

import posixpath
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import msgspec

from api.errors import ApiError
from api.models import s3
from api.models.conversion import convert_pickles
from api.models.http_client import Wanted
from api.models.keys import LocatedFiles, model_key
from api.models.manifest import FileEntry, OnProgress, list_files
from api.models.partial_file import Fetched
from api.models.parts import CONFIG
from api.models.refs import SourceRef
from api.models.select import MODEL_INDEX, PRECISION_FIELD, Selection, select_files, select_part
from api.models.sources.hub import pickle_not_allowed
from api.models.sources.remote import access_to, policy_of
from api.models.sources.source import Got, Source
from api.models.transfer import download_many
from api.settings import Settings

_CONNECTIONS = 8


class S3FolderSource(Source):
    """A prefix with a diffusers folder, as ``models push`` and many others leave it.

    Args:
        ref: its URL and the precision that is preferred.
        settings: keys.

    Raises:
        ApiError: see ``s3.resolve``; MODEL_BROKEN where the folder holds no safetensors.
    """

    def __init__(self, ref: SourceRef, settings: Settings) -> None:
        assert ref.url is not None
        location, access = ref.url, access_to(ref.url, settings, ref.trusted)
        chosen: list[Selection] = []

        def select(names: list[str], index: bytes) -> tuple[str, ...]:
            chosen.append(_select(names, _decoded(index), ref.precision, ref.part))
            return chosen[0].files

        self.is_known = location.endpoint_is_default
        marker = posixpath.normpath(f"{ref.part}/{CONFIG}") if ref.part else MODEL_INDEX
        self._plan = s3.resolve(location, access, select=select, marker=marker)
        self._urls = s3.urls(self._plan, access)
        self._policy = policy_of(location, settings, ref.trusted)
        self._selection = chosen[0]
        self._allow_pickle = settings.allow_pickle != "0"
        if self._selection.needs_conversion and not self._allow_pickle:
            raise pickle_not_allowed(str(location))
        self.variant = self._selection.variant
        self.key = model_key(LocatedFiles(location, self._plan.revision, self.variant, part=ref.part))
        self.origin, self.revision = str(location), self._plan.revision
        self.size = self._plan.bytes
        self.bytes = self._plan.bytes * (2 if self._selection.needs_conversion else 1)

    def configuration(self, folder: Path, on_progress: OnProgress) -> bool:
        """The files that are no weights."""
        small = [f for f in self._plan.files if PurePosixPath(f.path).suffix not in (".safetensors", ".bin")]
        self._download(small, folder, on_progress)
        return True

    def fetch(self, folder: Path, on_progress: OnProgress) -> Got:
        """Every file, over several connections; pickles are converted."""
        got = self._download(self._plan.files, folder, on_progress)
        files: tuple[FileEntry, ...] = got
        if self._selection.needs_conversion:
            convert_pickles(folder, on_progress, allow_pickle=self._allow_pickle)
            files = tuple(entry for entry in list_files(folder) if not entry.path.startswith("."))
        return Got(files, verified=all(file.verified for file in got))

    def _download(self, files: Sequence[s3.RemoteFile], folder: Path, on_progress: OnProgress) -> tuple[Fetched, ...]:
        wanted = [Wanted(self._urls[f.path], f.path, f.size, f.etag, f.sha256, digests=f.digests) for f in files]
        return download_many(wanted, folder, connections=_CONNECTIONS, on_progress=on_progress, policy=self._policy)


def _select(names: list[str], index: dict[str, Any], precision: str, part: str) -> Selection:
    """As ``select_files``; a folder with weights of one variant alone is taken for what it is."""

    def select(precision: str) -> Selection:
        return select_part(names, part, precision) if part else select_files(names, index, precision)

    try:
        return select(precision)
    except ApiError as error:
        if error.field != PRECISION_FIELD or not error.available:
            raise
        return select(error.available[0])


def _decoded(index: bytes) -> dict[str, Any]:
    try:
        return msgspec.json.decode(index, type=dict[str, Any])
    except msgspec.DecodeError:
        return {}
