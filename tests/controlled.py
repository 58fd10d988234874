"""Tiny ControlNets with random weights, and the pictures that they follow."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from PIL import Image

from api.schema.generation import Picture
from tests.running import as_base64

SIZE = 64
_ZEROES = ("controlnet_", "controlnet_cond_embedding.conv_out", "controlnet_x_embedder", "pos_embed_input")
"""What a new ControlNet has zeroes in, so that it changes nothing."""


def telling(net: Any, seed: int) -> Any:
    """The same ControlNet, but that it changes the picture."""
    torch.manual_seed(seed)
    for name, parameter in net.named_parameters():
        if any(name.startswith(zero) for zero in _ZEROES):
            parameter.data = torch.randn_like(parameter) * 0.3
    return net


def save_controlnet(folder: Path, model: Path, seed: int = 0, *, union: bool = False, **more: Any) -> Path:
    """A ControlNet for a model's denoiser.

    Args:
        folder: where to.
        model: folder of the model.
        seed: of its weights.
        union: one that knows two kinds of pictures.
        more: for ``save_pretrained``.
    """
    torch.manual_seed(seed)
    if (model / "unet").is_dir():
        unet = diffusers.UNet2DConditionModel.from_pretrained(model, subfolder="unet")
        channels = (16, 32)
        net: Any = diffusers.ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=channels)
        if union:
            net = diffusers.ControlNetUnionModel(
                **_shared(diffusers.ControlNetUnionModel, unet), conditioning_embedding_out_channels=channels,
                num_control_type=2, num_trans_channel=8, num_trans_head=2, num_trans_layer=1, num_proj_channel=8,
            )  # fmt: skip
    elif "Flux" in (model / "model_index.json").read_text():
        flux = diffusers.FluxTransformer2DModel.from_pretrained(model, subfolder="transformer")
        net = diffusers.FluxControlNetModel(**_shared(diffusers.FluxControlNetModel, flux))
    else:
        sd3 = diffusers.SD3Transformer2DModel.from_pretrained(model, subfolder="transformer")
        net = diffusers.SD3ControlNetModel(**_shared(diffusers.SD3ControlNetModel, sd3), extra_conditioning_channels=0)
    telling(net, seed).save_pretrained(folder, **more)
    return folder


def _shared(cls: Any, denoiser: Any) -> dict[str, Any]:
    """The settings that a ControlNet has from what it controls."""
    names = set(inspect.signature(cls).parameters)
    return {name: value for name, value in denoiser.config.items() if name in names}


def control_picture(seed: int) -> np.ndarray:
    """A picture with something to follow, uint8 (H, W, 3)."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 2, (8, 8, 1), dtype=np.uint8) * 255
    return np.repeat(np.repeat(np.repeat(coarse, SIZE // 8, 0), SIZE // 8, 1), 3, 2)


def as_picture(array: np.ndarray) -> Picture:
    """As the engine is given it."""
    mode = "L" if array.ndim == 2 else "RGB"
    pixels = np.ascontiguousarray(array).tobytes()
    return Picture(mode, array.shape[1], array.shape[0], pixels, hashlib.sha256(pixels).hexdigest())


def as_pil(array: np.ndarray) -> Image.Image:
    """As diffusers is given it."""
    return Image.fromarray(array)


def as_sent(array: np.ndarray) -> str:
    """As a client sends it."""
    return as_base64(array)


def weights_hash(modules: Iterable[torch.nn.Module]) -> str:
    """Of every weight and buffer."""
    digest = hashlib.sha256()
    for module in modules:
        for name, tensor in sorted(module.state_dict().items()):
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
