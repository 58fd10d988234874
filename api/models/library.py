"""Finds models that are here already: in the image, on the volume, in folders and caches that others fill.

No network, whatever is asked for.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import msgspec

from api.errors import ApiError
from api.models import hub
from api.models.adapters import UPSCALER
from api.models.description import InstalledModel, describe, is_model
from api.models.keys import HubFiles, is_commit, is_key, model_key
from api.models.locations import normalized_model_id
from api.models.manifest import MANIFEST_NAME, Manifest, missing_parts, read_manifest, sha256_of
from api.models.names import folder_name, is_model_id, model_id_of
from api.models.parts import is_part
from api.models.records import Records
from api.models.refs import SourceRef
from api.models.safetensors_check import safetensors_problem
from api.models.volume import InstalledEntry, Volume
from api.settings import BUNDLED_MODELS, Settings

BUNDLED_ORG = "demo"
_MOMENT = 5.0
"""Seconds for which an answer is believed without looking at the records again."""
_NOTE_USE = 60.0
"""Seconds between two notes of a model's use."""
_LOOKED_AT = 1000
"""Files of a folder that are looked at, at most: what is no model of diffusers' is not to cost more than one."""


class InstalledAdapter(msgspec.Struct, frozen=True):
    """A LoRA, a textual inversion or an upscaler that is here.

    Attributes:
        name: what it is called in messages.
        path: of its safetensors file.
        sha256: of that file, in hex.
        source: where it was fetched from, without credentials.
    """

    name: str
    path: Path
    sha256: str
    source: str = ""


_Seen = tuple[tuple[str, int, int], ...]
"""Names, sizes and times of change."""


class _Known(NamedTuple):
    """A model that was read, and what was seen of its files before."""

    seen: _Seen
    model: InstalledModel
    is_settled: bool
    """Its revision was told, not made of its files."""


class _Answer(NamedTuple):
    """What a ref was answered with, for a while."""

    times: tuple[int, int]
    model: InstalledModel
    until: float


