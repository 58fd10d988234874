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
from safetensors.torch import save_file
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from api.schema.generation import Picture
from tests.running import as_base64

SIZE = 64
_ZEROES = ("controlnet_", "controlnet_cond_embedding.conv_out", "controlnet_x_embedder", "pos_embed_input",
           "spatial_ch_projs", "task_embedding", "control_add_embedding")  # fmt: skip
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


def save_image_encoder(folder: Path, seed: int = 0, projection: int = 24) -> Path:
    """A CLIP that looks at pictures of 32 x 32."""
    torch.manual_seed(seed)
    config = CLIPVisionConfig(
        hidden_size=32, intermediate_size=37, num_attention_heads=4, num_hidden_layers=3, image_size=32, patch_size=8,
        projection_dim=projection,
    )  # fmt: skip
    CLIPVisionModelWithProjection(config).save_pretrained(folder)
    return folder


def save_ip_adapter(file: Path, model: Path, seed: int = 0, *, plus: bool = False) -> Path:
    """An IP-Adapter for a model's UNet, for the encoder of ``save_image_encoder``.

    Args:
        file: where to.
        model: folder of the model.
        seed: of its weights.
        plus: one that takes the encoder's hidden states.
    """
    unet = diffusers.UNet2DConditionModel.from_pretrained(model, subfolder="unet")
    tokens = unet.config.cross_attention_dim
    torch.manual_seed(seed)
    weights = {
        "image_proj.proj.weight": torch.randn(4 * tokens, 24), "image_proj.proj.bias": torch.randn(4 * tokens),
        "image_proj.norm.weight": torch.ones(tokens), "image_proj.norm.bias": torch.randn(tokens),
    }  # fmt: skip
    if plus:
        weights = {f"image_proj.{name}": value for name, value in _resampler(tokens).items()}
    cross = [name for name in unet.attn_processors if name.endswith("attn2.processor")]
    for number, name in enumerate(cross):
        width = unet.get_submodule(name.removesuffix(".processor")).to_k.out_features
        for which in ("k", "v"):
            weights[f"ip_adapter.{2 * number + 1}.to_{which}_ip.weight"] = torch.randn(width, tokens) * 0.5
    file.parent.mkdir(parents=True, exist_ok=True)
    save_file(weights, file)
    return file


def _resampler(tokens: int) -> dict[str, torch.Tensor]:
    """As the original code names it: four layers, with a head of 64."""
    inner, wide = 64, 32

    def norm(name: str, size: int) -> dict[str, torch.Tensor]:
        return {f"{name}.weight": torch.ones(size), f"{name}.bias": torch.randn(size)}

    found = {
        "latents": torch.randn(1, 4, wide),
        "proj_in.weight": torch.randn(wide, 32), "proj_in.bias": torch.randn(wide),
        "proj_out.weight": torch.randn(tokens, wide), "proj_out.bias": torch.randn(tokens),
        **norm("norm_out", tokens),
    }  # fmt: skip
    for layer in (f"layers.{number}" for number in range(4)):
        found |= {
            **norm(f"{layer}.0.norm1", wide), **norm(f"{layer}.0.norm2", wide), **norm(f"{layer}.1.0", wide),
            f"{layer}.0.to_q.weight": torch.randn(inner, wide), f"{layer}.0.to_kv.weight": torch.randn(2 * inner, wide),
            f"{layer}.0.to_out.weight": torch.randn(wide, inner), f"{layer}.1.1.weight": torch.randn(4 * wide, wide),
            f"{layer}.1.3.weight": torch.randn(wide, 4 * wide),
        }  # fmt: skip
    return found


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
