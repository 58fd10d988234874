"""Tiny upscalers, made on the fly: at random, and one that repeats each pixel."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from api.engine.spandrel_import import import_spandrel
from api.models.manifest import sha256_of
from api.schema.generation import ModelRef, Upscale

ROOM = 2**30


def esrgan(seed: int = 0, scale: int = 4, channels: int = 3, **more: Any) -> torch.nn.Module:
    """An RRDBNet of one block with eight features; it looks 18 pixels around at most."""
    import_spandrel()
    from spandrel.architectures.ESRGAN import ESRGAN

    torch.manual_seed(seed)
    wide = channels * more.get("shuffle_factor", 1) ** 2
    return _spread_out(ESRGAN(in_nc=wide, out_nc=channels, num_filters=8, num_blocks=1, scale=scale, **more), gain=0.8)


def compact(seed: int = 0, scale: int = 2, channels: int = 3) -> torch.nn.Module:
    """An SRVGGNetCompact of two convolutions with eight features; it looks 4 pixels around."""
    import_spandrel()
    from spandrel.architectures.Compact import Compact

    torch.manual_seed(seed)
    net = Compact(num_in_ch=channels, num_out_ch=channels, num_feat=8, num_conv=2, upscale=scale)
    return _spread_out(net, gain=0.6)


def swin(seed: int = 0) -> torch.nn.Module:
    """A SwinIR of two layers: it looks through windows, asks for 16 pixels at least, and is not to be given pieces."""
    import_spandrel()
    from spandrel.architectures.SwinIR import SwinIR

    torch.manual_seed(seed)
    how = {"img_size": 16, "window_size": 8, "mlp_ratio": 2, "upsampler": "pixelshuffle", "resi_connection": "1conv"}
    return SwinIR(upscale=2, in_chans=3, img_range=1.0, depths=[2, 2], embed_dim=12, num_heads=[2, 2], **how).eval()


def repeating(scale: int = 4) -> torch.nn.Module:
    """A compact network whose own part adds nothing: what is left is each pixel, repeated."""
    net = compact(scale=scale)
    for parameter in net.parameters():
        parameter.data.zero_()
    return net


def _spread_out(net: torch.nn.Module, gain: float) -> torch.nn.Module:
    """Weights that let the input through, so that what comes out is a picture and not one colour."""
    for name, parameter in net.named_parameters():
        if parameter.dim() == 4:
            torch.nn.init.kaiming_normal_(parameter, a=0.2)
            parameter.data.mul_(gain)
        elif name.endswith("bias"):
            parameter.data.uniform_(-0.05, 0.05)
    return net.eval()


def save(net: torch.nn.Module, path: Path) -> Path:
    """As a safetensors file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in net.state_dict().items()}, path)
    return path


def ref_of(path: Path, precision: str = "fp32") -> ModelRef:
    """What a worker knows it by."""
    return ModelRef(f"tiny/{path.name}", sha256_of(path), precision, str(path))


def upscale_by(
    path: Path, scale: float | None = None, tile: int = 256, most: int = ROOM, precision: str = "fp32"
) -> Upscale:
    return Upscale(ref_of(path, precision), scale, tile, most)


def plainly(path: Path, picture: np.ndarray) -> np.ndarray:
    """What spandrel itself makes of uint8 (H, W, C), called with the whole picture."""
    found = import_spandrel().MAIN_REGISTRY.load(load_file(path))
    given = torch.from_numpy(picture.copy()).permute(2, 0, 1)[None] / 255.0
    with torch.no_grad():
        made = found.eval()(given)
    return made[0].permute(1, 2, 0).mul(255).round().clamp(0, 255).to(torch.uint8).numpy()


def a_picture(height: int, width: int, channels: int = 3, seed: int = 0) -> np.ndarray:
    """Smooth colours with some noise on them; uint8 (H, W, C)."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:height, 0:width]
    waves = [np.sin(x / (5 + 3 * c) + seed) * np.cos(y / (7 + 2 * c)) for c in range(channels)]
    noise = rng.normal(0, 0.1, (height, width, channels))
    return ((np.stack(waves, 2) * 0.4 + 0.5 + noise).clip(0, 1) * 255).astype(np.uint8)
