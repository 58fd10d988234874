"""Which attention kernels a job uses.

diffusers keeps its kernels in a registry (``models/attention_dispatch.py``). Its ``set_attention_backend`` switches the
processors of the module that it is called on, and the whole process with them; processors of UNets it does not reach.
Here the switch is a class over the class of a processor, whose code is diffusers' own and finds another attention where
it looks for torch's or for the registry's. Only processors of a tree of its own over the shared weights have it.
"""

from __future__ import annotations

import functools
import logging
import threading
import types
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import ModelMixin
from diffusers.models import attention_dispatch as dispatch
from torch import nn

from api.engine.cloning import clone
from api.engine.device import is_fatal
from api.engine.loader import LoadedModel
from api.schema.attention import LOSSY, NATIVE

log = logging.getLogger("api.engine")

_BACKEND = "_attends_with"
_REMEMBERED = 4096
_NEAR = {True: 0.1, False: 0.02}
"""How far a kernel's result may be from torch's own, of its norm: of a lossy one, and of another in half precision."""
_ROWS, _HEADS = 128, 2

OnDevice = Callable[[Callable[[], Any]], Any]
"""Runs a function on the device's thread: torch's switches of kernels are the process's, and calls are made there."""


def components_with(
    model: LoadedModel, asked: str, settled: Mapping[torch.dtype, str], on_device: OnDevice
) -> tuple[dict[str, Any], str]:
    """The model's components with the wanted kernels, and what they really use.

    Autoencoders and text encoders stay with torch's own.

    Args:
        model: its own modules are shared by all jobs and never switched: others over the same weights are.
        asked: of ``schema.attention.ATTENTIONS``. What cannot be had falls back to ``sdpa``, and is logged once.
        settled: what ``auto`` is for each dtype; ``sdpa`` where it says nothing.
        on_device: see ``OnDevice``.
    """
    wanted = settled.get(model.dtype, NATIVE) if asked == "auto" else asked
    if wanted in (NATIVE, "native"):
        return model.components, NATIVE
    own = model.variants.get(wanted)
    if own is None:  # of two that are made at once one is used by all, so that their calls merge
        own = model.variants.setdefault(wanted, _switched(model, wanted, on_device))
    return (own, wanted) if own else (model.components, NATIVE)


def _switched(model: LoadedModel, wanted: str, on_device: OnDevice) -> dict[str, Any]:
    """Empty: none of the model's attention can be computed so."""
    found = {name: _sizes(part) for name, part in model.components.items() if _attends(part)}
    usable = {size: on_device(functools.partial(usable_for, wanted, *size)) for size in set().union(*found.values())}
    chosen = [name for name, sizes in found.items() if any(usable[size] for size in sizes)]
    if not chosen:
        if not usable:
            _tell(wanted, f"nothing in {model.ref.model_id} computes attention in a way that can be chosen")
        return {}
    own = {name: clone(model.components[name]) for name in chosen}
    for part in own.values():
        switch(part, wanted)
    return {**model.components, **own}


def _attends(part: Any) -> bool:
    return isinstance(part, ModelMixin) and not hasattr(part, "decode") and any(map(_switchable, _processors(part)))


def _processors(part: nn.Module) -> list[Any]:
    found = (getattr(module, "processor", None) for module in part.modules())
    return [processor for processor in found if callable(processor)]


