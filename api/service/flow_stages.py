"""The generations that follow a request's first: what each is asked for, and what is wrong with it."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from api.errors import ApiError
from api.models.description import InstalledModel
from api.models.parts import config_in
from api.models.refs import SourceRef
from api.schema.catalogue import AUTO_FOR_TASK, catalogue
from api.schema.flows import IMAGES, LATENTS, UPSCALERS, Handover
from api.schema.generation import ModelRef, Picture, Pictures, each_picture
from api.service import controlnets, ip_adapters
from api.service import inputs as checks
from api.service.drafts import Draft, draft_of
from api.service.flow_options import HIRES, HIRES_KEYS, MODEL, REFINER, REFINER_INPUTS
from api.settings import Settings

_SWITCH_AT = 0.8
"""Of the way the base goes where nobody says how far, as diffusers' guide to SDXL and AUTOMATIC1111's web UI do."""
_REFINED, _REPAINTED = 0.3, 0.5
"""Strength of a refiner, and of a second pass, where nobody says it."""
_SCALE = 2.0
_FIRST_ONLY = ("PIPELINE", "custom_pipeline_method", "controlnets", "ip_adapters", "lora_weights", "textual_inversions",
               "output_url", "refiner", "hires")  # fmt: skip
"""Options that say nothing of the generations after the first."""
_PROMPTS = ("prompt", "prompt_2", "prompt_3", "negative_prompt", "negative_prompt_2", "negative_prompt_3")
_SAME_FAMILY = ("guidance_scale", "guidance_rescale", "eta", "original_size", "target_size", "crops_coords_top_left",
                "negative_original_size", "negative_target_size", "negative_crops_coords_top_left")  # fmt: skip
_OF_THE_FIRST = frozenset({"strength", "width", "height", "timesteps", "sigmas", "denoising_start", "denoising_end",
                           "original_size", "target_size", "crops_coords_top_left", "negative_original_size",
                           "negative_target_size", "negative_crops_coords_top_left", "padding_mask_crop"})  # fmt: skip
"""Inputs that a second pass in another size does not take over."""
_TAKES_LATENTS = frozenset(
    f"{family}{task}Pipeline"
    for family in ("StableDiffusion", "StableDiffusionXL", "StableDiffusion3", "Kolors")
    for task in ("Img2Img", "Inpaint")
)
"""Pipelines that take latents in the place of an image as the families' pipelines give them."""
_GIVES_LATENTS = _TAKES_LATENTS | frozenset(
    f"{family}{kind}Pipeline"
    for family in ("StableDiffusion", "StableDiffusionXL", "StableDiffusion3", "Kolors")
    for kind in ("", "ControlNet", "ControlNetImg2Img", "ControlNetInpaint", "ControlNetUnion", "PAG")
)
_SPACE: dict[str, Any] = {"latent_channels": 4, "scaling_factor": 0.18215, "shift_factor": None, "latents_mean": None,
                          "latents_std": None}  # fmt: skip
"""What latents mean is said by these settings of an autoencoder, with the defaults of AutoencoderKL."""


class Refiner(NamedTuple):
    """The refiner of a request that is here."""

    source: SourceRef
    model: InstalledModel


class Stage(NamedTuple):
    """A generation after the first, checked.

    Attributes:
        draft: what was chosen.
        takes: what it gets.
        pictures: with one without pixels in the place of each that it gets.
        source: names its model; None: the first one's.
    """

    draft: Draft
    takes: Handover
    pictures: Pictures
    source: SourceRef | None


