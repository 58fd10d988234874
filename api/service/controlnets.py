"""What a request with ControlNets gets: which pipeline, which pictures, or what is wrong with it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from api.errors import ApiError
from api.models.description import InstalledModel
from api.models.parts import config_in
from api.schema.catalogue import AUTO, AUTO_FOR_TASK, WithControlNet, catalogue, nearest
from api.service.additions import Added
from api.service.fitting import misfit
from api.service.inputs import MAX_PICTURES

PICTURE = "control_image"
_FIELD = "callInputs.controlnets"
_IN_WORDS = {"text2image": "a prompt", "image2image": "an image", "inpaint": "an image and a mask"}
_UNION = "ControlNetUnionModel"
_SAME = ("cross_attention_dim", "block_out_channels", "layers_per_block", "joint_attention_dim")
"""Settings of a ControlNet that must be those of what it controls."""


class Control(NamedTuple):
    """What there is of the ControlNets in a request.

    Attributes:
        pipeline: the class that takes them.
        requested: what to call it in ``$meta``.
        image: its argument for their pictures.
        inputs: the ``modelInputs`` without the pictures.
        pictures: the pictures, as they were sent.
    """

    pipeline: str
    requested: str
    image: str
    inputs: dict[str, Any]
    pictures: list[str]


def of(added: Sequence[Added]) -> list[Added]:
    """Those that are ControlNets of what a request adds."""
    return [one for one in added if one.wanted.name.startswith("controlnet")]


def control(
    options: dict[str, Any], model_inputs: dict[str, Any], model: InstalledModel, nets: Sequence[Added]
) -> Control:
    """The pipeline for a model with ControlNets, and their pictures.

    Raises:
        ApiError: INVALID_INPUTS, MISSING_INPUT, NO_SUCH_PIPELINE, PIPELINE_NOT_SUPPORTED.
    """
    fitting = check_fit(model, nets)
    requested, pipeline = _pipeline(options, model_inputs, model, fitting)
    entry, inputs = fitting[pipeline], dict(model_inputs)
    sent = inputs.pop(PICTURE, None)
    if sent is None and entry.task == "text2image" and entry.image == "image":
        sent = inputs.pop("image", None)  # as the pipeline itself calls it
    return Control(pipeline, requested, entry.image, inputs, _pictures(sent, inputs, nets))


def check_is_controlnet(added: Sequence[Added]) -> None:
    """Whether parts are ControlNets of any kind.

    Raises:
        ApiError: INVALID_INPUTS.
    """
    known = sorted({entry.controlnet for entry in catalogue().controlnets.values()})
    for one in of(added):
        if one.model.class_name not in known:
            what = f"a {one.model.class_name}" if one.model.class_name else "nothing that says what it is"
            message = f"{one.shown} is {what}, not a ControlNet."
            raise ApiError("INVALID_INPUTS", message, field=one.wanted.field, requested=one.shown, available=known)


def again(added: Sequence[Added]) -> dict[str, Any]:
    """What ``$meta`` says of them: names that mean the same versions."""
    nets = of(added)
    if not nets:
        return {}
    return {
        "controlnets": [one.again for one in nets],
        "controlnet_versions": [one.model.revision for one in nets],
    }


def check_fit(model: InstalledModel, nets: Sequence[Added]) -> dict[str, WithControlNet]:
    """Whether ControlNets go with a model.

    Returns:
        The pipelines that can be built from them.

    Raises:
        ApiError: INVALID_INPUTS, PIPELINE_NOT_SUPPORTED.
    """
    known = catalogue().controlnets.items()
    of_model = {name: entry for name, entry in known if misfit(model, name, {"controlnet"}) is None}
    if not of_model:
        message = f"diffusers {catalogue().diffusers} has no pipeline for a {model.class_name} with ControlNets."
        raise ApiError("PIPELINE_NOT_SUPPORTED", message, field=_FIELD, requested=model.model_id)
    check_is_controlnet(nets)
    classes = sorted({entry.controlnet for entry in of_model.values()})
    for net in nets:
        if net.model.class_name not in classes:
            message = (
                f"{net.shown} is a {net.model.class_name}, which is made for other models than {model.model_id}, a "
                f"{model.class_name}."
            )
            raise ApiError("INVALID_INPUTS", message, field=net.wanted.field, requested=net.shown, available=classes)
    kinds = {net.model.class_name for net in nets}
    if len(kinds) > 1:
        message = f"They are of different kinds ({', '.join(sorted(kinds))}), and no pipeline takes both."
        raise ApiError("INVALID_INPUTS", message, field=_FIELD)
    fitting = {name: entry for name, entry in of_model.items() if {entry.controlnet} == kinds}
    if len(nets) > 1 and not any(entry.several for entry in fitting.values()):
        message = f"Pipelines for a {model.class_name} take one ControlNet, not {len(nets)}."
        raise ApiError("INVALID_INPUTS", message, field=_FIELD)
    _check_shapes(model, nets)
    return fitting


def _check_shapes(model: InstalledModel, nets: Sequence[Added]) -> None:
    """Whether ControlNets have the shape of what they are to control, as far as their configurations say."""
    theirs = config_in(model.folder / "unet") or config_in(model.folder / "transformer")
    for net in nets:
        ours = config_in(net.model.folder / net.model.part)
        for name in _SAME:
            is_, wanted = ours.get(name), theirs.get(name)
            if is_ is not None and wanted is not None and is_ != wanted:
                message = (
                    f"{net.shown} was made for another kind of model than {model.model_id}: its {name} is {is_}, "
                    f"the model's is {wanted}."
                )
                raise ApiError("INVALID_INPUTS", message, field=net.wanted.field, requested=net.shown)


def _pipeline(
    options: dict[str, Any], model_inputs: dict[str, Any], model: InstalledModel, fitting: dict[str, WithControlNet]
) -> tuple[str, str]:
    named = options.get("PIPELINE")
    if named in fitting:
        return named, named
    if named in AUTO:
        task = AUTO[named]
    elif named in (None, "ALL"):
        has_image = any(model_inputs.get(name) for name in ("image", "init_image", "input_image"))
        task = "inpaint" if model_inputs.get("mask_image") else "image2image" if has_image else "text2image"
    else:
        known = named in catalogue().pipeline_names
        message = f"{named} takes no ControlNets of this kind with {model.model_id}."
        if not known:
            message = f"diffusers {catalogue().diffusers} has no such pipeline.{nearest(named, fitting)}"
        code = "PIPELINE_NOT_SUPPORTED" if known else "NO_SUCH_PIPELINE"
        raise ApiError(code, message, field="callInputs.PIPELINE", requested=named, available=list(fitting))
    family = catalogue().tasks_of(model.class_name).values()
    of_task = [name for name, entry in fitting.items() if entry.task == task]
    found = next((name for name in of_task if fitting[name].plain in family or name in family), None)
    if found is None:
        message = (
            f"diffusers {catalogue().diffusers} has no pipeline that takes {_IN_WORDS[task]} and ControlNets with a "
            f"{model.class_name}."
        )
        field = "callInputs.PIPELINE" if named in AUTO else _FIELD
        raise ApiError("PIPELINE_NOT_SUPPORTED", message, field=field, requested=named, available=list(fitting))
    return AUTO_FOR_TASK[task], found


def _pictures(sent: Any, inputs: dict[str, Any], nets: Sequence[Added]) -> list[str]:
    """The pictures of the ControlNets; settings of them in ``inputs`` are checked, and mended where need be."""
    field = f"modelInputs.{PICTURE}"
    if sent is None or sent == []:
        raise ApiError("MISSING_INPUT", "A ControlNet needs a picture of what it is to follow.", field=field)
    pictures = sent if isinstance(sent, list) else [sent]
    if len(pictures) > MAX_PICTURES:
        raise ApiError("LIMIT_EXCEEDED", f"At most {MAX_PICTURES} images.", field=field)
    if not all(isinstance(picture, str) for picture in pictures):
        raise ApiError("INVALID_INPUTS", "Must be an image, or a list with one for each ControlNet.", field=field)
    count, what = len(nets), "ControlNet"
    if nets[0].model.class_name == _UNION:
        mode = inputs.get("control_mode")
        if mode is None:
            message = "This ControlNet knows several kinds of pictures: the number of the kind is needed."
            raise ApiError("MISSING_INPUT", message, field="modelInputs.control_mode")
        modes = mode if isinstance(mode, list) else [mode]
        if count == 1:
            count, what = len(modes), "control_mode"
        elif len(modes) != count:
            raise _wrong_count("control_mode", len(modes), count, what)
    if len(pictures) != count:
        raise _wrong_count(PICTURE, len(pictures), count, what)
    _check_settings(inputs, count, what)
    return pictures


def _check_settings(inputs: dict[str, Any], count: int, what: str) -> None:
    for name in ("controlnet_conditioning_scale", "control_guidance_start", "control_guidance_end"):
        value = inputs.get(name)
        if isinstance(value, list) and len(value) != count:
            raise _wrong_count(name, len(value), count, what)
        if isinstance(value, list) and count == 1:
            inputs[name] = value[0]
    starts, ends = (
        value if isinstance(value, list) else [value] * count
        for value in (inputs.get("control_guidance_start"), inputs.get("control_guidance_end"))
    )
    for start, end in zip(starts, ends, strict=True):
        start, end = 0.0 if start is None else start, 1.0 if end is None else end
        if isinstance(start, int | float) and isinstance(end, int | float) and not 0 <= start < end <= 1:
            message = "It must begin before control_guidance_end, and both are parts of the way, from 0 to 1."
            field = "modelInputs.control_guidance_start"
            raise ApiError("INVALID_INPUTS", message, field=field, requested=[start, end])


def _wrong_count(name: str, sent: int, count: int, what: str) -> ApiError:
    message = f"There is to be one for each {what}: {count}, not {sent}."
    return ApiError("INVALID_INPUTS", message, field=f"modelInputs.{name}", requested=sent)
