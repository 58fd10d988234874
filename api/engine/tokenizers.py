"""Tokenizers for several threads.

They keep padding and truncation as state between two of their own lines: two threads at once get wrong lengths, or
another prompt's. Jobs take turns, whether they come to a tokenizer directly or through a processor that holds it.
"""

from __future__ import annotations

import copy
import functools
import threading
from collections.abc import Mapping
from typing import Any

from torch import nn
from transformers import PreTrainedTokenizerBase

_METHODS = ("__call__", "encode", "decode", "batch_decode", "tokenize", "pad", "apply_chat_template")


def taking_turns(components: Mapping[str, Any]) -> dict[str, Any]:
    """A model's components, where tokenizers, and processors that hold one, are used by one thread at a time.

    The state is in the tokenizer's backend: there is one lock for each of these. What takes turns already, because
    several models share it, is given as it is.
    """
    locks: dict[int, Any] = {}

    def lock_of(tokenizer: PreTrainedTokenizerBase) -> Any:
        return locks.setdefault(id(getattr(tokenizer, "_tokenizer", tokenizer)), threading.RLock())

    def turned(part: Any) -> Any:
        if getattr(type(part), "takes_turns", False):
            return part
        if isinstance(part, PreTrainedTokenizerBase):
            return _locked(part, lock_of(part))
        if isinstance(part, nn.Module) or not hasattr(part, "__dict__"):
            return part
        held = {name: value for name, value in vars(part).items() if isinstance(value, PreTrainedTokenizerBase)}
        for value in held.values():
            part = _locked(part, lock_of(value))
        for name, value in held.items():
            setattr(part, name, turned(value))
        return part

    return {name: turned(part) for name, part in components.items()}


def _locked(part: Any, lock: Any) -> Any:
    cls = type(part)

    def turn(name: str) -> Any:
        method = getattr(cls, name)

        @functools.wraps(method)
        def call(self: Any, *args: Any, **kwargs: Any) -> Any:
            with lock:
                return method(self, *args, **kwargs)

        return call

    body: dict[str, Any] = {name: turn(name) for name in _METHODS if hasattr(cls, name)}
    # a class of the same name: pipelines compare and save names
    turned = copy.copy(part)
    body |= {"__module__": cls.__module__, "takes_turns": True, "turn": lock}
    turned.__class__ = type(cls.__name__, (cls,), body)
    return turned
