"""Brings a model onto the volume: finds its source, and installs it whole or not at all."""

from __future__ import annotations

import logging
import uuid
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import msgspec

from api.errors import ApiError
from api.models.conversion import convert_pickles
from api.models.description import describe
from api.models.installation import Installation
from api.models.keys import adopted_key
from api.models.locations import Location, normalized_model_id
from api.models.manifest import Manifest, OnProgress
from api.models.records import Records
from api.models.refs import SourceRef
from api.models.s3_upload import can_upload_folder
from api.models.sources import checkpoint, remote
from api.models.sources.adapter import AdapterSource
from api.models.sources.archive import ArchiveSource
from api.models.sources.file import FileSource
from api.models.sources.hub import HubSource
from api.models.sources.s3_folder import S3FolderSource
from api.models.sources.source import Source
from api.models.volume import Volume
from api.settings import Settings

log = logging.getLogger("api.models")

_STEP = 16 * 2**20
"""Bytes of room that are made at a time."""

OnConfiguration = Callable[[Path | None], None]
"""Called before a model's weights are fetched, with a folder that holds its small files, or with None where the source
cannot give them apart; may raise to stop."""
FindFolder = Callable[[str], tuple[Path, str] | None]
"""The folder and the revision of an installed model, by its id."""


class Installed(msgspec.Struct, frozen=True):
    """A model that is there.

    Attributes:
        key: its name on the volume.
        folder: where it is.
        upload_to: MODEL_URL, where that was asked for and held nothing.
    """

    key: str
    folder: Path
    upload_to: Location | None = None


