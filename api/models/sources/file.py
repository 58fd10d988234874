"""A single file of weights as a source, kept as it is."""

from __future__ import annotations

from pathlib import Path

import msgspec

from api.models.keys import LocatedFiles, model_key
from api.models.manifest import OnProgress, list_files
from api.models.sources.remote import Remote
from api.models.sources.source import Got, Source
from api.models.transfer import download_many


class FileSource(Source):
    """A ``.safetensors`` that is one part of a pipeline.

    Args:
        remote: where it is.
        part: the name that it gets here.

    """

    def __init__(self, remote: Remote, part: str) -> None:
        self._remote, self._part = remote, part
        self.is_known = remote.is_known
        self.key = model_key(LocatedFiles(remote.location, remote.version, part=part))
        self.origin, self.revision = str(remote.location), remote.version
        self.size = remote.size
        self.bytes = remote.size or 0

    def fetch(self, folder: Path, on_progress: OnProgress) -> Got:
        """Download it over several connections."""
        wanted = msgspec.structs.replace(self._remote.wanted, path=self._part)
        (got,) = download_many([wanted], folder, on_progress=on_progress, policy=self._remote.policy)
        return Got(tuple(e for e in list_files(folder) if e.path == self._part), verified=got.verified)
