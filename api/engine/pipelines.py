"""Builds one job's own pipeline over a model's shared components."""

from __future__ import annotations

import copy
import functools
import inspect
from typing import Any

import diffusers
import torch
from torch import nn

from api.engine.community import class_of
from api.engine.controlnets import together
from api.engine.loader import LoadedModel
from api.engine.schedulers import Generators, make_scheduler, seeded
from api.schema.generation import GenerationRequest


def make_pipeline(
    model: LoadedModel, components: dict[str, Any], request: GenerationRequest, generator: Generators
) -> diffusers.DiffusionPipeline:
    """A pipeline object for one job: views of the model's modules, a scheduler of its own.

    Built from components, because ``from_pipe`` may cast the shared modules.

    Args:
        model: whose configuration and scheduler are taken.
        components: its parts, as this job sees them.
        request: what is asked for.
        generator: the job's random numbers.

    Raises:
        ApiError: INVALID_SCHEDULER, PIPELINE_NOT_SUPPORTED.
    """
    own: Any = class_of(request)
    cls = _on_one_device(own)
    accepted = set(inspect.signature(cls.__init__).parameters) - {"self"}
    components = together(components)
    parts = {k: v for k, v in {**model.config, **components}.items() if k in accepted}
    for key, part in parts.items():  # a prior's, which is not to be chosen: schedulers count their steps
        if isinstance(part, diffusers.SchedulerMixin):
            parts[key] = seeded(copy.deepcopy(part), generator)
    if request.scheduler:  # else the model's several, as they are
        parts["scheduler"] = make_scheduler(model, request.scheduler, generator, request.scheduler_args)
    for key in cls._optional_components:
        if key in accepted:  # models saved by another class do not name them
            parts.setdefault(key, None)
    if not request.safety_checker or parts.get("safety_checker") is None:
        if "safety_checker" in accepted:
            parts["safety_checker"] = None
        if "requires_safety_checker" in accepted:
            parts["requires_safety_checker"] = False
    pipe = cls(**parts)
    pipe.__dict__["_device"] = next(part.device for part in parts.values() if isinstance(part, nn.Module))
    pipe.set_progress_bar_config(disable=True)
    return pipe


@functools.cache
def _on_one_device(cls: type[diffusers.DiffusionPipeline]) -> type[diffusers.DiffusionPipeline]:
    """The same class, which knows its device.

    diffusers looks for hooks of offloading in every module, again and again, and a view copies what is looked at.
    """

    def device(self: Any) -> torch.device:
        # not known yet while it is built
        return self.__dict__.get("_device") or cls.device.fget(self)

    body = {"__module__": cls.__module__, "device": property(device), "_execution_device": property(device)}
    return type(cls.__name__, (cls,), body)
