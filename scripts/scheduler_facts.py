"""What each scheduler class of the installed diffusers takes, and whether image pipelines can run it.

What signatures do not say (the words that an argument of type ``str`` may be, whether a class can be stepped with what
image pipelines give it) is tried on numbers.
"""

import contextlib
import importlib
import inspect
import math
import re
import sys
import types
import typing
import warnings
from pathlib import Path

import diffusers
import torch

FOLDER = Path(diffusers.__file__).parent / "schedulers"
LIBRARIES = ("torchsde",)
"""What some schedulers import beyond what diffusers itself needs."""
TYPES = {str: "string", int: "integer", float: "number", bool: "boolean"}
OURS = {"trained_betas"}
"""Arguments that belong to the weights: a list of a thousand numbers that a model was trained with."""
_STEPS = 4


def classes() -> dict[str, tuple[type, str]]:
    """Each scheduler class by name, and the library it needs, also where that is not installed."""
    found = {}
    for name in sorted(n for n in dir(diffusers) if n.endswith("Scheduler") and not n.startswith("Flax")):
        cls, library = getattr(diffusers, name), ""
        missing = [backend for backend in getattr(cls, "_backends", []) if backend in LIBRARIES]
        if getattr(cls, "_backends", None):
            if not missing:
                continue
            cls = _without_library(name, missing[0])
        source = Path(inspect.getfile(cls)).read_text(encoding="utf-8")
        if any(word in source for word in ("torchsde", "scheduling_dpmsolver_sde")):  # from which others take its noise
            library = "torchsde"
        if isinstance(cls, type) and issubclass(cls, diffusers.SchedulerMixin):
            found[name] = (cls, library)
    return found


def _without_library(name: str, library: str) -> type:
    """A class from its own module, which is told that the library is there."""
    (file,) = (path for path in FOLDER.glob("scheduling_*.py") if f"class {name}(" in path.read_text(encoding="utf-8"))
    sys.modules.setdefault(library, types.ModuleType(library))
    return getattr(importlib.import_module(f"diffusers.schedulers.{file.stem}"), name)


def facts() -> dict[str, dict[str, object]]:
    """The catalogue's entry for each scheduler class."""
    warnings.simplefilter("ignore")
    found = classes()
    words: dict[str, set[str]] = {}
    for cls, _ in found.values():
        for name, parameter in _parameters(cls).items():
            words.setdefault(name, set()).update(_literals(parameter.annotation))
    return {
        name: {
            "library": library,
            "compatibles": sorted({name, *(getattr(c, "name", c) for c in cls._compatibles)}),
            "fault": "" if library else _fault(cls),
            "args": {
                argument: entry
                for argument, parameter in _parameters(cls).items()
                if (entry := _entry(cls, argument, parameter, words.get(argument, set()), try_it=not library))
            },
        }
        for name, (cls, library) in found.items()
    }


def _parameters(cls: type) -> dict[str, inspect.Parameter]:
    parameters = list(inspect.signature(cls.__init__, eval_str=True).parameters.values())[1:]
    return {p.name: p for p in parameters if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL) and p.name not in OURS}


def _parts(annotation: object) -> list[object]:
    """What a union is of."""
    if isinstance(annotation, types.UnionType) or typing.get_origin(annotation) is typing.Union:
        return [part for arg in typing.get_args(annotation) for part in _parts(arg)]
    return [annotation]


def _literals(annotation: object) -> list[str]:
    parts = [part for part in _parts(annotation) if typing.get_origin(part) is typing.Literal]
    return [word for part in parts for word in typing.get_args(part)]


def _entry(
    cls: type, name: str, parameter: inspect.Parameter, siblings: set[str], *, try_it: bool
) -> dict[str, object] | None:
    """An argument's JSON types, default and words; None where JSON cannot hold it."""
    parts = _parts(parameter.annotation)
    kinds = {TYPES[part] for part in parts if part in TYPES}
    if "number" in kinds:
        kinds.discard("integer")  # JSON has one kind of number
    choices = _literals(parameter.annotation)
    kinds |= {"string"} if choices else set()
    kinds |= {"numbers"} if any(part in (list[float], list[int]) for part in parts) else set()
    if not kinds:
        return None
    if kinds == {"string"} and not choices:
        documented = set(re.findall(r"[`\"']([a-z][a-z0-9_+-]*)[`\"']", cls.__doc__ or ""))
        choices = _accepted(cls, name, parameter, siblings, documented) if try_it else sorted(siblings)
    default = parameter.default
    if not isinstance(default, str | int | float | bool) or (isinstance(default, float) and not math.isfinite(default)):
        default = None
    entry: dict[str, object] = {"types": sorted(kinds), "default": default}
    return {**entry, "choices": choices} if choices else entry


def _accepted(
    cls: type, name: str, parameter: inspect.Parameter, siblings: set[str], documented: set[str]
) -> list[str]:
    """The words that a class takes for an argument; those of the same argument elsewhere, where it takes anything."""
    default = {parameter.default} if isinstance(parameter.default, str) else set()
    if _fault(cls):
        return []
    if not _fault(cls, **{name: "no-such-word"}):
        return sorted(siblings | default) if siblings else []
    return sorted(word for word in siblings | documented | default if not _fault(cls, **{name: word}))


def _fault(cls: type, **arguments: object) -> str:
    """What is in the way of running a scheduler as image pipelines do, in diffusers' words."""
    generator = torch.Generator().manual_seed(0)
    try:
        with contextlib.redirect_stdout(None), torch.no_grad():
            scheduler = cls(**arguments)
            scheduler.set_timesteps(_STEPS)
            sample = torch.randn(1, 4, 8, 8, generator=generator) * scheduler.init_noise_sigma
            assert scheduler.order
            for t in scheduler.timesteps:
                output = torch.randn(1, 4, 8, 8, generator=generator)
                scheduler.scale_model_input(sample, t)
                sample = scheduler.step(output, t, sample, return_dict=False)[0]
    except Exception as fault:
        text = f"{type(fault).__name__}: {fault}" if isinstance(fault, LookupError) else str(fault)
        return text.splitlines()[0][:200]
    return ""
