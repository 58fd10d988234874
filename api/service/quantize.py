"""What a request's weights are quantized to."""

from __future__ import annotations

import importlib.util
from typing import Any

from api.errors import ApiError
from api.schema.generation import QUANTIZED_BY
from api.settings import Settings, SettingsError


def choose_quantize(options: dict[str, Any], settings: Settings) -> str:
    """What weights are quantized to: what ``QUANTIZE`` says, else the server's; empty: nothing.

    Raises:
        ApiError: NOT_SUPPORTED: the package is not there that does it.
    """
    kind: str = options.get("QUANTIZE") or settings.quantize
    if kind in ("", "none"):
        return ""
    if not _is_there(kind):
        message = (
            f"{kind} needs {QUANTIZED_BY[kind]}, which is not installed on this server. Leave QUANTIZE out, or have it "
            "installed: pip install '.[quantize]'."
        )
        available = ["none", *filter(_is_there, QUANTIZED_BY)]
        raise ApiError("NOT_SUPPORTED", message, field="callInputs.QUANTIZE", requested=kind, available=available)
    return kind


def asked_for(options: dict[str, Any]) -> str:
    """What the request itself says of it; empty: nothing."""
    kind: str = options.get("QUANTIZE", "")
    return "" if kind == "none" else kind


def check_installed(settings: Settings) -> None:
    """See that the server can do what its configuration says.

    It does not fall back: the memory that it was given may be too little for weights as they are.

    Raises:
        SettingsError: the package is not there.
    """
    kind = settings.quantize
    if kind not in ("", "none") and not _is_there(kind):
        package = QUANTIZED_BY[kind]
        raise SettingsError(
            f"QUANTIZE={kind}: needs {package}, which is not installed: pip install '.[quantize]', or leave it empty"
        )


def _is_there(kind: str) -> bool:
    return importlib.util.find_spec(QUANTIZED_BY[kind]) is not None
