"""The ``callInputs`` that clients send: names, types and meanings, and the ones that come later.

``docs/call-inputs.md`` is made from this table by ``scripts/make-docs``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec

from api.errors import ApiError
from api.models.adapters import FORMS, INVERSION, LORA, MOST, Asked, read_asked
from api.models.refs import PRECISIONS
from api.models.upscalers import SCHEMA as UPSCALE_SCHEMA
from api.models.upscalers import AskedUpscale, read_upscale
from api.schema.attention import ATTENTIONS
from api.schema.catalogue import nearest
from api.schema.generation import OFFLOADS, OUTPUTS, QUANTIZED_BY
from api.schema.prompts import SYNTAXES
from api.schema.videos import MOST_FPS
from api.service import videos
from api.service.flow_options import HIRES_SCHEMA, REFINER_SCHEMA, check_hires, check_refiner
from api.service.step_cache import SCHEMA as STEP_CACHE
from api.service.step_cache import read_step_cache
from api.service.webhooks_signing import check_key

_LONGEST = 200
_LONGEST_URL = 8192
_MOST_STEPS = 10**6
_MOST_CONTROLNETS = 8
_MOST_IP_ADAPTERS = 4
_URL = {"type": "string", "minLength": 1, "maxLength": _LONGEST_URL}
_CLOSED = {"additionalProperties": False}
_URLS = {"anyOf": [_URL, {"type": "array", "items": _URL, "minItems": 1}]}


class Option(msgspec.Struct, frozen=True, kw_only=True):
    """One of the ``callInputs``.

    Attributes:
        kind: of value, as clients are told it.
        meaning: in half a sentence.
        default: what holds where it is not sent, as clients are told it.
        example: a value.
        check: (value, field, meaning) → the value as the server has it; None: as if it had not been sent.
        schema: what ``check`` takes, as JSON Schema (draft 2020-12).
    """

    kind: str
    meaning: str
    default: str
    example: Any
    check: Callable[[Any, str, str], Any]
    schema: dict[str, Any]


def text(meaning: str, default: str, example: str, longest: int = _LONGEST) -> Option:
    """An option that is a string."""

    def check(value: Any, field: str, meaning: str) -> str:
        if not isinstance(value, str) or len(value) > longest:
            raise _invalid(field, f"Must be a string of at most {longest} characters: {meaning}.", value)
        return value

    schema = {"type": "string", "maxLength": longest}
    return Option(kind="string", meaning=meaning, default=default, example=example, check=check, schema=schema)


def choice(meaning: str, default: str, example: str, among: tuple[str, ...]) -> Option:
    """An option that is one of a few words."""

    def check(value: Any, field: str, meaning: str) -> str:
        if value not in among:
            raise _invalid(field, f"Must be one of {', '.join(among)}.", value, among)
        return str(value)

    kind = ", ".join(f"`{word}`" for word in among)
    schema = {"type": "string", "enum": list(among)}
    return Option(kind=kind, meaning=meaning, default=default, example=example, check=check, schema=schema)


def flag(meaning: str, default: str = "`false`", example: bool = True) -> Option:
    """An option that is on or off; 0 and 1 are taken as well."""

    def check(value: Any, field: str, meaning: str) -> bool:
        if not isinstance(value, bool) and value not in (0, 1):
            raise _invalid(field, f"Must be true or false: {meaning}.", value)
        return bool(value)

    schema = {"anyOf": [{"type": "boolean"}, {"type": "integer", "enum": [0, 1]}]}
    return Option(kind="boolean", meaning=meaning, default=default, example=example, check=check, schema=schema)


def whole(meaning: str, default: str, example: int, low: int, high: int) -> Option:
    """An option that is a whole number, within limits."""

    def check(value: Any, field: str, meaning: str) -> int:
        if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
            raise _invalid(field, f"Must be a whole number from {low} to {high}: {meaning}.", value)
        return value

    kind, schema = f"integer, {low}–{high}", {"type": "integer", "minimum": low, "maximum": high}
    return Option(kind=kind, meaning=meaning, default=default, example=example, check=check, schema=schema)


def words(meaning: str, default: str, example: list[str], among: tuple[str, ...]) -> Option:
    """An option that is a list of some words."""

    def check(value: Any, field: str, meaning: str) -> tuple[str, ...]:
        if not isinstance(value, list) or not all(isinstance(word, str) and word in among for word in value):
            raise _invalid(field, f"Must be a list of some of {', '.join(among)}.", value, among)
        return tuple(value)

    kind = "list of " + ", ".join(f"`{word}`" for word in among)
    schema = {"type": "array", "items": {"type": "string", "enum": list(among)}}
    return Option(kind=kind, meaning=meaning, default=default, example=example, check=check, schema=schema)


def names(meaning: str, default: str, example: dict[str, Any], most: int = 64) -> Option:
    """An option that is an object: names, and a value for each."""

    def check(value: Any, field: str, meaning: str) -> dict[str, Any]:
        if not isinstance(value, dict) or len(value) > most:
            raise _invalid(field, f"Must be an object of at most {most} names: {meaning}.", value)
        return value

    schema = {"type": "object", "maxProperties": most}
    return Option(kind="object", meaning=meaning, default=default, example=example, check=check, schema=schema)


def texts(meaning: str, example: Any, most: int) -> Option:
    """An option that is a string, or a list of them; the server has it as a list."""

    def check(value: Any, field: str, meaning: str) -> list[str] | None:
        found = value if isinstance(value, list) else [value]
        if len(found) > most or not all(isinstance(one, str) and 0 < len(one) <= _LONGEST_URL for one in found):
            raise _invalid(field, f"Must be a string, or a list of at most {most}: {meaning}.", value)
        return found or None

    schema = {"anyOf": [_URL, {"type": "array", "items": _URL, "maxItems": most}]}
    kind = "string, or strings"
    return Option(kind=kind, meaning=meaning, default="none", example=example, check=check, schema=schema)


def _preview(value: Any, field: str, meaning: str) -> int | None:
    """After how many steps, as ``GenerationRequest.preview``."""
    if isinstance(value, bool):
        return 0 if value else None
    if not isinstance(value, int) or not 1 <= value <= _MOST_STEPS:
        raise _invalid(field, f"Must be true, or a whole number from 1 to {_MOST_STEPS}: {meaning}.", value)
    return value


def _adapters(kind: str) -> Callable[[Any, str, str], Any]:
    def check(value: Any, field: str, meaning: str) -> tuple[Asked, ...] | None:
        return read_asked(value, kind, field) or None

    return check


def _adapters_schema(kind: str) -> dict[str, Any]:
    one = {"anyOf": [_URL, {"type": "object", "properties": FORMS[kind], "required": ["url"], **_CLOSED}]}
    return {"anyOf": [*one["anyOf"], {"type": "array", "items": one, "maxItems": MOST}]}


def _upscale(value: Any, field: str, meaning: str) -> AskedUpscale:
    return read_upscale(value, field)


def _urls(value: Any, field: str, meaning: str) -> tuple[str, ...]:
    urls = value if isinstance(value, list) else [value]
    if not urls or not all(isinstance(url, str) and 0 < len(url) <= _LONGEST_URL for url in urls):
        raise _invalid(field, f"Must be a URL, or a list of URLs: {meaning}.", None)
    return tuple(urls)


def _secret(value: Any, field: str, meaning: str) -> str:
    """A key; what was sent is in no message."""
    if not isinstance(value, str) or len(value) > _LONGEST:
        raise _invalid(field, f"Must be a string of at most {_LONGEST} characters: {meaning}.", None)
    try:
        check_key(value)
    except ValueError as fault:
        raise _invalid(field, f"Cannot be used: {fault}.", None) from None
    return value


def _invalid(field: str, message: str, value: Any, among: tuple[str, ...] | None = None) -> ApiError:
    return ApiError("INVALID_INPUTS", message, field=field, requested=value, available=list(among) if among else None)


_SERVERS = "the server's"
OPTIONS: dict[str, Option] = {
    "MODEL_ID": text("the model", _SERVERS, "stabilityai/sdxl-turbo"),
    "HF_MODEL_ID": text("its id on the hub, where that is another", "`MODEL_ID`", "stabilityai/sdxl-turbo"),
    "MODEL_REVISION": text("its revision: a branch, tag or commit", "its newest", "main"),
    "MODEL_PRECISION": choice('which files, and what is computed in; `""` is fp32', _SERVERS, "fp16", PRECISIONS),
    "MODEL_URL": text(
        "where it lies, or is to be kept: s3://…, https://…", "none", "s3://bucket/model.tar.zst", _LONGEST_URL
    ),
    "CHECKPOINT_URL": text(
        "a single file to make it from: .safetensors or .ckpt", "none", "https://host/model.safetensors", _LONGEST_URL
    ),
    "CHECKPOINT_CONFIG_URL": text(
        "how that file is built: a family, a model id, or the URL of a .yaml", "found from its weights", "sdxl",
        _LONGEST_URL,
    ),
    "PIPELINE": text(
        "a diffusers pipeline class, one of the AutoPipelines, or a community pipeline",
        "what the request holds decides", "StableDiffusionImg2ImgPipeline",
    ),
    "custom_pipeline_method": text(
        "the method that generates, of a community pipeline that has several, e.g. text2img, img2img, inpaint",
        "the pipeline is called", "img2img",
    ),
    "SCHEDULER": text(
        "a diffusers scheduler class, or the name that AUTOMATIC1111 has for one with settings: `GET /schedulers`",
        _SERVERS, "DPM++ 2M Karras",
    ),
    "scheduler_args": names(
        "arguments of that class, over the settings that the model was saved with", "none",
        {"use_karras_sigmas": True, "timestep_spacing": "trailing"},
    ),
    "controlnets": texts(
        "ControlNets, each with a picture in `modelInputs.control_image`: a repository, or a URL; see "
        "[controlnets.md](controlnets.md)", ["lllyasviel/sd-controlnet-canny"], _MOST_CONTROLNETS,
    ),
    "ip_adapters": texts(
        "IP-Adapters, each with a picture in `modelInputs.ip_adapter_image`: a file in a repository, or a URL; "
        "`#scale=`, `#encoder=`; see [controlnets.md](controlnets.md#ip-adapters)",
        ["h94/IP-Adapter/models/ip-adapter_sd15.safetensors#scale=0.6"], _MOST_IP_ADAPTERS,
    ),
    "safety_checker": flag("run the model's safety checker, where it has one", "`true`", False),
    "prompt_syntax": choice(
        "how prompts are read: as they are, or with weights, as compel or the web UI of AUTOMATIC1111 write them",
        "`plain`", "a1111", SYNTAXES,
    ),
    "compel_prompts": flag('the same as `prompt_syntax: "compel"`'),
    "is_url": flag("`image`, `mask_image` and `init_image` are URLs"),
    "image_format": text("`PNG`, `JPEG`, `WEBP`, `AVIF`; `JXL` where its codec is installed", "`PNG`", "AVIF"),
    "image_quality": whole("for all but PNG; 100 makes WEBP and JXL lossless", "95", 90, 1, 100),
    "lossless": flag("keep every pixel: PNG, WEBP and JXL can, of the formats for videos webp"),
    "video_format": choice(
        "what a pipeline that makes videos answers with ([video.md](video.md))", "`mp4`", "webp", videos.FORMATS
    ),
    "fps": Option(
        kind=f"number, 0.1–{MOST_FPS}", meaning="frames a second of the video; it is shown faster or slower by it",
        default="the pipeline's", example=23.976, check=videos.fps_of,
        schema={"type": "number", "minimum": 0.1, "maximum": MOST_FPS},
    ),
    "video_quality": whole("of mp4 and webp", str(videos.QUALITY), 90, 1, 100),
    "image_metadata": flag("write `$meta` and AUTOMATIC1111's `parameters` into the files", "`true`", False),
    "output_url": Option(
        kind="string, or strings: one for each image",
        meaning="upload the images instead: an http(s) URL that takes a PUT, or `s3://` in the server's own bucket",
        default="none", example="s3:///bucket/folder/name.png", check=_urls,
        schema=_URLS,
    ),
    "dest_url": Option(
        kind="the same", meaning="another name of `output_url`", default="none", example="https://host/presigned?…",
        check=_urls, schema=_URLS,
    ),
    "output": words(
        "what comes beside the images: `latents`, `intermediate_latents` (after each step), the `mask` of inpainting",
        "`images`", ["images", "latents"], OUTPUTS,
    ),
    "attention": choice(
        "attention kernels, as diffusers calls them; `sage` is lossy ([attention.md](attention.md))", _SERVERS,
        "xformers", ATTENTIONS,
    ),
    "xformers_memory_efficient_attention": flag('the same as `attention: "xformers"`'),
    "compile": flag("false: run without compiled code, also where the server has it", "`true`", example=False),
    "low_vram": flag("decode in slices and tiles, with one part of the model on the device at a time"),
    "OFFLOAD": choice(
        "`none`: the model is held as it is, whether it fits so or not; `model`, `sequential`: its weights stay in "
        "RAM, and one part or block of it is on the device at a time", _SERVERS, "model", OFFLOADS,
    ),
    "QUANTIZE": choice(
        "lossy: what large linear layers are quantized to, for less memory ([quantization.md](quantization.md))",
        _SERVERS, "int8", ("none", *QUANTIZED_BY),
    ),
    "step_cache": Option(
        kind="`true`, or object of `kind` and `threshold` or `interval`",
        meaning="lossy: skip what changes little from step to step ([quantization.md](quantization.md#step-caching))",
        default="none", example={"kind": "first_block", "threshold": 0.08}, check=read_step_cache,
        schema=STEP_CACHE,
    ),
    "lora_weights": Option(
        kind="string or object, or a list of them",
        meaning="LoRAs: `ADDRESS#scale=0.8`, and `&fname=` for a file of a repository (docs/adapters.md)",
        default="none", example=["demo/adapters/outlined.safetensors#scale=0.8"], check=_adapters(LORA),
        schema=_adapters_schema(LORA),
    ),
    "textual_inversions": Option(
        kind="string or object, or a list of them",
        meaning="textual inversions: `ADDRESS#token=<word>` (docs/adapters.md)",
        default="none", example=["demo/adapters/sun.safetensors#token=<sun>"], check=_adapters(INVERSION),
        schema=_adapters_schema(INVERSION),
    ),
    "hires": Option(
        kind="object",
        meaning="a second pass over the images, made larger: `scale`, or `width` and `height`; `strength`, `upscaler`, "
        "`num_inference_steps`, `guidance_scale` ([flows.md](flows.md#hires-fix))",
        default="none", example={"scale": 2, "strength": 0.5, "upscaler": "lanczos"}, check=check_hires,
        schema=HIRES_SCHEMA,
    ),
    "refiner": Option(
        kind="string or object",
        meaning="another model that finishes the images: its `MODEL_ID` and the like, `switch_at` or `strength`, "
        "`num_inference_steps`, `guidance_scale`, `aesthetic_score` ([flows.md](flows.md#refiner))",
        default="none", example="stabilityai/stable-diffusion-xl-refiner-1.0", check=check_refiner,
        schema=REFINER_SCHEMA,
    ),
    "streamEvents": flag("answer with a stream of events, one JSON object a line"),
    "preview": Option(
        kind="`true`, or integer", meaning="a small picture after every so many steps; true: about four in all",
        default="none", example=True, check=_preview,
        schema={"anyOf": [{"type": "boolean"}, {"type": "integer", "minimum": 1, "maximum": _MOST_STEPS}]},
    ),
    "async": flag("answer at once with the id of a job for later"),
    "startRequestId": text("the client's own id; returned in $meta, and in events", "none", "order-7"),
    "SEND_URL": text(
        "where to send its events as webhooks ([webhooks.md](webhooks.md))", _SERVERS, "https://example.com/hook",
        _LONGEST_URL,
    ),
    "SIGN_KEY": Option(
        kind="string", meaning="what these are signed with", default=_SERVERS, example="a long random text",
        check=_secret, schema={"type": "string", "maxLength": _LONGEST},
    ),
    "upscale": Option(
        kind="object",
        meaning="make the finished images larger with an upscaler such as Real-ESRGAN: `model`, `scale`, `tile`; see "
        "[upscaling.md](upscaling.md)",
        default="none", example={"model": "owner/repository/RealESRGAN_x4plus.safetensors", "scale": 4}, check=_upscale,
        schema=UPSCALE_SCHEMA,
    ),
    "use_extra": text(
        "`upsample`: no pipeline is run, but `modelInputs.image` made larger by the upscaler that `MODEL_ID` or "
        "`upscale` names; see [upscaling.md](upscaling.md)", "none", "upsample",
    ),
}  # fmt: skip
KNOWN = tuple(OPTIONS)

LATER = {
    "FILL_MODE": "prepare the picture before sending it",
    "train": "training is not offered yet",
}
"""Options of docker-diffusers-api that this version refuses rather than ignores."""


def check_options(call_inputs: dict[str, Any]) -> dict[str, Any]:
    """Check names and types of ``callInputs``; an option set to its empty value counts as not sent.

    Raises:
        ApiError: UNKNOWN_INPUT, NOT_SUPPORTED or INVALID_INPUTS, with the field.
    """
    out: dict[str, Any] = {}
    for name, value in call_inputs.items():
        field = f"callInputs.{name}"
        if name in LATER:
            if value in (None, "", False, 0, [], {}):
                continue
            raise ApiError("NOT_SUPPORTED", f"{name} is not supported by this version: {LATER[name]}.", field=field)
        if name not in OPTIONS:
            message = f"Unknown option.{nearest(name, [*KNOWN, *LATER])}"
            raise ApiError("UNKNOWN_INPUT", message, field=field, available=sorted(KNOWN))
        if name == "MODEL_PRECISION" and value == "":
            value = "fp32"
        if value is None or value == "":
            continue
        option = OPTIONS[name]
        checked = option.check(value, field, option.meaning)
        if checked is not None:
            out[name] = checked
    compel, syntax = out.get("compel_prompts"), out.get("prompt_syntax")
    if compel is not None and syntax is not None and compel != (syntax == "compel") and (compel or syntax == "compel"):
        message = f"Asks for the opposite of prompt_syntax {syntax}; send one of them."
        raise ApiError("INVALID_INPUTS", message, field="callInputs.compel_prompts", requested=compel)
    xformers, attention = out.get("xformers_memory_efficient_attention"), out.get("attention")
    if attention and xformers is not None and xformers != (attention == "xformers"):
        message = f"Asks for other kernels than attention {attention}; send one of them."
        field = "callInputs.xformers_memory_efficient_attention"
        raise ApiError("INVALID_INPUTS", message, field=field, requested=xformers)
    if "dest_url" in out:
        if "output_url" in out:
            message = "Another name of output_url; send one of them."
            raise ApiError("INVALID_INPUTS", message, field="callInputs.dest_url")
        out["output_url"] = out.pop("dest_url")
    if out.get("low_vram") and out.get("OFFLOAD") == "none":
        message = "Asks for the opposite of OFFLOAD none; send one of them."
        raise ApiError("INVALID_INPUTS", message, field="callInputs.low_vram", requested=True)
    return out
