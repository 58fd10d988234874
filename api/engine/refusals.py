"""Whose fault it is that a pipeline failed: the request's, which is told, or the server's."""

from __future__ import annotations

import logging
import re
from typing import Any

import diffusers
import PIL.Image

from api.engine.device import is_fatal
from api.errors import ApiError

log = logging.getLogger("api.engine")

_RARE = frozenset(
    {
        "timesteps", "sigmas", "cross_attention_kwargs", "clip_skip", "padding_mask_crop", "class_labels",
        "control_mode", "text_encoder_out_layers", "token_indices", "skip_guidance_layers", "return_index",
        "temperature",
    }
)  # fmt: skip
"""Inputs that reach deep into a pipeline, where a wrong value fails in any way at all."""


_OF_SHAPES = re.compile(r"shapes cannot be multiplied|must match|expected input.*channels|invalid for input of size")
"""How torch says that sizes do not go together: an input, an adapter or a picture is made for another model."""


def is_of_inputs(fault: Exception, inputs: dict[str, Any]) -> bool:
    """Whether the client's inputs are to blame: diffusers says so, or they hold something rare, or several pictures.

    A device that was lost is nobody's fault here, whatever the inputs hold: the worker has to end.
    """
    if is_fatal(fault):
        return False
    if isinstance(fault, ValueError | TypeError | NotImplementedError):
        return True
    if isinstance(fault, AttributeError) and isinstance(fault.obj, diffusers.SchedulerMixin):
        return True  # the pipeline asks for what few schedulers have
    if isinstance(fault, RuntimeError) and _OF_SHAPES.search(str(fault)):
        return True
    deep = isinstance(fault, LookupError | AttributeError | RuntimeError)
    several = any(isinstance(v, list) and isinstance(v[0], PIL.Image.Image) for v in inputs.values() if v)
    return deep and (several or any(inputs.get(name) is not None for name in _RARE))


def refused_inputs(fault: Exception, inputs: dict[str, Any], pipeline: str) -> ApiError | None:
    """What a request is told that is to blame for a pipeline's failure; None where it is not."""
    if not is_of_inputs(fault, inputs):
        return None
    log.debug("%s refused its inputs", pipeline, exc_info=fault)
    message = f"diffusers refused the inputs: {fault}"
    return ApiError("PIPELINE_ERROR", message[:1000], field="modelInputs")
