"""Builds one job's own pipeline over a model's shared components."""

from __future__ import annotations

import copy
import functools
import inspect
import logging
import weakref
from typing import Any, TypeAlias

import diffusers
import torch
from torch import nn

from api.engine.loader import LoadedModel
from api.errors import ApiError

Generators: TypeAlias = torch.Generator | list[torch.Generator]

log = logging.getLogger("api.engine")


def make_scheduler(model: LoadedModel, name: str, generator: Generators) -> Any:
    """A scheduler of a job's own, with the model's settings and the job's random numbers.

    Raises:
        ApiError: INVALID_SCHEDULER when the class refuses the model's settings.
    """
    pristine = model.schedulers.get(name)
    if pristine is None:
        pristine = model.schedulers[name] = _new_scheduler(model, name)
    return seeded(copy.deepcopy(pristine), generator)  # copied in a third of the time that from_config takes


def seeded(scheduler: Any, generator: Generators) -> Any:
    """A scheduler that draws its noise from a job's generator, also where the pipeline hands it none.

    It would draw from torch's global generator then, from which all jobs draw. Most pipelines of flow-matching models
    hand none, and schedulers that they may be run with are stochastic by their settings.
    """
    if hasattr(scheduler, "noise_sampler_seed") and scheduler.noise_sampler_seed is None:
        each = generator if isinstance(generator, list) else [generator]
        seeds = [one.initial_seed() for one in each]
        scheduler.noise_sampler_seed = seeds if isinstance(generator, list) else seeds[0]
    signature = inspect.signature(scheduler.step)
    if "generator" not in signature.parameters:
        return scheduler
    itself, method = weakref.ref(scheduler), type(scheduler).step

    @functools.wraps(scheduler.step)
    def step(*args: Any, **kwargs: Any) -> Any:
        given = signature.bind(*args, **kwargs)
        if given.arguments.get("generator") is None and given.arguments.get("variance_noise") is None:
            given.arguments["generator"] = generator
        return method(itself(), *given.args, **given.kwargs)

    del step.__wrapped__  # type: ignore[attr-defined]  # it holds the scheduler
    step.__signature__ = signature  # type: ignore[attr-defined]  # pipelines look what it takes
    scheduler.step = step
    return scheduler


def _new_scheduler(model: LoadedModel, name: str) -> Any:
    try:
        return getattr(diffusers, name).from_config(model.components["scheduler"].config)
    except (ValueError, TypeError, NotImplementedError, ImportError) as fault:
        raise ApiError(
            "INVALID_SCHEDULER",
            f"{name} does not work with {model.ref.model_id}: {fault}",
            field="callInputs.SCHEDULER",
            requested=name,
        ) from fault


def make_pipeline(
    model: LoadedModel,
    components: dict[str, Any],
    name: str,
    scheduler: str,
    safety_checker: bool,
    generator: Generators,
) -> diffusers.DiffusionPipeline:
    """A pipeline object for one job: views of the model's modules, a scheduler of its own.

    Built from components, because ``from_pipe`` may cast the shared modules.

    Args:
        model: whose configuration and scheduler are taken.
        components: its parts, as this job sees them.
        name: a diffusers pipeline class.
        scheduler: a diffusers scheduler class.
        safety_checker: keep the model's safety checker, where it has one.
        generator: the job's random numbers.
    """
    cls = _on_one_device(getattr(diffusers, name))
    accepted = set(inspect.signature(cls.__init__).parameters) - {"self"}
    parts = {k: v for k, v in {**model.config, **components}.items() if k in accepted}
    for key, part in parts.items():  # a prior's, which is not to be chosen: schedulers count their steps
        if isinstance(part, diffusers.SchedulerMixin):
            parts[key] = seeded(copy.deepcopy(part), generator)
    parts["scheduler"] = make_scheduler(model, scheduler, generator)
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
