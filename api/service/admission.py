"""Turns what a client sent into a ``GenerationRequest``, or says exactly what is wrong with it.

Everything here happens before a worker is asked and before a weight is read.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import msgspec

from api.errors import ApiError, nothing_to_offload
from api.models.community import Community, community, is_community
from api.models.description import InstalledModel
from api.models.library import Library
from api.models.refs import SourceRef, read_ref
from api.schema.catalogue import Input, catalogue
from api.schema.generation import (
    WEIGHTS,
    Code,
    GenerationRequest,
    IpAdapter,
    ModelRef,
    Picture,
    Pictures,
    each_picture,
    for_each,
)
from api.schema.transfers import Transfer
from api.service import controlnets, ip_adapters
from api.service import inputs as checks
from api.service.adapters import Adapters, Chosen
from api.service.additions import Added, Additions
from api.service.choices import check_community, check_early, choose_method, choose_pipeline
from api.service.destinations import Destination, check_destinations, choose_destinations
from api.service.fetcher import Fetched, Fetcher
from api.service.options import check_options
from api.service.output import Encoding, check_output, choose_encoding
from api.service.pictures import read_picture
from api.service.prompts import check_syntax, check_weighing
from api.service.safety import choose_safety
from api.service.schedulers import Scheduler, choose_scheduler
from api.settings import Settings

_MAX_DRAWN_SEED = 2**32


class Admitted(NamedTuple):
    """A request that can run, and what is to be known of it.

    Attributes:
        request: for a worker.
        options: its checked ``callInputs``.
        timings: what fetching its model took, milliseconds by phase.
        destinations: where its images go, if not into the answer.
    """

    request: GenerationRequest
    options: dict[str, Any]
    timings: dict[str, int]
    destinations: tuple[Destination, ...] = ()


@dataclass(frozen=True)
class _Draft:
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


class Admission:
    """Validates requests.

    Args:
        settings: defaults and limits.
        library: the models there are.
        fetcher: gets those that are not there.
        has_gpu: a CPU computes in fp32 whatever is asked for, so other precisions mean the same there.
    """

    def __init__(self, settings: Settings, library: Library, fetcher: Fetcher, has_gpu: bool) -> None:
        self._settings = settings
        self._library = library
        self._fetcher = fetcher
        self._additions = Additions(settings, library, fetcher)
        self._has_gpu = has_gpu
        self._adapters = Adapters(settings, library, fetcher)

    def default_refs(self) -> list[SourceRef]:
        """The models to have in memory before the first request.

        Raises:
            ApiError: INVALID_INPUTS: MODEL_ID, MODEL_URL or one of their like cannot be used.
        """
        named = [{"MODEL_ID": name} for name in self._settings.warm_models]
        refs = [read_ref(options, self._settings) for options in [{}, *named]]
        return list({ref.name: ref for ref in refs if ref is not None}.values())

    def model_ref(self, model: InstalledModel, ref: SourceRef) -> ModelRef:
        """What a worker is told to load."""
        return ModelRef(model.model_id, model.revision, self.precision_of(ref), str(model.folder))

    def precision_of(self, ref: SourceRef) -> str:
        """What the weights are computed in."""
        return (ref.precision or "fp32") if self._has_gpu else "fp32"

    async def admit(
        self,
        request_id: str,
        model_inputs: dict[str, Any],
        call_inputs: dict[str, Any],
        on_event: Callable[[Transfer], None] | None = None,
    ) -> Admitted:
        """Validate one request, and wait for its model where that is not here yet.

        Args:
            request_id: what the client and the log know it by.
            model_inputs: the wire's ``modelInputs``.
            call_inputs: the wire's ``callInputs``.
            on_event: called with what happens while the model is fetched; None where nobody reads events.

        Raises:
            ApiError: the first thing that is wrong.
        """
        options = check_options(call_inputs)
        code = await self._community(options)
        if "preview" in options and on_event is None:
            message = "Previews are events, and this answer has none: send streamEvents as well, or a job for later."
            raise ApiError("INVALID_INPUTS", message, field="callInputs.preview")
        ref = self.source_ref(options)
        self._adapters.check(options)
        wanted = self._additions.read(options, ref) + ip_adapters.read(options, self._settings, ref)
        pictures: Pictures = {}
        added: list[Added] = []

        async def check(model: InstalledModel) -> _Draft:
            return await self._checked(model, options, model_inputs, ref, pictures, code, added)

        async def check_added(known: list[Added]) -> None:
            controlnets.check_is_controlnet(known)
            if found is not None and (nets := controlnets.of(known)):
                controlnets.check_fit(found, nets)
            if found is not None and len(known) == len(wanted):
                await self._checked(found, options, model_inputs, ref, pictures, code, known)

        found = self._library.recall(ref) or await asyncio.to_thread(self._library.find, ref)
        fetched = Fetched(found, {}) if found else None
        with contextlib.ExitStack() as held:
            if fetched is None:
                check_early(options, model_inputs, code)
            else:
                held.enter_context(self._fetcher.hold(fetched.model.folder))
            added, took = await self._additions.ensure(wanted, check_added, held, on_event)
            if fetched is None:
                fetched = await self._fetcher.ensure(ref, check, on_event)
                held.enter_context(self._fetcher.hold(fetched.model.folder))
            draft = await check(fetched.model)
            chosen = await self._adapters.choose(options, fetched.model, on_event)
            held.enter_context(self._fetcher.hold(*chosen.folders))
            request = self._complete(request_id, draft, pictures, ref, chosen)
        timings = Counter(took)
        timings.update(chosen.timings)
        timings.update(fetched.timings)
        options = {**options, "callback_steps": draft.callback_steps}
        return Admitted(request, options, dict(timings), draft.destinations)

    async def check(self, model_inputs: dict[str, Any], call_inputs: dict[str, Any]) -> None:
        """Validate a request that is to run later, as far as that goes without fetching anything.

        Where its model is here, all that is left for later is what lies behind the URLs of images.

        Raises:
            ApiError: the first thing that is wrong.
        """
        options = check_options(call_inputs)
        if options.get("streamEvents"):
            message = "A job for later is not streamed to the one who sends it: read GET /jobs/{id}/events."
            raise ApiError("INVALID_INPUTS", message, field="callInputs.streamEvents")
        ref, code = self.source_ref(options), await self._community(options)
        self._adapters.check(options)
        model = self._library.recall(ref) or await asyncio.to_thread(self._library.find, ref)
        if model is None:
            check_early(options, model_inputs, code)
            if not self._fetcher.is_local(ref):
                return
            model = (await self._fetcher.ensure(ref)).model  # no network: it says what there is
        added = await self._added(options, ref)
        if added is None:
            check_early(options, model_inputs, code)
        elif options.get("is_url"):
            self._check(model, options, model_inputs, ref, code, added)
        else:
            await self._checked(model, options, model_inputs, ref, {}, code, added)

    async def plan(
        self, model_inputs: dict[str, Any], call_inputs: dict[str, Any]
    ) -> tuple[SourceRef, GenerationRequest | None]:
        """Validate a request that is not to run, without fetching its model.

        Returns:
            What it asks for; None in place of the request where its model is not here, and all that can be said without
            it is right.

        Raises:
            ApiError: the first thing that is wrong; where nothing is fetched, that the model is not here.
        """
        options = check_options(call_inputs)
        ref, pictures, code = self.source_ref(options), Pictures(), await self._community(options)
        self._adapters.check(options)
        model = self._library.recall(ref) or await asyncio.to_thread(self._library.find, ref)
        if model is None:
            check_early(options, model_inputs, code)
            if not self._fetcher.is_local(ref):
                return ref, None
            model = (await self._fetcher.ensure(ref)).model  # no network: it says what there is
        added = await self._added(options, ref)
        if added is None:
            check_early(options, model_inputs, code)
            return ref, None
        draft = await self._checked(model, options, model_inputs, ref, pictures, code, added)
        return ref, self._complete("", draft, pictures, ref)

    async def _added(self, options: dict[str, Any], ref: SourceRef) -> list[Added] | None:
        """What the request adds to its model, if all of it is here."""
        wanted = self._additions.read(options, ref) + ip_adapters.read(options, self._settings, ref)
        return await self._additions.find(wanted)

    async def _checked(
        self,
        model: InstalledModel,
        options: dict[str, Any],
        model_inputs: dict[str, Any],
        ref: SourceRef,
        pictures: Pictures,
        code: Community | None,
        added: Sequence[Added],
    ) -> _Draft:
        """Everything that can be said of a request with its model's configuration; fills in its pictures."""
        draft = self._check(model, options, model_inputs, ref, code, added)
        await check_destinations(draft.destinations, self._settings)
        if not pictures:  # read once, also where it is checked before the model is fetched and after
            pictures.update(await self._pictures(draft, model_inputs))
        _fill_size(draft, pictures)
        checks.check_size(draft.given, model, self._settings)
        checks.sides(draft.given, pictures, draft.pipeline, self._settings)
        return draft

    def source_ref(self, options: dict[str, Any]) -> SourceRef:
        """What checked ``callInputs`` name, or the default.

        Raises:
            ApiError: NO_MODEL_ID, or what is wrong with the name.
        """
        ref = read_ref(options, self._settings)
        if ref is None:
            raise ApiError(
                "NO_MODEL_ID",
                "No model was named and this server has no default.",
                field="callInputs.MODEL_ID",
                available=self._library.names(),
            )
        return ref

    async def _community(self, options: dict[str, Any]) -> Community | None:
        """The community pipeline that a request names, if it names one."""
        name = options.get("PIPELINE", "")
        if not is_community(name):
            return None
        return await asyncio.to_thread(community, name, self._settings)

    def _check(
        self,
        model: InstalledModel,
        options: dict[str, Any],
        model_inputs: dict[str, Any],
        ref: SourceRef,
        code: Community | None,
        added: Sequence[Added],
    ) -> _Draft:
        """Everything that can be said once the model's configuration is at hand, and those of what is added to it."""
        control, nets = None, controlnets.of(added)
        if code:
            check_community(model, code, added)
            requested, pipeline = code.name, code.code.class_name
        elif nets:
            control = controlnets.control(options, model_inputs, model, nets)
            requested, pipeline, model_inputs = control.requested, control.pipeline, control.inputs
        else:
            requested, pipeline = choose_pipeline(options, model_inputs, model, self._settings.pipeline)
        method = choose_method(options, code.name if code else pipeline, code)
        scheduler = choose_scheduler(options, model, self._settings.scheduler)
        safety_checker = choose_safety(options, model, self._settings.safety_checker)
        encoding = choose_encoding(options)
        adapted = ip_adapters.check(model_inputs, model, pipeline, added)
        if adapted:
            model_inputs = adapted.inputs
        accepted = code.methods[method] if code else catalogue().pipelines[pipeline]
        if control:
            accepted = {name: spec for name, spec in accepted.items() if name != control.image}
        output = check_output(options, accepted, pipeline)
        sent = checks.rename_aliases(model_inputs, accepted)
        given = checks.check_inputs(sent, accepted, pipeline)
        defaults = {name: checks.default_of(name, spec, self._settings) for name, spec in accepted.items()}
        given = {**{name: value for name, value in defaults.items() if value is not None}, **given}
        checks.check_values(given, accepted, model, self._settings)
        prompt_syntax = check_syntax(options, given)
        check_weighing(prompt_syntax, options, pipeline, accepted)
        images = checks.count_images(given, self._settings)
        seed = checks.check_seed(sent.get("seed"), images, secrets.randbelow(_MAX_DRAWN_SEED))
        job_id = secrets.token_hex(8)
        callback_steps = sent.get("callback_steps")
        if callback_steps is not None and (not isinstance(callback_steps, int) or callback_steps < 1):
            raise ApiError("INVALID_INPUTS", "Must be a whole number, at least 1.", field="modelInputs.callback_steps")
        additions = tuple(one.addition for one in added if one in nets or one.wanted.name == ip_adapters.ENCODER)
        return _Draft(
            options=options,
            model=model,
            ref=msgspec.structs.replace(self.model_ref(model, ref), additions=additions),
            requested=requested,
            pipeline=pipeline,
            scheduler=scheduler,
            encoding=encoding,
            output=output,
            safety_checker=safety_checker,
            id=job_id,
            destinations=choose_destinations(options, images, encoding.format, job_id, self._settings),
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
        )

    def _complete(
        self,
        request_id: str,
        draft: _Draft,
        pictures: Pictures,
        source: SourceRef,
        adapters: Chosen | None = None,
    ) -> GenerationRequest:
        options, given, ref, seed = draft.options, draft.given, draft.ref, draft.seed
        plain = {name: value for name, value in given.items() if not draft.accepted[name].is_picture}
        looking = draft.adapted.adapters if draft.adapted else ()
        repeat = {**plain, "seed": seed, **_named(pictures, looking)}
        meta = {
            "MODEL_ID": ref.model_id,
            # what lies at a URL has no revision that could be asked for; source_version says what it was
            "MODEL_REVISION": ref.revision if source.is_plain else source.revision,
            "MODEL_PRECISION": ref.precision,
            "PIPELINE": draft.requested,
            "SCHEDULER": draft.scheduler.name,
            **_told(draft.scheduler),
            "pipeline": draft.pipeline,
            "modelInputs": repeat,
            "image_format": draft.encoding.format,
            "image_quality": draft.encoding.quality,
            "safety_checker": draft.safety_checker,
            **(adapters.meta if adapters else {}),
        }
        for name, place in (("MODEL_URL", source.url), ("CHECKPOINT_URL", source.checkpoint)):
            if place:
                meta[name] = str(place)
        if source.config and not source.config.startswith(("http:", "https:")):
            meta["CHECKPOINT_CONFIG_URL"] = source.config
        meta |= controlnets.again(draft.added) | ip_adapters.again(draft.added)
        if draft.model.source:
            meta["source"] = draft.model.source
            meta["source_version"] = ref.revision
        if draft.encoding.lossless:
            meta["lossless"] = True
        if draft.method != "__call__":
            meta["custom_pipeline_method"] = draft.method
        if draft.code:
            meta["pipeline_code"] = f"sha256:{draft.code.sha256}"
        low_vram = bool(options.get("low_vram"))
        if low_vram:
            meta["low_vram"] = True
        if draft.prompt_syntax != "plain":
            meta["prompt_syntax"] = draft.prompt_syntax
        if "startRequestId" in options:
            meta["startRequestId"] = options["startRequestId"]
        wants_xformers = options.get("xformers_memory_efficient_attention", self._settings.attention == "xformers")
        return GenerationRequest(
            id=draft.id,
            request_id=request_id,
            model=ref,
            pipeline=draft.pipeline,
            scheduler=draft.scheduler.name,
            inputs=plain,
            pictures=pictures,
            seed=seed,
            images=draft.images,
            image_format=draft.encoding.format,
            image_quality=draft.encoding.quality,
            attention="xformers" if wants_xformers else "sdpa",
            safety_checker=draft.safety_checker,
            safety_required=self._settings.safety_checker == "required",
            meta=meta,
            preview=options.get("preview"),
            offload=self._offload(options, low_vram),
            low_vram=low_vram,
            scheduler_args=draft.scheduler.args,
            loras=adapters.loras if adapters else (),
            inversions=adapters.inversions if adapters else (),
            prompt_syntax=draft.prompt_syntax,
            lossless=draft.encoding.lossless,
            image_metadata=options.get("image_metadata", True),
            output=draft.output,
            method=draft.method,
            code=draft.code,
            ip_adapters=looking,
        )

    def _offload(self, options: dict[str, Any], low_vram: bool) -> str:
        asked: str | None = options.get("OFFLOAD")
        if self._has_gpu:
            return asked or ("auto" if low_vram and self._settings.offload == "none" else self._settings.offload)
        if asked in WEIGHTS:
            raise nothing_to_offload(asked)
        return asked or ("none" if self._settings.offload == "none" and not low_vram else "auto")

    async def _pictures(self, draft: _Draft, model_inputs: dict[str, Any]) -> Pictures:
        given, is_url = draft.given, bool(draft.options.get("is_url"))
        sent = {name: given[name] for name, spec in draft.accepted.items() if spec.is_picture and name in given}
        if draft.controls:
            sent[controlnets.PICTURE] = draft.controls
        if draft.adapted:
            sent[ip_adapters.PICTURE] = draft.adapted.pictures

        async def one(name: str, value: str, number: str = "") -> Picture:
            old = next((o for o, new in checks.ALIASES.items() if new == name and o in model_inputs), name)
            mode = "L" if name in checks.MASKS else "RGB"
            return await read_picture(value, f"modelInputs.{old}{number}", mode, is_url, self._settings)

        async def every(name: str, value: str | list[str]) -> Picture | list[Picture]:
            if isinstance(value, str):
                return await one(name, value)
            told = len(value) > 1 and name != ip_adapters.PICTURE  # which may have been sent as lists in a list
            numbers = [f"[{number}]" if told else "" for number in range(len(value))]
            return await asyncio.gather(*(one(name, item, number) for item, number in zip(value, numbers, strict=True)))

        found = await asyncio.gather(*(every(name, value) for name, value in sent.items()))
        return dict(zip(sent, found, strict=True))


def _told(scheduler: Scheduler) -> dict[str, Any]:
    """What ``$meta`` says of a scheduler beyond its class."""
    told = {"scheduler_args": scheduler.args, "scheduler_alias": scheduler.alias, "scheduler_note": scheduler.note}
    return {name: value for name, value in told.items() if value}


def _named(pictures: Pictures, looking: Sequence[IpAdapter]) -> dict[str, Any]:
    """Pictures as ``$meta`` tells them."""
    named: dict[str, Any] = {}
    for name, found in pictures.items():
        each = [f"sha256:{picture.sha256}" for picture in each_picture({name: found})]
        named[name] = each if isinstance(found, list) else each[0]
    if len(looking) > 1:
        named[ip_adapters.PICTURE] = for_each(looking, named[ip_adapters.PICTURE])
    return named


def _fill_size(draft: _Draft, pictures: Pictures) -> None:
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
