"""Which layers of which parts are quantized, and to what.

The weights of linear layers, as nearly all of a transformer is; convolutions stay, and with them most of a UNet's bytes
that are not attention. Held back from it is what is small, or costs quality out of proportion:

- Whatever is not in one of a model's lists of equal blocks: embeddings of patches, texts and time, and the first and
  last projections. What goes wrong there goes wrong in every pixel, and they are a hundredth of the bytes (the
  ``modules_to_not_convert`` of diffusers' own recipes name the same ones; SmoothQuant, arXiv:2211.10438, and
  Q-Diffusion, arXiv:2302.04304, keep first and last layers).
- Layers of few weights: nothing is won by them.
- Layers that are held in fp32, as T5's ``wo`` is beside fp16: their library says that they need it.
- Autoencoders, which show in every pixel, and ControlNets and small text encoders such as CLIP's, which are small.

The kinds:

``int8``
    Weights alone, a scale for each row; they are multiplied in what the model computes in. On cards of every
    generation. Activations stay as they are: to quantize them costs more passes over memory than it saves unless it is
    compiled, and shows in images.
``fp8``
    ``float8_e4m3fn``, a scale for each row. In bf16 on cards of compute capability 8.9 and above (Ada, Hopper,
    Blackwell) activations are quantized as well, a scale for each of their own rows, and multiplied by the tensor cores
    of fp8; elsewhere weights alone. Never a scale for a whole tensor: it would have the rows of other jobs decide over
    one's own. Layers of modulation and embedding keep their activations: these are one row for an image, and steer all
    of it.
``nf4``
    Four bits on the quantiles of a normal distribution, a scale for every 64 (QLoRA, arXiv:2305.14314), by
    bitsandbytes.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel

BLOCK = 64
"""Weights of one scale of nf4."""
_MULTIPLES = {"int8": 1, "fp8": 16, "nf4": BLOCK}
"""What the sides of a weight are multiples of: what the kernels of each kind take."""
_DENOISER = re.compile(r"transformer(_\d+)?|unet(_\d+)?|prior|decoder|image_unet")
_TEXT = re.compile(r"text_encoder(_\d+)?|language_model|mllm")
_STEERING = re.compile(r"norm\w*|(\w+_)?mod(ulation)?|adaln\w*|\w*emb(ed\w*)?|time\w*", re.IGNORECASE)
_COMPUTES_FP8 = (8, 9)


@dataclass(frozen=True)
class Rule:
    """Sizes from which something is quantized.

    Attributes:
        layer: weights of a layer.
        text: weights of all such layers of a text encoder: T5-XXL, Qwen and Gemma have billions, CLIP's at most 0.7.
    """

    layer: int = 2**18
    text: int = 10**9


RULE = Rule()


def layers(name: str, module: nn.Module, kind: str, plain: Collection[str], rule: Rule = RULE) -> list[str]:
    """The linear layers of a component that are quantized, by their names in it.

    Args:
        name: of the component in its pipeline.
        module: it, without weights.
        kind: ``int8``, ``fp8`` or ``nf4``.
        plain: the names of the tensors in it that are held in what the model computes in.
        rule: from which sizes.
    """
    is_text = _TEXT.fullmatch(name) is not None and isinstance(module, PreTrainedModel)
    if not is_text and not _DENOISER.fullmatch(name):
        return []
    blocks = tuple(f"{path}." for path, part in module.named_modules() if isinstance(part, nn.ModuleList))
    seen: dict[int, int] = {}
    for part in module.modules():
        for parameter in part._parameters.values():
            if parameter is not None:
                seen[id(parameter)] = seen.get(id(parameter), 0) + 1
    found = [
        (path, layer.weight.numel())
        for path, layer in module.named_modules()
        if type(layer) is nn.Linear
        and path.startswith(blocks)
        and layer.weight.numel() >= rule.layer
        and f"{path}.weight" in plain
        and seen[id(layer.weight)] == 1  # what is tied is a table as well
        and all(side % _MULTIPLES[kind] == 0 for side in _sides(layer, kind))
    ]
    if is_text and sum(size for _, size in found) < rule.text:
        return []
    return [path for path, _ in found]


def _sides(layer: nn.Linear, kind: str) -> tuple[int, ...]:
    return (layer.in_features,) if kind == "nf4" else (layer.in_features, layer.out_features)


def steers(path: str) -> bool:
    """Whether a layer makes what modulates others, by its name: its input is one row for an image."""
    return any(_STEERING.fullmatch(step) for step in path.split("."))


def computes_fp8(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether activations are quantized to fp8 as well: what the tensor cores multiply gives bf16."""
    if device.type != "cuda" or dtype != torch.bfloat16:
        return False
    capability: tuple[int, int] = torch.cuda.get_device_capability(device)
    return capability >= _COMPUTES_FP8


def word(kind: str, device: torch.device, dtype: torch.dtype) -> str:
    """What ``$meta.numerics`` says of a kind: cards that compute in fp8 give other pixels than those that do not."""
    return "fp8+activations" if kind == "fp8" and computes_fp8(device, dtype) else kind
