"""``python -m api download`` and ``models pull``: bring models here, without a server."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from api.cli.bars import Bars
from api.cli.main import FAILED, OK, options, sentence
from api.cli.text import amount, short
from api.errors import ApiError
from api.models.archive_pack import pack
from api.models.installer import Installed, Installer
from api.models.library import BUNDLED_ORG, Library
from api.models.locations import Location
from api.models.manifest import read_manifest
from api.models.refs import SourceRef, read_ref
from api.models.s3_upload import upload
from api.models.sources.remote import access_to
from api.settings import BUNDLED_MODELS, Settings


def download(settings: Settings, args: argparse.Namespace) -> int:
    """Bring models here that are not here yet; those that are need no network.

    Raises:
        ApiError: what the source says, or the volume.
    """
    refs = _refs(settings, args)
    if len(refs) == 1:
        return _download(refs[0], settings, args)
    status = OK
    for ref in refs:
        try:
            status = max(status, _download(ref, settings, args))
        except ApiError as error:
            print(f"{ref.model_id}: {sentence(error)}", file=sys.stderr)
            status = FAILED
    return status


def _download(ref: SourceRef, settings: Settings, args: argparse.Namespace) -> int:
    library = Library(settings)
    model = library.find(ref)
    if model is not None and model.folder.is_relative_to(BUNDLED_MODELS):
        print(f"{ref.model_id} comes with this server: there is nothing to download.")
        return OK
    if model is not None:
        print(f"{ref.model_id} is here already ({short(model.revision)}): {model.folder}")
        return OK
    _not_bundled(ref, library)
    installed = _install(ref, settings, library, adopt=True)
    print(_arrived(ref, installed.folder))
    return _keep(ref, installed, settings, args)


def pull(settings: Settings, args: argparse.Namespace) -> int:
    """Ask the source again, and install what it has today; the records then lead there.

    Raises:
        ApiError: as ``download``.
    """
    ref = _refs(settings, args)[0]
    library = Library(settings)
    _not_bundled(ref, library)
    before = library.find(ref)
    installed = _install(ref, settings, library, adopt=False)
    if before is not None and before.folder == installed.folder.resolve():
        print(f"{ref.model_id} is up to date ({short(before.revision)}): {installed.folder}")
    elif before is not None and before.key:
        manifest = read_manifest(installed.folder)
        now = short(manifest.revision) if manifest else installed.key
        print(f"{ref.model_id} was brought up to date, {short(before.revision)} → {now}: {installed.folder}")
        print(f"What was there before stays until it is removed: python -m api models rm {before.key}")
    else:
        print(_arrived(ref, installed.folder))
    found = Library(settings).find(ref)
    if found is not None and found.folder != installed.folder.resolve():
        print(f"Requests for it are answered by {found.folder}, which was put there by hand.", file=sys.stderr)
    return _keep(ref, installed, settings, args)


def push_folder(folder: Path, location: Location, settings: Settings) -> None:
    """Upload a model with the operator's keys.

    Raises:
        ApiError: see ``api.models.s3_upload.upload``.
    """
    with Bars() as bars:
        upload(folder, location, bars, access_to(location, settings, trusted=True), pack=pack)


def _refs(settings: Settings, args: argparse.Namespace) -> list[SourceRef]:
    named = options(args).keys() - {"MODELS_DIR"}
    warm = () if named or args.command == "models" else settings.warm_models
    refs = [read_ref(wanted, settings) for wanted in [{}, *({"MODEL_ID": name} for name in warm)]]
    found = list({ref.name: ref for ref in refs if ref is not None}.values())
    if not found:
        raise ApiError("NO_MODEL_ID", "Which model? Give its id, or set MODEL_ID.")
    return found


def _not_bundled(ref: SourceRef, library: Library) -> None:
    if ref.is_plain and ref.repo.startswith(f"{BUNDLED_ORG}/"):
        message = f'"{ref.repo}" is not downloaded: models of {BUNDLED_ORG}/ come with this server.'
        available = [name for name in library.names() if name.startswith(f"{BUNDLED_ORG}/")]
        raise ApiError("MODEL_NOT_FOUND", message, requested=ref.repo, available=available)


def _install(ref: SourceRef, settings: Settings, library: Library, *, adopt: bool) -> Installed:
    installer = Installer(settings, library.volume, find_folder=library.folder_of)
    with Bars() as bars:
        return installer.install(ref, bars, on_wait=bars.waiting, adopt=adopt)


def _arrived(ref: SourceRef, folder: Path) -> str:
    manifest = read_manifest(folder)
    if manifest is None:
        return f"{ref.model_id} is here: {folder}"
    size = amount(sum(entry.size for entry in manifest.files))
    checked = "" if manifest.verified else ", unverified: its source gave no hashes"
    return f"{ref.model_id} is here ({short(manifest.revision)}, {size}{checked}): {folder}"


def _keep(ref: SourceRef, installed: Installed, settings: Settings, args: argparse.Namespace) -> int:
    """Upload to MODEL_URL what was not there."""
    location = installed.upload_to
    if location is None:
        return OK
    if not args.upload:
        print(f"{location} holds nothing yet: python -m api models push {installed.key} {location}")
        return OK
    try:
        push_folder(installed.folder, location, settings)
    except ApiError as error:
        raise ApiError(
            error.code,
            f"{ref.model_id} is here, but could not be uploaded: {error.message} "
            f"To try again: python -m api models push {installed.key} {location}",
            available=error.available,
        ) from None
    print(f"{ref.model_id} is kept at {location}")
    return OK
