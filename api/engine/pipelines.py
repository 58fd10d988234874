"""Builds one job's own pipeline over a model's shared components."""

from __future__ import annotations

import copy
import functools
import inspect
from typing import Any

import diffusers
import torch
from torch import nn

from api.engine.loader import LoadedModel
from api.engine.schedulers import Generators, make_scheduler, seeded


def make_pipeline(
    model: LoadedModel,
    components: dict[str, Any],
    name: str,
    scheduler: str,
    safety_checker: bool,
    generator: Generators,
    scheduler_args: dict[str, Any] | None = None,
) -> diffusers.DiffusionPipeline:
    """A pipeline object for one job: views of the model's modules, a scheduler of its own.

    Built from components, because ``from_pipe`` may cast the shared modules.

    Args:
        model: whose configuration and scheduler are taken.
        components: its parts, as this job sees them.
        name: a diffusers pipeline class.
        scheduler: a diffusers scheduler class; empty: the model's several, as they are.
        safety_checker: keep the model's safety checker, where it has one.
        generator: the job's random numbers.
        scheduler_args: over the settings of the model's own scheduler.
    """
    cls = _on_one_device(getattr(diffusers, name))
    accepted = set(inspect.signature(cls.__init__).parameters) - {"self"}
    parts = {k: v for k, v in {**model.config, **components}.items() if k in accepted}
    for key, part in parts.items():  # a prior's, which is not to be chosen: schedulers count their steps
        if isinstance(part, diffusers.SchedulerMixin):
            parts[key] = seeded(copy.deepcopy(part), generator)
    if scheduler:
        parts["scheduler"] = make_scheduler(model, scheduler, generator, scheduler_args)
    for key in cls._optional_components:
        if key in accepted:  # models saved by another class do not name them
            parts.setdefault(key, None)
    if not safety_checker or parts.get("safety_checker") is None:
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
