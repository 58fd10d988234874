"""Makes a ``GenerationRequest`` of a draft and its pictures, with all of ``$meta`` that is known before it runs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from api.errors import nothing_to_offload
from api.models.refs import SourceRef
from api.schema.attention import asked
from api.schema.generation import WEIGHTS, GenerationRequest, IpAdapter, Pictures, each_picture, for_each
from api.service import controlnets, ip_adapters
from api.service.adapters import Chosen
from api.service.drafts import Draft
from api.service.quantize import asked_for
from api.service.schedulers import Scheduler
from api.settings import Settings


def complete(
    request_id: str,
    draft: Draft,
    pictures: Pictures,
    source: SourceRef,
    adapters: Chosen | None,
    settings: Settings,
    has_gpu: bool,
) -> GenerationRequest:
    """What a worker is given.

    Args:
        request_id: what the client and the log know it by.
        draft: what was chosen.
        pictures: its pictures.
        source: what names the model.
        adapters: LoRAs and textual inversions; None: they have not been looked for.
        settings: defaults.
        has_gpu: else there is nothing to offload weights from.

    Raises:
        ApiError: NOT_SUPPORTED: OFFLOAD asks for what this server has not.
    """
    options, given = draft.options, draft.given
    plain = {name: value for name, value in given.items() if not draft.accepted[name].is_picture}
    looking = draft.adapted.adapters if draft.adapted else ()
    repeat = {**plain, "seed": draft.seed, **_named(pictures, looking)}
    wants_xformers = options.get("xformers_memory_efficient_attention")
    return GenerationRequest(
        id=draft.id,
        request_id=request_id,
        model=draft.ref,
        pipeline=draft.pipeline,
        scheduler=draft.scheduler.name,
        inputs=plain,
        pictures=pictures,
        seed=draft.seed,
        images=draft.images,
        image_format=draft.encoding.format,
        image_quality=draft.encoding.quality,
        attention=asked(options.get("attention"), wants_xformers, settings.attention),
        safety_checker=draft.safety_checker,
        safety_required=settings.safety_checker == "required",
        meta=_meta(draft, repeat, source, adapters),
        preview=options.get("preview"),
        offload=_offload(options, settings, has_gpu),
        low_vram=bool(options.get("low_vram")),
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
        quantize=asked_for(options),
        step_cache=options.get("step_cache"),
        video=draft.video,
        compile=options.get("compile", True),
    )


def _meta(draft: Draft, repeat: dict[str, Any], source: SourceRef, adapters: Chosen | None) -> dict[str, Any]:
    """What is known of ``$meta`` before the request has run."""
    options, ref = draft.options, draft.ref
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
        **_encoding(draft),
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
    if options.get("low_vram"):
        meta["low_vram"] = True
    if "QUANTIZE" in options:
        meta["QUANTIZE"] = options["QUANTIZE"]
    if not options.get("compile", True):
        meta["compile"] = False
    if draft.prompt_syntax != "plain":
        meta["prompt_syntax"] = draft.prompt_syntax
    if "startRequestId" in options:
        meta["startRequestId"] = options["startRequestId"]
    return meta


def _encoding(draft: Draft) -> dict[str, Any]:
    """How the files are encoded, as it is asked for."""
    if draft.video is None:
        return {"image_format": draft.encoding.format, "image_quality": draft.encoding.quality}
    quality = {} if draft.encoding.format == "GIF" else {"video_quality": draft.encoding.quality}
    return {"video_format": draft.encoding.format.lower(), **quality, "fps": draft.video.fps}


def _offload(options: dict[str, Any], settings: Settings, has_gpu: bool) -> str:
    asked: str | None = options.get("OFFLOAD")
    low_vram = bool(options.get("low_vram"))
    if has_gpu:
        return asked or ("auto" if low_vram and settings.offload == "none" else settings.offload)
    if asked in WEIGHTS:
        raise nothing_to_offload(asked)
    return asked or ("none" if settings.offload == "none" and not low_vram else "auto")


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
