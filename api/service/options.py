"""The ``callInputs`` that clients send: their types, and the ones that come later."""

from __future__ import annotations

from typing import Any

from api.errors import ApiError
from api.schema.catalogue import nearest
from api.schema.generation import OFFLOADS

TEXT = {
    "MODEL_ID": "the model",
    "HF_MODEL_ID": "its id on the hub, where that is another",
    "MODEL_REVISION": "its revision",
    "MODEL_PRECISION": 'fp32 (also ""), fp16 or bf16',
    "MODEL_URL": "where it lies, or is to be kept: s3://…, https://…",
    "CHECKPOINT_URL": "a single file to make it from: .safetensors or .ckpt",
    "CHECKPOINT_CONFIG_URL": "how that file is built: a family, a model id, or the URL of a .yaml",
    "PIPELINE": "a diffusers pipeline class, or one of the AutoPipelines",
    "SCHEDULER": "a diffusers scheduler class",
    "image_format": "PNG, JPEG or WEBP",
    "OFFLOAD": "auto; none: the model is held as it is, whether it fits so or not; model, sequential: its weights stay "
    "in RAM, and one part or block of it is on the device at a time",
    "startRequestId": "the client's own id; returned in $meta",
}
FLAGS = {
    "streamEvents": "answer with a stream of events, one JSON object a line",
    "async": "answer at once with the id of a job for later",
    "is_url": "image, mask_image and init_image are URLs",
    "safety_checker": "run the model's safety checker, where it has one",
    "xformers_memory_efficient_attention": "use xformers where installed",
    "low_vram": "decode in slices and tiles, with one part of the model on the device at a time",
}
WHOLE = {"image_quality": "1-100, for JPEG and WEBP"}
OTHER = {"preview": "a small picture after every so many steps; true: about four in all"}
_LONGEST = 200
_LONGEST_URL = 8192
_MOST_STEPS = 10**6
KNOWN = (*TEXT, *FLAGS, *WHOLE, *OTHER)

LATER = {
    "custom_pipeline_method": "pipelines are called, no other method of theirs",
    "compel_prompts": "prompts are taken as they are",
    "textual_inversions": "adapters cannot be loaded yet",
    "lora_weights": "adapters cannot be loaded yet",
    "SEND_URL": "no webhooks are sent yet",
    "SIGN_KEY": "no webhooks are sent yet",
    "use_extra": "there are no extras yet",
    "FILL_MODE": "prepare the picture before sending it",
    "train": "training is not offered yet",
    "dest_url": "the answer holds the images",
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
        if name not in KNOWN:
            message = f"Unknown option.{nearest(name, [*KNOWN, *LATER])}"
            raise ApiError("UNKNOWN_INPUT", message, field=field, available=sorted(KNOWN))
        if name == "MODEL_PRECISION" and value == "":
            value = "fp32"
        if value is None or value == "":
            continue
        longest = _LONGEST_URL if name.endswith("_URL") else _LONGEST
        if name in TEXT and (not isinstance(value, str) or len(value) > longest):
            message = f"Must be a string of at most {longest} characters: {TEXT[name]}."
            raise ApiError("INVALID_INPUTS", message, field=field, requested=value)
        if name == "OFFLOAD":
            _check_offload(value)
        if name in FLAGS:
            value = _flag(name, value)
        if name in WHOLE and (not isinstance(value, int) or isinstance(value, bool)):
            raise ApiError("INVALID_INPUTS", f"Must be a whole number: {WHOLE[name]}.", field=field, requested=value)
        if name == "preview" and (value := _preview(value)) is None:
            continue
        out[name] = value
    if out.get("low_vram") and out.get("OFFLOAD") == "none":
        message = "Asks for the opposite of OFFLOAD none; send one of them."
        raise ApiError("INVALID_INPUTS", message, field="callInputs.low_vram", requested=True)
    return out


def _flag(name: str, value: Any) -> bool:
    if not isinstance(value, bool) and value not in (0, 1):
        message = f"Must be true or false: {FLAGS[name]}."
        raise ApiError("INVALID_INPUTS", message, field=f"callInputs.{name}", requested=value)
    return bool(value)


def _check_offload(value: str) -> None:
    if value not in OFFLOADS:
        message = f"Must be one of {', '.join(OFFLOADS)}."
        raise ApiError("INVALID_INPUTS", message, field="callInputs.OFFLOAD", requested=value, available=list(OFFLOADS))


def _preview(value: Any) -> int | None:
    """After how many steps, as ``GenerationRequest.preview``."""
    if isinstance(value, bool):
        return 0 if value else None
    if not isinstance(value, int) or not 1 <= value <= _MOST_STEPS:
        message = f"Must be true, or a whole number from 1 to {_MOST_STEPS}: {OTHER['preview']}."
        raise ApiError("INVALID_INPUTS", message, field="callInputs.preview", requested=value)
    return value
