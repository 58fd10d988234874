"""Calls a pipeline with what it takes, and makes uint8 of what it gives, whatever that is."""

from __future__ import annotations

import functools
import inspect
import re
import typing
from collections.abc import Callable
from typing import Any

import numpy as np
import PIL.Image
import torch

from api.engine.schedulers import Generators
from api.schema.generation import Picture, Pictures

AfterStep = Callable[[Any, int, Any, dict[str, Any]], dict[str, Any]]
"""What pipelines call as ``callback_on_step_end``."""

_AT_ONCE = 8
_POSTPROCESSED = re.compile(r"postprocess(_video)?\(")
_LATENTS_AS_TENSORS = frozenset({"PRXPixelPipeline"})
"""Pipelines that give what they were at, and no image, where a tensor is asked for."""


def call(
    pipe: Any,
    method: str,
    arguments: dict[str, Any],
    generator: Generators,
    after_step: AfterStep,
    latents: bool = False,
) -> Any:
    """Run a pipeline.

    Args:
        pipe: a job's own.
        method: of it: ``__call__``, or what else it generates with.
        arguments: what the client sent, pictures as Pillow has them.
        generator: the job's random numbers.
        after_step: called after each step, where the pipeline tells of them.
        latents: these are wanted, not images.

    Returns:
        What the pipeline gives.
    """
    cls: Any = type(pipe)
    taken = inspect.signature(getattr(cls, method)).parameters
    ours: dict[str, Any] = {"generator": generator, "output_type": "latent" if latents else output_type(cls, arguments)}
    if "callback_on_step_end" in taken:
        ours["callback_on_step_end"] = after_step
    elif "callback" in taken:
        ours |= {"callback": _old_callback(pipe, arguments, after_step), "callback_steps": 1}
    tuples = _tuples(getattr(cls, method))
    arguments = {name: tuple(v) if name in tuples and isinstance(v, list) else v for name, v in arguments.items()}
    return getattr(pipe, method)(**arguments, **{name: value for name, value in ours.items() if name in taken})


@functools.cache
def _tuples(method: Any) -> frozenset[str]:
    """Arguments that are tuples: pipelines add some to others, and neither JSON nor msgpack has them."""
    found = set()
    for name, parameter in inspect.signature(method).parameters.items():
        among = typing.get_args(parameter.annotation) or ()
        origins = {typing.get_origin(parameter.annotation), *map(typing.get_origin, among)}
        if tuple in origins and list not in origins:
            found.add(name)
    return frozenset(found)


def _old_callback(pipe: Any, arguments: dict[str, Any], after_step: AfterStep) -> Callable[..., None]:
    """For pipelines that tell of a step, its timestep and the latents, and do not count their steps."""
    total = arguments.get("num_inference_steps") or 0

    class Steps:
        scheduler = getattr(pipe, "scheduler", None)
        num_timesteps = total

    def callback(step: int, timestep: Any, latents: torch.Tensor) -> None:
        after_step(Steps, step, timestep, {"latents": latents})

    return callback


def output_type(cls: Any, arguments: dict[str, Any]) -> str:
    """How a pipeline is asked for its images.

    As tensors, which are rounded where they are: the same values as with diffusers' ``numpy_to_pil`` without its detour
    over float32 arrays. Pipelines that do without diffusers' image processor give tensors that are not between 0 and 1,
    or none at all: those are asked for arrays. Cropping around a mask pastes the result back with Pillow.
    """
    if arguments.get("padding_mask_crop") is not None:
        return "pil"
    return "pt" if _gives_tensors(cls) else "np"


@functools.cache
def _gives_tensors(cls: Any) -> bool:
    own = next(base for base in cls.__mro__ if "__call__" in vars(base))
    return own.__name__ not in _LATENTS_AS_TENSORS and _POSTPROCESSED.search(inspect.getsource(own)) is not None


def images_of(out: Any) -> Any:
    """The images, or frames, in what a pipeline gives; a few call them ``image``."""
    if hasattr(out, "frames"):
        return out.frames
    return out.images if hasattr(out, "images") else out.image


def _parts(video: Any) -> list[Any]:
    """A video's frames, a few at a time: all of them as floats once more may be more than the device has left."""
    return [video[first : first + _AT_ONCE] for first in range(0, len(video), _AT_ONCE)]


def shape_of(images: np.ndarray) -> dict[str, Any]:
    """What ``$meta`` says of videos (N, F, H, W, 3): pipelines round what they are asked for. Of images nothing."""
    if images.ndim != 5:
        return {}
    return {"frames": images.shape[1], "size": [images.shape[3], images.shape[2]]}


def to_pil(pictures: Pictures) -> dict[str, Any]:
    """Decoded pictures as the pipelines take them."""

    def one(picture: Picture) -> PIL.Image.Image:
        return PIL.Image.frombytes(picture.mode, (picture.width, picture.height), picture.pixels)

    return {
        name: [one(picture) for picture in found] if isinstance(found, list) else one(found)
        for name, found in pictures.items()
    }


def to_uint8(images: Any) -> np.ndarray:
    """What a pipeline gave to uint8 (N, H, W, 3), or (N, H, W, 4) where it gave an opacity; videos to (N, F, H, W, 3).

    Args:
        images: floats in [0, 1] as a tensor (N, C, H, W) or an array (N, H, W, C), or pictures; or a list of these for
            each image, as pipelines that make layers give them. Of videos tensors (N, F, C, H, W), arrays
            (N, F, H, W, C), or lists of frames.
    """
    if getattr(images, "ndim", 0) == 5:
        return np.stack([np.concatenate([to_uint8(some) for some in _parts(video)]) for video in images])
    if isinstance(images, list) and not isinstance(images[0], PIL.Image.Image):
        return np.concatenate([to_uint8(each) for each in images])
    if isinstance(images, list):
        modes = {"RGBA" if image.mode == "RGBA" else "RGB" for image in images}
        return np.stack([np.asarray(image.convert(min(modes))) for image in images])
    if isinstance(images, torch.Tensor):
        scaled = images.float().mul(255).round_().clamp_(0, 255).to(torch.uint8)
        found = scaled.permute(0, 2, 3, 1).contiguous().cpu().numpy()
    else:
        found = (images * 255).round().clip(0, 255).astype(np.uint8)
    return found.repeat(3, axis=3) if found.shape[3] == 1 else found
