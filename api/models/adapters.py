"""LoRAs, textual inversions and upscalers: what a request asks for, where the file lies, what its header says of it."""

from __future__ import annotations

import math
from pathlib import PurePosixPath
from typing import Any
from urllib.parse import quote

import msgspec

from api.errors import ApiError
from api.models.locations import Location, pairs_of, parse_location, redacted
from api.models.manifest import is_safe_path
from api.models.names import check_model_id, check_revision
from api.models.refs import SourceRef
from api.settings import Settings

LORA, INVERSION, UPSCALER = "lora", "inversion", "upscaler"
ADAPTER_FILE = "adapter.safetensors"
"""What the one file of an adapter is called on the volume."""
USUAL_FILE = {LORA: "pytorch_lora_weights.safetensors", INVERSION: "learned_embeds.safetensors"}
"""What diffusers saves under, in repositories where no file is named."""
FIELDS = {
    LORA: "callInputs.lora_weights",
    INVERSION: "callInputs.textual_inversions",
    UPSCALER: "callInputs.upscale.model",
}

_KNOWN: dict[str, tuple[str, ...]] = {LORA: ("scale",), INVERSION: ("token",), UPSCALER: ()}
_COMMON = ("fname", "weight_name", "sha256", "revision")
MOST = 32
"""Adapters of a kind in one request."""
_LONGEST = 8192
_LARGEST_SCALE = 100.0
_LONGEST_TOKEN = 100
_LONGEST_TEXT = 500
_TEXTS = {name: {"type": ["string", "null"], "maxLength": _LONGEST_TEXT} for name in _COMMON}
_ADDRESS = {"type": "string", "minLength": 1, "maxLength": _LONGEST}
_SCALE = {"type": ["number", "null"], "minimum": -_LARGEST_SCALE, "maximum": _LARGEST_SCALE}
FORMS: dict[str, dict[str, Any]] = {
    LORA: {"url": _ADDRESS, **_TEXTS, "scale": _SCALE},
    INVERSION: {"url": _ADDRESS, **_TEXTS, "token": {"type": ["string", "null"], "maxLength": _LONGEST_TOKEN}},
}
"""What the object says that asks for one, as JSON Schema."""


class Asked(msgspec.Struct, frozen=True):
    """An adapter as a request names it.

    Attributes:
        kind: ``lora``, ``inversion`` or ``upscaler``.
        address: a URL, or ``owner/repo[/file]``, without what follows ``#``.
        fname: which file of a repository, or what a URL's file is called.
        revision: of the repository.
        sha256: that the file must have.
        scale: of a LoRA.
        token: of an inversion; empty: what the file says.
    """

    kind: str
    address: str
    fname: str = ""
    revision: str = ""
    sha256: str = ""
    scale: float = 1.0
    token: str = ""


def read_asked(value: Any, kind: str, field: str) -> tuple[Asked, ...]:
    """Read ``lora_weights`` or ``textual_inversions``: one or a list of strings, or of objects.

    Args:
        value: ``URL#fname=…&scale=…``, or ``{"url": URL, "scale": …}`` with the same names.
        kind: ``lora`` or ``inversion``.
        field: for errors.

    Raises:
        ApiError: INVALID_INPUTS.
    """
    items = value if isinstance(value, list) else [value]
    if len(items) > MOST:
        raise ApiError("INVALID_INPUTS", f"At most {MOST} in one request.", field=field, requested=len(items))
    return tuple(_read(item, kind, field if len(items) == 1 else f"{field}[{n}]") for n, item in enumerate(items))


