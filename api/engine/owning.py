"""What a model has of its own of the parts that it shares with others.

Constructors of pipelines write to what they are given: they mend the settings of schedulers (SD 1.x), of the
autoencoder (upscalers) and of tokenizers (Sana, Lumina 2, HiDream). That is to count for the model that they are the
pipeline of, and for no other one that has the same part, nor for one whose weights the same module takes over later.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from typing import Any, TypeVar

from torch import nn
from transformers import PreTrainedTokenizerBase

_SETTINGS = ("config", "_internal_dict", "generation_config")
"""Where the two libraries keep a module's settings: objects that are written to, whatever their names say."""

_CONTAINERS = frozenset({dict, OrderedDict, list, set})

_T = TypeVar("_T")


def own(part: Any) -> Any:
    """A part for one model to change: the same weights, vocabulary and turns, with attributes of its own.

    Args:
        part: a module, or what has no weights: a tokenizer, processor, scheduler. It is not changed.
    """
    if isinstance(part, nn.Module):
        return _root(part)
    if isinstance(part, PreTrainedTokenizerBase):
        return _shallow(part)
    held = vars(part).values() if hasattr(part, "__dict__") else ()
    # in a processor, the tokenizer: its backend may be large, and is the one that turns are taken at
    memo = {id(value): _shallow(value) for value in held if isinstance(value, PreTrainedTokenizerBase)}
    if not memo:
        return copy.deepcopy(part)
    copied = _blank(part)
    vars(copied).update({name: copy.deepcopy(value, memo) for name, value in vars(part).items()})
    return copied


def shared_unless_changed(mine: Any, shared: nn.Module) -> Any:
    """The shared module where nothing was written to a model's own: the calls of several models are merged then.

    Args:
        mine: what a constructor has left of ``own(shared)``.
        shared: the module.
    """
    return mine if _is_changed(mine, shared) else shared


def _blank(part: _T) -> _T:
    # past __init__, and past the __reduce__ of tokenizers, which read their files again
    return object.__new__(type(part))


def _shallow(part: _T) -> _T:
    copied = _blank(part)
    vars(copied).update({name: _unfilled(value) for name, value in vars(part).items()})
    return copied


def _unfilled(value: Any) -> Any:
    return copy.copy(value) if type(value) in _CONTAINERS else value


def _root(module: nn.Module) -> nn.Module:
    """The same children, parameters and buffers under a root of its own."""
    copied = _shallow(module)
    for name, value in vars(copied).items():
        if name in _SETTINGS:
            vars(copied)[name] = copy.deepcopy(value)
        elif value is module:
            vars(copied)[name] = copied
    return copied


def _is_changed(mine: Any, shared: nn.Module) -> bool:
    if type(mine) is not type(shared) or vars(mine).keys() != vars(shared).keys():
        return True
    return any(
        _differs(name, value, mine if vars(shared)[name] is shared else vars(shared)[name])
        for name, value in vars(mine).items()
    )


def _differs(name: str, value: Any, before: Any) -> bool:
    if name in _SETTINGS:
        return bool(value != before) or getattr(value, "__dict__", None) != getattr(before, "__dict__", None)
    if type(value) is not type(before) or type(value) not in _CONTAINERS:
        return value is not before
    if isinstance(value, dict):
        return value.keys() != before.keys() or any(item is not before[key] for key, item in value.items())
    return bool(value != before)
