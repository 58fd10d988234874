"""One part of a pipeline, kept by itself: a ControlNet or an image encoder, or a single file of weights.

A source ref, a manifest and a description call it by its path in the repository: ``.`` is the root, empty means that
no part is meant but a whole pipeline.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec

CONFIG = "config.json"
FILE_SUFFIX = ".safetensors"


def is_file(part: str) -> bool:
    """Whether a part is one file, not a folder with a configuration."""
    return part.endswith(FILE_SUFFIX)


def is_part(folder: Path, part: str) -> bool:
    """Whether a folder holds a part; one that may not be looked into holds none."""
    try:
        return marker(folder, part).is_file()
    except OSError:
        return False


def marker(folder: Path, part: str) -> Path:
    """The file without which there is no such part."""
    return folder / part if is_file(part) else folder / part / CONFIG


def configuration(folder: Path, part: str) -> dict[str, Any]:
    """The configuration of a part; empty for a file.

    Raises:
        OSError, msgspec.DecodeError: it cannot be read.
    """
    if is_file(part):
        return {}
    return msgspec.json.decode(marker(folder, part).read_bytes(), type=dict[str, Any])


def config_in(folder: Path) -> dict[str, Any]:
    """The configuration of a component in its folder; empty where there is none that can be read."""
    try:
        return msgspec.json.decode((folder / CONFIG).read_bytes(), type=dict[str, Any])
    except (OSError, msgspec.DecodeError, UnicodeDecodeError):
        return {}


def class_of(config: dict[str, Any]) -> str:
    """The class that a configuration names: diffusers' ``_class_name``, or transformers' ``architectures``; or none."""
    named = config.get("architectures")
    name = config.get("_class_name") or (named[0] if isinstance(named, list) and named else "")
    return name if isinstance(name, str) else ""