def _read(item: Any, kind: str, field: str) -> Asked:
    known = (*_COMMON, *_KNOWN[kind])

    def wrong(problem: str) -> ApiError:
        return ApiError(
            "INVALID_INPUTS", problem, field=field, requested=_shown(item), available=[f"#{name}=" for name in known]
        )

    said = (
        {name: value for name, value in item.items() if value is not None} if isinstance(item, dict) else {"url": item}
    )
    address = said.pop("url", None)
    if not isinstance(address, str) or not address.strip() or len(address) > _LONGEST:
        raise wrong('Must be a URL, "owner/repo/file.safetensors", or an object with such a "url".')
    address, _, fragment = address.strip().partition("#")
    pairs = pairs_of(fragment)
    names = [*(name for name, _ in pairs), *said]
    if (fragment and not pairs) or len(set(names)) < len(names) or set(names) - set(known):
        raise wrong(f"After # these are known, each once: {', '.join(known)}.")
    said |= dict(pairs)
    return Asked(
        kind,
        address,
        _text(said.get("fname", ""), wrong) or _text(said.get("weight_name", ""), wrong),
        check_revision(_text(said.get("revision", ""), wrong), field),
        _text(said.get("sha256", ""), wrong).lower(),
        _scale(said.get("scale", 1.0), wrong),
        _token(said.get("token", ""), wrong),
    )


def _shown(item: Any) -> Any:
    """What was sent, with an address that holds no secret."""
    if isinstance(item, str):
        address, mark, fragment = item.partition("#")
        return redacted(address) + (mark + fragment)[:200]
    return {**item, "url": _shown(item["url"])} if isinstance(item, dict) and "url" in item else item


def _text(value: Any, wrong: Any) -> str:
    if not isinstance(value, str) or len(value) > _LONGEST_TEXT:
        raise wrong("fname, weight_name, sha256 and revision are strings.")
    return value


def _scale(value: Any, wrong: Any) -> float:
    try:
        scale = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        scale = math.nan
    if not abs(scale) <= _LARGEST_SCALE:
        raise wrong(f"scale must be a number, at most {_LARGEST_SCALE:g} either way.")
    return scale


def _token(value: Any, wrong: Any) -> str:
    if not isinstance(value, str) or len(value) > _LONGEST_TOKEN or value != value.strip() or len(value.split()) > 1:
        raise wrong(f"token must be one word of at most {_LONGEST_TOKEN} characters.")
    return value


def repository_of(asked: Asked) -> tuple[str, str] | None:
    """Repository and file of what is named by them; None for a URL.

    Raises:
        ApiError: INVALID_INPUTS.
    """
    if "://" in asked.address:
        return None
    field = FIELDS[asked.kind]
    owner, _, rest = asked.address.partition("/")
    repo, _, path = rest.partition("/")
    check_model_id(f"{owner}/{repo}", field)
    path = path or asked.fname or USUAL_FILE.get(asked.kind, "")
    if not is_safe_path(path) or not path.isprintable():
        raise ApiError("INVALID_INPUTS", "The name of the file is not a path.", field=field, requested=asked.address)
    return f"{owner}/{repo}", path


def adapter_ref(asked: Asked, settings: Settings) -> SourceRef:
    """Where an adapter's file comes from.

    Raises:
        ApiError: INVALID_INPUTS.
    """
    found = repository_of(asked)
    if found is None:
        url, trusted, fname = asked.address, False, asked.fname
    else:
        repo, path = found
        hub = settings.hf_endpoint or "https://huggingface.co"
        url = f"{hub}/{repo}/resolve/{quote(asked.revision or 'main', safe='')}/{quote(path)}"
        trusted, fname = True, ""
    location = _locate(url, asked, settings)
    name = "/".join(found) if found else str(location) + (f"#fname={fname}" if fname else "")
    return SourceRef(name, "", checkpoint=location, trusted=trusted, adapter=asked.kind)


def _locate(url: str, asked: Asked, settings: Settings) -> Location:
    # what it is called decides nothing: its content says whether it is safetensors
    fragment = f"#fname={ADAPTER_FILE}" + (f"&sha256={asked.sha256}" if asked.sha256 else "")
    return parse_location(
        url + fragment,
        default_endpoint=settings.aws_s3_endpoint_url,
        default_bucket=settings.aws_s3_default_bucket,
        field=FIELDS[asked.kind],
    )


def file_name(asked: Asked) -> str:
    """What the file is called where it comes from: the token of many an embedding."""
    found = repository_of(asked)
    return asked.fname or PurePosixPath(found[1] if found else asked.address.partition("?")[0]).name
