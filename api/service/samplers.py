"""The names that AUTOMATIC1111's users know schedulers by: each is a class of diffusers with arguments.

After diffusers' own table (docs/source/en/api/schedulers/overview.md), but for "DPM++ SDE": that is a single-step
solver which adds noise at each step, which diffusers' single-step solver can do as well since.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

from api.schema.schedulers import scheduler_classes

SPACINGS = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "use_lu_lambdas")
"""Arguments of which one at most may be on: how the noise levels are spaced."""
_SCHEDULES: dict[str, dict[str, Any]] = {
    "Karras": {"use_karras_sigmas": True},
    "Exponential": {"use_exponential_sigmas": True},
    "Beta": {"use_beta_sigmas": True},
    "SGM Uniform": {"timestep_spacing": "trailing"},
}
_SAMPLERS: dict[str, tuple[str, dict[str, Any]]] = {
    "Euler": ("EulerDiscreteScheduler", {}),
    "Euler a": ("EulerAncestralDiscreteScheduler", {}),
    "LMS": ("LMSDiscreteScheduler", {}),
    "Heun": ("HeunDiscreteScheduler", {}),
    "DPM2": ("KDPM2DiscreteScheduler", {}),
    "DPM2 a": ("KDPM2AncestralDiscreteScheduler", {}),
    "DPM++ 2M": ("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver++", "solver_order": 2}),
    "DPM++ 2M SDE": ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++", "solver_order": 2}),
    "DPM++ 2M SDE Heun": (
        "DPMSolverMultistepScheduler",
        {"algorithm_type": "sde-dpmsolver++", "solver_order": 2, "solver_type": "heun"},
    ),
    "DPM++ 3M SDE": ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++", "solver_order": 3}),
    "DPM++ 2S a": ("DPMSolverSinglestepScheduler", {"algorithm_type": "dpmsolver++", "solver_order": 2}),
    "DPM++ SDE": ("DPMSolverSinglestepScheduler", {"algorithm_type": "sde-dpmsolver++", "solver_order": 2}),
    "DDIM": ("DDIMScheduler", {}),
    "DDPM": ("DDPMScheduler", {}),
    "PLMS": ("PNDMScheduler", {"skip_prk_steps": True}),
    "UniPC": ("UniPCMultistepScheduler", {}),
    "DEIS": ("DEISMultistepScheduler", {}),
    "SA-Solver": ("SASolverScheduler", {}),
    "LCM": ("LCMScheduler", {}),
    "TCD": ("TCDScheduler", {}),
}


class Sampler(NamedTuple):
    """A name, as it is written, and what it means."""

    name: str
    scheduler: str
    args: dict[str, Any]


@functools.cache
def samplers() -> dict[str, Sampler]:
    """Every name in lower case, and what it means.

    A name without a schedule turns off those that the model's own settings may hold.
    """
    found = {}
    for plain, (scheduler, args) in _SAMPLERS.items():
        takes = scheduler_classes()[scheduler].args
        off = {name: False for name in SPACINGS if name in takes}
        for schedule, more in [("", {}), *_SCHEDULES.items()]:
            if set(more) <= set(takes):
                name = f"{plain} {schedule}".strip()
                found[name.lower()] = Sampler(name, scheduler, {**off, **args, **more})
    return found


def sampler(name: str) -> Sampler | None:
    """What a name means, whatever its case and spaces."""
    return samplers().get(" ".join(name.lower().split()))


def names_of(scheduler: str) -> list[str]:
    """The names that mean a class."""
    return [found.name for found in samplers().values() if found.scheduler == scheduler]
