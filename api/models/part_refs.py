"""What a request names of a part of a pipeline: which one, where it lies, and what is said of it after a ``#``."""

from __future__ import annotations

import posixpath
from typing import NamedTuple
from urllib.parse import urlencode

from api.errors import ApiError
from api.models.locations import Location, pairs_of, parse_location
from api.models.manifest import is_safe_path
from api.models.names import check_model_id, check_revision
from api.models.parts import is_file
from api.models.refs import SourceRef, name_of
from api.settings import Settings

_FORMS = ["owner/repository", "owner/repository/folder", "s3:///bucket/key/", "https://host/file.tar.zst"]


class PartRef(NamedTuple):
    """A part, and what else was said of it.

    Attributes:
        source: where it comes from.
        said: what followed the ``#``, by name, but for what says where it lies.
    """

    source: SourceRef
    said: dict[str, str]


def read_part(
    text: str, field: str, settings: Settings, precision: str, *, known: tuple[str, ...] = (), single: bool = False
) -> PartRef:
    """Read the name or URL of a part: a folder with a configuration and weights, or a single file of weights.

    Args:
        text: ``owner/repository``, a path in it, or a URL; ``#revision=`` says which of the repository's; ``#fname=``
            and ``#sha256=`` are of a URL.
        field: path of the input that held it, for errors.
        settings: the default storage.
        precision: that is preferred where there are files of several.
        known: what else may follow the ``#``.
        single: a file is meant, not a folder.

    Raises:
        ApiError: INVALID_INPUTS.
    """
    base, _, fragment = text.strip().partition("#")
    pairs = pairs_of(fragment)
    said = dict(pairs)
    is_url = "://" in base
    place = ("fname", "sha256") if is_url else ("revision",)
    if (fragment and not pairs) or len(said) != len(pairs) or said.keys() - {*place, *known}:
        allowed = ", ".join(f"{name}=" for name in (*place, *known))
        raise _invalid(field, f"After # only {allowed} are known here, each once.", text)
    where = {name: said.pop(name) for name in place if name in said}
    if is_url:
        return PartRef(_at_url(base, where, field, settings, precision, single), said)
    owner, _, rest = base.partition("/")
    name, _, part = rest.partition("/")
    part = part.rstrip("/")
    if part and not is_safe_path(part):
        raise _invalid(field, "The path in the repository is not one of a file or folder in it.", text)
    if is_file(part) != single:
        wanted = "a .safetensors file in a repository" if single else "a folder, not a file"
        raise _invalid(field, f"It must name {wanted}.", text)
    repo = check_model_id(f"{owner}/{name}" if name else owner, field)
    revision = check_revision(where.get("revision", ""), field)
    return PartRef(SourceRef(repo, repo, revision, precision, part=part or "."), said)


def _at_url(
    base: str, where: dict[str, str], field: str, settings: Settings, precision: str, single: bool
) -> SourceRef:
    location = parse_location(
        f"{base}#{urlencode(where)}" if where else base,
        default_endpoint=settings.aws_s3_endpoint_url,
        default_bucket=settings.aws_s3_default_bucket,
        field=field,
    )
    if single and not is_file(location.filename):
        raise _invalid(field, 'It must lead to a .safetensors file; add "#fname=NAME" where its end does not say so.')
    if not single and (location.kind == "checkpoint" or (location.source == "http" and location.kind == "prefix")):
        message = (
            "It must lead to an archive (.tar.zst, .tar.gz, .tar) or a folder in S3 with config.json and weights; "
            '"#fname=NAME" says which where the end of the URL does not.'
        )
        raise _invalid(field, message, str(location))
    name = name_of(location)
    return SourceRef(name, name, "", precision, location, part=location.filename if single else ".")


def repeated(ref: PartRef, revision: str) -> str:
    """What names the same part in the same version again; without secrets.

    Args:
        ref: as it was asked for.
        revision: that it was found in.
    """
    source, said = ref.source, dict(ref.said)
    if source.url is not None:
        return _with(str(source.url), _of_url(source.url) | said)
    name = posixpath.normpath(f"{source.repo}/{source.part}")
    return _with(name, {"revision": revision} | said)


def _of_url(url: Location) -> dict[str, str]:
    return {name: value for name, value in (("fname", url.fname), ("sha256", url.sha256)) if value}


def _with(name: str, said: dict[str, str]) -> str:
    return f"{name}#{urlencode(said, safe='/:')}" if said else name


def _invalid(field: str, message: str, text: str | None = None) -> ApiError:
    shown = text.partition("#")[0].partition("?")[0][:200] if text and "@" not in text else None
    return ApiError("INVALID_INPUTS", message, field=field, requested=shown, available=_FORMS)