class Library:
    """What is here.

    Args:
        settings: says where to look.

    Attributes:
        volume: the one that models are installed on.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self.volume = Volume(settings.models_dir, _limit(settings))
        self._volumes = [self.volume, Volume(settings.baked_models_dir, None)]
        self._records = [Records(volume.root) for volume in self._volumes]
        self._known: dict[tuple[Path, str], _Known] = {}
        """By folder, and what of a pipeline is there."""
        self._answers: dict[str, _Answer] = {}
        self._used: dict[str, float] = {}
        self._digests: dict[Path, tuple[tuple[int, int], str]] = {}

    def find(self, ref: SourceRef) -> InstalledModel | None:
        """The model that a ref means, if it is here.

        Raises:
            ApiError: MODEL_BROKEN: it is here and cannot be read.
        """
        found = self._local(ref) if ref.is_local else None
        found = found or self._installed(ref) or (self._cached(ref) if ref.is_plain else None)
        found = found or (self._left_behind(ref) if ref.is_local and not ref.part else None)
        if found is not None:
            with contextlib.suppress(OSError):
                self._answers[ref.name] = _Answer(_times(found), found, time.monotonic() + _MOMENT)
        return found

    def recall(self, ref: SourceRef) -> InstalledModel | None:
        """What ``find`` said a moment ago, if that is still there: quick enough for every request.

        Only a moment: the command line and other containers pull, remove and adopt models, too.
        """
        answer = self._answers.get(ref.name)
        with contextlib.suppress(OSError):
            if answer and time.monotonic() < answer.until and answer.times == _times(answer.model):
                self._use(answer.model)
                return answer.model
        return None

    def find_adapter(self, ref: SourceRef) -> InstalledAdapter | None:
        """The adapter that a ref of one means, if it is on a volume."""
        assert ref.checkpoint is not None
        wanted = ref.checkpoint.sha256
        # what was fetched before its digest was known, too
        anywhere = msgspec.structs.replace(ref, checkpoint=dataclasses.replace(ref.checkpoint, sha256=None))
        for each in dict.fromkeys((ref, anywhere)):
            for volume, records in zip(self._volumes, self._records, strict=True):
                key = records.find(each)
                folder = volume.find(key) if key is not None and is_key(key) else None
                manifest = read_manifest(folder) if folder else None
                if folder is None or manifest is None or not manifest.adapter:
                    continue
                (entry,) = manifest.files
                if each is ref or entry.sha256 == wanted:
                    return InstalledAdapter(ref.model_id, folder / entry.path, entry.sha256 or "", manifest.source)
        return None

    def upscalers(self) -> list[InstalledAdapter]:
        """Every upscaler on a volume."""
        entries = [(volume, entry) for volume in self._volumes for entry in volume.list()]
        return [
            InstalledAdapter(
                entry.manifest.model_id,
                volume.root / entry.key / entry.manifest.files[0].path,
                entry.manifest.files[0].sha256 or "",
                entry.manifest.source,
            )
            for volume, entry in entries
            if entry.manifest.adapter == UPSCALER and entry.manifest.files
        ]

    def bundled_adapters(self) -> list[str]:
        """Names of the adapters that come with this server."""
        return sorted(path.name for path in (BUNDLED_MODELS / "adapters").glob("*.safetensors"))

    def find_local_adapter(self, repo: str, path: str) -> InstalledAdapter | None:
        """An adapter that comes with this server, or that somebody put into a folder by hand.

        Args:
            repo: ``demo/adapters`` is what comes with it.
            path: of the file within.
        """
        for place in self._places(repo):
            file = place / path
            with contextlib.suppress(OSError):
                if file.suffix == ".safetensors" and file.is_file() and not (place / MANIFEST_NAME).exists():
                    status = file.stat()
                    seen = status.st_size, status.st_mtime_ns
                    known = self._digests.get(file)
                    if known is None or known[0] != seen:
                        known = self._digests[file] = seen, sha256_of(file)
                    return InstalledAdapter(f"{repo}/{path}", file, known[1])
        return None

    def find_by_name(self, ref: SourceRef) -> InstalledModel | None:
        """The one installed model that the ref can mean: for when its source cannot be asked.

        What a request installed from an address of its own choice has the name that the request gave it, and that
        proves nothing: it counts only if the operator chose it, or if it is the named repository's on the hub.

        Raises:
            ApiError: MODEL_BROKEN.
        """
        found = [
            (volume, entry.key, entry.manifest)
            for volume in self._volumes
            for entry in volume.list()
            if not entry.manifest.adapter
            and entry.manifest.part == ref.part
            and (_is_of_repo(entry, ref.repo) or (entry.manifest.trusted and entry.manifest.model_id == ref.model_id))
            and entry.manifest.variant in ("", ref.variant)
            and ref.revision in ("", entry.manifest.revision)
        ]
        return self._take(*found[0], ref.model_id) if len(found) == 1 and ref.is_local else None

    def names(self) -> list[str]:
        """Every model that can be asked for by its id."""
        installed = {manifest.model_id for _, _, manifest in self._listed() if not manifest.part}
        return sorted({model_id for model_id, _ in self._plain_folders()} | installed)

    def all(self) -> list[InstalledModel]:
        """Every model that can be read; broken ones are left out."""
        found: dict[str, InstalledModel] = {}
        for model_id, folder in self._plain_folders():
            with contextlib.suppress(ApiError):
                found.setdefault(model_id, self._inspect(model_id, folder))
        for volume, key, manifest in self._listed():
            with contextlib.suppress(ApiError):
                found.setdefault(key, self._take(volume, key, manifest, manifest.model_id))
        return sorted(found.values(), key=lambda model: (model.model_id, model.key))

    def recognize(self, folder: Path, revision: str) -> InstalledModel | None:
        """The model that was found in a folder in that revision, if all is there as it was.

        ``all`` lists what is installed and what was put there by hand; this knows those of others' caches as well.
        """
        known = self._known.get((folder, ""))
        if known is None or known.model.revision != revision or known.seen != _seen(folder, known.is_settled):
            return None
        return known.model

    def folder_of(self, model_id: str) -> tuple[Path, str] | None:
        """Folder and revision of the model of that id."""
        if not is_model_id(model_id):
            return None
        model = self.find(SourceRef(model_id, model_id)) or self.find_by_name(SourceRef(model_id, model_id))
        return (model.folder, model.revision) if model else None

    def _use(self, model: InstalledModel) -> None:
        """Note the use of a model now and then: what is used least recently makes room first."""
        now = time.monotonic()
        if model.key and now - self._used.get(model.key, -_NOTE_USE) >= _NOTE_USE:
            self._used[model.key] = now
            with contextlib.suppress(OSError):
                os.utime(model.folder / MANIFEST_NAME)

    def _local(self, ref: SourceRef) -> InstalledModel | None:
        """A folder that somebody put there by hand."""
        for folder in self._places(ref.model_id):
            there = is_part(folder, ref.part) if ref.part else is_model(folder)
            if there and not (folder / MANIFEST_NAME).exists():
                model = self._inspect(ref.model_id, folder, part=ref.part)
                if ref.revision in ("", model.revision):
                    return model
        return None

    def _places(self, model_id: str) -> Iterator[Path]:
        org, _, name = model_id.rpartition("/")
        if org == BUNDLED_ORG:
            yield BUNDLED_MODELS / name
        yield self.volume.root / folder_name(model_id)
        for root in self._settings.local_models:
            yield root / model_id
            yield root / folder_name(model_id)

    def _installed(self, ref: SourceRef) -> InstalledModel | None:
        for volume, records in zip(self._volumes, self._records, strict=True):
            key = records.find(ref)
            if key is None and ref.is_plain and is_commit(ref.revision):
                key = model_key(HubFiles(ref.repo, ref.revision, ref.variant, ref.part))
            # a record is a file on a volume that others write to as well
            folder = volume.find(key) if key is not None and is_key(key) else None
            manifest = read_manifest(folder) if folder else None
            if key is not None and manifest is not None:
                return self._take(volume, key, manifest, ref.model_id)
        return None

    def _cached(self, ref: SourceRef) -> InstalledModel | None:
        for cache in self._settings.hub_caches:
            snapshot = hub.cached(ref.repo, ref.revision, cache, ref.precision, ref.part)
            weights = list(snapshot.rglob("*.safetensors")) if snapshot else []
            if snapshot and weights and not any(safetensors_problem(path) for path in weights):
                return self._inspect(ref.model_id, snapshot, revision=snapshot.name, part=ref.part)
        return None

    def _left_behind(self, ref: SourceRef) -> InstalledModel | None:
        """What docker-diffusers-api left on a volume that cannot be written, so that it cannot be taken over."""
        folder = self.volume.root / normalized_model_id(ref.model_id, ref.revision)
        if folder.parent != self.volume.root or not is_model(folder) or os.access(self.volume.root, os.W_OK):
            return None
        if missing_parts(folder) or any(safetensors_problem(path) for path in folder.rglob("*.safetensors")):
            return None
        return self._inspect(ref.model_id, folder)

    def _plain_folders(self) -> Iterator[tuple[str, Path]]:
        """Folders that were put there by hand, with the ids that they can be asked for by."""
        places = [(f"{BUNDLED_ORG}/{folder.name}", folder) for folder in _folders(BUNDLED_MODELS)]
        for root in (self.volume.root, *self._settings.local_models):
            for folder in _folders(root):
                places.append((model_id_of(folder.name), folder))
                if root in self._settings.local_models:
                    places += [(f"{folder.name}/{inner.name}", inner) for inner in _folders(folder)]
        for model_id, folder in places:
            if is_model_id(model_id) and is_model(folder) and not (folder / MANIFEST_NAME).exists():
                yield model_id, folder

    def _listed(self) -> Iterator[tuple[Volume, str, Manifest]]:
        for volume in self._volumes:
            for entry in volume.list():
                if not entry.manifest.adapter:
                    yield volume, entry.key, entry.manifest

    def _take(self, volume: Volume, key: str, manifest: Manifest, model_id: str) -> InstalledModel:
        return self._inspect(model_id, volume.root / key, manifest.revision, key, manifest.source, manifest.part)

    def _inspect(
        self, model_id: str, folder: Path, revision: str = "", key: str = "", source: str = "", part: str = ""
    ) -> InstalledModel:
        folder = folder.resolve()
        seen = _seen(folder, bool(revision))
        known = self._known.get((folder, part))
        if known is None or known.seen != seen:
            model = describe(model_id, folder, revision=revision, key=key, source=source, part=part)
            known = self._known[folder, part] = _Known(seen, model, bool(revision))
        if known.model.model_id == model_id:
            return known.model
        return msgspec.structs.replace(known.model, model_id=model_id)


def _is_of_repo(entry: InstalledEntry, repo: str) -> bool:
    """Whether an installed model is that repository's: its key says so, which nobody can choose."""
    manifest = entry.manifest
    if not is_commit(manifest.revision):
        return False
    return entry.key == model_key(HubFiles(repo, manifest.revision, manifest.variant, manifest.part))


