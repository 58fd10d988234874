"""What a request's ControlNets are to its pipeline: components, and pictures among the arguments."""

from __future__ import annotations

import inspect
import re
from typing import Any

import diffusers
import PIL.Image

from api.schema.generation import GenerationRequest

_NAME = re.compile(r"controlnet(?:_(\d+))?")
_SCALE = "controlnet_conditioning_scale"
_MODE = "control_mode"
_FLUX = "FluxMultiControlNetModel"
_UNIONS = ("ControlNetUnionModel",)
"""Classes that take several pictures, each with its mode."""


def together(components: dict[str, Any]) -> dict[str, Any]:
    """Components with several ControlNets as one, which the pipeline makes of a list of them.

    What it makes belongs to its job, and calls each of them: so their calls are merged with those of other jobs.
    """
    found = {int(match[1] or 0): name for name in components if (match := _NAME.fullmatch(name))}
    if len(found) < 2:
        return components
    names = [found[number] for number in sorted(found)]
    rest = {name: part for name, part in components.items() if name not in names}
    return {**rest, "controlnet": [components[name] for name in names]}


def picture_arguments(
    pipe: diffusers.DiffusionPipeline, request: GenerationRequest, pictures: dict[str, Any]
) -> dict[str, Any]:
    """A request's pictures, those of its ControlNets under the names and in the form that the pipeline takes them in.

    Args:
        pipe: that is to be called.
        request: whose model may have ControlNets; then ``control_image`` is a list with one picture for each, or, of
            one that knows several modes, for each mode.
        pictures: all of them, by name.
    """
    if not any(part.name.startswith("controlnet") for part in request.model.additions):
        return pictures
    rest = {name: found for name, found in pictures.items() if name != "control_image"}
    return rest | _control_arguments(pipe, request.inputs, pictures["control_image"])


def _control_arguments(
    pipe: diffusers.DiffusionPipeline, inputs: dict[str, Any], pictures: list[PIL.Image.Image]
) -> dict[str, Any]:
    parameters = inspect.signature(type(pipe).__call__).parameters
    name = "control_image" if "control_image" in parameters else "image"
    net: Any = pipe.controlnet
    nets = len(getattr(net, "nets", "x"))
    given: dict[str, Any] = {name: pictures if nets > 1 or type(net).__name__ in _UNIONS else pictures[0]}
    scale = inputs.get(_SCALE)
    if nets > 1 and isinstance(scale, float):  # not every pipeline takes one number for all of them
        given[_SCALE] = [scale] * nets
    if nets > 1 and type(net).__name__ == _FLUX and inputs.get(_MODE) is None:
        given[_MODE] = [-1] * nets  # what it means by none; over a picture it would go on without it and fail
    return given