class Stages:
    """Says which generations follow a first one.

    Args:
        settings: defaults and limits.
        has_gpu: a CPU computes in fp32 whatever is asked for.
    """

    def __init__(self, settings: Settings, has_gpu: bool) -> None:
        self._settings = settings
        self._has_gpu = has_gpu

    def of(
        self, draft: Draft, pictures: Pictures, model_inputs: dict[str, Any], refiner: Refiner | None
    ) -> tuple[dict[str, Any], list[Stage]]:
        """The generations that follow a first one.

        Args:
            draft: of the first, with its size.
            pictures: its pictures.
            model_inputs: as they were sent.
            refiner: None: there is none, or it is not known yet.

        Returns:
            What is added to the inputs of the first, and the others.

        Raises:
            ApiError: the first thing that is wrong.
        """
        hires = draft.options.get("hires")
        if hires is None and refiner is None:
            return {}, []
        if draft.code:
            field = HIRES if hires is not None else REFINER
            message = f"{draft.requested} is a community pipeline, which nothing follows: leave this out."
            raise ApiError("NOT_SUPPORTED", message, field=field)
        first, stages = dict[str, Any](), list[Stage]()
        if hires is not None:
            stages.append(self._hires(draft, pictures, model_inputs, hires))
        if refiner is not None:
            before = stages[-1] if stages else None
            stage = self._refined(draft, pictures, before, refiner)
            stages.append(stage)
            if (switch := stage.draft.given.get("denoising_start")) is not None:
                (before.draft.given if before else first)["denoising_end"] = switch
        return first, stages

    def _hires(self, draft: Draft, pictures: Pictures, model_inputs: dict[str, Any], asked: dict[str, Any]) -> Stage:
        width, height = _larger(draft, pictures, asked)
        sent: dict[str, Any] = {
            **{name: value for name, value in draft.given.items() if _passes(name, draft)},
            "strength": asked.get("strength", _REPAINTED),
            **{name: asked[name] for name in ("num_inference_steps", "guidance_scale") if name in asked},
        }
        if "num_inference_steps" in draft.given:
            sent.setdefault("num_inference_steps", draft.given["num_inference_steps"])
        added = [one for one in draft.added if one not in controlnets.of(draft.added)]
        if draft.adapted:
            sent[ip_adapters.PICTURE] = model_inputs[ip_adapters.PICTURE]
        nothing = f"{draft.model.model_id} makes no images of images, as a second pass does."
        with about(HIRES, HIRES_KEYS, nothing):
            made = self._draft(draft, draft.model, draft.ref, sent, (width, height), added, draft.options)
            if "strength" not in made.accepted:
                raise ApiError("PIPELINE_NOT_SUPPORTED", nothing, field=HIRES)
            checks.check_size({"width": width, "height": height}, draft.model, self._settings)
        upscaler = asked.get("upscaler", UPSCALERS[0])
        if upscaler == "latent" and not _passes_latents(draft, made):
            message = f"{draft.pipeline} hands no latents to {made.pipeline}; the images can be made larger instead."
            available = [name for name in UPSCALERS if name != "latent"]
            raise ApiError(
                "INVALID_INPUTS", message, field=f"{HIRES}.upscaler", requested=upscaler, available=available
            )
        what = LATENTS if upscaler == "latent" else IMAGES
        takes = Handover("hires", what, (width, height), upscaler, _factor(draft.model))
        own = _stand_ins(draft, width, height)
        if draft.adapted:
            own[ip_adapters.PICTURE] = pictures[ip_adapters.PICTURE]
        return Stage(made, takes, own, None)

    def _refined(self, draft: Draft, pictures: Pictures, before: Stage | None, refiner: Refiner) -> Stage:
        previous, asked = before.draft if before else draft, draft.options["refiner"]
        size = before.takes.size if before else _size(draft, pictures)
        masked = "mask_image" in pictures and before is None and not draft.given.get("padding_mask_crop")
        task = "inpaint" if masked and "inpaint" in catalogue().tasks_of(refiner.model.class_name) else "image2image"
        ref = ModelRef(
            refiner.model.model_id,
            refiner.model.revision,
            (refiner.source.precision or "fp32") if self._has_gpu else "fp32",
            str(refiner.model.folder),
        )
        related = _same_space(draft.model, refiner.model)
        _check_taken(asked, refiner.model, task)
        shared = (*_PROMPTS, "num_images_per_prompt", "num_inference_steps", *(_SAME_FAMILY if related else ()))
        pipeline = catalogue().tasks_of(refiner.model.class_name)[task]
        accepted = catalogue().pipelines[pipeline]
        sent = {name: draft.given[name] for name in shared if name in draft.given and name in accepted}
        sent |= {name: asked[name] for name in REFINER_INPUTS if name in asked}
        ensemble = "denoising_end" in previous.accepted and "denoising_start" in accepted
        options = {**draft.options, **{name: asked[name] for name in ("SCHEDULER", "scheduler_args") if name in asked}}
        if "SCHEDULER" in asked and "scheduler_args" not in asked:
            options.pop("scheduler_args", None)
        switch = asked.get("switch_at")
        handed = _hands_latents(previous, pipeline) and related and not draft.given.get("padding_mask_crop")
        if switch is None and "strength" not in asked and ensemble and handed and "denoising_end" not in draft.given:
            switch = _SWITCH_AT
        if switch is not None:
            _check_switch(previous, refiner.model, pipeline, ensemble, related, handed, switch, sent)
            sent |= {"denoising_start": switch, "strength": 1.0}
        else:
            sent.setdefault("strength", _REFINED)
        with about(REFINER, (*REFINER_INPUTS, *(name for name in ("SCHEDULER", "scheduler_args") if name in asked))):
            made = self._draft(draft, refiner.model, ref, sent, size, (), options, task)
        if switch is not None:
            del made.given["strength"]  # which is not looked at then
        takes = Handover("refiner", LATENTS if handed else IMAGES)
        mine = _stand_ins(draft, *(size or (0, 0)))
        if task == "inpaint":
            mine["mask_image"] = pictures["mask_image"]
        return Stage(made, takes, mine, refiner.source)

    def _draft(
        self,
        draft: Draft,
        model: InstalledModel,
        ref: ModelRef,
        sent: dict[str, Any],
        size: tuple[int, int] | None,
        added: Sequence[Any],
        options: dict[str, Any],
        task: str = "image2image",
    ) -> Draft:
        """The draft of a later generation; its picture is not one of the request's."""
        options = {name: value for name, value in options.items() if name not in _FIRST_ONLY}
        options |= {"PIPELINE": AUTO_FOR_TASK[task]}
        if "output" in options:
            options["output"] = [word for word in options["output"] if word != "mask"]
        tasks = catalogue().tasks_of(model.class_name)
        accepted = catalogue().pipelines.get(tasks.get(task, ""), {})
        given = {name: value for name, value in sent.items() if name in accepted or name == ip_adapters.PICTURE}
        if size:
            given |= {name: side for name, side in zip(("width", "height"), size, strict=True) if name in accepted}
        pictures = {"image": "", **({"mask_image": ""} if task == "inpaint" else {})}
        made = draft_of(model, options, {**given, **pictures}, ref, None, added, self._settings)
        for name in pictures:
            del made.given[name]
        return made


