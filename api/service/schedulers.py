"""Which scheduler a request runs with: its class, its arguments, and whether it suits the model."""

from __future__ import annotations

import importlib.util
import math
from typing import Any, NamedTuple

from api.errors import ApiError
from api.models.description import InstalledModel
from api.schema.catalogue import catalogue, nearest
from api.schema.schedulers import Argument, SchedulerClass, scheduler_classes
from api.service.samplers import SPACINGS, names_of, sampler, samplers

FLOW = "flow_prediction"
_FLOW_CLASSES = frozenset(
    {"FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler", "FlowMatchLCMScheduler"}
)
"""What pipelines of models that predict a flow can run, and no others."""
_OF_PIXELS = ("DPMSolverMultistep", "DPMSolverSinglestep", "SASolver")
"""Classes that count on images of three channels where a denoiser gives a variance as well."""
_EDM = "models trained with EDM's preconditioning (Karras et al. 2022)"
_MADE_FOR = {
    "LCMScheduler": "models distilled to a few steps as latent consistency models",
    "FlowMatchLCMScheduler": "models distilled to a few steps as latent consistency models",
    "TCDScheduler": "models distilled to a few steps by trajectory consistency",
    "CMStochasticIterativeScheduler": "consistency models",
    "EDMEulerScheduler": _EDM,
    "EDMDPMSolverMultistepScheduler": _EDM,
    "CosineDPMSolverMultistepScheduler": _EDM,
    "DDIMInverseScheduler": "turning pictures into noise",
    "DPMSolverMultistepInverseScheduler": "turning pictures into noise",
}
_RANGES = {
    "num_train_timesteps": (1, 10_000),
    "solver_order": (1, 3),
    "predictor_order": (1, 4),
    "corrector_order": (1, 4),
    "steps_offset": (0, 1000),
    "original_inference_steps": (1, 10_000),
}
_LARGEST, _MOST_NUMBERS = 10_000, 1000
_DESCRIBED = {"number": "a number", "integer": "a whole number", "boolean": "true or false", "string": "a string"}


class Verdict(NamedTuple):
    """Whether a model can be run with a scheduler class.

    Attributes:
        state: ``suits``; ``unsuited``: it runs, and is made for other models; ``refused``.
        reason: why, where it does not suit.
        args: what the class must be told besides, for this model.
    """

    state: str
    reason: str
    args: dict[str, Any]


class Scheduler(NamedTuple):
    """What a request is run with.

    Attributes:
        name: the class.
        args: over the model's own settings.
        alias: the name of AUTOMATIC1111 that it was asked for by.
        note: why it does not suit the model, though it runs.
    """

    name: str
    args: dict[str, Any]
    alias: str = ""
    note: str = ""


def is_missing(found: SchedulerClass) -> bool:
    """Whether a class needs a library that is not installed."""
    return bool(found.library) and importlib.util.find_spec(found.library) is None


def verdict(name: str, model: InstalledModel) -> Verdict:
    """Whether a model can be run with a scheduler class of diffusers."""
    known = scheduler_classes()
    found, own = known[name], known.get(model.scheduler)
    if is_missing(found):
        library = found.library
        return Verdict("refused", f"needs the library {library}, which is not installed: pip install {library}", {})
    if name == model.scheduler:
        return Verdict("suits", "", {})
    if model.predicts == FLOW:
        return _for_flow(name, found, model)
    if name in _FLOW_CLASSES:
        return Verdict("refused", f"is for models that predict a flow; {model.model_id} predicts {model.predicts}", {})
    if found.fault:
        return Verdict("refused", f"cannot be run by the pipelines of {model.model_id}: {found.fault}", {})
    if model.learns_variance and "movq" in model.parts and name.startswith(_OF_PIXELS):
        return Verdict("refused", f"takes the variance that {model.model_id} gives as well for a part of the noise", {})
    predictions = found.predictions()
    if predictions and model.predicts not in predictions:
        what = f"takes {' or '.join(predictions)}, and {model.model_id} predicts {model.predicts}"
        return Verdict("refused", what, {})
    if _MADE_FOR.get(name) != _MADE_FOR.get(model.scheduler):
        if name in _MADE_FOR:
            return Verdict("unsuited", f"is made for {_MADE_FOR[name]}", {})
        return Verdict("unsuited", f"{model.model_id} is of {_MADE_FOR[model.scheduler]}", {})
    if name in _MADE_FOR:
        return Verdict("suits", "", {})
    if predictions is None and model.predicts != "epsilon":
        what = f"has no prediction_type: it takes what a model predicts for noise; here it is {model.predicts}"
        return Verdict("unsuited", what, {})
    if model.scheduler not in found.compatibles and name not in (own.compatibles if own else ()):
        return Verdict("unsuited", f"does not say that it takes over the settings of {model.scheduler}", {})
    return Verdict("suits", "", {})


