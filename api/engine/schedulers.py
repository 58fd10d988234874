"""Makes one job's own scheduler, and says when a fault is the scheduler's."""

from __future__ import annotations

import copy
import functools
import inspect
import weakref
from pathlib import Path
from typing import Any, TypeAlias

import diffusers
import msgspec
import torch

from api.engine.device import is_fatal
from api.engine.loader import LoadedModel
from api.errors import ApiError
from api.schema.generation import GenerationRequest
from api.schema.schedulers import scheduler_classes

Generators: TypeAlias = torch.Generator | list[torch.Generator]

_MOST_KEPT = 32
"""Schedulers kept for each model: classes, and what they are asked for with."""
_OF_THE_MODEL = frozenset({"prediction_type", "beta_schedule"})
"""Settings that say how the weights were trained: a class that does not know them cannot run the model."""
_FOLDER = str(Path(diffusers.__file__).parent / "schedulers")


def make_scheduler(model: LoadedModel, name: str, generator: Generators, args: dict[str, Any] | None = None) -> Any:
    """A scheduler of a job's own, with the model's settings and the job's random numbers.

    Args:
        model: whose settings it takes over.
        name: a diffusers scheduler class.
        generator: the job's random numbers.
        args: over the model's settings.

    Raises:
        ApiError: INVALID_SCHEDULER when the class refuses the settings.
    """
    key = name + (msgspec.json.encode(args, order="deterministic").decode() if args else "")
    pristine = model.schedulers.get(key)
    if pristine is None:
        pristine = _new_scheduler(model, name, args or {})
        if len(model.schedulers) < _MOST_KEPT:
            model.schedulers[key] = pristine
    scheduler = copy.deepcopy(pristine)  # in a third of the time that from_config takes
    if pristine.config.get("use_flow_sigmas") and not model.components["scheduler"].config.get("use_dynamic_shifting"):
        _ignore_mu(scheduler)
    return seeded(scheduler, generator)


def _ignore_mu(scheduler: Any) -> None:
    """Do as the schedulers for flows do where noise levels are not shifted by the image's size.

    Pipelines such as FLUX's hand the shift to all of them; others do not take it then.
    """
    itself, method = weakref.ref(scheduler), type(scheduler).set_timesteps

    @functools.wraps(scheduler.set_timesteps)
    def set_timesteps(*args: Any, mu: float | None = None, **kwargs: Any) -> None:
        method(itself(), *args, **kwargs)

    set_timesteps.__signature__ = inspect.signature(scheduler.set_timesteps)  # type: ignore[attr-defined]
    del set_timesteps.__wrapped__  # type: ignore[attr-defined]
    scheduler.set_timesteps = set_timesteps


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


def _new_scheduler(model: LoadedModel, name: str, args: dict[str, Any]) -> Any:
    own = model.components["scheduler"]
    known = scheduler_classes()[name].args
    # words that mean something to the model's own class only, such as the names of its solvers
    foreign = {
        key
        for key, value in own.config.items()
        if key in known and isinstance(value, str) and known[key].choices and value not in known[key].choices
    }
    if type(own).__name__ == name:
        foreign = set()
    # what the class itself does not know stays with it: pipelines look there, such as for the limits of a shift
    settings = {key: value for key, value in own.config.items() if key not in foreign - _OF_THE_MODEL}
    if args.get("use_flow_sigmas") and "flow_shift" in known and "shift" in own.config:
        settings["flow_shift"] = own.config["shift"]
    try:
        return getattr(diffusers, name).from_config(settings, **args)
    except (ValueError, TypeError, NotImplementedError, ImportError, LookupError, RuntimeError) as fault:
        asked = f" with {', '.join(args)}" if args else ""
        raise _refused(name, f"does not work with {model.ref.model_id}{asked}: {fault}") from fault


def refused_by(fault: Exception, request: GenerationRequest, own: str) -> ApiError | None:
    """What to tell of a fault in a pipeline where the scheduler that was asked for is to blame, else None.

    Args:
        fault: raised while the pipeline ran.
        request: what ran.
        own: the class that the model was saved with: as it is, nobody who asks is to blame for it.
    """
    if (request.scheduler == own and not request.scheduler_args) or is_fatal(fault) or isinstance(fault, ApiError):
        return None
    where, inside = fault.__traceback__, False
    while where is not None and not inside:
        inside = where.tb_frame.f_code.co_filename.startswith(_FOLDER)
        where = where.tb_next
    of_it = isinstance(getattr(fault, "obj", None), diffusers.SchedulerMixin) or "set_timesteps" in str(fault)
    if not inside and not of_it:
        return None
    args = f" with {', '.join(request.scheduler_args)}" if request.scheduler_args else ""
    return _refused(request.scheduler, f"cannot do this{args}: {str(fault)[:500] or type(fault).__name__}")


def _refused(name: str, why: str) -> ApiError:
    return ApiError("INVALID_SCHEDULER", f"{name} {why}", field="callInputs.SCHEDULER", requested=name)
