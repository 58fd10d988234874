"""What the installed diffusers can build and accept, read from the generated ``catalogue.json``."""

from __future__ import annotations

import difflib
import functools
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import msgspec

TASKS = ("text2image", "image2image", "inpaint")
AUTO = {
    "AutoPipelineForText2Image": "text2image",
    "AutoPipelineForImage2Image": "image2image",
    "AutoPipelineForInpainting": "inpaint",
}
AUTO_FOR_TASK = {task: name for name, task in AUTO.items()}


class Input(msgspec.Struct, frozen=True):
    """One argument of a pipeline: JSON types it admits, and its default."""

    types: tuple[str, ...]
    default: Any = None


class Catalogue(msgspec.Struct, frozen=True):
    """The generated catalogue.

    Attributes:
        diffusers: the version it was made from.
        families: family name to pipeline class by task.
        pipelines: pipeline class to its inputs.
        pipeline_names: every pipeline class there is.
    """

    diffusers: str
    families: dict[str, dict[str, str]]
    pipelines: dict[str, dict[str, Input]]
    pipeline_names: list[str]

    def tasks_of(self, model_class: str) -> dict[str, str]:
        """Pipeline classes by task that a model saved as ``model_class`` can be run with."""
        for tasks in self.families.values():
            if model_class in tasks.values():
                return tasks
        return {}


@functools.cache
def catalogue() -> Catalogue:
    """The catalogue, read once."""
    return msgspec.json.decode(Path(__file__).with_name("catalogue.json").read_bytes(), type=Catalogue)


def nearest(name: str, among: Iterable[str]) -> str:
    """A sentence that suggests the closest name, or nothing."""
    found = difflib.get_close_matches(name, list(among), n=1, cutoff=0.6)
    return f' Did you mean "{found[0]}"?' if found else ""
