"""``scripts/bench sizes``: bytes of weights by model, precision and placement, and what fits on which card.

Arithmetic, from the architectures on ``meta``: nothing is measured and no GPU is needed. Activations come on top; they
depend on the size of the images.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import diffusers
import torch
from torch import nn

from api.engine.blocks import Layout, of_module
from api.engine.budgets import DEVICE_SHARE
from api.engine.convert.families import CONFIGS
from scripts.benchmarks.architectures import on_meta
from scripts.benchmarks.configurations import CLIP_G, CLIP_L, FLUX, SD35_LARGE, SD35_MEDIUM, T5_XXL, VAE_16

CARDS = (8, 16, 24, 80)
"""GiB."""
_DENOISERS = ("unet", "transformer")
_LARGE = ("T5EncoderModel",)
"""Text encoders whose linear layers are quantized, too."""
_PER_WEIGHT = {"16 bits": 2.0, "fp8, int8": 1.0, "nf4": 0.5 + 4 / 64}
"""Bytes; nf4 has a float32 scale for each 64 weights. The scales of the others are one for a row, and left out."""


@dataclass(frozen=True)
class Sizes:
    """Bytes of one model's weights on the device.

    Attributes:
        model: its name.
        weights: of what: ``16 bits``, ``fp8, int8`` or ``nf4``.
        parameters: how many it has.
        ways: bytes by how the weights are held; a quantized one is held as it is.
    """

    model: str
    weights: str
    parameters: int
    ways: dict[str, float]


def main(argv: Sequence[str]) -> int:
    """Print both tables."""
    if argv:
        print("scripts/bench sizes takes no arguments")
        return 2
    diffusers.utils.logging.set_verbosity_error()
    print("\n".join(tables()))
    return 0


def tables() -> list[str]:
    """Markdown."""
    found = sizes()
    lines = [
        "| model | weights | parameters | full | model | sequential |",
        "| --- | --- | ---: | ---: | ---: | ---: |",
    ]
    for each in found:
        held = " | ".join(f"{each.ways[way] / 1e9:.2f} GB" if way in each.ways else "" for way in _WAYS)
        lines.append(f"| {each.model} | {each.weights} | {each.parameters / 1e9:.2f} × 10⁹ | {held} |")
    lines += ["", f"| model | {' | '.join(f'{card} GB card' for card in CARDS)} |", f"| --- |{' --- |' * len(CARDS)}"]
    for model in dict.fromkeys(each.model for each in found):
        choices = " | ".join(choice([each for each in found if each.model == model], card) for card in CARDS)
        lines.append(f"| {model} | {choices} |")
    return lines


_WAYS = ("full", "model", "sequential")


def choice(found: Sequence[Sizes], card: int) -> str:
    """What keeps most of its speed and pixels of what fits in the share of a card that models get."""
    room = card * 2**30 * DEVICE_SHARE
    exact, *quantized = found
    if exact.ways["full"] <= room:
        return "as it is"
    names = [way for way in _WAYS[1:] if exact.ways[way] <= room]
    lossy = [each.weights for each in quantized if each.ways["full"] <= room]
    return (
        "; or lossily ".join(
            part for part in (f"`OFFLOAD={names[0]}`" if names else "", lossy[0] if lossy else "") if part
        )
        or "not at all"
    )


def sizes() -> list[Sizes]:
    """Of the models that docs/speed.md tells of."""
    found = []
    for model, parts in _models().items():
        modules = {
            name: on_meta(library, cls, config).to(torch.float16) for name, (library, cls, config) in parts.items()
        }
        parameters = sum(parameter.numel() for module in modules.values() for parameter in module.parameters())
        for weights, each in _PER_WEIGHT.items():
            if each == 2.0:
                found.append(Sizes(model, weights, parameters, _ways(modules)))
            else:
                full = sum(_quantized(name, module, each) for name, module in modules.items())
                found.append(Sizes(model, weights, parameters, {"full": full}))
    return found


def _ways(modules: dict[str, nn.Module]) -> dict[str, float]:
    """As ``Offloading.room`` has it: what does not come and go of each part, and the largest that comes."""
    layouts = [of_module(module, _bytes(module)) for module in modules.values()]
    small = sum(layout.small for layout in layouts)
    return {
        "full": float(sum(_bytes(module) for module in modules.values())),
        "model": float(small + max(layout.whole.size for layout in layouts)),
        "sequential": float(small + max(min(layout.whole.size, _in_blocks(layout)) for layout in layouts)),
    }


def _in_blocks(layout: Layout) -> int:
    return layout.rest.size + 2 * layout.block()


def _bytes(module: nn.Module) -> int:
    tensors = {id(tensor): tensor for tensor in (*module.parameters(), *module.buffers())}
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def _quantized(name: str, module: nn.Module, each: float) -> float:
    size = float(_bytes(module))
    if name in _DENOISERS or type(module).__name__ in _LARGE:
        linear = [layer for layer in module.modules() if isinstance(layer, nn.Linear)]
        size -= sum(layer.weight.numel() * (2.0 - each) for layer in linear)
    return size


def _models() -> dict[str, dict[str, tuple[str, str, dict[str, Any]]]]:
    clip_l, clip_g = ("transformers", "CLIPTextModel", CLIP_L), ("transformers", "CLIPTextModelWithProjection", CLIP_G)
    projected = ("transformers", "CLIPTextModelWithProjection", CLIP_L)
    t5, vae = ("transformers", "T5EncoderModel", T5_XXL), ("diffusers", "AutoencoderKL", VAE_16)

    def own(family: str) -> dict[str, tuple[str, str, dict[str, Any]]]:
        classes = {"unet": "UNet2DConditionModel", "vae": "AutoencoderKL"}
        return {
            name: ("diffusers", cls, json.loads((CONFIGS / family / name / "config.json").read_text()))
            for name, cls in classes.items()
        }

    sd3 = {"text_encoder": projected, "text_encoder_2": clip_g, "text_encoder_3": t5, "vae": vae}
    return {
        "SD 1.5": {**own("sd1"), "text_encoder": clip_l},
        "SDXL": {**own("sdxl"), "text_encoder": clip_l, "text_encoder_2": clip_g},
        "SD 3.5 medium": {"transformer": ("diffusers", "SD3Transformer2DModel", SD35_MEDIUM), **sd3},
        "SD 3.5 large": {"transformer": ("diffusers", "SD3Transformer2DModel", SD35_LARGE), **sd3},
        "FLUX.1": {
            "transformer": ("diffusers", "FluxTransformer2DModel", FLUX), "text_encoder": clip_l,
            "text_encoder_2": t5, "vae": vae,
        },
    }  # fmt: skip