def _for_flow(name: str, found: SchedulerClass, model: InstalledModel) -> Verdict:
    flows = model.scheduler in _FLOW_CLASSES
    if name == "FlowMatchEulerDiscreteScheduler" and flows:
        return Verdict("suits", "", {})
    if name in _FLOW_CLASSES and flows:
        if name in _MADE_FOR:
            return Verdict("unsuited", f"is made for {_MADE_FOR[name]}", {})
        # those of FLUX and its like, which give their own noise levels
        return Verdict("unsuited", "is refused by pipelines that choose the noise levels themselves", {})
    if "use_flow_sigmas" in found.args and not found.fault and name not in _MADE_FOR:
        more = {"use_flow_sigmas": True, "prediction_type": FLOW}
        if "use_dynamic_shifting" in found.args:
            return Verdict("suits", "", more)
        return Verdict(
            "unsuited", "does not shift its noise levels by the image's size, as larger models want it", more
        )
    return Verdict("refused", f"cannot sample a flow, which is what {model.model_id} predicts", {})


def choose_scheduler(options: dict[str, Any], model: InstalledModel, default: str) -> Scheduler:
    """What a request is run with.

    Args:
        options: checked ``callInputs``.
        model: what it is run with.
        default: the server's, a class or a name of AUTOMATIC1111; gives way to the model's own where it does not suit.

    Raises:
        ApiError: NO_SUCH_SCHEDULER, INVALID_SCHEDULER, UNKNOWN_INPUT or INVALID_INPUTS.
    """
    named = options.get("SCHEDULER")
    if not model.scheduler:
        for option in ("SCHEDULER", "scheduler_args"):
            if options.get(option):
                message = f"{model.model_id} has several schedulers, which are its own."
                raise ApiError("INVALID_SCHEDULER", message, field=f"callInputs.{option}", requested=options[option])
        return Scheduler("", {})
    found = _default(model, default) if named is None else _named(named, model)
    sent = check_args(found.name, options["scheduler_args"]) if options.get("scheduler_args") else {}
    return found._replace(args={**found.args, **sent})


def suitable(model: InstalledModel) -> list[str]:
    """Classes that a model is well run with; none where it has several schedulers of its own."""
    return [name for name in scheduler_classes() if model.scheduler and verdict(name, model).state == "suits"]


def _default(model: InstalledModel, default: str) -> Scheduler:
    known, alias = scheduler_classes(), sampler(default)
    name = alias.scheduler if alias else default
    fits = name in known and verdict(name, model) == ("suits", "", {})
    if not fits or model.learns_variance:  # which few of them can do anything with
        return Scheduler(model.scheduler, {})
    return Scheduler(name, alias.args, alias.name) if alias else Scheduler(name, {})


def _named(named: str, model: InstalledModel) -> Scheduler:
    check_name(named)
    alias = sampler(named)
    name = alias.scheduler if alias else named
    state, reason, more = verdict(name, model)
    if state == "refused":
        raise ApiError(
            "INVALID_SCHEDULER",
            f"{name} {reason.rstrip('.')}.",
            field="callInputs.SCHEDULER",
            requested=named,
            available=suitable(model),
        )
    note = f"{name} {reason}" if reason.startswith(("is ", "has ", "does ")) else reason
    return Scheduler(name, {**(alias.args if alias else {}), **more}, alias.name if alias else "", note)


