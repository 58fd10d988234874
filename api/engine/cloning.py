"""Copies of modules over the same tensors, and what every module made here is given."""

from __future__ import annotations

import copy
import functools
from typing import Any

import torch
from torch import nn
from transformers import CLIPTextModel

_PLAIN = (bool, int, float, str, bytes, type(None), type, torch.dtype, torch.device, torch.Size)


def clone(module: nn.Module) -> nn.Module:
    """A module tree of its own over the same parameters and buffers: what is switched on one is not on the other."""
    return clone_with(module, {id(tensor): tensor for tensor in (*module.parameters(), *module.buffers())})


def clone_with(module: nn.Module, memo: dict[int, Any]) -> nn.Module:
    """``copy.deepcopy`` of a module, but that modules are known to be modules.

    An SDXL UNet has 21,000 empty dictionaries for hooks: general copying takes six times as long.

    Args:
        module: to copy.
        memo: what stands for what, by the ``id`` of the original; what is copied is added.
    """
    known: nn.Module | None = memo.get(id(module))
    if known is not None:
        return known
    copied = module.__class__.__new__(module.__class__)
    memo[id(module)] = copied
    below = {}
    for name, value in module.__dict__.items():
        kind = type(value)
        if kind in _PLAIN:
            below[name] = value
        elif name == "_modules":
            below[name] = kind((key, part if part is None else clone_with(part, memo)) for key, part in value.items())
        elif name in ("_parameters", "_buffers") or (kind in _EMPTY and not value):
            below[name] = kind(value)
        elif kind is tuple and all(type(item) in _PLAIN for item in value):
            below[name] = value
        else:
            below[name] = copy.deepcopy(value, memo)
    copied.__dict__.update(below)
    return copied


_EMPTY = frozenset({dict, set, list, type(nn.Module()._forward_hooks)})


def keep_text_model(module: nn.Module) -> None:
    """Give a CLIP text encoder the ``text_model`` that diffusers still reads for ``clip_skip`` and LoRA scales.

    transformers 5 moved its parts up a level. Looked up at the class: a module that held itself would stay in memory,
    with its weights, until the garbage collector comes by, and a copy of it would hold the original.
    """
    if isinstance(module, CLIPTextModel) and not hasattr(module, "text_model"):
        module.__class__ = _with_text_model(type(module))  # type: ignore[arg-type]


@functools.cache
def _with_text_model(cls: type[nn.Module]) -> type[nn.Module]:
    """A class of the same name: pipelines compare and save names, transformers finds what to record by them."""
    names = {"__module__": cls.__module__, "__qualname__": cls.__qualname__, "__doc__": cls.__doc__}
    return type(cls.__name__, (cls,), {**names, "text_model": property(lambda module: module)})
