"""A single-file checkpoint as a source: downloaded, then converted once to a diffusers folder."""

from __future__ import annotations

import shutil
from pathlib import Path

import msgspec

from api.errors import ApiError
from api.models.conversion import FAMILIES, convert_checkpoint
from api.models.keys import LocatedFiles, model_key
from api.models.locations import parse_location
from api.models.manifest import OnProgress
from api.models.sources import remote
from api.models.sources.remote import Remote
from api.models.sources.source import CONTENT, Got, Source, move_up
from api.models.transfer import download_many
from api.settings import Settings

FIELD = "callInputs.CHECKPOINT_CONFIG_URL"

_DOWNLOAD = ".checkpoint"
_CONFIG_NAME = "config.yaml"
_LARGEST_CONFIG = 2**20


class Config(msgspec.Struct, frozen=True):
    """How a checkpoint is built.

    Attributes:
        family: the name of a bundled family; empty: detected, unless there is one of the others.
        folder: a diffusers folder whose configuration is taken.
        file: an original configuration, a ``.yaml``.
        version: what tells it from any other configuration.
    """

    family: str = ""
    folder: Path | None = None
    file: Remote | None = None
    version: str = ""


def read_config(text: str, settings: Settings, trusted: bool, *, folder: Path | None, revision: str) -> Config:
    """Read CHECKPOINT_CONFIG_URL: a family, the id of an installed model, or the address of a ``.yaml``.

    Args:
        text: the value; empty: detect the family.
        settings: for addresses.
        trusted: the operator wrote it.
        folder: of the installed model of that name, if there is one.
        revision: of that model.

    Raises:
        ApiError: INVALID_INPUTS, MODEL_NOT_FOUND, and what looking up an address raises.
    """
    if not text:
        return Config()
    if folder is not None:
        return Config(folder=folder, version=f"model:{revision}")
    if text in FAMILIES:
        return Config(family=text, version=f"family:{text}")
    if "://" not in text:
        message = "It is neither the URL of a .yaml, nor the id of a model that is installed, nor one of the families."
        raise ApiError("MODEL_NOT_FOUND", message, field=FIELD, requested=text[:200], available=list(FAMILIES))
    location = parse_location(text, field=FIELD)
    if location.source != "http":
        message = "A configuration is read over http or https."
        raise ApiError("INVALID_INPUTS", message, field=FIELD, requested=str(location))
    found = remote.find(location, settings, trusted)
    if found.size is None or found.size > _LARGEST_CONFIG:
        message = f"{location} is no configuration: it is larger than {_LARGEST_CONFIG >> 20} MiB, or of unknown size."
        raise ApiError("INVALID_INPUTS", message, field=FIELD)
    return Config(file=found, version=f"url:{location.identity}:{found.version}")


class CheckpointSource(Source):
    """A ``.safetensors`` or ``.ckpt`` with all of a pipeline's weights.

    Args:
        found: where it is.
        config: how it is built.
        settings: whether pickles are allowed.

    Raises:
        ApiError: PICKLE_NOT_ALLOWED.
    """

    def __init__(self, found: Remote, config: Config, settings: Settings) -> None:
        self._remote, self._config = found, config
        self.is_known = found.is_known
        self._allow_pickle = settings.allow_pickle != "0"
        if not self._allow_pickle and found.wanted.path.lower().endswith(".ckpt"):
            message = "A .ckpt is a pickle, and this server takes none (ALLOW_PICKLE=0); use a .safetensors."
            raise ApiError("PICKLE_NOT_ALLOWED", message, field="callInputs.CHECKPOINT_URL")
        self.key = model_key(LocatedFiles(found.location, found.version, config_version=config.version))
        self.origin, self.revision = str(found.location), found.version
        self.size = found.size
        self.bytes = 2 * (found.size or 0)

    def fetch(self, folder: Path, on_progress: OnProgress) -> Got:
        """Download over several connections, convert in a process of its own, drop the download."""
        download, content = folder / _DOWNLOAD, folder / CONTENT
        wanted = self._remote.wanted
        (got,) = download_many([wanted], download, on_progress=on_progress, policy=self._remote.policy)
        config: Path | str | None = self._config.folder or self._config.family or None
        if self._config.file is not None:
            as_yaml = msgspec.structs.replace(self._config.file.wanted, path=_CONFIG_NAME)
            download_many([as_yaml], download, policy=self._config.file.policy)
            config = download / _CONFIG_NAME
        shutil.rmtree(content, ignore_errors=True)
        convert_checkpoint(download / wanted.path, content, on_progress, config=config, allow_pickle=self._allow_pickle)
        shutil.rmtree(download)
        return Got(move_up(folder), verified=got.verified)
