"""What requests for videos can ask for, and what only requests for images can."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from api.errors import ApiError
from api.models.description import InstalledModel
from api.models.parts import config_in
from api.schema.catalogue import MakesVideo, catalogue
from api.schema.generation import Video
from api.schema.videos import GIF_FPS, MOST_FPS, VIDEO_FORMATS
from api.service.output import Encoding
from api.service.prompts import syntax_of
from api.settings import Settings

OPTIONS = ("video_format", "fps", "video_quality")
"""``callInputs`` that only videos have."""
FORMATS = ("mp4", "gif", "webp")
QUALITY = 75
_OF_IMAGES = {
    "image_format": "its format is video_format: mp4, gif or webp",
    "image_quality": "its quality is video_quality",
    "output": "its latents are not given out, and it has no mask",
    "preview": "its previews would be videos too, and there are none",
    "refiner": "a refiner goes on with images",
    "hires": "a second pass goes over images",
    "upscale": "upscalers take images",
}
"""``callInputs`` that only images have, and what there is instead."""


def fps_of(value: Any, field: str, meaning: str) -> float:
    """The option ``fps``.

    Raises:
        ApiError: INVALID_INPUTS.
    """
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not 0.1 <= value <= MOST_FPS:
        message = f"Must be a number from 0.1 to {MOST_FPS}: {meaning}."
        raise ApiError("INVALID_INPUTS", message, field=field, requested=value)
    return float(value)


def check_options(options: Mapping[str, Any], pipeline: str) -> None:
    """Refuse options that say nothing of what a pipeline makes.

    Args:
        options: checked ``callInputs``.
        pipeline: a class, or the name of a community pipeline.

    Raises:
        ApiError: INVALID_INPUTS, NOT_SUPPORTED.
    """
    if pipeline not in catalogue().videos:
        for name in OPTIONS:
            if name in options:
                message = f"{pipeline} makes images: leave this out."
                raise ApiError("INVALID_INPUTS", message, field=f"callInputs.{name}", requested=options[name])
        return
    for name, instead in _OF_IMAGES.items():
        asked = options.get(name)
        if name in options and not (name == "output" and set(asked or ()) <= {"images"}):
            message = f"{pipeline} makes a video: {instead}."
            raise ApiError("INVALID_INPUTS", message, field=f"callInputs.{name}", requested=asked)
    if syntax_of(options) != "plain":
        name = "prompt_syntax" if "prompt_syntax" in options else "compel_prompts"
        message = f"{pipeline} makes a video, and its prompts are read as they are: leave this out."
        raise ApiError("NOT_SUPPORTED", message, field=f"callInputs.{name}", requested=options[name])


def choose_encoding(options: Mapping[str, Any]) -> Encoding:
    """How a video is encoded.

    Args:
        options: checked ``callInputs``.

    Raises:
        ApiError: INVALID_INPUTS.
    """
    name, lossless = options.get("video_format", FORMATS[0]).upper(), options.get("lossless", False)
    if name == "GIF" and "video_quality" in options:
        message = "A GIF has no quality: it has 256 colours for each frame. Leave this out."
        raise ApiError("INVALID_INPUTS", message, field="callInputs.video_quality")
    if lossless and not VIDEO_FORMATS[name].lossless:
        message = f"{name} cannot keep every pixel as this server writes it."
        raise ApiError("INVALID_INPUTS", message, field="callInputs.lossless", requested=True, available=["webp"])
    return Encoding(name, options.get("video_quality", QUALITY), lossless)


def fill(given: dict[str, Any], pipeline: str, model: InstalledModel, settings: Settings) -> None:
    """Size and number of frames where none were sent: the model's own, or its class's, as far as the limits go."""
    about = catalogue().videos[pipeline]
    own = _own(str(model.folder), model.revision)
    found = about.size or (own.width, own.height)
    for name, value in (("width", found[0]), ("height", found[1])):
        if given.get(name) is None and value:
            given[name] = value
    if given.get(about.frames) is None and own.frames:
        given[about.frames] = min(own.frames, settings.max_frames)


def choose_video(
    given: dict[str, Any],
    options: Mapping[str, Any],
    pipeline: str,
    encoding: Encoding,
    videos: int,
    settings: Settings,
) -> Video:
    """How many frames there are, and how long each is shown.

    Args:
        given: checked inputs, defaults filled in.
        options: checked ``callInputs``.
        pipeline: a class that makes videos.
        encoding: of the file.
        videos: how many the request makes.
        settings: the limits.

    Raises:
        ApiError: INVALID_INPUTS, LIMIT_EXCEEDED.
    """
    about = catalogue().videos[pipeline]
    frames = given.get(about.frames) or 0
    _check_sides(given, about)
    if frames * videos > settings.max_frames:
        several = f" ({videos} videos of {frames})" if videos > 1 else ""
        message = f"{frames * videos} frames{several} are over this server's MAX_FRAMES of {settings.max_frames}."
        raise ApiError("LIMIT_EXCEEDED", message, field=f"modelInputs.{about.frames}", requested=frames)
    rate = given.get(about.rate) if about.rate else None
    fps = options.get("fps") or float(rate or about.fps)
    is_gif = encoding.format == "GIF"
    if fps > (most := GIF_FPS if is_gif else MOST_FPS):
        instead = ", or for mp4 or webp" if is_gif else ""
        message = f"{encoding.format} shows {most} frames a second at most here: ask for fewer{instead}."
        raise ApiError("INVALID_INPUTS", message, field="callInputs.fps", requested=fps)
    return Video(fps=fps, frames=frames)


def by_content(pipeline: str, has_image: bool) -> str:
    """What a request that asks for no pipeline gets of a model for videos: with a picture, the class that takes one."""
    known = catalogue()
    same = known.videos[pipeline].same
    if same and ("image" in known.pipelines[pipeline]) != has_image:
        return same
    return pipeline


def misfit(model: InstalledModel, name: str) -> str | None:
    """Why a model cannot be run as a pipeline where one of both is for videos; None where that is no reason.

    What is built from the same parts was trained for something else all the same: with a picture beside the latents,
    or without; so only the class that a model was saved as, and the one that shares its weights, are run.
    """
    videos = catalogue().videos
    if name != model.class_name and (name in videos or model.class_name in videos):
        same = videos[name].same if name in videos else None
        return None if same == model.class_name else f"Models for {name} are saved as such."
    if name == "AnimateDiffPipeline" and model.parts.get("unet") == "UNet2DConditionModel":
        return "Its UNet and its motion adapter are apart: load it with diffusers and save it, which joins them."
    return None


class _Own(msgspec.Struct, frozen=True):
    """What a model makes where nothing is asked for; 0: it does not say."""

    width: int = 0
    height: int = 0
    frames: int = 0


@functools.lru_cache(maxsize=256)
def _own(folder: str, revision: str) -> _Own:
    """Of a model's folder; its revision is for the cache, as the files of one do not change."""
    denoiser = config_in(Path(folder, "transformer")) or config_in(Path(folder, "unet"))
    codec = config_in(Path(folder, "vae"))
    factor = 2 ** (len(codec.get("block_out_channels") or ()) - 1)
    sides = [denoiser.get(name) for name in ("sample_width", "sample_height")]
    frames = denoiser.get("sample_frames") or denoiser.get("num_frames") or denoiser.get("video_length")
    width, height = (int(side * factor) if isinstance(side, int) and side > 0 and factor >= 1 else 0 for side in sides)
    return _Own(width, height, frames if isinstance(frames, int) and frames > 0 else 0)


def _check_sides(given: dict[str, Any], about: MakesVideo) -> None:
    for name in ("width", "height"):
        value = given.get(name)
        if value is not None and value % about.multiple:
            fitting = max(1, round(value / about.multiple)) * about.multiple
            message = f"Must be divisible by {about.multiple} for this pipeline, e.g. {fitting}."
            raise ApiError("INVALID_INPUTS", message, field=f"modelInputs.{name}", requested=value)
