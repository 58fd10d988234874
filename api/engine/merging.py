"""The rule of which module calls may run as one, and how they are put together and taken apart.

Two calls of one module are merged when everything about them is equal but the rows: the same arguments are given,
tensors that have a row for each sample agree in all other dimensions, timesteps become one for each row, tensors
without rows and plain values are equal. Which argument is of which kind is said by name, below; it is never guessed
from a first dimension that happens to fit. A call with an argument that the rule does not know runs alone.
"""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from diffusers.utils import BaseOutput
from transformers.utils import ModelOutput

# arguments of diffusers' denoisers, ControlNets and autoencoders, and of transformers' text and image encoders
PRIMARY = ("sample", "hidden_states", "input_ids", "pixel_values", "inputs_embeds", "z", "x")
"""The argument that says how many rows a call has: the first of these that it was given."""
ROWS = frozenset(PRIMARY) | {
    "encoder_hidden_states",
    "encoder_hidden_states_mask",
    "encoder_attention_mask",
    "attention_mask",
    "pooled_projections",
    "guidance",
    "class_labels",
    "timestep_cond",
    "text_embeds",
    "time_ids",
    "image_embeds",
    "resolution",
    "aspect_ratio",
    "controlnet_cond",
    "down_block_additional_residuals",
    "mid_block_additional_residual",
    "down_intrablock_additional_residuals",
    "block_controlnet_hidden_states",
    "controlnet_block_samples",
    "controlnet_single_block_samples",
    "added_time_ids",
}
"""Tensors, or lists of tensors, with a row for each sample."""
STEPS = frozenset({"timestep"})
"""One number for all rows, or one for each."""
SAME = frozenset({"img_ids", "txt_ids", "position_ids", "image_rotary_emb", "ofs"})
"""Tensors without rows, or tuples of them: equal in value, or the calls are not merged."""
SAME_NUMBERS = frozenset({"rope_interpolation_scale"})
"""Tuples of numbers that hold for all rows, such as the scales of LTX's three axes: equal, or not merged."""
MIXES = frozenset({"AutoencoderKLTemporalDecoder"})
"""Classes whose rows are frames of one video, which look at each other: their calls run alone, and whole."""
ROW_LISTS = frozenset({"img_shapes"})
"""Plain lists with an item for each row. The modules read the first and take the others for equal (Qwen's rotary
embedding warns of it and goes on): calls are merged only where all items of all of them are."""
UNUSED = frozenset({("AutoencoderKL", "generator"), ("AutoencoderTiny", "generator")})
"""Arguments that a class takes for the sake of others and does not read."""

FLOAT_STEPS = frozenset({"UNet2DConditionModel", "ControlNetModel"})
"""Classes that make float32 of their timesteps at once (``get_timestep_embedding``): a scheduler that counts in whole
numbers and one that does not are the same to them."""

_PLAIN = (bool, int, float, str, type(None), torch.dtype, torch.device)
_DIGEST = "_merging_digest"


class CannotSplit(Exception):
    """A module returned something that has no rows that could be told apart."""


@dataclass(frozen=True)
class Mergeable:
    """A call, seen by the rule.

    Attributes:
        rows: how many samples it has.
        key: calls with equal keys may be merged.
        arguments: by name.
        kinds: kind of each leaf of the arguments, by path.
    """

    rows: int
    key: Hashable
    arguments: Mapping[str, Any]
    kinds: Mapping[str, str] = field(repr=False)


