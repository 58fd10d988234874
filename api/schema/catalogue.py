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
    """One argument of a pipeline: JSON types it admits, its default, and whether it cannot be left out."""

    types: tuple[str, ...]
    default: Any = None
    required: bool = False

    @property
    def is_picture(self) -> bool:
        """Whether it is an image, or a list of images."""
        return "image" in self.types or "images" in self.types


class Build(msgspec.Struct, frozen=True):
    """What a pipeline class is built from.

    Attributes:
        required: components that a model has to name, each with the classes it may have where that is told.
        nullable: those of them that may be named without being there.
        optional: components that it can do without.
        needs: components that requests bring, such as ``controlnet``; some are among ``required``.
    """

    required: dict[str, tuple[str, ...]]
    nullable: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()
    needs: tuple[str, ...] = ()

    @property
    def accepts(self) -> frozenset[str]:
        """Every component that it takes."""
        return frozenset((*self.required, *self.optional))


class WithControlNet(msgspec.Struct, frozen=True):
    """A pipeline that is another one with a ControlNet.

    Attributes:
        plain: the other one.
        task: what both are for.
        controlnet: class of the ControlNet.
        several: it takes more than one.
        image: its argument for the ControlNet's picture.
    """

    plain: str
    task: str
    controlnet: str
    several: bool
    image: str


class MakesVideo(msgspec.Struct, frozen=True):
    """A pipeline that makes videos.

    Attributes:
        fps: frames a second of what it makes, where a request says nothing.
        frames: its argument for how many frames.
        rate: its argument for the frames a second, where it has one.
        multiple: sides are divisible by this, whatever the model's latents say.
        size: width and height that the class itself makes, where no argument has a default.
        same: the class that runs the same weights with a picture, or without one.
        makes: ``video``.
    """

    fps: float
    frames: str
    rate: str | None
    multiple: int
    size: tuple[int, int] | None
    same: str | None
    makes: str


class Catalogue(msgspec.Struct, frozen=True):
    """The generated catalogue.

    Attributes:
        diffusers: the version it was made from.
        families: family name to pipeline class by task.
        pipelines: class of each pipeline that can be run, to its inputs.
        builds: the same, to what it is built from.
        refused: class of each pipeline that cannot be run, to a sentence that says why.
        controlnets: class of each pipeline that takes ControlNets which a request names, to what it is.
        ip_adapters: class of each pipeline that takes IP-Adapters.
        videos: class of each pipeline that makes videos, to what is to be known of those.
    """

    diffusers: str
    families: dict[str, dict[str, str]]
    pipelines: dict[str, dict[str, Input]]
    builds: dict[str, Build]
    refused: dict[str, str]
    controlnets: dict[str, WithControlNet]
    ip_adapters: list[str]
    videos: dict[str, MakesVideo]

    @property
    def pipeline_names(self) -> list[str]:
        """Every pipeline class there is."""
        return [*self.pipelines, *self.refused]

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