class Installer:
    """Installs models on a volume.

    Args:
        settings: keys and doors.
        volume: where to.
        leased: the keys that must stay when room is made.
        find_folder: looks up the model that a CHECKPOINT_CONFIG_URL names.
    """

    def __init__(
        self,
        settings: Settings,
        volume: Volume,
        leased: Callable[[], set[str]] = set,
        find_folder: FindFolder = lambda model_id: None,
    ) -> None:
        self._settings = settings
        self._volume = volume
        self._records = Records(volume.root)
        self._leased = leased
        self._find_folder = find_folder

    def install(
        self,
        ref: SourceRef,
        on_progress: OnProgress,
        *,
        on_configuration: OnConfiguration | None = None,
        on_wait: Callable[[], None] | None = None,
        adopt: bool = True,
    ) -> Installed:
        """Ask the source what the ref means today, and bring that here if it is not here already.

        Args:
            ref: what is wanted.
            on_progress: called at least five times a second while bytes move; raise in it to stop.
            on_configuration: see there.
            on_wait: called while another process installs the same.
            adopt: a folder that docker-diffusers-api left on the volume will do.

        Raises:
            ApiError: what the sources raise; DISK_FULL; MODEL_NOT_FOUND where the volume cannot be written.
        """
        adopted = self.adopt(ref, on_progress) if adopt else None
        if adopted is not None:
            return adopted
        source, upload_to = self._find(ref)
        with self._volume.install(source.key, on_wait=on_wait) as installation:
            if installation.installed is None:
                self._fetch(ref, source, installation, on_progress, on_configuration)
            folder = installation.installed
        assert folder is not None
        self._records.write(ref, source.key, source.origin)
        return Installed(source.key, folder, upload_to)

    def size(self, ref: SourceRef) -> int | None:
        """Bytes that ``install`` would fetch, or None where the source does not say; nothing is fetched or changed.

        Raises:
            ApiError: what the sources raise.
        """
        if self._left_by_others(ref) is not None:
            return 0
        source, _ = self._find(ref)
        return source.size if self._volume.find(source.key) is None else 0

    def adopt(self, ref: SourceRef, on_progress: OnProgress) -> Installed | None:
        """Take over what docker-diffusers-api left: ``models--org--name[--revision]`` with a diffusers folder in it.

        Needs no network. What is there and is not whole is left as it is.
        """
        old = self._left_by_others(ref)
        if old is None:
            return None
        name, key = old.name, adopted_key(old.name)

        def prepare() -> None:
            if any(old.rglob("*.bin")):
                convert_pickles(old, on_progress, allow_pickle=self._settings.allow_pickle != "0")

        try:
            folder = self._volume.adopt(old, key, ref.model_id, prepare=prepare)
        except (ApiError, OSError) as error:
            log.warning("%s is not taken over: %s", name, error)
            return None
        self._records.write(ref, key, name)
        log.info("took over %s as %s", name, key)
        return Installed(key, folder)

    def _left_by_others(self, ref: SourceRef) -> Path | None:
        """Where docker-diffusers-api left it, also when that was taken over before."""
        # where a request says where the weights are, nothing says that these are those
        if ref.part or not (ref.is_local or (ref.trusted and ref.repo == ref.model_id)) or "/" in ref.revision:
            return None
        old = self._volume.root / normalized_model_id(ref.model_id, ref.revision)
        there = (old / "model_index.json").is_file() and not old.is_symlink()
        return old if there or self._volume.find(adopted_key(old.name)) is not None else None

    def _fetch(
        self,
        ref: SourceRef,
        source: Source,
        installation: Installation,
        on_progress: OnProgress,
        on_configuration: OnConfiguration | None,
    ) -> None:
        # what says nothing of its content cannot be continued
        installation.expect(f"{source.origin} {source.revision or uuid.uuid4().hex}")
        if on_configuration:
            has = source.configuration(installation.staging, lambda phase, done, total: None)
            on_configuration(installation.staging if has else None)
        # a stranger's server may claim any size: others make room for what it sends, not for what it says
        reserved = source.bytes if ref.trusted or source.is_known else 0
        if source.bytes > self._volume.capacity():
            message = f"{source.origin} says that it takes {source.bytes} bytes, more than the volume can ever hold."
            raise ApiError("DISK_FULL", message, requested=ref.model_id)
        installation.reserve(reserved, self._leased)
        got = source.fetch(installation.staging, self._making_room(installation, source, reserved, on_progress))
        manifest = Manifest(
            ref.model_id,
            source.origin,
            source.revision,
            source.variant,
            tuple(got.files),
            got.verified,
            datetime.now(UTC).isoformat(timespec="seconds"),
            ref.trusted,
            adapter=ref.adapter,
            part=ref.part,
        )
        if not ref.adapter:
            describe(ref.model_id, installation.staging, revision="-", part=ref.part)
        hashes = {entry.path: entry.sha256 for entry in got.files if entry.sha256}
        installation.commit(manifest, hashes)
        log.info("installed %s from %s as %s", ref.model_id, source.origin, source.key)

    def _making_room(
        self, installation: Installation, source: Source, reserved: int, on_progress: OnProgress
    ) -> OnProgress:
        """Room in steps for what is not known ahead: an archive says only while it is unpacked how large it becomes."""

        def tell(phase: str, done: int, total: int | None) -> None:
            nonlocal reserved
            taken = done if phase == "extract" or not total else source.bytes * done // total
            if phase in ("download", "extract") and taken > reserved:
                ahead = taken + max(_STEP, taken // 4)
                reserved = min(ahead, source.bytes) if taken <= source.bytes else ahead
                installation.reserve(reserved, self._leased)
            on_progress(phase, done, total)

        return tell

    def _find(self, ref: SourceRef) -> tuple[Source, Location | None]:
        """The source, and where to upload the model to once it is here."""
        settings = self._settings
        if ref.url is None:
            return self._original(ref), None
        try:
            if ref.url.kind == "prefix":
                return S3FolderSource(ref, settings), None
            found = remote.find(ref.url, settings, ref.trusted)
        except ApiError as error:
            # a model is named twice so that it can be fetched where it is and kept where it is wanted
            if error.code != "MODEL_NOT_FOUND" or ref.url.source != "s3":
                raise
            return self._after_a_miss(ref, ref.url, error)
        if ref.url.kind == "archive":
            return ArchiveSource(found, ref.part), None
        if ref.part:
            return FileSource(found, ref.part), None
        return checkpoint.CheckpointSource(found, self._config(ref), settings), None

    def _after_a_miss(self, ref: SourceRef, url: Location, miss: ApiError) -> tuple[Source, Location | None]:
        try:
            source = self._original(ref)
        except ApiError as error:
            if error.code != "MODEL_NOT_FOUND" or ref.checkpoint:
                raise
            message = f"{miss.message} And it could not be fetched elsewhere to be kept there: {error.message}"
            raise ApiError("MODEL_NOT_FOUND", message, field=miss.field or "callInputs.MODEL_URL") from None
        # what may be read here with the operator's keys is not sent to whoever a request names
        ours = url.endpoint_is_default and url.bucket == self._settings.aws_s3_default_bucket
        return source, url if can_upload_folder(url) and (ref.trusted or ours) else None

    def _original(self, ref: SourceRef) -> Source:
        if ref.checkpoint is None:
            return HubSource(ref, self._settings)
        if ref.adapter:
            return AdapterSource(ref, self._settings)
        found = remote.find(ref.checkpoint, self._settings, ref.trusted)
        return checkpoint.CheckpointSource(found, self._config(ref), self._settings)

    def _config(self, ref: SourceRef) -> checkpoint.Config:
        there = self._find_folder(ref.config) if ref.config and "://" not in ref.config else None
        folder, revision = there or (None, "")
        return checkpoint.read_config(ref.config, self._settings, ref.config_trusted, folder=folder, revision=revision)
