"""The name of a model's folder on the volume: one for all requests that mean the same files, and for no others."""

from __future__ import annotations

import hashlib
import re

import msgspec

from api.models.locations import ARCHIVE_SUFFIXES, CHECKPOINT_SUFFIXES, Location

KEY = re.compile(r"[a-z0-9][a-z0-9._-]{0,99}@[0-9a-f]{20}(?:-(?:fp16|bf16))?")
"""What every key looks like: at most 126 characters of ASCII, none of them upper case."""

_COMMIT = re.compile(r"[0-9a-f]{40}(?:[0-9a-f]{24})?")
_VARIANTS = ("", "fp16", "bf16")
# a client may try for two sources with one key: 80 bits make that 2^40 tries for any pair, 2^80 for a given one
_DIGITS = 20
_READABLE = 100


class HubFiles(msgspec.Struct, frozen=True):
    """Files of a repository on the hub.

    Attributes:
        repo: ``org/name`` as the hub itself spells it (it also answers to other spellings).
        commit: what the revision resolved to: 40 (SHA-1) or 64 (SHA-256) hex digits.
        variant: which weight files are meant: ``""``, ``fp16`` or ``bf16``. The variant that was found,
            not the precision that was asked for: plain files that are cast on load are plain files.
        part: what of a pipeline is meant; empty: all of it.
    """

    repo: str
    commit: str
    variant: str = ""
    part: str = ""


class LocatedFiles(msgspec.Struct, frozen=True):
    """Files at a URL: a folder, an archive, or a single-file checkpoint.

    Attributes:
        location: where they lie.
        version: what tells this content from what lay there before: an ETag (quotes and ``W/`` do not
            count) or ``sha256:<hex>``; empty where the source says nothing. ``#sha256=`` in the URL
            goes before it.
        variant: as in ``HubFiles``; counts for a folder only, the others have one set of files.
        config_version: what identifies a checkpoint's configuration, where one was given: the same weights
            converted with another one are another model.
        part: as in ``HubFiles``.
    """

    location: Location
    version: str = ""
    variant: str = ""
    config_version: str = ""
    part: str = ""


def model_key(files: HubFiles | LocatedFiles) -> str:
    """The name of the folder that holds these files: ``org--name@1a2b3c4d5e6f7a8b9c0d-fp16``.

    A readable part, then the start of a SHA-256 over everything that decides which files are meant.
    It depends on nothing else: MODEL_ID, credentials and signatures may differ between requests that
    mean the same files. Lower case only: it is the same name on a file system that ignores case.

    Raises:
        ValueError: the commit is not a full one, or the variant is unknown.
    """
    variant = files.variant
    if variant not in _VARIANTS:
        raise ValueError(f"unknown variant {variant!r}")
    if isinstance(files, HubFiles):
        if not _COMMIT.fullmatch(files.commit):
            raise ValueError("a key needs a full commit, not a branch, a tag or an abbreviation")
        readable = files.repo
        identity: list[object] = ["hub", files.repo, files.commit, variant]
    else:
        where = files.location
        variant = variant if where.kind == "prefix" else ""
        readable = _name_of(where)
        identity = ["url", where.identity, _version(where, files.version), variant]
        if where.kind == "checkpoint":
            identity.append(files.config_version)
    if files.part:
        identity.append({"part": files.part})
    # JSON keeps the parts apart whatever they hold
    digest = hashlib.sha256(msgspec.json.encode(identity)).hexdigest()[:_DIGITS]
    return f"{_readable(readable)}@{digest}" + (f"-{variant}" if variant else "")


def is_key(name: str) -> bool:
    """Whether a folder's name can have come from ``model_key``."""
    return KEY.fullmatch(name) is not None


def is_commit(revision: str) -> bool:
    """Whether a revision is a full commit, which means the same files for ever."""
    return _COMMIT.fullmatch(revision) is not None


def _version(location: Location, version: str) -> str:
    if location.sha256:
        return f"sha256:{location.sha256}"
    return version.strip().removeprefix("W/").strip('"')


def _name_of(location: Location) -> str:
    """The last part of the address. Not ``#fname=``: that does not decide what is fetched."""
    name = location.identity[3 if location.source == "s3" else 1].partition("?")[0].rstrip("/").rpartition("/")[2]
    for suffix in ARCHIVE_SUFFIXES + CHECKPOINT_SUFFIXES:
        if name.lower().endswith(suffix):
            name = name[: -len(suffix)]
            break
    return name.removeprefix("models--")


def _readable(name: str) -> str:
    lowered = re.sub(r"%[0-9A-Fa-f]{2}", "-", name).replace("/", "--").lower()
    safe = re.sub(r"[^a-z0-9._-]+", "-", lowered)
    return re.sub(r"\.\.+", ".", safe).lstrip("._-")[:_READABLE].rstrip("._-") or "model"


def adopted_key(folder: str) -> str:
    """The key of a model that another program left in a folder of that name."""
    digest = hashlib.sha256(msgspec.json.encode(["folder", folder])).hexdigest()[:_DIGITS]
    return f"{_readable(folder.removeprefix('models--'))}@{digest}"
