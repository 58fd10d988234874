"""What a request of several generations gets: its second pass (hires fix), its refiner, or what is wrong with them."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from typing import Any

import msgspec

from api.errors import ApiError
from api.models.description import InstalledModel
from api.models.library import Library
from api.models.refs import SourceRef, read_ref
from api.schema.catalogue import catalogue
from api.schema.generation import GenerationRequest, Pictures, size_of
from api.schema.transfers import Transfer
from api.service.adapters import Chosen
from api.service.drafts import Draft
from api.service.fetcher import Fetcher
from api.service.flow_options import HIRES_KEYS, MODEL, REFINER, REFINER_INPUTS
from api.service.flow_stages import Refiner, Stage, Stages, about, is_scored
from api.service.requests import complete
from api.settings import Settings

Check = Callable[[Refiner | None], Awaitable[None]]


class Flows:
    """Finds, fetches and checks what comes after a request's first generation.

    Args:
        settings: defaults and limits.
        library: what is here.
        fetcher: gets what is not.
        has_gpu: as ``Admission`` has it.
    """

    def __init__(self, settings: Settings, library: Library, fetcher: Fetcher, has_gpu: bool) -> None:
        self._settings = settings
        self._library = library
        self._fetcher = fetcher
        self._has_gpu = has_gpu
        self._after = Stages(settings, has_gpu)

    def source(self, options: dict[str, Any], ref: SourceRef) -> SourceRef | None:
        """What names the refiner; None: there is none.

        Args:
            options: checked ``callInputs``.
            ref: of the model, whose precision is the refiner's where it says none.

        Raises:
            ApiError: what is wrong with its name.
        """
        asked = options.get("refiner")
        if asked is None:
            return None
        named = {name: asked[name] for name in MODEL if name in asked}
        if ref.precision:
            named.setdefault("MODEL_PRECISION", ref.precision)
        with about(REFINER, MODEL):
            return read_ref(named, self._settings)

    async def ensure(
        self,
        source: SourceRef | None,
        check: Check,
        held: contextlib.ExitStack,
        on_event: Callable[[Transfer], None] | None,
    ) -> tuple[Refiner | None, dict[str, int]]:
        """Wait until the refiner is here.

        Args:
            source: names it; None: there is none.
            check: awaited where it is not here: with None before it is asked for, and with the refiner before its
                weights are; raises what is wrong with the request.
            held: keeps it on the volume until it is closed.
            on_event: called with what happens meanwhile.

        Returns:
            The refiner, and milliseconds by phase.

        Raises:
            ApiError: what ``check`` raises; what its source says; PIPELINE_NOT_SUPPORTED: it makes no images of images.
        """
        if source is None:
            return None, {}
        model, took = await self._here(source), dict[str, int]()

        async def checked(model: InstalledModel) -> None:
            _check_repaints(model)
            await check(Refiner(source, model))

        if model is None:
            await check(None)
        with about(REFINER, MODEL):
            if model is None:
                fetched = await self._fetcher.ensure(source, checked, on_event)
                model, took = fetched.model, fetched.timings
            _check_repaints(model)
        held.enter_context(self._fetcher.hold(model.folder))
        return Refiner(source, model), took

    async def find(self, source: SourceRef) -> Refiner | None:
        """The refiner, if it is here; nothing is fetched.

        Raises:
            ApiError: it is neither here nor anywhere that is asked; PIPELINE_NOT_SUPPORTED.
        """
        model = await self._here(source)
        with about(REFINER, MODEL):
            if model is None:
                if not self._fetcher.is_local(source):
                    return None
                model = (await self._fetcher.ensure(source)).model
            _check_repaints(model)
        return Refiner(source, model)

    def check(
        self, draft: Draft, pictures: Pictures, model_inputs: dict[str, Any], refiner: Refiner | None
    ) -> tuple[int, int] | None:
        """Say what is wrong with what comes after the first generation.

        Args:
            draft: of the first, with its size.
            pictures: its pictures.
            model_inputs: as they were sent.
            refiner: None: there is none, or it is not known yet.

        Returns:
            Width and height of the images that the last one gives, if they are known.

        Raises:
            ApiError: the first thing that is wrong.
        """
        _, stages = self._after.of(draft, pictures, model_inputs, refiner)
        if not stages:
            return size_of(draft.given, pictures)
        return stages[-1].takes.size or size_of(stages[-1].draft.given, stages[-1].pictures)

    def joined(
        self,
        request: GenerationRequest,
        draft: Draft,
        model_inputs: dict[str, Any],
        refiner: Refiner | None,
        source: SourceRef,
        adapters: Chosen | None,
    ) -> GenerationRequest:
        """A request with the generations that follow the first.

        Args:
            request: the first.
            draft: it was made of.
            model_inputs: as they were sent.
            refiner: None: there is none.
            source: what names the model.
            adapters: of the first; a second pass by the same model has them too.

        Raises:
            ApiError: what is wrong with it.
        """
        first, stages = self._after.of(draft, request.pictures, model_inputs, refiner)
        if not stages:
            return request
        then, meta = list[GenerationRequest](), dict(request.meta)
        for stage in stages:
            own = adapters if stage.source is None else None
            named = stage.source or source
            made = complete(request.request_id, stage.draft, stage.pictures, named, own, self._settings, self._has_gpu)
            meta[stage.takes.name] = _again(stage, made)
            then.append(made)
        last = then[-1]
        whole = [
            msgspec.structs.replace(
                made,
                id=request.id,
                seed=request.seed,
                meta=meta,
                takes=stages[number - 1].takes if number else None,
                inputs={**made.inputs, **({} if number else first)},
                # a safety checker sees the images that are answered, and no others
                safety_checker=made is last and made.safety_checker,
                safety_required=made is last and made.safety_required,
                output=tuple(
                    word
                    for word in request.output
                    if (word == "mask" and not number) or (word != "mask" and made is last)
                ),
            )
            for number, made in enumerate([request, *then])
        ]
        return msgspec.structs.replace(whole[0], then=tuple(whole[1:]))

    async def _here(self, ref: SourceRef) -> InstalledModel | None:
        return self._library.recall(ref) or await asyncio.to_thread(self._library.find, ref)


def _check_repaints(model: InstalledModel) -> None:
    if "image2image" not in catalogue().tasks_of(model.class_name):
        message = f"{model.model_id} is a {model.class_name}, which makes no images of images, as a refiner does."
        raise ApiError("PIPELINE_NOT_SUPPORTED", message, field=REFINER, requested=model.model_id)


def _again(stage: Stage, made: GenerationRequest) -> dict[str, Any]:
    """What ``$meta`` says of a generation: it can be sent again as that option."""
    names = REFINER_INPUTS if is_scored(stage.draft.model) else (n for n in REFINER_INPUTS if "aesthetic" not in n)
    inputs = {name: made.inputs[name] for name in names if name in made.inputs}
    if stage.source is None:
        width, height = stage.takes.size or (0, 0)
        inputs = {name: value for name, value in inputs.items() if name in HIRES_KEYS}
        return {"width": width, "height": height, **inputs, "upscaler": stage.takes.upscaler}
    switch = made.inputs.get("denoising_start")
    weights = {name: made.meta[name] for name in MODEL if name in made.meta}
    if stage.source.repo != stage.source.model_id:
        weights["HF_MODEL_ID"] = stage.source.repo
    return {
        **{name: value for name, value in weights.items() if value},
        **({"switch_at": switch} if switch is not None else {}),
        **inputs,
        "SCHEDULER": made.scheduler,
        **({"scheduler_args": made.scheduler_args} if made.scheduler_args else {}),
    }