def analyse(
    function: Callable[..., Any], owner: str, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> Mergeable | None:
    """Look at a call; None when it must run alone.

    Args:
        function: the bound method that is called; one with an attribute ``runs_alone`` does.
        owner: name of the module's class.
        args: positional arguments.
        kwargs: keyword arguments.
    """
    if getattr(function, "runs_alone", False) or owner in MIXES:
        return None
    arguments = _bind(function, owner, args, kwargs)
    if arguments is None:
        return None
    step = arguments.get("timestep")
    if owner in FLOAT_STEPS and isinstance(step, torch.Tensor) and not step.is_floating_point():
        arguments["timestep"] = step.to(torch.float32)
    primary = next((arguments[name] for name in PRIMARY if isinstance(arguments.get(name), torch.Tensor)), None)
    if primary is None or primary.dim() == 0 or primary.shape[0] == 0:
        return None  # nothing is shared by rows that are not there
    rows, kinds, parts = primary.shape[0], dict[str, str](), list[Hashable]()
    for name in sorted(arguments):
        part = _look(name, name, arguments[name], rows, kinds)
        if part is None:
            return None
        parts.append(part)
    return Mergeable(rows, tuple(parts), arguments, kinds)


def merge(calls: Sequence[Mergeable]) -> dict[str, Any]:
    """The keyword arguments of one call that does the work of several with equal keys."""
    if len(calls) == 1:
        return dict(calls[0].arguments)
    first = calls[0]
    return {
        name: _join(name, [call.arguments[name] for call in calls], [call.rows for call in calls], first.kinds)
        for name in first.arguments
    }


def take(call: Mergeable, start: int, stop: int) -> Mergeable:
    """The part of a call that is about some of its rows."""
    arguments = {
        name: _rows_of(name, value, start, stop, call.rows, call.kinds) for name, value in call.arguments.items()
    }
    return Mergeable(stop - start, call.key, arguments, call.kinds)


def split(output: Any, counts: Sequence[int]) -> list[Any]:
    """What each call would have returned alone. Rows are copied: a view would keep the whole batch in memory.

    Raises:
        CannotSplit: there is something in it that the rule does not know.
    """
    total = sum(counts)
    if isinstance(output, torch.Tensor):
        if output.dim() == 0 or output.shape[0] != total:
            raise CannotSplit(f"a tensor of shape {tuple(output.shape)} for {total} rows")
        return [part.clone() for part in output.split(list(counts))]
    if output is None or isinstance(output, _PLAIN):
        return [output] * len(counts)
    if isinstance(output, DiagonalGaussianDistribution):
        return [DiagonalGaussianDistribution(part, output.deterministic) for part in split(output.parameters, counts)]
    if isinstance(output, BaseOutput | ModelOutput):
        parts = {name: split(value, counts) for name, value in output.items()}
        return [type(output)(**{name: parts[name][i] for name in parts}) for i in range(len(counts))]
    if type(output) in (tuple, list):
        columns = [split(value, counts) for value in output]
        return [type(output)(column[i] for column in columns) for i in range(len(counts))]
    if type(output) is dict:
        named = {name: split(value, counts) for name, value in output.items()}
        return [{name: named[name][i] for name in named} for i in range(len(counts))]
    raise CannotSplit(f"a {type(output).__name__}")


def rejoin(outputs: Sequence[Any]) -> Any:
    """The inverse of ``split``: what one call would have returned that was run in parts.

    Raises:
        CannotSplit: as there.
    """
    first = outputs[0]
    if isinstance(first, torch.Tensor):
        return torch.cat(list(outputs))
    if first is None or isinstance(first, _PLAIN):
        return first
    if isinstance(first, DiagonalGaussianDistribution):
        return DiagonalGaussianDistribution(torch.cat([out.parameters for out in outputs]), first.deterministic)
    if isinstance(first, BaseOutput | ModelOutput):
        return type(first)(**{name: rejoin([out[name] for out in outputs]) for name in first})
    if type(first) in (tuple, list):
        return type(first)(rejoin(items) for items in zip(*outputs, strict=True))
    if type(first) is dict:
        return {name: rejoin([out[name] for out in outputs]) for name in first}
    raise CannotSplit(f"a {type(first).__name__}")


@lru_cache(maxsize=256)
def _signature(function: Callable[..., Any]) -> inspect.Signature:
    """Of a method's function, which lives as long as its class; others hold what they close over."""
    return inspect.signature(function)


def _bind(
    function: Callable[..., Any], owner: str, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> dict[str, Any] | None:
    """The arguments by name, those that are None by default left out."""
    of_class = getattr(function, "__func__", None)
    signature = _signature(of_class) if of_class else inspect.signature(function)
    try:
        bound = signature.bind(*((None,) if hasattr(function, "__func__") else ()), *args, **kwargs)
    except TypeError:
        return None  # the module itself says what is wrong
    arguments: dict[str, Any] = {}
    for name, value in list(bound.arguments.items())[1 if hasattr(function, "__func__") else 0 :]:
        kind = signature.parameters[name].kind
        if kind is inspect.Parameter.VAR_POSITIONAL:
            return None
        if kind is inspect.Parameter.VAR_KEYWORD:
            arguments.update(value)
        elif (owner, name) not in UNUSED:
            arguments[name] = value
    return arguments


def _look(path: str, name: str, value: Any, rows: int, kinds: dict[str, str]) -> Hashable | None:
    """The part of the key that is about one argument, or None when it is unknown."""
    if isinstance(value, torch.Tensor):
        return _look_at_tensor(path, name, value, rows, kinds)
    if name in STEPS and isinstance(value, int | float):
        kinds[path] = "number"
        return (path, "number", type(value))
    if isinstance(value, _PLAIN):
        kinds[path] = "plain"
        return (path, type(value), value)
    if name in ROW_LISTS and isinstance(value, list) and len(value) == rows:
        items = [_frozen(item) for item in value]
        if items[0] is None or items.count(items[0]) != rows:
            return None
        kinds[path] = "row list"
        return (path, "row list", items[0])
    if isinstance(value, dict):
        return _look_inside(
            path, [(str(key), str(key), value[key]) for key in sorted(value, key=str)], rows, kinds, dict
        )
    if isinstance(value, list | tuple):
        # a list of plain values may be one for each row: only what is known to have rows is looked into
        if name in SAME_NUMBERS and (numbers := _frozen(value)) is not None:
            kinds[path] = "plain"
            return (path, "plain", numbers)
        if not ((name in ROWS or name in SAME) and all(isinstance(item, torch.Tensor) for item in value)):
            return None
        return _look_inside(path, [(str(i), name, item) for i, item in enumerate(value)], rows, kinds, type(value))
    return None


def _frozen(value: Any) -> Hashable | None:
    """Nested lists of numbers as a key; None for anything else. A list and a tuple are not the same to a module."""
    if isinstance(value, int | float):
        return (type(value), value)
    if type(value) not in (list, tuple):
        return None
    items = tuple(map(_frozen, value))
    return None if None in items else (type(value), items)


def _look_inside(
    path: str, items: list[tuple[str, str, Any]], rows: int, kinds: dict[str, str], kind: type
) -> Hashable | None:
    parts: list[Hashable] = [path, kind]
    for index, name, item in items:
        part = _look(f"{path}.{index}", name, item, rows, kinds)
        if part is None:
            return None
        parts.append(part)
    return tuple(parts)


def _look_at_tensor(path: str, name: str, value: torch.Tensor, rows: int, kinds: dict[str, str]) -> Hashable | None:
    of_kind: Hashable
    if name in STEPS and (value.numel() == 1 or value.shape == (rows,)):
        kind, of_kind = "step", None
    elif name in ROWS and value.dim() and value.shape[0] == rows:
        kind, of_kind = "rows", tuple(value.shape[1:])
    elif name in SAME:
        kind, of_kind = "same", (tuple(value.shape), digest(value))
    else:
        return None
    kinds[path] = kind
    return (path, kind, of_kind, value.dtype, value.device)


def digest(value: torch.Tensor) -> str:
    """Of its content; kept with the tensor, so that a job that uses it in every step waits for the device once."""
    known = getattr(value, _DIGEST, None)
    if known is None or known[0] != value._version:
        content = value.detach().to("cpu").contiguous().view(torch.uint8).numpy().tobytes()
        known = (value._version, hashlib.sha1(content, usedforsecurity=False).hexdigest())
        setattr(value, _DIGEST, known)
    return str(known[1])


def _join(path: str, values: Sequence[Any], rows: Sequence[int], kinds: Mapping[str, str]) -> Any:
    first, kind = values[0], kinds.get(path)
    if kind == "rows":
        return torch.cat(list(values))
    if kind == "step":
        return torch.cat([value.reshape(-1).expand(count) for value, count in zip(values, rows, strict=True)])
    if kind == "number":
        numbers = [value for value, count in zip(values, rows, strict=True) for _ in range(count)]
        return torch.tensor(numbers, dtype=torch.float64 if isinstance(first, float) else torch.int64)
    if kind == "row list":
        return [item for value in values for item in value]
    if isinstance(first, dict):
        return {key: _join(f"{path}.{key}", [value[key] for value in values], rows, kinds) for key in first}
    if isinstance(first, list | tuple):
        joined = (_join(f"{path}.{i}", [value[i] for value in values], rows, kinds) for i in range(len(first)))
        return type(first)(joined)
    return first


def _rows_of(path: str, value: Any, start: int, stop: int, rows: int, kinds: Mapping[str, str]) -> Any:
    kind = kinds.get(path)
    if kind in ("rows", "row list") or (kind == "step" and value.shape == (rows,)):
        return value[start:stop]
    if isinstance(value, dict):
        return {key: _rows_of(f"{path}.{key}", item, start, stop, rows, kinds) for key, item in value.items()}
    if isinstance(value, list | tuple) and kind is None:
        return type(value)(_rows_of(f"{path}.{i}", item, start, stop, rows, kinds) for i, item in enumerate(value))
    return value