def _limit(settings: Settings) -> int | None:
    limit = settings.volume_limit
    if not isinstance(limit, float):
        return limit
    root = settings.models_dir
    while not root.exists():
        root = root.parent
    return int(shutil.disk_usage(root).total * limit)


def _times(model: InstalledModel) -> tuple[int, int]:
    return model.folder.stat().st_mtime_ns, model.marker.stat().st_mtime_ns


def _seen(folder: Path, is_settled: bool) -> _Seen:
    # what has a revision of its own is never written to; elsewhere the files are what the revision is made of
    return _looked_at([folder, folder / "model_index.json"]) if is_settled else _files_of(folder)


def _files_of(folder: Path) -> _Seen:
    """The files of a folder and of its components; none is read. Those past the first thousand count by their names."""
    names = [*_names(folder), *(path for below in _folders(folder) for path in _names(below))]
    return _looked_at(names[:_LOOKED_AT]) + tuple((str(path), 0, 0) for path in names[_LOOKED_AT:])


def _names(folder: Path) -> list[Path]:
    try:
        return sorted(folder.iterdir())
    except OSError:
        return []


def _looked_at(paths: list[Path]) -> _Seen:
    seen = []
    for path in paths:
        try:
            status = path.stat()
        except OSError:
            continue  # what a model lacks is told by reading it
        seen.append((str(path), status.st_size, status.st_mtime_ns))
    return tuple(seen)


def _folders(root: Path) -> list[Path]:
    try:
        return sorted(f for f in root.iterdir() if not f.name.startswith(".") and f.is_dir())
    except OSError:
        return []
