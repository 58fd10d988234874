"""What a job gives beside its images, where it is asked: its latents, and the mask that inpainting used."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import torch
from safetensors.torch import save

from api.engine.encode import encode_png
from api.errors import ApiError
from api.schema.generation import EXTRAS_LIMIT, GenerationRequest


class Extras:
    """Collects them while one job runs.

    Latents are the pipeline's own: scaled as the denoiser has them, and packed where the family packs them (FLUX).

    Args:
        pipe: the job's own pipeline object.
        request: whose ``output`` says what is wanted.

    Raises:
        ApiError: NOT_SUPPORTED: this pipeline has no mask to show.
    """

    def __init__(self, pipe: Any, request: GenerationRequest) -> None:
        self._output, self._meta = request.output, request.meta if request.image_metadata else {}
        self._latents: torch.Tensor | None = None
        self._steps: dict[str, torch.Tensor] = {}
        self._bytes = 0
        self._mask: torch.Tensor | None = None
        if "mask" in self._output:
            self._listen(pipe)

    def _listen(self, pipe: Any) -> None:
        processor = getattr(pipe, "mask_processor", None)
        if processor is None:
            raise _none("prepares its mask in a way of its own", pipe)
        prepare = processor.preprocess

        def preprocess(*args: Any, **kwargs: Any) -> torch.Tensor:
            mask: torch.Tensor = prepare(*args, **kwargs)
            self._mask = mask
            return mask

        processor.preprocess = preprocess

    def after(self, step: int, latents: torch.Tensor | None) -> None:
        """Take the latents after a step, which counts from 1.

        Raises:
            ApiError: LIMIT_EXCEEDED: those of all steps are more than an answer holds.
        """
        if latents is None or not {"latents", "intermediate_latents"} & set(self._output):
            return
        self._latents = latents.detach().clone()
        if "intermediate_latents" in self._output:
            self._bytes += latents.nelement() * latents.element_size()
            if self._bytes > EXTRAS_LIMIT:
                message = (
                    f"The latents of all steps are more than {EXTRAS_LIMIT // 2**20} MiB: ask for fewer steps or "
                    'images, smaller ones, or for "latents", which are the last.'
                )
                raise ApiError("LIMIT_EXCEEDED", message, field="callInputs.output")
            self._steps[f"step_{step}"] = latents.detach().to("cpu", copy=True).contiguous()

    def encoded(self, pipe: Any) -> dict[str, bytes]:
        """What was collected: ``latents`` as safetensors, ``mask`` as PNG.

        Raises:
            ApiError: NOT_SUPPORTED: the pipeline showed no latents.
        """
        out = {}
        if self._latents is not None:
            tensors = {"latents": self._latents.cpu().contiguous(), **self._steps}
            out["latents"] = save(tensors, {"meta": json.dumps(self._meta, default=str)})
        elif {"latents", "intermediate_latents"} & set(self._output):
            raise _none("shows no latents between its steps", pipe)
        if self._mask is not None:
            grey = self._mask[0].float().mul(255).round().clamp(0, 255).to(torch.uint8)
            out["mask"] = encode_png(np.ascontiguousarray(grey.permute(1, 2, 0).cpu().numpy()[:, :, :1]))
        return out


def _none(why: str, pipe: Any) -> ApiError:
    return ApiError("NOT_SUPPORTED", f"{type(pipe).__name__} {why}; leave output out.", field="callInputs.output")
