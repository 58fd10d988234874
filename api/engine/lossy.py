"""What is to be told of an image that was made with less than the model has: in fewer bits, or with steps skipped."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from api.engine.loader import LoadedModel
from api.engine.parts import PartSpec
from api.engine.quantization import word
from api.errors import ApiError
from api.schema.attention import LOSSY
from api.schema.generation import GenerationRequest, ModelRef


def told_of(model: LoadedModel, request: GenerationRequest, attention: str) -> dict[str, Any]:
    """What ``$meta`` says of it.

    Args:
        model: that it was made with.
        request: that it was made for.
        attention: the kernels that were used.
    """
    told: dict[str, Any] = {}
    if model.quantized:
        told |= {"quantize": request.model.quantize, "quantized": model.quantized}
    if cache := request.step_cache:
        told["step_cache"] = {"kind": cache.kind, cache.argument: cache.number}
    found = [name for name in ("quantize", "step_cache") if name in told] + ["attention"] * (attention in LOSSY)
    return told | {"lossy": found} if found else told


def words(request: GenerationRequest, told: dict[str, Any], device: torch.device, dtype: torch.dtype) -> str:
    """What ``$meta.numerics`` says of it."""
    found = [word(told["quantize"], device, dtype)] if "quantize" in told else []
    found += [request.step_cache.word] if request.step_cache else []
    return "".join(f"/{one}" for one in found)


def check_quantizes(request: GenerationRequest, parts: Callable[[ModelRef], Sequence[PartSpec]]) -> None:
    """See that what a request asks to have quantized has something to quantize, before a weight is read.

    Where the server's configuration asks for it, a model that has nothing is served as it is, and ``$meta`` does not
    say that it is quantized.

    Args:
        request: what is asked for.
        parts: says what a model consists of.

    Raises:
        ApiError: NOT_SUPPORTED; MODEL_BROKEN.
    """
    if not request.quantize or any(spec.quantize for spec in parts(request.model)):
        return
    message = (
        f"{request.model.model_id} has no layers that {request.quantize} is for: large linear ones in the blocks of a "
        "denoiser or a large text encoder. Send QUANTIZE none."
    )
    raise ApiError("NOT_SUPPORTED", message, field="callInputs.QUANTIZE", requested=request.quantize)
