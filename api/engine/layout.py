"""The weights of convolutions in the order in which GPUs compute them: channels last.

Files hold (out, in, height, width). cuDNN's half precision kernels want the channels innermost and otherwise turn the
weights round at each call. A weight has as many bytes in either order, so it is turned round where it lies, on the
device, after it was copied as it is; for whoever uses it the shape stays, and the strides differ.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

_KINDS = ("UNet", "ControlNet", "Autoencoder", "VQModel", "T2IAdapter")
"""How the classes begin that consist of convolutions; the one at the door of a transformer is not worth it."""
_MARK = "_channels_last"


def turns(root: nn.Module, part: nn.Module, name: str) -> bool:
    """Whether a parameter of a diffusers module is a weight that may be turned round.

    Args:
        root: the whole module.
        part: that the parameter is of.
        name: of the parameter there.
    """
    return isinstance(part, nn.Conv2d) and name == "weight" and type(root).__name__.startswith(_KINDS)


def turned(tensor: torch.Tensor) -> torch.Tensor:
    """The memory of a contiguous (n, c, h, w) as one with its channels last. What is in it is not moved yet."""
    n, c, h, w = tensor.shape
    return tensor.view(n, h, w, c).permute(0, 3, 1, 2)


def turn(tensor: torch.Tensor) -> None:
    """Turn round what was copied byte by byte into a tensor of ``turned``; others are left as they are."""
    if tensor.dim() == 4 and not tensor.is_contiguous():
        tensor.copy_(tensor.permute(0, 2, 3, 1).view(tensor.shape).clone())


def mark(module: nn.Module) -> None:
    """Remember that weights of a module are turned round: those that come and go do not always show it."""
    vars(module)[_MARK] = True


def words(components: dict[str, Any]) -> tuple[str, ...]:
    """What ``$meta.numerics`` says of a model's components: other kernels round otherwise."""
    laid = any(isinstance(part, nn.Module) and _MARK in vars(part) for part in components.values())
    return ("channels_last",) if laid else ()
