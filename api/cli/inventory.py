"""Every model that is here, whole or not, and which of them a word means."""

from __future__ import annotations

import posixpath
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec

from api.errors import ApiError
from api.models.library import Library
from api.models.manifest import Manifest, list_files, read_manifest, sizes_match
from api.models.records import Records
from api.models.volume import Volume
from api.settings import BUNDLED_MODELS, Settings


class Entry(msgspec.Struct, frozen=True):
    """A model that is here.

    Attributes:
        key: its name on the volume; empty for a folder that was put there by hand.
        model_id: its name; empty where its manifest cannot be read.
        names: every MODEL_ID that it was asked for by.
        asked_revision: MODEL_REVISION that it was asked for by, where that was one.
        folder: where it lies.
        place: ``volume``, ``image``, ``bundled`` or ``folder``.
        volume: the one that it lies on.
        manifest: what it consists of, where there is one.
        bytes: size of its files.
        last_used: seconds since 1970, where that is known.
        whole: every file is there with its size.
    """

    key: str
    model_id: str
    names: frozenset[str]
    asked_revision: str
    folder: Path
    place: str
    volume: Volume | None
    manifest: Manifest | None
    bytes: int
    last_used: float | None
    whole: bool

    @property
    def title(self) -> str:
        """Its name, and what of it is here where that is not all."""
        part = self.manifest.part if self.manifest else ""
        return posixpath.normpath(f"{self.model_id or '?'}/{part or '.'}")

    def as_data(self) -> dict[str, Any]:
        """For programs; names as in ``GET /models``."""
        manifest = self.manifest
        used = datetime.fromtimestamp(self.last_used, UTC).isoformat(timespec="seconds") if self.last_used else None
        return {
            "key": self.key or None,
            "MODEL_ID": self.model_id or None,
            "MODEL_REVISION": manifest.revision if manifest else None,
            "variant": manifest.variant if manifest else None,
            "part": (manifest.part or None) if manifest else None,
            "bytes": self.bytes,
            "last_used": used,
            "installed": manifest.installed if manifest else None,
            "source": manifest.source if manifest else None,
            "verified": manifest.verified if manifest else None,
            "whole": self.whole,
            "place": self.place,
            "folder": str(self.folder),
        }


def inventory(settings: Settings) -> list[Entry]:
    """Every model, by name and key.

    Raises:
        OSError: MODELS_DIR cannot be read.
    """
    library = Library(settings)
    entries: dict[Path, Entry] = {}
    for place, volume in (("volume", library.volume), ("image", Volume(settings.baked_models_dir, None))):
        records = Records(volume.root).list()
        for folder in volume.models():
            asked = [record for record in records if record.key == folder.name]
            entries.setdefault(folder, _installed(place, volume, folder, {r.model_id: r.revision for r in asked}))
    for model in library.all():
        if not model.key:
            place = "bundled" if model.folder.is_relative_to(BUNDLED_MODELS) else "folder"
            size = sum(entry.size for entry in list_files(model.folder))
            entries[model.folder] = Entry(
                "", model.model_id, frozenset([model.model_id]), "", model.folder, place, None, None, size, None, True
            )
    return sorted(entries.values(), key=lambda entry: (entry.model_id, entry.key))


def _installed(place: str, volume: Volume, folder: Path, asked: dict[str, str]) -> Entry:
    manifest = read_manifest(folder)
    model_id = manifest.model_id if manifest else min(asked, default="")
    revisions = set(asked.values())
    return Entry(
        folder.name,
        model_id,
        frozenset({model_id, *asked} - {""}),
        revisions.pop() if len(revisions) == 1 else "",
        folder,
        place,
        volume,
        manifest,
        sum(entry.size for entry in manifest.files) if manifest else sum(f.size for f in list_files(folder)),
        volume.last_used(folder),
        manifest is not None and sizes_match(folder, manifest.files),
    )


def choose(entries: list[Entry], name: str) -> Entry:
    """The one model that a key or an id means; installed ones go before folders of the same name.

    Raises:
        ApiError: MODEL_NOT_FOUND; INVALID_INPUTS where several are meant.
    """
    found = [entry for entry in entries if entry.key == name]
    if not found:
        named = [entry for entry in entries if name in entry.names]
        found = [entry for entry in named if entry.key] or named
        if len({entry.key for entry in found}) > 1:
            message = f'"{name}" is several models here; say which by its key.'
            raise ApiError("INVALID_INPUTS", message, requested=name, available=[entry.key for entry in found])
    if not found:
        available = sorted({entry.model_id for entry in entries} - {""})
        raise ApiError("MODEL_NOT_FOUND", f'"{name}" is not here.', requested=name, available=available)
    # what lies on the volume goes before the same in the image
    return min(found, key=lambda entry: entry.place != "volume")