def check_name(named: str) -> None:
    """Whether there is such a scheduler at all.

    Raises:
        ApiError: NO_SUCH_SCHEDULER.
    """
    known = scheduler_classes()
    if named in known or sampler(named):
        return
    hint = nearest(named, [*known, *(each.name for each in samplers().values())])
    message = f"diffusers {catalogue().diffusers} has no such scheduler.{hint}"
    available = [*known, *dict.fromkeys(each.name for each in samplers().values())]
    raise ApiError("NO_SUCH_SCHEDULER", message, field="callInputs.SCHEDULER", requested=named, available=available)


def check_args(name: str, sent: dict[str, Any]) -> dict[str, Any]:
    """Check ``scheduler_args`` against the arguments of a class.

    Returns:
        Them, without ``null``; where one spacing of noise levels is turned on, the others are turned off.

    Raises:
        ApiError: UNKNOWN_INPUT or INVALID_INPUTS, with the field.
    """
    known = scheduler_classes()[name].args
    out = {}
    for argument, value in sent.items():
        field = f"callInputs.scheduler_args.{argument[:100]}"
        if argument not in known:
            message = f"{name} has no such argument.{nearest(argument, known)}"
            raise ApiError("UNKNOWN_INPUT", message, field=field, available=sorted(known))
        if value is not None:
            out[argument] = _checked(argument, value, known[argument], field)
    on = [argument for argument in SPACINGS if out.get(argument)]
    if len(on) > 1:
        message = f"Noise levels are spaced in one way: {' and '.join(on)} cannot both be true."
        raise ApiError("INVALID_INPUTS", message, field=f"callInputs.scheduler_args.{on[1]}")
    if on:
        out |= {argument: False for argument in SPACINGS if argument in known and argument != on[0]}
    return out


def _checked(name: str, value: Any, argument: Argument, field: str) -> Any:
    if argument.choices and value not in argument.choices:
        message = f"Must be one of {', '.join(argument.choices)}."
        if isinstance(value, str):
            message += nearest(value, argument.choices)
        raise ApiError("INVALID_INPUTS", message, field=field, requested=value, available=list(argument.choices))
    if argument.choices:
        return value
    for kind in argument.types:
        if _is(kind, value):
            break
    else:
        message = f"Must be {' or '.join(_DESCRIBED.get(kind, 'a list of numbers') for kind in argument.types)}."
        raise ApiError("INVALID_INPUTS", message, field=field, requested=value)
    if kind == "integer":
        low, high = _RANGES.get(name, (-_LARGEST, _LARGEST))
        if not low <= value <= high:
            raise ApiError("INVALID_INPUTS", f"Must be from {low} to {high}.", field=field, requested=value)
        return int(value)
    return float(value) if kind == "number" else value


def _is(kind: str, value: Any) -> bool:
    if kind == "boolean":
        return isinstance(value, bool)
    if kind == "string":
        return isinstance(value, str) and len(value) <= 100
    if kind == "numbers":
        return isinstance(value, list) and len(value) <= _MOST_NUMBERS and all(_is("number", item) for item in value)
    if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value):
        return False
    return abs(value) < 2**53 and (kind == "number" or float(value).is_integer())


def listing(model: InstalledModel | None = None) -> list[dict[str, Any]]:
    """Every scheduler class: names, arguments, what it needs; and with a model, whether it suits that."""
    out = []
    for name, found in scheduler_classes().items():
        entry: dict[str, Any] = {
            "name": name,
            "aliases": names_of(name),
            "library": found.library or None,
            "installed": not is_missing(found),
        }
        if model:
            state, reason, _ = verdict(name, model)
            entry |= {"compatible": state != "refused", "suits": state == "suits", "reason": reason or None}
        args = {argument: _described(spec) for argument, spec in found.args.items()}
        out.append({**entry, "args": args})
    return out


def _described(spec: Argument) -> dict[str, Any]:
    described: dict[str, Any] = {"types": list(spec.types), "default": spec.default}
    return {**described, "choices": list(spec.choices)} if spec.choices else described
