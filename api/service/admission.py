"""Turns what a client sent into a ``GenerationRequest``, or says exactly what is wrong with it.

Everything here happens before a worker is asked and before a weight is read.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from api.errors import ApiError
from api.models.community import Community, community, is_community
from api.models.description import InstalledModel
from api.models.library import Library
from api.models.refs import SourceRef, read_ref
from api.schema.generation import (
    GenerationRequest,
    ModelRef,
    Picture,
    Pictures,
)
from api.schema.transfers import Transfer
from api.service import controlnets, ip_adapters
from api.service import inputs as checks
from api.service.adapters import Adapters
from api.service.additions import Added, Additions
from api.service.choices import check_early
from api.service.destinations import Destination, check_destinations
from api.service.drafts import Draft, draft_of, fill_size
from api.service.fetcher import Fetched, Fetcher
from api.service.flow_stages import Refiner
from api.service.flows import Flows
from api.service.options import check_options
from api.service.pictures import read_picture
from api.service.quantize import choose_quantize
from api.service.requests import complete
from api.service.upscaling import Upscaling, with_upscale
from api.service.webhooks_delivery import check_receiver
from api.settings import Settings


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
        self._flows = Flows(settings, library, fetcher, has_gpu)
        self._upscaling = Upscaling(settings, self._adapters, has_gpu)

    def default_refs(self) -> list[SourceRef]:
        """The models to have in memory before the first request.

        Raises:
            ApiError: INVALID_INPUTS: MODEL_ID, MODEL_URL or one of their like cannot be used.
        """
        named = [{"MODEL_ID": name} for name in self._settings.warm_models]
        refs = [read_ref(options, self._settings) for options in [{}, *named]]
        return list({ref.name: ref for ref in refs if ref is not None}.values())

    def model_ref(self, model: InstalledModel, ref: SourceRef, options: dict[str, Any] | None = None) -> ModelRef:
        """What a worker is told to load, where ``callInputs`` say no more than ``options``."""
        quantize = choose_quantize(options or {}, self._settings)
        return ModelRef(model.model_id, model.revision, self.precision_of(ref), str(model.folder), quantize=quantize)

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
        if "SEND_URL" in options:
            await check_receiver(options["SEND_URL"], "callInputs.SEND_URL", self._settings)
        if (extra := self._upscaling.asked(options, model_inputs)) is not None:
            upscaled = await self._upscaling.admit(request_id, options, model_inputs, extra, on_event)
            return Admitted(upscaled[0], {**options, "callback_steps": None}, *upscaled[1:])
        self._upscaling.check(options)
        code = await self._community(options)
        if "preview" in options and on_event is None:
            message = "Previews are events, and this answer has none: send streamEvents as well, or a job for later."
            raise ApiError("INVALID_INPUTS", message, field="callInputs.preview")
        ref = self.source_ref(options)
        self._adapters.check(options)
        wanted = self._additions.read(options, ref) + ip_adapters.read(options, self._settings, ref)
        second = self._flows.source(options, ref)
        pictures: Pictures = {}
        added: list[Added] = []
        refiner: Refiner | None = None

        async def check(model: InstalledModel) -> Draft:
            return await self._checked(model, options, model_inputs, ref, pictures, code, added, refiner)

        async def check_added(known: list[Added]) -> None:
            controlnets.check_is_controlnet(known)
            if found is not None and (nets := controlnets.of(known)):
                controlnets.check_fit(found, nets)
            if found is not None and len(known) == len(wanted):
                await self._checked(found, options, model_inputs, ref, pictures, code, known)

        async def check_refined(known: Refiner | None) -> None:
            if found is not None:
                await self._checked(found, options, model_inputs, ref, pictures, code, added, known)

        found = self._library.recall(ref) or await asyncio.to_thread(self._library.find, ref)
        fetched = Fetched(found, {}) if found else None
        with contextlib.ExitStack() as held:
            if fetched is None:
                check_early(options, model_inputs, code)
            else:
                held.enter_context(self._fetcher.hold(fetched.model.folder))
            added, took = await self._additions.ensure(wanted, check_added, held, on_event)
            refiner, took_refiner = await self._flows.ensure(second, check_refined, held, on_event)
            if fetched is None:
                fetched = await self._fetcher.ensure(ref, check, on_event)
                held.enter_context(self._fetcher.hold(fetched.model.folder))
            draft = await check(fetched.model)
            chosen = await self._adapters.choose(options, fetched.model, held, on_event)
            upscaler = await self._upscaling.ready(options, held, on_event)
            request = complete(request_id, draft, pictures, ref, chosen, self._settings, self._has_gpu)
            request = self._flows.joined(request, draft, model_inputs, refiner, ref, chosen)
            request = with_upscale(request, upscaler)
        timings = Counter(took)
        for more in (took_refiner, chosen.timings, upscaler.timings if upscaler else {}, fetched.timings):
            timings.update(more)
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
        if "SEND_URL" in options:
            await check_receiver(options["SEND_URL"], "callInputs.SEND_URL", self._settings)
        if (extra := self._upscaling.asked(options, model_inputs)) is not None:
            await self._upscaling.check_picture(options, model_inputs, extra)
            return
        self._upscaling.check(options)
        ref, code = self.source_ref(options), await self._community(options)
        self._adapters.check(options)
        model = self._library.recall(ref) or await asyncio.to_thread(self._library.find, ref)
        if model is None:
            check_early(options, model_inputs, code)
            if not self._fetcher.is_local(ref):
                return
            model = (await self._fetcher.ensure(ref)).model  # no network: it says what there is
        added = await self._added(options, ref)
        second = self._flows.source(options, ref)
        refiner = await self._flows.find(second) if second else None
        if added is None:
            check_early(options, model_inputs, code)
        elif options.get("is_url"):
            draft_of(model, options, model_inputs, self.model_ref(model, ref), code, added, self._settings)
        else:
            await self._checked(model, options, model_inputs, ref, {}, code, added, refiner)

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
        if self._upscaling.asked(options, model_inputs) is not None:
            message = "A plan is made of a generation; an upscaler takes its pictures in pieces, and needs none."
            raise ApiError("NOT_SUPPORTED", message, field="callInputs.use_extra", requested=options["use_extra"])
        self._upscaling.check(options)
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
        second = self._flows.source(options, ref)
        refiner = await self._flows.find(second) if second else None
        draft = await self._checked(model, options, model_inputs, ref, pictures, code, added, refiner)
        if second and refiner is None:
            return second, None
        request = complete("", draft, pictures, ref, None, self._settings, self._has_gpu)
        return ref, self._flows.joined(request, draft, model_inputs, refiner, ref, None)

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
        refiner: Refiner | None = None,
    ) -> Draft:
        """Everything that can be said of a request with its model's configuration; fills in its pictures."""
        draft = draft_of(model, options, model_inputs, self.model_ref(model, ref), code, added, self._settings)
        await check_destinations(draft.destinations, self._settings)
        if not pictures:  # read once, also where it is checked before the model is fetched and after
            pictures.update(await self._pictures(draft, model_inputs))
        fill_size(draft, pictures)
        checks.check_size(draft.given, model, self._settings)
        checks.sides(draft.given, pictures, draft.pipeline, self._settings)
        self._upscaling.check_size(options, self._flows.check(draft, pictures, model_inputs, refiner))
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

    async def _pictures(self, draft: Draft, model_inputs: dict[str, Any]) -> Pictures:
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
