"""IP-Adapters: a denoiser that also looks at pictures, over the weights of the one that jobs share.

An adapter's weights go to a copy of the denoiser's tree, over the same parameters; the shared one is never written to.
Copies are kept for as long as the denoiser is, the most recently used ones: one for each set of adapters with their
weights, and over that one for each set of scales, so that requests with the same scales are merged.
"""

from __future__ import annotations

import threading
import weakref
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from safetensors import safe_open
from torch import nn
from transformers import CLIPImageProcessor

from api.engine.attention import same_as
from api.engine.cloning import clone
from api.errors import ApiError
from api.schema.generation import GenerationRequest, IpAdapter, for_each

_SETS, _SCALES = 4, 16
"""Copies that are kept of one denoiser."""
_GROUPS = ("image_proj", "ip_adapter")
_FIELD = "callInputs.ip_adapters"


@dataclass
class _Adapted:
    """A denoiser with a set of adapters, and with the same ones at other scales."""

    module: Any
    scaled: OrderedDict[tuple[float, ...], Any] = field(default_factory=OrderedDict)


_made: weakref.WeakKeyDictionary[nn.Module, OrderedDict[Any, _Adapted]] = weakref.WeakKeyDictionary()
_lock = threading.Lock()


def with_ip_adapters(components: dict[str, Any], adapters: Sequence[IpAdapter]) -> dict[str, Any]:
    """A model's components with IP-Adapters.

    Args:
        components: with an ``image_encoder``; none is changed.
        adapters: what a request asks for; empty: nothing is changed.

    Raises:
        ApiError: INVALID_INPUTS: an adapter was made for another kind of model.
    """
    if not adapters:
        return components
    changed = {**components, "unet": _adapted(components["unet"], adapters)}
    if components.get("feature_extractor") is None:
        size = components["image_encoder"].config.image_size
        changed["feature_extractor"] = CLIPImageProcessor(size=size, crop_size=size)
    return changed


def ip_arguments(request: GenerationRequest, pictures: dict[str, Any]) -> dict[str, Any]:
    """A request's pictures, those of its adapters in a list for each, as pipelines take them."""
    if not request.ip_adapters:
        return pictures
    return pictures | {"ip_adapter_image": for_each(request.ip_adapters, pictures["ip_adapter_image"])}


def clear() -> bool:
    """Forget the copies that no running job uses; whether there were any."""
    with _lock:
        there = any(_made.values())
        _made.clear()
    return there


def _adapted(unet: nn.Module, adapters: Sequence[IpAdapter]) -> nn.Module:
    files = tuple((adapter.file, adapter.revision) for adapter in adapters)
    scales = tuple(adapter.scale for adapter in adapters)
    with _lock:
        sets = _made.setdefault(unet, OrderedDict())
        if files not in sets:
            sets[files] = _Adapted(_loaded(unet, adapters))
        kept = _newest(sets, files, _SETS)
        if scales not in kept.scaled:
            kept.scaled[scales] = _scaled(kept.module, scales)
        module: nn.Module = _newest(kept.scaled, scales, _SCALES)
        return module


def _newest(known: OrderedDict[Any, Any], key: Any, most: int) -> Any:
    known.move_to_end(key)
    while len(known) > most:
        known.popitem(last=False)
    return known[key]


def _loaded(unet: Any, adapters: Sequence[IpAdapter]) -> nn.Module:
    own: Any = clone(unet)
    states = [_read(adapter, unet.dtype) for adapter in adapters]
    cross = sum(name.endswith("attn2.processor") for name in unet.attn_processors)
    for adapter, state in zip(adapters, states, strict=True):
        numbers = {name.partition(".")[0] for name in state["ip_adapter"]}
        if numbers != {str(2 * number + 1) for number in range(cross)}:
            what = f"it has weights for {len(numbers)} layers, the model has {cross}"
            raise _does_not_fit(adapter, what)
    vars(own)["to"] = lambda *args, **kwargs: own  # what is shared stays where it is, and as it is
    try:
        own._load_ip_adapter_weights(states, low_cpu_mem_usage=False)  # the other way patches torch process-wide
    except torch.OutOfMemoryError:
        raise
    except (LookupError, ArithmeticError, RuntimeError, ValueError, TypeError, AttributeError) as fault:
        raise _does_not_fit(adapters[0] if len(adapters) == 1 else None, str(fault)[:300]) from fault
    finally:
        del vars(own)["to"]
    same_as(unet, own)
    for new in (own.encoder_hid_proj, *own.attn_processors.values()):
        if isinstance(new, nn.Module):
            new.to(device=unet.device, dtype=unet.dtype).requires_grad_(False).eval()
    return own  # type: ignore[no-any-return]


def _scaled(module: Any, scales: tuple[float, ...]) -> nn.Module:
    own: Any = clone(module)
    for processor in own.attn_processors.values():
        if hasattr(processor, "to_k_ip"):
            processor.scale = list(scales)
    return own  # type: ignore[no-any-return]


def _read(adapter: IpAdapter, dtype: torch.dtype) -> dict[str, dict[str, torch.Tensor]]:
    state: dict[str, dict[str, torch.Tensor]] = {group: {} for group in _GROUPS}
    with safe_open(adapter.file, framework="pt", device="cpu") as file:
        for name in file.keys():  # noqa: SIM118 - it is no dictionary
            group, _, rest = name.partition(".")
            if group in state:
                state[group][rest] = file.get_tensor(name).to(dtype)
    return state


def _does_not_fit(adapter: IpAdapter | None, why: str) -> ApiError:
    which = adapter.file.rpartition("/")[2] if adapter else "One of them"
    return ApiError("INVALID_INPUTS", f"{which} was made for another kind of model: {why}.", field=_FIELD)