def _passes(name: str, draft: Draft) -> bool:
    """Whether a second pass has an input of the first one's."""
    return name not in _OF_THE_FIRST and not draft.accepted[name].is_picture


def _passes_latents(draft: Draft, after: Draft) -> bool:
    return _hands_latents(draft, after.pipeline) and not draft.given.get("padding_mask_crop")


def _hands_latents(before: Draft, pipeline: str) -> bool:
    return before.pipeline in _GIVES_LATENTS and pipeline in _TAKES_LATENTS


def _same_space(one: InstalledModel, other: InstalledModel) -> bool:
    """Whether latents mean the same to two models, as far as their autoencoders' configurations say."""
    ours, theirs = (config_in(model.folder / "vae") for model in (one, other))
    same = all(ours.get(name, default) == theirs.get(name, default) for name, default in _SPACE.items())
    return bool(ours) and bool(theirs) and same and _factor(one) == _factor(other)


def _factor(model: InstalledModel) -> int:
    """Pixels along a side for each latent."""
    channels = config_in(model.folder / "vae").get("block_out_channels")
    return int(2 ** (len(channels) - 1)) if isinstance(channels, list) and channels else 8


def _size(draft: Draft, pictures: Pictures) -> tuple[int, int] | None:
    """Width and height of the first generation's images, about: pipelines round those of pictures down."""
    width, height = draft.given.get("width"), draft.given.get("height")
    if width and height:
        return width, height
    picture = next(each_picture({"image": pictures["image"]}), None) if "image" in pictures else None
    return (picture.width, picture.height) if picture else None


def _larger(draft: Draft, pictures: Pictures, asked: dict[str, Any]) -> tuple[int, int]:
    """Width and height of the second pass."""
    if "width" in asked:
        return asked["width"], asked["height"]
    size = _size(draft, pictures)
    if size is None:
        message = f"How large the images of {draft.pipeline} are is not known beforehand: say width and height."
        raise ApiError("INVALID_INPUTS", message, field=HIRES)
    multiple, scale = draft.model.size_multiple, asked.get("scale", _SCALE)
    width, height = (max(1, round(side * scale / multiple)) * multiple for side in size)
    return width, height