def _sizes(part: nn.Module) -> set[tuple[torch.device, torch.dtype, int]]:
    """What decides whether there is a kernel: the device, the dtype, and the size of a head.

    An offloaded part says where it is computed, whose weights are elsewhere at the moment.
    """
    device, dtype = part.device, part.dtype
    found = set()
    for module in part.modules():
        heads, query = getattr(module, "heads", None), getattr(getattr(module, "to_q", None), "out_features", None)
        if isinstance(heads, int) and isinstance(query, int) and _switchable(getattr(module, "processor", None)):
            found.add((device, dtype, query // heads))
    return found


# --- a processor whose attention is another ---


def switch(part: nn.Module, backend: str) -> None:
    """Have all processors of a module compute attention by a backend. The module is the caller's alone."""
    for processor in _processors(part):
        if _switchable(processor):
            processor.__class__ = _with_backend(_own(type(processor)), backend)


def same_as(part: nn.Module, new: nn.Module) -> None:
    """Have processors that were given to a module attend as those of the module that it was made of do."""
    backend = next((found for p in _processors(part) if (found := getattr(type(p), _BACKEND, None))), None)
    if backend is not None:
        switch(new, backend)


def _own(cls: type) -> type:
    return cls.__base__ if _BACKEND in vars(cls) else cls  # type: ignore[return-value]


def _switchable(processor: Any) -> bool:
    call = _call_of(_own(type(processor)))
    names = set(call.__code__.co_names) if call else set()
    return "dispatch_attention_fn" in names or {"F", "scaled_dot_product_attention"} <= names


def _call_of(cls: type) -> types.FunctionType | None:
    found = next((vars(each)["__call__"] for each in cls.__mro__ if "__call__" in vars(each)), None)
    return found if isinstance(found, types.FunctionType) else None


@functools.cache
def _with_backend(cls: type, backend: str) -> type:
    """A class of the same name, made without arguments like the other: diffusers goes by both in some places."""
    call = _call_of(cls)
    assert call is not None  # it is ``_switchable``
    other = {"F": _Functional(backend), "dispatch_attention_fn": functools.partial(_dispatched, backend)}
    seen = {**call.__globals__, **other}
    own = types.FunctionType(call.__code__, seen, call.__name__, call.__defaults__, call.__closure__)
    own.__kwdefaults__ = call.__kwdefaults__
    names = {"__module__": cls.__module__, "__qualname__": cls.__qualname__, "__doc__": cls.__doc__}
    return type(cls.__name__, (cls,), {**names, "__call__": own, _BACKEND: backend})


class _Functional:
    """``torch.nn.functional`` with another attention.

    Args:
        backend: its name.
    """

    def __init__(self, backend: str) -> None:
        self._backend = backend

    def __getattr__(self, name: str) -> Any:
        return getattr(F, name)

    def scaled_dot_product_attention(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attn_mask: torch.Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        **more: Any,
    ) -> torch.Tensor:
        """As torch's, (batch, heads, rows, size), by the backend."""
        turned = (tensor.transpose(1, 2) for tensor in (query, key, value))
        given = {"attn_mask": attn_mask, "dropout_p": dropout_p, "is_causal": is_causal, **more}
        return _dispatched(self._backend, *turned, **given).transpose(1, 2)


_refused: dict[Any, None] = {}
_told: set[Any] = set()
_lock = threading.Lock()


def _dispatched(
    backend: str, /, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attn_mask: Any = None, **more: Any
) -> torch.Tensor:
    """``dispatch_attention_fn``: (batch, rows, heads, size), by a backend; by torch's own where it has no operator.

    Whether it has one is asked for each shape anew, whatever the number of rows in the batch: what other requests were
    refused never decides about this one.
    """
    given = {**more, "attn_mask": attn_mask}
    mask = None if attn_mask is None else (attn_mask.dtype, attn_mask.shape[1:])
    kind = backend, query.device, query.dtype, query.shape[1:], key.shape[1:], mask, given.get("is_causal")
    if kind not in _refused:
        try:
            return run(backend, query, key, value, **given)
        except Exception as fault:
            if isinstance(fault, torch.OutOfMemoryError) or is_fatal(fault):
                raise
            with _lock:
                if len(_refused) >= _REMEMBERED:
                    _refused.clear()
                _refused[kind] = None
            _tell(backend, str(fault))
    return run("native", query, key, value, **given)


def run(backend: str, /, *args: torch.Tensor, **given: Any) -> torch.Tensor:
    """A backend's own attention, (batch, rows, heads, size), or what it raises where it has no operator."""
    given = {**given, "backend": dispatch.AttentionBackendName("native" if backend == NATIVE else backend)}
    out: torch.Tensor = dispatch.dispatch_attention_fn(*args, **given)
    return out


# --- what there is ---


def missing(backend: str) -> str | None:
    """Why a backend cannot be used in this process at all; None: it can."""
    try:
        dispatch._check_attention_backend_requirements(dispatch.AttentionBackendName(backend))
    except (RuntimeError, ValueError) as fault:
        return str(fault)
    return None


def usable_for(backend: str, device: torch.device, dtype: torch.dtype, size: int, tell: bool = True) -> bool:
    """Whether a backend has an operator, which computes what torch's own does; what it has not is logged once.

    Run on the device's thread.

    Args:
        backend: its name.
        device: where.
        dtype: of the tensors.
        size: of a head.
        tell: log it.
    """
    kind = backend, device, dtype, size
    if kind not in _faults:
        _faults[kind] = missing(backend) or _fault_of(backend, device, dtype, size)
    why = _faults[kind]
    if why and tell:
        _tell(backend, why)
    return why is None


_faults: dict[Any, str | None] = {}


def _fault_of(backend: str, device: torch.device, dtype: torch.dtype, size: int) -> str | None:
    drawn = torch.randn(3, 1, _ROWS, _HEADS, size, generator=torch.Generator().manual_seed(0))
    query, key, value = drawn.to(device, dtype)
    what = f"{dtype} with heads of {size}".removeprefix("torch.")
    try:
        with torch.no_grad():
            right = run("native", query, key, value).float()
            away = float((run(backend, query, key, value).float() - right).norm() / right.norm())
    except torch.OutOfMemoryError:
        raise
    except Exception as fault:  # whatever a package says that was built for another device or torch
        return f"{what}: {fault}"
    near = _NEAR[backend in LOSSY]
    return None if away <= near else f"{what}: its result is {away:.3g} of the norm away from torch's own"


def _tell(backend: str, why: str) -> None:
    reason = " ".join(why.split())[:200]
    with _lock:
        known = (backend, reason) in _told
        if len(_told) < _REMEMBERED:
            _told.add((backend, reason))
    if not known:
        log.warning("attention %s was asked for and cannot be used (%s): sdpa instead", backend, reason)
