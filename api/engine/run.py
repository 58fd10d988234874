"""One run of one generation: a leased model, a pipeline of the job's own over views of it, its images."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch

from api.engine import layout, lossy
from api.engine.adapters import Adapters, without_scale
from api.engine.attempts import Job, Ran
from api.engine.attention import components_with
from api.engine.calling import AfterStep, call, images_of, shape_of, to_uint8
from api.engine.calls import Cancelled, Ticket
from api.engine.compiled.blocks import Blocks, NotPrepared, choose
from api.engine.compiled.graphs import Graphs
from api.engine.controlnets import picture_arguments
from api.engine.device import Device
from api.engine.embeddings import Embeddings
from api.engine.executor import Executor
from api.engine.extras import Extras
from api.engine.flows import empty, pictures_of, resumed, states
from api.engine.ip_adapters import ip_arguments, with_ip_adapters
from api.engine.loader import LoadedModel
from api.engine.pipelines import make_pipeline
from api.engine.placement import placed
from api.engine.preview import Previews
from api.engine.prompts import understand
from api.engine.refusals import refused_inputs
from api.engine.schedulers import Generators, refused_by
from api.engine.step_cache import StepCaching
from api.engine.tally import Tally
from api.engine.truncation import cut_off
from api.engine.views import view
from api.errors import ApiError
from api.schema.attention import LOSSY
from api.schema.generation import GenerationRequest


class Runner:
    """Runs generations on one device; for several threads at once.

    Args:
        device: that they run on.
        executor: makes their module calls.
        tally: counts their steps.
        attention: the kernels of requests for ``auto`` ones, by dtype.
        adapters: LoRAs and textual inversions.
        embeddings: answers calls of text encoders that were made before.
        blocks: compiled ones; None: none.
        graphs: recorded calls; None: none.
    """

    def __init__(
        self,
        device: Device,
        executor: Executor,
        tally: Tally,
        attention: Mapping[torch.dtype, str],
        adapters: Adapters,
        embeddings: Embeddings,
        blocks: Blocks | None,
        graphs: Graphs | None,
    ) -> None:
        self._device = device
        self._executor = executor
        self._tally = tally
        self._attention = attention
        self._adapters = adapters
        self._embeddings = embeddings
        self._blocks = blocks
        self._graphs = graphs

    def run(self, model: LoadedModel, job: Job, ticket: Ticket, placement: str) -> Ran:
        """Run a job's request, in the thread of the caller.

        Args:
            model: leased.
            job: of one generation.
            ticket: of the executor, for its calls.
            placement: from ``placement.rungs``.

        Raises:
            Cancelled: the job is to stop.
            ApiError: what is wrong with the request.
            torch.OutOfMemoryError: memory does not suffice.
        """
        if self._blocks is None:
            return self._run(model, job, ticket, placement)
        return self._blocks.run(self._run, model, job, ticket, placement)

    def _run(self, model: LoadedModel, job: Job, ticket: Ticket, placement: str) -> Ran:
        request = job.request
        with self._executor.job(ticket), torch.no_grad(), StepCaching(request.step_cache) as stepping:
            parts, told, used, code = self._components(model, job, placement)
            parts, told = stepping.applied(parts), {**told, **lossy.told_of(model, request, used)}
            generator = resumed(make_generators(request.seed), job.random)
            seed, known = first_seed(request.seed), self._embeddings
            seen = {name: view(part, self._executor, ticket, seed, known) for name, part in parts.items()}
            pipe = make_pipeline(model, seen, request, generator)
            if request.prompt_syntax != "plain":
                understand(pipe, request.prompt_syntax)
            if request.safety_required and getattr(pipe, "safety_checker", None) is None:
                raise _unsafe(request)
            extras = Extras(pipe, request)
            previews = _previews(model, pipe, job)
            out = _called(model, job, pipe, generator, _after_step(job, self._tally, extras, previews))
            latents = images_of(out) if job.latents else None
            images = empty() if job.latents else to_uint8(images_of(out))
        flags = getattr(out, "nsfw_content_detected", None)
        if request.safety_required and flags is None:
            raise _unsafe(request)
        nsfw = [bool(flag) for flag in flags] if flags is not None else None
        if warnings := cut_off(pipe, request.inputs, request.prompt_syntax):
            told = {**told, "warnings": warnings}
        words = ("lossy",) * (used in LOSSY) + ("tf32",) * self._device.tf32 + layout.words(parts)
        told, own = told | shape_of(images), extras.encoded(pipe)
        return Ran(images, nsfw, model.dtype, used, placement, told, own, latents, states(generator), words, code)

    def _components(
        self, model: LoadedModel, job: Job, placement: str
    ) -> tuple[dict[str, Any], dict[str, Any], str, str]:
        """A model's components as a job asks for them, what is to be told of that, their attention and their code."""
        request = job.request
        parts, used = components_with(model, request.attention, self._attention, self._executor.on_device)
        parts = with_ip_adapters(placed(model, parts, used, placement), request.ip_adapters)
        parts, told = self._adapters.applied(model, parts, used, request)
        parts, code = choose(self._blocks, self._graphs, model, parts, used, job, placement)
        return parts, told, used, code


def _previews(model: LoadedModel, pipe: Any, job: Job) -> Previews | None:
    request = job.request
    if request.preview is None or job.on_preview is None:
        return None
    size = request.inputs.get("width"), request.inputs.get("height")
    previews = Previews(model, pipe, size, request.preview, job.on_preview)
    previews.prepare()
    return previews


def _after_step(job: Job, tally: Tally, extras: Extras, previews: Previews | None) -> AfterStep:
    stepped: Callable[[], object] = tally.steps(job.request.pipeline)

    def after_step(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        if job.cancelled():
            raise Cancelled
        stepped()
        total = max(pipe.num_timesteps, step + 1)
        job.on_step(step + 1, total)
        extras.after(step + 1, tensors.get("latents"))
        if previews:
            previews.after(step + 1, total, tensors.get("latents"))
        return {}

    return after_step


def _called(model: LoadedModel, job: Job, pipe: Any, generator: Generators, after_step: AfterStep) -> Any:
    """What the pipeline gives; what it refuses is told as what is wrong with the request."""
    request = job.request
    pictures = ip_arguments(request, picture_arguments(pipe, request, pictures_of(job)))
    # a copy: some pipelines write to lists that they are given, and a job may run again
    arguments = {**copy.deepcopy(without_scale(request.inputs)), **pictures}
    try:
        return call(pipe, request.method, arguments, generator, after_step, job.latents)
    except (ApiError, Cancelled, NotPrepared, torch.OutOfMemoryError):
        raise
    except Exception as fault:
        own = type(model.components.get("scheduler")).__name__
        refusal = refused_by(fault, request, own) or refused_inputs(fault, arguments, request.pipeline)
        if refusal is None:
            raise
        raise refusal from fault


def make_generators(seed: int | list[int]) -> torch.Generator | list[torch.Generator]:
    """One generator for an integer seed, one per image for a list.

    On the CPU, so that a seed means the same noise on every machine.
    """
    if isinstance(seed, list):
        return [torch.Generator().manual_seed(s) for s in seed]
    return torch.Generator().manual_seed(seed)


def first_seed(seed: int | list[int]) -> int:
    """The seed of what is drawn once for all images."""
    return seed[0] if isinstance(seed, list) else seed


def _unsafe(request: GenerationRequest) -> ApiError:
    message = f"{request.pipeline} has its images seen by no safety checker, and this server gives out none like that."
    return ApiError("SAFETY_REQUIRED", message, field="callInputs.PIPELINE", requested=request.pipeline)
