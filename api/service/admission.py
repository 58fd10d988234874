"""Turns what a client sent into a ``GenerationRequest``, or says exactly what is wrong with it.

Everything here happens before a worker is asked and before a weight is read.
"""

from __future__ import annotations

import asyncio
import secrets
from typing import Any

from api.errors import ApiError
from api.models.library import InstalledModel, Library
from api.schema.catalogue import AUTO, AUTO_FOR_TASK, Input, catalogue, nearest
from api.schema.generation import GenerationRequest, ModelRef, Picture
from api.service import inputs as checks
from api.service.options import check_options
from api.service.pictures import read_picture
from api.settings import Settings

PRECISIONS = ("fp32", "fp16", "bf16")
FORMATS = ("PNG", "JPEG", "WEBP")
_MAX_DRAWN_SEED = 2**32


class Admission:
    """Validates requests.

    Args:
        settings: defaults and limits.
        library: the models there are.
        has_gpu: a CPU computes in fp32 whatever is asked for, so other precisions mean the same there.
    """

    def __init__(self, settings: Settings, library: Library, has_gpu: bool) -> None:
        self._settings = settings
        self._library = library
        self._has_gpu = has_gpu

    def default_refs(self) -> list[ModelRef]:
        """The models to have in memory before the first request."""
        names = [name for name in (self._settings.model_id, *self._settings.warm_models) if name]
        return [self._ref(self._library.find(name, "MODEL_ID"), {}) for name in dict.fromkeys(names)]

    async def admit(
        self, request_id: str, model_inputs: dict[str, Any], call_inputs: dict[str, Any]
    ) -> tuple[GenerationRequest, dict[str, Any]]:
        """Validate one request.

        Args:
            request_id: what the client and the log know it by.
            model_inputs: the wire's ``modelInputs``.
            call_inputs: the wire's ``callInputs``.

        Returns:
            The request and its checked options.

        Raises:
            ApiError: the first thing that is wrong.
        """
        options = check_options(call_inputs)
        if self._library.has_read(options.get("MODEL_ID") or self._settings.model_id):
            model = self._model(options)
        else:
            model = await asyncio.to_thread(self._model, options)
        requested, pipeline = self._pipeline(options, model_inputs, model)
        scheduler = self._scheduler(options, model)
        image_format, quality = _image_format(options)
        accepted = catalogue().pipelines[pipeline]
        sent = checks.rename_aliases(model_inputs, accepted)
        given = checks.check_inputs(sent, accepted, pipeline)
        given = {**{name: spec.default for name, spec in accepted.items() if spec.default is not None}, **given}
        checks.check_values(given, accepted, model, self._settings)
        images = checks.count_images(given, self._settings)
        seed = checks.check_seed(sent.get("seed"), images, secrets.randbelow(_MAX_DRAWN_SEED))
        callback_steps = sent.get("callback_steps")
        if callback_steps is not None and (not isinstance(callback_steps, int) or callback_steps < 1):
            raise ApiError("INVALID_INPUTS", "Must be a whole number, at least 1.", field="modelInputs.callback_steps")
        pictures = await self._pictures(given, accepted, bool(options.get("is_url")), model_inputs)
        _fill_size(given, accepted, model, pictures.get("image"))
        checks.check_size(given, model, self._settings)
        plain = {name: value for name, value in given.items() if name not in checks.IMAGES}
        ref = self._ref(model, options)
        repeat = {**plain, "seed": seed, **{name: f"sha256:{picture.sha256}" for name, picture in pictures.items()}}
        meta = {
            "MODEL_ID": ref.model_id,
            "MODEL_REVISION": ref.revision,
            "MODEL_PRECISION": ref.precision,
            "PIPELINE": requested,
            "SCHEDULER": scheduler,
            "pipeline": pipeline,
            "modelInputs": repeat,
            "image_format": image_format,
            "image_quality": quality,
            "safety_checker": options.get("safety_checker", True),
        }
        if "startRequestId" in options:
            meta["startRequestId"] = options["startRequestId"]
        wants_xformers = options.get("xformers_memory_efficient_attention", self._settings.attention == "xformers")
        request = GenerationRequest(
            id=secrets.token_hex(8),
            request_id=request_id,
            model=ref,
            pipeline=pipeline,
            scheduler=scheduler,
            inputs=plain,
            pictures=pictures,
            seed=seed,
            images=images,
            image_format=image_format,
            image_quality=quality,
            attention="xformers" if wants_xformers else "sdpa",
            safety_checker=options.get("safety_checker", True),
            meta=meta,
        )
        return request, {**options, "callback_steps": callback_steps}

    def _model(self, options: dict[str, Any]) -> InstalledModel:
        named = options.get("MODEL_ID")
        model_id = named or self._settings.model_id
        if not model_id:
            raise ApiError(
                "NO_MODEL_ID",
                "No model was named and this server has no default.",
                field="callInputs.MODEL_ID",
                available=self._library.names(),
            )
        model = self._library.find(model_id)
        revision = options.get("MODEL_REVISION") or ("" if named else self._settings.model_revision)
        if revision and revision != model.revision:
            raise ApiError(
                "MODEL_NOT_FOUND",
                f'"{model_id}" is installed here in another revision.',
                field="callInputs.MODEL_REVISION",
                requested=revision,
                available=[model.revision],
            )
        return model

    def _ref(self, model: InstalledModel, options: dict[str, Any]) -> ModelRef:
        named = options.get("MODEL_PRECISION")
        if named is not None and named not in PRECISIONS:
            raise ApiError(
                "INVALID_INPUTS",
                "Not a precision.",
                field="callInputs.MODEL_PRECISION",
                requested=named,
                available=list(PRECISIONS),
            )
        precision = (named or self._settings.model_precision or "fp32") if self._has_gpu else "fp32"
        return ModelRef(model.model_id, model.revision, precision, str(model.folder))

    def _pipeline(
        self, options: dict[str, Any], model_inputs: dict[str, Any], model: InstalledModel
    ) -> tuple[str, str]:
        """What to call the pipeline in ``$meta``, and its class."""
        tasks = catalogue().tasks_of(model.class_name)
        named = options.get("PIPELINE")
        default = self._settings.pipeline
        if (named or default) in ("ALL", "AutoPipelineForText2Image") and not (named and named != "ALL"):
            # nothing was asked for: what the request holds decides
            has_image = any(model_inputs.get(name) for name in ("image", "init_image", "input_image"))
            task = "inpaint" if model_inputs.get("mask_image") else "image2image" if has_image else "text2image"
            named = AUTO_FOR_TASK[task]
        named = named or default
        allowed = [*(auto for auto, task in AUTO.items() if task in tasks), *tasks.values()]
        if named in AUTO and AUTO[named] in tasks:
            return named, tasks[AUTO[named]]
        if named in tasks.values():
            return named, named
        if named not in AUTO and named not in catalogue().pipeline_names:
            message = f"diffusers {catalogue().diffusers} has no such pipeline.{nearest(named, allowed)}"
            raise ApiError("NO_SUCH_PIPELINE", message, field="callInputs.PIPELINE", requested=named, available=allowed)
        raise ApiError(
            "PIPELINE_NOT_SUPPORTED",
            f"{model.model_id} is a {model.class_name}; {named} cannot be built from it.",
            field="callInputs.PIPELINE",
            requested=named,
            available=allowed,
        )

    def _scheduler(self, options: dict[str, Any], model: InstalledModel) -> str:
        known = catalogue().schedulers
        compatible = [name for name in known.get(model.scheduler, []) if known.get(name)] or [model.scheduler]
        named = options.get("SCHEDULER")
        if named is None:
            return self._settings.scheduler if self._settings.scheduler in compatible else model.scheduler
        if named in compatible:
            return str(named)
        if named not in known:
            message = f"diffusers {catalogue().diffusers} has no such scheduler.{nearest(named, compatible)}"
            raise ApiError(
                "NO_SUCH_SCHEDULER", message, field="callInputs.SCHEDULER", requested=named, available=compatible
            )
        fits = f"cannot take over the settings of {model.scheduler}, which {model.model_id} was saved with"
        why = fits if known[named] else "needs a library that is not installed"
        raise ApiError(
            "INVALID_SCHEDULER",
            f"{named} {why}.",
            field="callInputs.SCHEDULER",
            requested=named,
            available=compatible,
        )

    async def _pictures(
        self, given: dict[str, Any], accepted: dict[str, Input], is_url: bool, model_inputs: dict[str, Any]
    ) -> dict[str, Picture]:
        names = [name for name in accepted if name in checks.IMAGES]
        for name in names:
            if given.get(name) is None:
                raise ApiError("MISSING_INPUT", "This pipeline needs an image.", field=f"modelInputs.{name}")

        async def one(name: str) -> Picture:
            old = next((o for o, new in checks.ALIASES.items() if new == name and o in model_inputs), name)
            mode = "L" if name == "mask_image" else "RGB"
            return await read_picture(given[name], f"modelInputs.{old}", mode, is_url, self._settings)

        return dict(zip(names, await asyncio.gather(*map(one, names)), strict=True))


def _image_format(options: dict[str, Any]) -> tuple[str, int]:
    name = str(options.get("image_format", "PNG")).upper().replace("JPG", "JPEG")
    if name not in FORMATS:
        raise ApiError(
            "INVALID_INPUTS",
            "Not an image format that this server writes.",
            field="callInputs.image_format",
            requested=options["image_format"],
            available=list(FORMATS),
        )
    quality = options.get("image_quality", 95)
    if not 1 <= quality <= 100:
        raise ApiError("INVALID_INPUTS", "Must be 1-100.", field="callInputs.image_quality", requested=quality)
    return name, quality


def _fill_size(
    given: dict[str, Any], accepted: dict[str, Input], model: InstalledModel, picture: Picture | None
) -> None:
    """Width and height where none were sent: the picture's, else the model's own.

    Diffusers would squash a picture into the model's own size.
    """
    multiple = model.size_multiple
    for name, side in (("width", picture and picture.width), ("height", picture and picture.height)):
        if name in accepted and given.get(name) is None:
            fitting = max(multiple, side // multiple * multiple) if side else model.default_size
            if fitting:
                given[name] = fitting
