"""What a request chooses by name: its pipeline; what it gets, or what there is instead."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from api.errors import ApiError
from api.models.community import METHODS, Community
from api.models.description import InstalledModel
from api.schema.catalogue import AUTO, AUTO_FOR_TASK, catalogue, nearest
from api.service import inputs as checks
from api.service import videos
from api.service.additions import Added
from api.service.fitting import misfit, pipelines_of, unbuildable
from api.service.output import choose_encoding
from api.service.prompts import check_syntax
from api.service.schedulers import check_name


def choose_pipeline(
    options: dict[str, Any], model_inputs: dict[str, Any], model: InstalledModel, default: str
) -> tuple[str, str]:
    """What to call the pipeline in ``$meta``, and its class; with ControlNets see ``controlnets``.

    Args:
        options: the checked ``callInputs``.
        model_inputs: as they were sent: a picture, or a mask, decides where nothing was asked for.
        model: what its configuration says of it.
        default: the server's pipeline.

    Raises:
        ApiError: NO_SUCH_PIPELINE, PIPELINE_NOT_SUPPORTED.
    """
    known, own = catalogue(), model.class_name
    tasks = {task: name for task, name in known.tasks_of(own).items() if misfit(model, name) is None}
    named = options.get("PIPELINE")
    if (named or default) in ("ALL", "AutoPipelineForText2Image") and not (named and named != "ALL"):
        named = _by_content(model_inputs, tasks, own)
    named = named or default
    if named in AUTO and AUTO[named] in tasks:
        return named, tasks[AUTO[named]]
    reason = misfit(model, named)
    if reason is None:
        return named, named
    allowed = [*(auto for auto, task in AUTO.items() if task in tasks), *pipelines_of(model)]
    if named not in AUTO and named not in known.pipeline_names:
        message = f"diffusers {known.diffusers} has no such pipeline.{nearest(named, allowed)}"
        raise ApiError("NO_SUCH_PIPELINE", message, field="callInputs.PIPELINE", requested=named, available=allowed)
    if named in AUTO:
        reason = misfit(model, own) or "Its family has no pipeline for that."
    raise ApiError(
        "PIPELINE_NOT_SUPPORTED",
        f"{model.model_id} is a {own}; {named} cannot be built from it. {reason}",
        field="callInputs.PIPELINE",
        requested=named,
        available=allowed,
    )


def choose_method(options: dict[str, Any], pipeline: str, code: Community | None) -> str:
    """The method of the pipeline that generates.

    Raises:
        ApiError: INVALID_INPUTS: the pipeline has no such method, or it is none that generates.
    """
    named = options.get("custom_pipeline_method")
    if named is None:
        return "__call__"
    methods = [method for method in code.methods if method in METHODS] if code else []
    if named in methods:
        return str(named)
    message = f"{pipeline} has no such method to generate with."
    if not methods:
        message += " It has one way to be called: leave this out, and choose by PIPELINE."
    field = "callInputs.custom_pipeline_method"
    raise ApiError("INVALID_INPUTS", message, field=field, requested=named, available=methods)


def check_community(model: InstalledModel, code: Community, added: Sequence[Added] = ()) -> None:
    """Whether a community pipeline can be built from a model.

    Raises:
        ApiError: PIPELINE_NOT_SUPPORTED, NOT_SUPPORTED: something is to be added to the model.
    """
    if added:
        message = f"{code.name} is built from the model's own parts: leave this out, or take a pipeline of diffusers."
        raise ApiError("NOT_SUPPORTED", message, field=added[0].wanted.field, requested=added[0].shown)
    if reason := unbuildable(model, code.build):
        message = f"{model.model_id} is a {model.class_name}; {code.name} cannot be built from it. {reason}"
        raise ApiError("PIPELINE_NOT_SUPPORTED", message, field="callInputs.PIPELINE", requested=code.name)


def _by_content(model_inputs: dict[str, Any], tasks: dict[str, str], own: str) -> str:
    """What a request that asks for no pipeline gets: by its pictures, or the model's own."""
    has_image = any(model_inputs.get(name) for name in ("image", *checks.ALIASES))
    if own in catalogue().videos:
        return videos.by_content(own, has_image)
    task = "inpaint" if model_inputs.get("mask_image") else "image2image" if has_image else "text2image"
    takes = catalogue().pipelines.get(own, {})
    if task in tasks or ("mask_image" not in takes and task == "inpaint") or ("image" not in takes and has_image):
        return AUTO_FOR_TASK[task]
    return own


def check_early(options: dict[str, Any], model_inputs: dict[str, Any], code: Community | None = None) -> None:
    """What can be said of a request before anything is known of its model.

    Args:
        options: the checked ``callInputs``.
        model_inputs: as they were sent.
        code: the community pipeline that was asked for.

    Raises:
        ApiError: NO_SUCH_PIPELINE, NO_SUCH_SCHEDULER, UNKNOWN_INPUT, INVALID_INPUTS.
    """
    choose_encoding(options)
    checks.check_lengths(model_inputs)
    check_syntax(options, model_inputs)
    known = catalogue()
    pipeline, scheduler = None if code else options.get("PIPELINE"), options.get("SCHEDULER")
    if pipeline and pipeline != "ALL" and pipeline not in AUTO and pipeline not in known.pipeline_names:
        hint = nearest(pipeline, [*AUTO, *known.pipeline_names])
        message = f"diffusers {known.diffusers} has no such pipeline.{hint}"
        raise ApiError("NO_SUCH_PIPELINE", message, field="callInputs.PIPELINE", requested=pipeline)
    if pipeline in known.refused:
        message = f"{pipeline} is not run here. {known.refused[pipeline]}"
        raise ApiError("PIPELINE_NOT_SUPPORTED", message, field="callInputs.PIPELINE", requested=pipeline)
    if scheduler:
        check_name(scheduler)
    names = {name for accepted in known.pipelines.values() for name in accepted}
    if code:
        names = set(code.methods[choose_method(options, code.name, code)])
    names |= {"ip_adapter_image"} if options.get("ip_adapters") else set()
    for name in model_inputs:
        if name not in names and name not in checks.ALIASES and name not in checks.OURS:
            who = f"{code.name} has no" if code else "No pipeline has"
            message = f"{who} such an input.{nearest(name, sorted(names))}"
            raise ApiError("UNKNOWN_INPUT", message, field=f"modelInputs.{name[:200]}")
