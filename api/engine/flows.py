"""Flows of several generations: one after another, each with its own model, as one job.

Each generation is a job of ``Attempts`` like any other: its model is leased while it runs and no longer, so the one
before may be evicted for it, and memory that does not suffice is dealt with for each by itself. What goes from one to
the next is a tensor of latents or the images, and the state of the generators: the numbers that the second one draws
are those that plain diffusers draws where one generator is given to both calls.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import diffusers
import msgspec
import numpy as np
import PIL.Image
import torch
from torch.nn import functional

from api.engine.attempts import Attempts, Job, Ran
from api.engine.calling import to_pil
from api.engine.line import Line
from api.engine.schedulers import Generators
from api.schema.flows import LATENTS, Handover
from api.schema.generation import GenerationRequest
from api.schema.messages import Planned

_RESAMPLING = {"lanczos": PIL.Image.Resampling.LANCZOS, "bicubic": PIL.Image.Resampling.BICUBIC}
_FIRST = "base"
"""What ``$timings`` and ``$meta`` call the first generation of several."""
_OF_EACH = ("dtype", "placement", "attention", "numerics", "quantize", "quantized", "step_cache", "lossy")
_JOINED = ("lossy", "warnings")
"""What ``$meta`` says of each generation, and of all of them together."""


class Flows:
    """Runs requests of one generation or several.

    Args:
        attempts: runs each of them.
        line: told of the models that come next.
    """

    def __init__(self, attempts: Attempts, line: Line) -> None:
        self._attempts = attempts
        self._line = line

    def run(self, job: Job, timings: dict[str, int]) -> list[Ran]:
        """Run a request.

        Args:
            job: which. Its phases are told as those of one generation, but that ``loadModel`` may come within
                ``inference``; its steps are counted over all generations.
            timings: to be filled in: milliseconds by phase, over all generations; where there are several, under the
                name of each those of its inference.

        Returns:
            What each generation gave.

        Raises:
            Cancelled: the job is to stop.
            ApiError: MODEL_BROKEN, OUT_OF_MEMORY; what is wrong with the request.
        """
        stages = job.request.stages
        if len(stages) == 1:
            return [self._attempts.run(job, timings)]
        runs: list[Ran] = []
        steps = _Steps(job, [_steps_of(stage) for stage in stages[1:]])
        for number, stage in enumerate(stages):
            following = stages[number + 1 :]
            part = dataclasses.replace(
                job,
                request=stage,
                on_step=steps.on_step,
                on_phase=_within(job.on_phase) if number else job.on_phase,
                on_preview=steps.on_preview if job.on_preview else None,
                handed=_handed(stage.takes, runs[-1]) if stage.takes and runs else {},
                random=runs[-1].random if runs else (),
                latents=bool(following and following[0].takes and following[0].takes.what == LATENTS),
                tried=[],
            )
            took: dict[str, int] = {}
            with self._line.expecting([later.model for later in following if later.model != stage.model]):
                runs.append(self._attempts.run(part, took))
            steps.next()
            for phase, milliseconds in took.items():
                timings[phase] = timings.get(phase, 0) + milliseconds
            timings[_name(stage)] = took["inference"]
        return runs


class _Steps:
    """Counts the steps of all generations as those of one.

    Args:
        job: is told.
        later: how many steps each generation after the first is expected to have.
    """

    def __init__(self, job: Job, later: list[int]) -> None:
        self._job = job
        self._later = later
        self._done = self._last = 0
        self._told = (0, 1)

    def on_step(self, step: int, total: int) -> None:
        self._last = total
        self._job.on_step(*self._count(step, total))

    def on_preview(self, step: int, total: int, pictures: np.ndarray) -> None:
        if self._job.on_preview:
            self._job.on_preview(*self._count(step, total), pictures)

    def next(self) -> None:
        """A generation is done."""
        self._done, self._last, self._later = self._done + self._last, 0, self._later[1:]

    def _count(self, step: int, total: int) -> tuple[int, int]:
        """The step and the total of all; the share that is done never shrinks, but where a run begins anew."""
        step, total = self._done + step, self._done + total + sum(self._later)
        before, of = self._told
        if step > before > 0 and step < total:  # more are to come than were expected
            total = max(step + 1, min(total, step * of // before))
        self._told = step, total
        return self._told


def pictures_of(job: Job) -> dict[str, Any]:
    """A job's pictures as pipelines take them, with what the generation before handed over in its place."""
    given = {name: found for name, found in job.request.pictures.items() if name not in job.handed}
    # a copy: a job may run again, and nothing says that pipelines do not write to what they are given
    own = {k: found.clone() if isinstance(found, torch.Tensor) else found for k, found in job.handed.items()}
    return to_pil(given) | own


