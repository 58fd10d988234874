"""What a request, or the environment, names: which weights, and where they may come from."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from typing import Any

import msgspec

from api.errors import ApiError
from api.models.locations import ARCHIVE_SUFFIXES, CHECKPOINT_SUFFIXES, Location, parse_location
from api.models.names import check_model_id, check_revision, is_model_id
from api.settings import Settings

PRECISIONS = ("fp32", "fp16", "bf16")
_OWN_SOURCE = ("HF_MODEL_ID", "MODEL_URL", "CHECKPOINT_URL")


class SourceRef(msgspec.Struct, frozen=True):
    """What names weights, as it was asked for.

    Attributes:
        model_id: their name here.
        repo: the hub's repository.
        revision: branch, tag or commit of that repository, or the fingerprint of a local folder; may be empty.
        precision: empty, ``fp32``, ``fp16`` or ``bf16``; decides which of a repository's files are meant.
        url: MODEL_URL: where they lie, or are to lie.
        checkpoint: CHECKPOINT_URL: a single file to convert.
        config: CHECKPOINT_CONFIG_URL: a family, a model id, or the address of a configuration.
        trusted: the addresses come from the environment, not from a request.
        config_trusted: so does the configuration's.
        adapter: ``lora``, ``inversion`` or ``upscaler``: ``checkpoint`` is no model, but one of these.
        part: what of a pipeline is meant (``parts``): the path of a folder or a file; empty: all of it.
    """

    model_id: str
    repo: str
    revision: str = ""
    precision: str = ""
    url: Location | None = None
    checkpoint: Location | None = None
    config: str = ""
    trusted: bool = False
    config_trusted: bool = False
    adapter: str = ""
    part: str = ""

    @property
    def variant(self) -> str:
        """The variant of weight files that is preferred: ``fp16``, ``bf16`` or empty."""
        return self.precision if self.precision in ("fp16", "bf16") else ""

    @property
    def name(self) -> str:
        """32 hex digits: refs with one name are answered by the same files."""
        parts: list[Any] = [self.model_id, self.repo, self.revision, self.variant]
        for place in (self.url, self.checkpoint):
            parts.append((*place.identity, place.sha256 or "") if place else None)
        parts += [self.adapter] if self.adapter else []
        parts.append(self.config if self.checkpoint or (self.url and self.url.kind == "checkpoint") else "")
        if self.part:
            parts.append({"part": self.part})
        return hashlib.sha256(msgspec.json.encode(parts)).hexdigest()[:32]

    @property
    def is_plain(self) -> bool:
        """Named by an id alone: any place that knows the id may answer."""
        return self.url is None and self.checkpoint is None

    @property
    def is_local(self) -> bool:
        """Whether a folder of that name may answer: it was not said that the weights are another repository's."""
        return self.is_plain and self.repo == self.model_id


def read_ref(options: Mapping[str, Any], settings: Settings) -> SourceRef | None:
    """The ref of a request; what it leaves out comes from the environment, where that is about the same model.

    Args:
        options: checked ``callInputs``.
        settings: the default model and the default storage.

    Returns:
        None where neither names a model.

    Raises:
        ApiError: INVALID_INPUTS for an unsafe name, a precision or a URL that is none.
    """
    named = options.get("MODEL_ID", "")
    own = any(options.get(name) for name in _OWN_SOURCE)
    is_default = not named or named == settings.model_id
    trusted = is_default and not own
    values = dict(options)
    if trusted:
        defaults = {
            "HF_MODEL_ID": settings.hf_model_id,
            "MODEL_REVISION": settings.model_revision,
            "MODEL_URL": settings.model_url,
            "CHECKPOINT_URL": settings.checkpoint_url,
            "CHECKPOINT_CONFIG_URL": settings.checkpoint_config_url,
        }
        values = {**defaults, **{name: value for name, value in options.items() if value}}
    precision = options.get("MODEL_PRECISION") or settings.model_precision
    if precision and precision not in PRECISIONS:
        message = "Not a precision."
        field = "callInputs.MODEL_PRECISION"
        raise ApiError("INVALID_INPUTS", message, field=field, requested=precision, available=list(PRECISIONS))
    for field in ("MODEL_ID", "HF_MODEL_ID"):
        if values.get(field):
            check_model_id(values[field], f"callInputs.{field}")
    revision = check_revision(values.get("MODEL_REVISION", ""), "callInputs.MODEL_REVISION")
    fallback = named or settings.model_id
    url = _locate(values, "MODEL_URL", settings, fallback, revision)
    checkpoint = _locate(values, "CHECKPOINT_URL", settings, fallback, revision)
    if checkpoint and checkpoint.kind != "checkpoint":
        message = 'A checkpoint is one file, .safetensors or .ckpt; where the URL does not end so, add "#fname=NAME".'
        raise ApiError("INVALID_INPUTS", message, field="callInputs.CHECKPOINT_URL", requested=str(checkpoint))
    if url and url.source == "http" and url.kind == "prefix":
        message = (
            'An http URL must lead to one file: .tar.zst, .tar.gz, .tar, .safetensors or .ckpt; "#fname=NAME" says '
            "which where its end does not. Folders of plain files are read from S3."
        )
        raise ApiError("INVALID_INPUTS", message, field="callInputs.MODEL_URL", requested=str(url))
    config = str(values.get("CHECKPOINT_CONFIG_URL", ""))
    if config and not (checkpoint or (url and url.kind == "checkpoint")):
        message = "It says how a checkpoint is built, and there is no CHECKPOINT_URL."
        raise ApiError("INVALID_INPUTS", message, field="callInputs.CHECKPOINT_CONFIG_URL")
    model_id = named or (trusted and settings.model_id) or values.get("HF_MODEL_ID") or name_of(checkpoint or url)
    if not model_id:
        return None
    repo = values.get("HF_MODEL_ID") or model_id
    config_trusted = trusted and not options.get("CHECKPOINT_CONFIG_URL")
    return SourceRef(model_id, repo, revision, precision, url, checkpoint, config, trusted, config_trusted)


def _locate(values: Mapping[str, Any], name: str, settings: Settings, model_id: str, revision: str) -> Location | None:
    if not values.get(name):
        return None
    return parse_location(
        values[name],
        default_endpoint=settings.aws_s3_endpoint_url,
        default_bucket=settings.aws_s3_default_bucket,
        model_id=model_id,
        revision=revision,
        field=f"callInputs.{name}",
    )


def name_of(place: Location | None) -> str:
    """A model id after the file's name, for a request that gives none."""
    if place is None:
        return ""
    name = place.key.rstrip("/").rpartition("/")[2] if place.source == "s3" else place.filename
    for suffix in ARCHIVE_SUFFIXES + CHECKPOINT_SUFFIXES:
        if name.lower().endswith(suffix):
            name = name[: -len(suffix)]
            break
    halves = name.removeprefix("models--").split("--", maxsplit=1)
    safe = (re.sub(r"[^A-Za-z0-9._]+|\.\.+", "-", half).strip("._-") for half in halves)
    name = "/".join(part for part in safe if part)[:200]
    return name if is_model_id(name) else "model"
