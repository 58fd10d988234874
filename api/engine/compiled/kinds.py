"""What compiled code of a block depends on: the structure of the block, and all of a call but the tensors' content.

Two blocks of one structure, of whatever model, run the same code over their own weights; so do two calls of one kind.
"""

from __future__ import annotations

import enum
import hashlib
import inspect
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import nn

ROWS = frozenset(
    {
        "hidden_states",
        "encoder_hidden_states",
        "attention_mask",
        "encoder_attention_mask",
        "encoder_hidden_states_mask",
        "temb",
        "timestep",
        "class_labels",
        "adaln_input",
        "temb_mod",
        "temb_mod_img",
        "temb_mod_txt",
        "temb_mod_params",
        "temb_mod_params_img",
        "temb_mod_params_txt",
        "conditioning_embedding",
    }
)
"""Arguments of diffusers' blocks that have a row for each sample, or one for all of them."""
SAME = frozenset({"image_rotary_emb", "rotary_emb", "freqs_cis", "freqs"})
"""Those that have none: of one shape for any number of rows."""
_PLAIN = (bool, int, float, str, type(None))
_INSIDE = frozenset(vars(nn.Module())) | {"_internal_dict"}
"""What every module has; a configuration says again what the attributes say."""

Leaf: TypeAlias = tuple[Any, ...]


class Unsuited(Exception):
    """A block, or a call of it, of which no compiled code is made; the text says why."""


class Seen(NamedTuple):
    """A call of a block, taken apart.

    Attributes:
        rows: samples in it.
        spec: what its code depends on beside the block; the same for every number of rows.
        tensors: in their order.
        dynamic: for each of them, whether it has a row for each sample.
    """

    rows: int
    spec: Leaf
    tensors: list[torch.Tensor]
    dynamic: list[bool]


def structure(block: nn.Module) -> str:
    """A digest of everything about a block but its weights' content.

    Raises:
        Unsuited: there is something in it that cannot be told.
    """
    text: list[str] = []
    _tell_module(block, text)
    return hashlib.sha256("\n".join(text).encode()).hexdigest()


def look(function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Seen:
    """Take a call apart.

    Args:
        function: ``forward`` of the block's class.
        args: without the block itself.
        kwargs: of the call.

    Raises:
        Unsuited: it has arguments that are not known.
    """
    named = dict(zip(_names(function), args, strict=False)) | dict(kwargs)
    first = named.get("hidden_states")
    if not isinstance(first, torch.Tensor) or first.dim() == 0:
        raise Unsuited("it has no hidden_states")
    rows, tensors, dynamic = first.shape[0], list[torch.Tensor](), list[bool]()
    spec = tuple((name, _leaf(name, named[name], rows, tensors, dynamic)) for name in sorted(named))
    return Seen(rows, spec, tensors, dynamic)


def build(spec: Leaf, make: Callable[[str, tuple[int, ...], torch.dtype, bool], Any]) -> dict[str, Any]:
    """Keyword arguments of a call of this kind.

    Args:
        spec: of ``look``.
        make: gives a tensor for its argument's name, its shape but for rows, its dtype, and whether it has rows.
    """

    def value(name: str, leaf: Leaf) -> Any:
        kind = leaf[0]
        if kind in ("rows", "same"):
            return make(name, leaf[1], leaf[2], kind == "rows")
        if kind == "plain":
            return leaf[2]
        if kind == "dict":
            return {key: value(name, item) for key, item in leaf[1]}
        items = [value(name, item) for item in leaf[1]]
        return items if kind == "list" else tuple(items)

    return {name: value(name, leaf) for name, leaf in spec}


@lru_cache(maxsize=256)
def _names(function: Callable[..., Any]) -> tuple[str, ...]:
    return tuple(inspect.signature(function).parameters)[1:]


def _leaf(name: str, value: Any, rows: int, tensors: list[torch.Tensor], dynamic: list[bool]) -> Leaf:
    if isinstance(value, torch.Tensor):
        has_rows = name in ROWS and value.dim() > 0 and value.shape[0] == rows
        if not has_rows and not (name in SAME or (name in ROWS and (value.dim() == 0 or value.shape[0] == 1))):
            raise Unsuited(f"{name} is a tensor that is not known")
        tensors.append(value if value.is_contiguous() else value.contiguous())
        dynamic.append(has_rows)
        shape = tuple(value.shape)
        return ("rows", shape[1:], value.dtype) if has_rows else ("same", shape, value.dtype)
    if isinstance(value, _PLAIN):
        return ("plain", type(value), value)
    if type(value) is dict:
        return ("dict", tuple((key, _leaf(name, value[key], rows, tensors, dynamic)) for key in sorted(value)))
    if type(value) in (list, tuple):
        return (type(value).__name__, tuple(_leaf(name, item, rows, tensors, dynamic) for item in value))
    raise Unsuited(f"{name} is a {type(value).__name__}")


def _tell_module(module: nn.Module, text: list[str]) -> None:
    if module.training:
        raise Unsuited("it is being trained")
    if any(vars(module)[name] for name in _INSIDE if name.endswith("_hooks") and name in vars(module)):
        raise Unsuited("it has hooks")
    text.append(f"{type(module).__module__}.{type(module).__qualname__}")
    for name, tensor in (*module._parameters.items(), *module._buffers.items()):
        text.append(f"{name}: {None if tensor is None else (tuple(tensor.shape), tensor.stride(), tensor.dtype)}")
    for name in sorted(set(vars(module)) - _INSIDE):
        text.append(f"{name}={_told(vars(module)[name], 0)}")
    for name, part in module._modules.items():
        text.append(f"{name}:")
        if part is not None:
            _tell_module(part, text)
    text.append(".")


def _told(value: Any, depth: int) -> str:
    """A value in a module, such as an attention processor, by its class and content."""
    if isinstance(value, (*_PLAIN, torch.dtype, torch.Size)):
        return repr(value)
    if isinstance(value, enum.Enum):
        return str(value)
    if depth > 4 or isinstance(value, torch.Tensor | nn.Module):
        raise Unsuited(f"it holds a {type(value).__name__}")
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{key!r}: {_told(item, depth + 1)}' for key, item in value.items())}}}"
    if isinstance(value, list | tuple | set | frozenset):
        items = [_told(item, depth + 1) for item in value]
        return f"{type(value).__name__}({', '.join(sorted(items) if isinstance(value, set | frozenset) else items)})"
    if isinstance(value, type) or inspect.isfunction(value) or inspect.isbuiltin(value):
        if "<locals>" in value.__qualname__:
            raise Unsuited(f"it holds {value.__qualname__}")
        return f"{value.__module__}.{value.__qualname__}"
    if not hasattr(value, "__dict__") or inspect.ismethod(value):
        raise Unsuited(f"it holds a {type(value).__name__}")
    return f"{type(value).__module__}.{type(value).__qualname__}{_told(vars(value), depth + 1)}"
