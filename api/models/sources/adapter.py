"""An adapter or an upscaler as a source: one file, downloaded, and made safetensors where it is a pickle."""

from __future__ import annotations

import shutil
from pathlib import Path, PurePosixPath

import msgspec

from api.errors import ApiError
from api.models.adapters import ADAPTER_FILE, FIELDS, UPSCALER
from api.models.conversion import convert_adapter
from api.models.keys import LocatedFiles, model_key
from api.models.manifest import FileEntry, OnProgress, sha256_of
from api.models.refs import SourceRef
from api.models.sources import remote
from api.models.sources.source import Got, Source
from api.models.transfer import download_many
from api.settings import Settings

_DOWNLOAD = ".adapter"
_PICKLES = (".bin", ".pt", ".pth", ".ckpt")


class AdapterSource(Source):
    """A LoRA, a textual inversion or an upscaler at a URL, in S3 or on the hub.

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
        self._sha256 = ref.checkpoint.sha256
        self.is_known = found.is_known
        self._kind = UPSCALER if ref.adapter == UPSCALER else "adapter"
        # the same file may be a checkpoint, which lies elsewhere; and of one pickle they are made in two ways
        self.key = model_key(LocatedFiles(found.location, found.version, config_version=self._kind))
        self.origin, self.revision = str(found.location), found.version
        self.size = found.size
        self.bytes = found.size or 0

    def fetch(self, folder: Path, on_progress: OnProgress) -> Got:
        """Download over several connections; a pickle is read in a process of its own."""
        download, target = folder / _DOWNLOAD, folder / ADAPTER_FILE
        # by a name that says nothing: torch goes by its end before it looks into a file
        wanted = msgspec.structs.replace(self._remote.wanted, path="adapter")
        if self._sha256:  # compared below, when both digests are known that it may be
            wanted = msgspec.structs.replace(wanted, sha256=None)
        (got,) = download_many([wanted], download, on_progress=on_progress, policy=self._remote.policy)
        is_same = convert_adapter(
            download / wanted.path,
            target,
            self._name,
            on_progress,
            allow_pickle=self._allow_pickle,
            field=self._field,
            kind=self._kind,
        )
        shutil.rmtree(download)
        sha256 = got.sha256 if is_same else sha256_of(target)
        # that of the file that lies there, or of what was made of it, which $meta tells
        if self._sha256 not in (None, got.sha256, sha256):
            message = f"The sha256 of {self._name} is {got.sha256}, not {self._sha256}."
            raise ApiError("MODEL_CORRUPT", message, field=self._field, requested=self._name)
        entry = FileEntry(ADAPTER_FILE, target.stat().st_size, sha256)
        return Got((entry,), verified=got.verified or self._sha256 is not None)
