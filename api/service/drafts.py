"""A request as far as it is known before its pictures are read: what it chose, and what it leaves to defaults."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from api.errors import ApiError
from api.models.community import Community
from api.models.description import InstalledModel
from api.schema.catalogue import Input, catalogue
from api.schema.generation import Code, ModelRef, Pictures, Video, each_picture
from api.service import controlnets, ip_adapters, videos
from api.service import inputs as checks
from api.service.additions import Added
from api.service.choices import check_community, choose_method, choose_pipeline
from api.service.destinations import Destination, choose_destinations
from api.service.output import Encoding, check_output, choose_encoding
from api.service.prompts import check_syntax, check_weighing
from api.service.quantize import choose_quantize
from api.service.safety import choose_safety
from api.service.schedulers import Scheduler, choose_scheduler
from api.service.step_cache import check_step_cache
from api.settings import Settings

_MAX_DRAWN_SEED = 2**32


@dataclass(frozen=True)
class Draft:
    """A request whose pictures have not been read."""

    options: dict[str, Any]
    model: InstalledModel
    ref: ModelRef
    requested: str
    pipeline: str
    scheduler: Scheduler
    encoding: Encoding
    output: tuple[str, ...]
    safety_checker: bool
    id: str
    destinations: tuple[Destination, ...]
    accepted: dict[str, Input]
    given: dict[str, Any]
    images: int
    seed: int | list[int]
    callback_steps: int | None
    prompt_syntax: str
    method: str
    code: Code | None
    controls: list[str]
    added: Sequence[Added]
    adapted: ip_adapters.Adapted | None
    video: Video | None


def draft_of(
    model: InstalledModel,
    options: dict[str, Any],
    model_inputs: dict[str, Any],
    ref: ModelRef,
    code: Community | None,
    added: Sequence[Added],
    settings: Settings,
) -> Draft:
    """Everything that can be said once the model's configuration is at hand, and those of what is added to it.

    Args:
        model: what is to be run.
        options: checked ``callInputs``.
        model_inputs: as they were sent.
        ref: what a worker is told to load.
        code: the community pipeline that was asked for.
        added: what the request adds to the model.
        settings: limits and defaults.

    Raises:
        ApiError: the first thing that is wrong.
    """
    control, nets = None, controlnets.of(added)
    if code:
        check_community(model, code, added)
        requested, pipeline = code.name, code.code.class_name
    elif nets:
        control = controlnets.control(options, model_inputs, model, nets)
        requested, pipeline, model_inputs = control.requested, control.pipeline, control.inputs
    else:
        requested, pipeline = choose_pipeline(options, model_inputs, model, settings.pipeline)
    method = choose_method(options, code.name if code else pipeline, code)
    check_step_cache(options, pipeline)
    scheduler = choose_scheduler(options, model, settings.scheduler)
    safety_checker = choose_safety(options, model, settings.safety_checker)
    makes_video = pipeline in catalogue().videos and not code
    videos.check_options(options, code.name if code else pipeline)
    encoding = videos.choose_encoding(options) if makes_video else choose_encoding(options)
    adapted = ip_adapters.check(model_inputs, model, pipeline, added)
    if adapted:
        model_inputs = adapted.inputs
    accepted = code.methods[method] if code else catalogue().pipelines[pipeline]
    if control:
        accepted = {name: spec for name, spec in accepted.items() if name != control.image}
    output = check_output(options, accepted, pipeline)
    sent = checks.rename_aliases(model_inputs, accepted)
    given = checks.check_inputs(sent, accepted, pipeline)
    defaults = {name: checks.default_of(name, spec, settings) for name, spec in accepted.items()}
    given = {**{name: value for name, value in defaults.items() if value is not None}, **given}
    if makes_video:
        videos.fill(given, pipeline, model, settings)
    checks.check_values(given, accepted, model, settings)
    prompt_syntax = check_syntax(options, given)
    check_weighing(prompt_syntax, options, pipeline, accepted)
    images = checks.count_images(given, settings)
    video = videos.choose_video(given, options, pipeline, encoding, images, settings) if makes_video else None
    seed = checks.check_seed(sent.get("seed"), images, secrets.randbelow(_MAX_DRAWN_SEED))
    job_id = secrets.token_hex(8)
    callback_steps = sent.get("callback_steps")
    if callback_steps is not None and (not isinstance(callback_steps, int) or callback_steps < 1):
        raise ApiError("INVALID_INPUTS", "Must be a whole number, at least 1.", field="modelInputs.callback_steps")
    additions = tuple(one.addition for one in added if one in nets or one.wanted.name == ip_adapters.ENCODER)
    return Draft(
        options=options,
        model=model,
        ref=msgspec.structs.replace(ref, additions=additions, quantize=choose_quantize(options, settings)),
        requested=requested,
        pipeline=pipeline,
        scheduler=scheduler,
        encoding=encoding,
        output=output,
        safety_checker=safety_checker,
        id=job_id,
        destinations=choose_destinations(options, images, encoding.format, job_id, settings),
        accepted=accepted,
        given=given,
        images=images,
        seed=seed,
        callback_steps=callback_steps,
        prompt_syntax=prompt_syntax,
        method=method,
        code=code.code if code else None,
        controls=control.pictures if control else [],
        added=added,
        adapted=adapted,
        video=video,
    )


def fill_size(draft: Draft, pictures: Pictures) -> None:
    """Width and height where none were sent: the picture's, else the model's own.

    Diffusers would squash a picture into the model's own size. Pipelines that edit, or take pictures for reference,
    choose a size by their picture themselves.
    """
    given, accepted, model = draft.given, draft.accepted, draft.model
    name = "image" if "image" in pictures else controlnets.PICTURE if draft.controls else None
    picture = next(each_picture({name: pictures[name]})) if name else None
    if name == "image" and (not accepted["image"].required or "Edit" in draft.pipeline):
        return
    multiple = model.size_multiple
    for name, side in (("width", picture and picture.width), ("height", picture and picture.height)):
        if name in accepted and given.get(name) is None:
            fitting = max(multiple, side // multiple * multiple) if side else model.default_size
            if fitting:
                given[name] = fitting
