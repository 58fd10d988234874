"""Reads a model's components from disk onto the device."""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Any

import diffusers
import torch
from torch import nn
from transformers import CLIPTextModel

from api.engine.device import Device
from api.engine.tokenizers import taking_turns
from api.errors import ApiError
from api.schema.generation import ModelRef

log = logging.getLogger("api.engine")


class LoadedModel:
    """A model in memory: the parts that every pipeline over it shares.

    Attributes:
        ref: what was loaded.
        dtype: what it computes in.
        components: by name, as diffusers calls them.
        config: arguments of its pipeline class that are no components.
        bytes: of all parameters and buffers.
        schedulers: by class name, with the model's settings, never run: jobs get copies.
        variants: modules over the same weights with something switched, such as the attention, by its name.
        latent_maps: what makes previews of latents, by the autoencoder's name; None where that cannot be.
    """

    def __init__(self, ref: ModelRef, dtype: torch.dtype, pipe: diffusers.DiffusionPipeline) -> None:
        self.ref = ref
        self.dtype = dtype
        self.components: dict[str, Any] = taking_turns(pipe.components)
        self.config = {k: v for k, v in pipe.config.items() if k not in self.components and not k.startswith("_")}
        self.schedulers: dict[str, Any] = {}
        self.variants: dict[str, dict[str, Any]] = {}
        self.latent_maps: dict[str, Any] = {}
        self.bytes = sum(_module_bytes(part) for part in self.components.values() if isinstance(part, nn.Module))


def _module_bytes(module: nn.Module) -> int:
    return sum(t.numel() * t.element_size() for t in [*module.parameters(), *module.buffers()])


def _keep_text_model(part: nn.Module) -> None:
    """Give a CLIP text encoder the ``text_model`` that diffusers still reads for ``clip_skip`` and LoRA scales.

    transformers 5 moved its parts up a level. Set past ``nn.Module``, which would register a loop.
    """
    if isinstance(part, CLIPTextModel) and not hasattr(part, "text_model"):
        object.__setattr__(part, "text_model", part)


def variant_of(folder: Path, precision: str) -> str | None:
    """Which weight files of a folder to read: ``fp16`` or ``bf16`` where they are preferred or alone, else plain ones.

    diffusers names them ``diffusion_pytorch_model.fp16.safetensors``, and takes a component's plain files where
    the variant is missing, but not the other way round.
    """
    names = {path.relative_to(folder).as_posix() for path in folder.glob("*/*.safetensors")}
    for variant in ("fp16", "bf16"):
        own = {name for name in names if f".{variant}." in name}
        folders = {name.partition("/")[0] for name in own}
        plain = {name.partition("/")[0] for name in names if not re.search(r"\.(fp16|bf16)\.", name)}
        if own and (variant == precision or not folders <= plain):
            return variant
    return None


def load(ref: ModelRef, device: Device) -> LoadedModel:
    """Load a model from its folder. Safetensors only; nothing is unpickled or downloaded.

    ``from_pretrained`` patches torch process-wide while it runs: no other work may go on meanwhile.

    Raises:
        ApiError: MODEL_BROKEN; OUT_OF_MEMORY is left to the caller as torch raises it.
    """
    dtype = device.dtype(ref.precision)
    try:
        pipe = diffusers.DiffusionPipeline.from_pretrained(
            ref.folder,
            dtype=dtype,
            variant=variant_of(Path(ref.folder), ref.precision),
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=False,
        )
    except torch.OutOfMemoryError:
        raise
    except Exception as fault:  # whatever a damaged file makes the libraries raise
        raise ApiError(
            "MODEL_BROKEN",
            f'"{ref.model_id}" cannot be loaded ({type(fault).__name__}: {str(fault)[:300]}).',
            field="callInputs.MODEL_ID",
            requested=ref.model_id,
        ) from fault
    pipe.to(device.torch)
    vae = getattr(pipe, "vae", None)
    if vae is not None and dtype == torch.float16 and getattr(vae.config, "force_upcast", False):
        vae.to(torch.float32)  # it overflows in fp16; the pipelines would cast it for each image
    for part in pipe.components.values():
        if isinstance(part, nn.Module):
            part.eval().requires_grad_(False)
            _keep_text_model(part)
    return LoadedModel(ref, dtype, pipe)