def resumed(generators: Generators, states: Sequence[torch.Tensor]) -> Generators:
    """Generators in the state in which the generation before left its own; as they are where there was none."""
    for generator, state in zip(_each(generators), states, strict=False):
        generator.set_state(state)
    return generators


def states(generators: Generators) -> list[torch.Tensor]:
    """What ``resumed`` takes."""
    return [generator.get_state() for generator in _each(generators)]


def empty() -> np.ndarray:
    """The images of a generation that gives latents."""
    return np.empty((0, 0, 0, 3), np.uint8)


def told_of(request: GenerationRequest, metas: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What ``$meta`` says of how a request was run.

    Args:
        request: that was run.
        metas: of each of its generations.

    Returns:
        Of several, what the first says, with what all say in ``numerics``, ``lossy`` and ``warnings``, and each by
        itself in ``stages``.
    """
    if len(metas) == 1:
        return metas[0]
    words = [word for meta in metas for word in meta["numerics"].split("/")]
    joined = {name: list(dict.fromkeys(item for meta in metas for item in meta.get(name, ()))) for name in _JOINED}
    stages = [
        {
            "name": _name(stage),
            "MODEL_ID": stage.model.model_id,
            "pipeline": stage.pipeline,
            "scheduler": stage.scheduler,
            **({"takes": stage.takes.what} if stage.takes else {}),
            **{name: meta[name] for name in _OF_EACH if name in meta},
        }
        for stage, meta in zip(request.stages, metas, strict=True)
    ]
    told = {**metas[0], "numerics": "/".join(dict.fromkeys(words)), "stages": stages}
    return told | {name: found for name, found in joined.items() if found}


def planned(request: GenerationRequest, plan: Callable[[GenerationRequest], Planned]) -> Planned:
    """What a request of several generations would take.

    Args:
        request: which.
        plan: says it of one.

    Returns:
        The placement of the first; bytes and seconds of all models together, each model counted once.
    """
    plans = [plan(msgspec.structs.replace(stage, then=())) for stage in request.stages]
    models = {stage.model.key: found for stage, found in zip(request.stages, plans, strict=True)}.values()
    fits = [found.fits for found in plans]
    tiers = ("disk", "host", "device")
    return Planned(
        fits=False if False in fits else None if None in fits else True,
        why=next((found.why for found in plans if found.why), ""),
        placement=plans[0].placement,
        tier=min((found.tier for found in models), key=tiers.index),
        model=sum(found.model for found in models),
        read=sum(found.read for found in models),
        copy=sum(found.copy for found in models),
        read_seconds=_summed([found.read_seconds for found in models]),
        copy_seconds=_summed([found.copy_seconds for found in models]),
    )


def _handed(takes: Handover, before: Ran) -> dict[str, Any]:
    """The argument that a generation gets of the one before it."""
    if before.latents is not None:
        return {"image": _larger_latents(before.latents, takes)}
    pictures = [PIL.Image.fromarray(image).convert("RGB") for image in before.images]
    if takes.size:
        pictures = [picture.resize(takes.size, _RESAMPLING[takes.upscaler]) for picture in pictures]
    return {"image": pictures}


def _larger_latents(latents: torch.Tensor, takes: Handover) -> torch.Tensor:
    if takes.size is None:
        return latents
    width, height = (side // takes.factor for side in takes.size)
    return functional.interpolate(latents, size=(height, width), mode="bilinear", align_corners=False, antialias=False)


def _within(on_phase: Callable[[str, str], None]) -> Callable[[str, str], None]:
    """Tells what is loaded while the request's inference goes on, which began with the first generation."""
    return lambda kind, status: on_phase(kind, status) if kind != "inference" else None


def _steps_of(stage: GenerationRequest) -> int:
    """How many steps a later generation will tell of, as far as that is known before its scheduler is made.

    Its timesteps decide, and may be some more or less; then the total is mended when it begins.
    """
    inputs = stage.inputs
    count, start = int(inputs.get("num_inference_steps") or 1), inputs.get("denoising_start")
    strength = inputs.get("strength")
    if start is not None:
        count = round(count * (1 - start))
    elif strength is not None:
        count = min(int(count * strength), count)
    if (end := inputs.get("denoising_end")) is not None:
        count -= round(int(inputs.get("num_inference_steps") or 1) * (1 - end))
    order = getattr(
        getattr(diffusers, stage.scheduler, None), "order", 1
    )  # a second-order one tells of each but one twice
    return max(1, order * count - (order - 1))


def _each(generators: Generators) -> list[torch.Generator]:
    return generators if isinstance(generators, list) else [generators]


def _name(stage: GenerationRequest) -> str:
    return stage.takes.name if stage.takes else _FIRST


def _summed(seconds: Sequence[float | None]) -> float | None:
    known = [each for each in seconds if each is not None]
    return sum(known) if len(known) == len(seconds) else None
