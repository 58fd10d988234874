"""An archive as a source: unpacked while it arrives."""

from __future__ import annotations

import shutil
from pathlib import Path

from api.models.archives import extract
from api.models.keys import LocatedFiles, model_key
from api.models.manifest import OnProgress
from api.models.sources.remote import Remote
from api.models.sources.source import CONTENT, MAX_FILES, Got, Source, move_up

_GROWS = 1.25
"""How much room is made ahead of what is unpacked: an archive does not say how large it becomes."""


class ArchiveSource(Source):
    """A ``.tar``, ``.tar.gz`` or ``.tar.zst`` with a diffusers folder.

    Args:
        remote: where it is.
        part: what of a pipeline it holds; empty: all of it.
    """

    def __init__(self, remote: Remote, part: str = "") -> None:
        self._remote = remote
        self.is_known = remote.is_known
        self.key = model_key(LocatedFiles(remote.location, remote.version, part=part))
        self.origin, self.revision = str(remote.location), remote.version
        self.size = remote.size
        self.bytes = int((remote.size or 0) * _GROWS)

    def fetch(self, folder: Path, on_progress: OnProgress) -> Got:
        """Unpack it. What a killed attempt unpacked is thrown away: a decompressor cannot go on in the middle."""
        content = folder / CONTENT
        shutil.rmtree(content, ignore_errors=True)
        free = shutil.disk_usage(folder).free
        kind = self._remote.location.archive_kind
        with self._remote.stream() as stream:
            extract(stream, kind, content, on_progress, free, MAX_FILES, size=self._remote.size)
        return Got(move_up(folder), verified=bool(self._remote.wanted.sha256 or self._remote.digests))
