"""What a job holds in place of the modules and tokenizers that it shares with others.

A module's view shares all parameters, buffers and submodules, and hands its calls to the executor. A tokenizer's view
takes turns: tokenizers keep padding and truncation as state between two of their own lines, and two threads at once
get wrong lengths, or another prompt's.
"""

from __future__ import annotations

import copy
import functools
import threading
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from api.engine.executor import Executor, Ticket

_METHODS = ("forward", "encode", "decode", "get_text_features", "get_image_features")
"""What pipelines call on modules and what computes on the device."""

_CODECS = ("encode", "decode")
"""Methods of an autoencoder, which may be held in another precision than the rest."""


def view(part: Any, executor: Executor, ticket: Ticket) -> Any:
    """The view of one component for one job; what is neither module nor tokenizer is given as it is."""
    if not isinstance(part, nn.Module):
        return part
    shallow = copy.copy(part)
    # pipelines cast their VAE up and back around a call; weights that others use stay what they are
    object.__setattr__(shallow, "to", lambda *args, **kwargs: shallow)
    for name in _METHODS:
        method = getattr(part, name, None)
        if callable(method):
            # past nn.Module's own setter, which looks into every value
            object.__setattr__(shallow, name, _handed_over(executor, ticket, method))
    return shallow


def _handed_over(executor: Executor, ticket: Ticket, method: Any) -> Any:
    dtype = getattr(method.__self__, "dtype", None)

    def cast(value: Any) -> Any:
        floating = isinstance(value, torch.Tensor) and value.is_floating_point()
        return value.to(dtype) if floating and value.dtype != dtype else value

    @functools.wraps(method)
    def call(*args: Any, **kwargs: Any) -> Any:
        if method.__name__ in _CODECS:
            args, kwargs = tuple(map(cast, args)), {name: cast(value) for name, value in kwargs.items()}
        return executor.run(ticket, method, args, kwargs)

    return call


def clone(module: nn.Module) -> nn.Module:
    """A module tree of its own over the same parameters and buffers: what is switched on one is not on the other."""
    shared = {id(tensor): tensor for tensor in [*module.parameters(), *module.buffers()]}
    return copy.deepcopy(module, shared)


def locked(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """The same tokenizer, for several threads."""
    cls = type(tokenizer)
    lock = threading.RLock()

    def taking_turns(name: str) -> Any:
        method = getattr(cls, name)

        @functools.wraps(method)
        def call(self: Any, *args: Any, **kwargs: Any) -> Any:
            with lock:
                return method(self, *args, **kwargs)

        return call

    methods = ("__call__", "encode", "decode", "batch_decode", "tokenize", "pad", "apply_chat_template")
    body = {name: taking_turns(name) for name in methods if hasattr(cls, name)}
    # a class of the same name: pipelines compare and save names
    turned = copy.copy(tokenizer)
    turned.__class__ = type(cls.__name__, (cls,), {"__module__": cls.__module__, **body})
    return turned
