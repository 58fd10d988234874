"""LoRAs and textual inversions with random weights, in the formats that they come in."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from api.models.manifest import sha256_of
from api.schema.generation import Inversion, Lora

Halves = dict[str, tuple[torch.Tensor, torch.Tensor]]
"""``down`` and ``up`` by the module's name, ``unet.…`` or ``text_encoder.…``."""

UNET = ("to_q", "to_k", "to_v", "to_out.0", "conv1", "proj_in", "ff.net.2")
TEXT = ("q_proj", "v_proj", "fc1")


def random_halves(components: dict[str, Any], seed: int, rank: int = 4, size: float = 0.2) -> Halves:
    """A LoRA for every layer of UNet and text encoder that is often trained."""
    generator = torch.Generator().manual_seed(seed)
    found: Halves = {}
    for component, ends in (("unet", UNET), ("transformer", UNET), ("text_encoder", TEXT)):
        for name, module in components[component].named_modules() if component in components else ():
            if name.endswith(ends) and hasattr(module, "weight"):
                weight = module.weight
                kernel = weight.shape[2:]
                down = torch.randn(rank, weight.shape[1], *kernel, generator=generator)
                up = torch.randn(weight.shape[0], rank, *([1] * len(kernel)), generator=generator) * size
                found[f"{component}.{name}"] = (down / down[0].numel() ** 0.5, up)
    return found


def save_peft(path: Path, halves: Halves) -> Path:
    """As diffusers saves today."""
    tensors = {f"{name}.lora_A.weight": down for name, (down, _) in halves.items()}
    tensors |= {f"{name}.lora_B.weight": up for name, (_, up) in halves.items()}
    save_file(tensors, path, {"format": "pt"})
    return path


def save_kohya(path: Path, halves: Halves, alpha: float, more: Sequence[str] = ()) -> Path:
    """As kohya's trainer saves; ``more``: names of tensors that nobody knows."""
    tensors = {name: torch.zeros(3) for name in more}
    for name, (down, up) in halves.items():
        component, _, module = name.partition(".")
        prefix = "lora_unet_" if component == "unet" else "lora_te_text_model_"
        layer = prefix + module.removeprefix("text_model.").replace(".", "_")
        tensors[f"{layer}.lora_down.weight"], tensors[f"{layer}.lora_up.weight"] = down, up
        tensors[f"{layer}.alpha"] = torch.tensor(alpha)
    save_file(tensors, path, {"ss_network_module": "networks.lora"})
    return path


def lora(path: Path, scale: float = 1.0) -> Lora:
    return Lora(path.name, str(path), sha256_of(path), scale)


def inversion(path: Path, token: str) -> Inversion:
    return Inversion(path.name, str(path), sha256_of(path), token)