def _stand_ins(draft: Draft, width: int, height: int) -> Pictures:
    """Pictures without pixels for what is handed over; none where their size is not known."""
    if not width:
        return {}
    empty = Picture("RGB", width, height, b"", "")
    return {"image": [empty] * draft.images if draft.images > 1 else empty}


def is_scored(model: InstalledModel) -> bool:
    """Whether a model is told how beautiful its images are to be."""
    return json.loads((model.folder / "model_index.json").read_bytes()).get("requires_aesthetics_score") is True


def _check_taken(asked: dict[str, Any], model: InstalledModel, task: str) -> None:
    """Whether what is said of a refiner means anything to it.

    Raises:
        ApiError: PIPELINE_NOT_SUPPORTED, INVALID_INPUTS.
    """
    pipeline = catalogue().tasks_of(model.class_name)[task]
    accepted = catalogue().pipelines[pipeline]
    if "strength" not in accepted:
        message = f"{model.model_id} runs as {pipeline}, which has no strength: it is no refiner."
        raise ApiError("PIPELINE_NOT_SUPPORTED", message, field=REFINER, requested=model.model_id)
    scored = is_scored(model)
    for name in REFINER_INPUTS:
        if name in asked and (name not in accepted or ("aesthetic" in name and not scored)):
            message = f"{model.model_id} ({pipeline}) has no such input; leave it out."
            raise ApiError("INVALID_INPUTS", message, field=f"{REFINER}.{name}", requested=asked[name])


def _check_switch(
    before: Draft,
    model: InstalledModel,
    pipeline: str,
    ensemble: bool,
    related: bool,
    handed: bool,
    switch: float,
    sent: dict[str, Any],
) -> None:
    """Whether a refiner can take over on the way.

    Raises:
        ApiError: INVALID_INPUTS.
    """
    field, why = f"{REFINER}.switch_at", ""
    if not ensemble:
        why = f"{before.pipeline} and {pipeline} cannot stop and go on in between; SDXL's can."
    elif not related:
        why = f"the latents of {before.model.model_id} mean something else to {model.model_id}: their VAEs differ."
    elif not handed:
        why = f"{before.pipeline} hands no latents over as it is asked to be run here."
    if why:
        message = f"The refiner cannot take over on the way: {why} Send strength instead."
        raise ApiError("INVALID_INPUTS", message, field=field, requested=switch)
    if before.given.get("denoising_end") is not None:
        message = "It says the same as refiner.switch_at; leave it out."
        raise ApiError("INVALID_INPUTS", message, field="modelInputs.denoising_end")
    steps, strength = before.given.get("num_inference_steps") or 1, before.given.get("strength", 1.0)
    if steps * (switch - (1 - strength)) < 1 - 1e-9:
        message = f"Of the {steps} steps that come before, with strength {strength:g}, it leaves none."
        raise ApiError("INVALID_INPUTS", message, field=field, requested=switch)
    own = sent.get("num_inference_steps", steps)
    if own * (1 - switch) < 1 - 1e-9:
        message = f"It leaves the refiner less than one of its {own} steps; ask for more of them, or switch sooner."
        raise ApiError("INVALID_INPUTS", message, field=field, requested=switch)


@contextlib.contextmanager
def about(option: str, known: Iterable[str] = (), otherwise: str = "") -> Iterator[None]:
    """What is said of a later generation is said of the option that asks for it.

    Args:
        option: its field.
        known: what can be said in it.
        otherwise: what is said where its model cannot do that at all.
    """
    try:
        yield
    except ApiError as error:
        where, _, name = (error.field or "").partition(".")
        top = name.partition(".")[0]
        field: str | None = option
        if top in known:
            field = f"{option}.{name}"
        elif where == "modelInputs" and (top in _PROMPTS or top == "num_images_per_prompt"):
            field = error.field  # it is what the first one gets as well
        elif where == "callInputs" and top not in ("PIPELINE", *MODEL):
            field = error.field
        raise ApiError(
            error.code,
            otherwise if otherwise and error.code == "PIPELINE_NOT_SUPPORTED" else error.message,
            field=field,
            requested=error.requested,
            available=error.available,
            retry_after=error.retry_after,
        ) from error
