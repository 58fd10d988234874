"""An adapter as a source: one file, downloaded, and made safetensors where it is a pickle."""

from __future__ import annotations

import shutil
from pathlib import Path, PurePosixPath

import msgspec

from api.errors import ApiError
from api.models.adapters import ADAPTER_FILE, FIELDS
from api.models.conversion import convert_adapter
from api.models.keys import LocatedFiles, model_key
from api.models.manifest import FileEntry, OnProgress
from api.models.refs import SourceRef
from api.models.sources import remote
from api.models.sources.source import Got, Source
from api.models.transfer import download_many
from api.settings import Settings

_DOWNLOAD = ".adapter"
_PICKLES = (".bin", ".pt", ".pth", ".ckpt")


class AdapterSource(Source):
    """A LoRA or a textual inversion at a URL, in S3 or on the hub.

    Args:
        ref: names it.
        settings: keys, and whether pickles are allowed.

    Raises:
        ApiError: PICKLE_NOT_ALLOWED; see ``remote.find``.
    """

    def __init__(self, ref: SourceRef, settings: Settings) -> None:
        assert ref.checkpoint is not None
        self._name, self._field = ref.model_id, FIELDS[ref.adapter]
        self._allow_pickle = settings.allow_pickle != "0"
        if not self._allow_pickle and PurePosixPath(ref.model_id).suffix.lower() in _PICKLES:
            message = f"{ref.model_id} is a pickle, and this server takes none (ALLOW_PICKLE=0); use a .safetensors."
            raise ApiError("PICKLE_NOT_ALLOWED", message, field=self._field)
        self._remote = found = remote.find(ref.checkpoint, settings, ref.trusted)
        self.is_known = found.is_known
        # the same file may be a checkpoint, which lies elsewhere
        self.key = model_key(LocatedFiles(found.location, found.version, config_version="adapter"))
        self.origin, self.revision = str(found.location), found.version
        self.size = found.size
        self.bytes = found.size or 0

    def fetch(self, folder: Path, on_progress: OnProgress) -> Got:
        """Download over several connections; a pickle is read in a process of its own."""
        download, target = folder / _DOWNLOAD, folder / ADAPTER_FILE
        # by a name that says nothing: torch goes by its end before it looks into a file
        wanted = msgspec.structs.replace(self._remote.wanted, path="adapter")
        (got,) = download_many([wanted], download, on_progress=on_progress, policy=self._remote.policy)
        is_same = convert_adapter(
            download / wanted.path,
            target,
            self._name,
            on_progress,
            allow_pickle=self._allow_pickle,
            field=self._field,
        )
        shutil.rmtree(download)
        entry = FileEntry(ADAPTER_FILE, target.stat().st_size, got.sha256 if is_same else None)
        return Got((entry,), verified=got.verified)
