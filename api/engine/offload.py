"""Models whose weights stay in the host's memory, and come to the device for each of their calls.

``model``: one part of the model at a time. ``sequential``: one block of it. They come to a room on the device that is
made once for the model; nothing is copied back, the host's copy has not changed. The device's thread brings what it is
about to run, so nobody's weights leave while they are used.

The parameters themselves stay what they are and are bound to other memory, so whatever shares them (a job's view, a
clone with tiles switched on) comes along. What calls the bringing is a class over the module's own and no hook: hooks
hang on one object, and are left behind by ``forward`` called directly, as the executor does.
"""

from __future__ import annotations

import copy
import functools
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from api.engine import skeletons
from api.engine.blocks import Layout, Load, of_module, of_skeleton
from api.engine.device import Device
from api.engine.layout import mark
from api.engine.parts import HostPart, PartSpec
from api.engine.reading import BufferPart
from api.engine.rooms import Block, Bound, Carrier, Guest, Room
from api.engine.skeletons import Skeleton
from api.engine.views import METHODS
from api.schema.generation import ModelRef

_GUEST, _BLOCK, _DEVICE = "_offload_guest", "_offload_block", "_offload_device"
_KEPT = 64
"""Layouts that are remembered."""
_UNEVEN = 2**20
"""Bytes that a part which a library loads may take beyond what its files say."""


class Offloaded(ModelRef, frozen=True):
    """A model that is held in another way than as it is.

    Attributes:
        mode: ``model`` or ``sequential``.
    """

    mode: str = "model"

    @property
    def key(self) -> str:
        """The books know it apart from the same model held as it is."""
        return f"{self.full}#{self.mode}"

    @property
    def full(self) -> str:
        """The key of the same model held as it is."""
        return self.plain.key

    @property
    def plain(self) -> ModelRef:
        """The same model held as it is."""
        return ModelRef(self.model_id, self.revision, self.precision, self.folder, self.additions, self.quantize)


def held_as(ref: ModelRef, mode: str) -> ModelRef:
    """A model held in a way: ``full``, ``model`` or ``sequential``."""
    if mode == "full":
        return ref
    return Offloaded(ref.model_id, ref.revision, ref.precision, ref.folder, ref.additions, ref.quantize, mode)


class Offloading:
    """Makes offloaded models of parts in the host's memory.

    Args:
        device: that they come to.
        skeleton: gives the skeleton of a part that our own reader knows.
    """

    def __init__(self, device: Device, skeleton: Callable[[PartSpec], Skeleton]) -> None:
        self._device = device
        self._skeleton = skeleton
        self._carrier = Carrier(device)
        self._layouts: dict[str, Layout] = {}
        self._lock = threading.Lock()

    def room(self, specs: Sequence[PartSpec], mode: str) -> int:
        """Bytes that a model takes on the device, whichever of its parts runs.

        Args:
            specs: its parts.
            mode: ``model`` or ``sequential``.
        """
        unique = {spec.key: spec for spec in specs}.values()
        return self._shared(unique, mode) + sum(self._layout(s).small for s in unique if not s.by_library)

    def make(self, specs: Sequence[PartSpec], hosts: Mapping[str, HostPart], mode: str) -> dict[str, nn.Module]:
        """The modules of a model, by name; on the device's thread.

        Args:
            specs: its parts.
            hosts: their weights, by key. They are never written to.
            mode: ``model`` or ``sequential``.

        Raises:
            torch.OutOfMemoryError: there is no room on the device.
        """
        unique = {spec.key: spec for spec in specs}
        size = self._shared(unique.values(), mode)
        for host in hosts.values():
            if host.module is not None:  # of which nothing exact was known before
                size = max(size, of_module(host.module, host.bytes).whole.size)
        room = Room(size, self._carrier)
        made = {key: self._guest(spec, hosts[key], room, mode) for key, spec in unique.items()}
        return {spec.name: made[spec.key] for spec in specs}

    def _shared(self, specs: Any, mode: str) -> int:
        """Bytes of the room that the parts take turns at."""
        return max((self._needed(spec, mode) for spec in specs), default=0)

    def _needed(self, spec: PartSpec, mode: str) -> int:
        if spec.by_library:
            return spec.bytes + _UNEVEN
        layout = self._layout(spec)
        return layout.whole.size if mode == "model" else min(layout.whole.size, self._in_blocks(layout))

    def _in_blocks(self, layout: Layout) -> int:
        return layout.rest.size + self._places * layout.block()

    @property
    def _places(self) -> int:
        return 2 if self._carrier.ahead else 1

    def _layout(self, spec: PartSpec) -> Layout:
        known = self._layouts.get(spec.architecture)
        if known is None:
            known = of_skeleton(self._skeleton(spec), self._device.turns)
            with self._lock:  # asked from any thread
                while len(self._layouts) >= _KEPT:
                    del self._layouts[next(iter(self._layouts))]
                self._layouts[spec.architecture] = known
        return known

    def _guest(self, spec: PartSpec, host: HostPart, room: Room, mode: str) -> nn.Module:
        if host.module is None:
            layout, tensors = self._layout(spec), host.tensors
            module = skeletons.fill(self._skeleton(spec), tensors, self._device.torch)
        else:
            layout, module = of_module(host.module, host.bytes), _own(host.module)
            tensors = dict(host.module.named_parameters(remove_duplicate=False))
        flat = host.flat if isinstance(host, BufferPart) else None
        parameters = dict(module.named_parameters(remove_duplicate=False))
        data = {weight.names[0]: tensors[weight.names[0]].data for weight in layout.whole.weights}
        self._place_small(module, {id(parameters[name]) for name in data})

        def bound(load: Load) -> Bound:
            return Bound(load, parameters, data, flat)

        if layout.whole.size <= len(room.flat):
            guest = Guest(room, bound(layout.whole))
        else:
            guest = Guest(room, bound(layout.rest))
            guest.divide(layout.block(), self._places)
            for name, load in layout.blocks.items():
                block = module.get_submodule(name)
                vars(block)[_BLOCK] = Block(guest, bound(load))
                block.__class__ = _block_class(type(block))  # type: ignore[arg-type]
        for part in module.modules():
            if hasattr(type(part), "device"):
                vars(part)[_DEVICE] = self._device.torch
                part.__class__ = _device_class(type(part))  # type: ignore[arg-type]
        if any(weight.turned for weight in layout.whole.weights):
            mark(module)
        vars(module)[_GUEST] = guest
        module.__class__ = _guest_class(type(module))  # type: ignore[arg-type]
        return module

    def _place_small(self, module: nn.Module, coming: set[int]) -> None:
        """What does not come and go is on the device from now on."""
        there, seen = self._device.torch, dict[int, torch.Tensor]()
        for part in module.modules():
            for parameter in part._parameters.values():
                if parameter is not None and id(parameter) not in coming and id(parameter) not in seen:
                    parameter.data = parameter.data.to(there, copy=True)
                    seen[id(parameter)] = parameter
            for name, buffer in part._buffers.items():
                if buffer is not None and id(buffer) not in seen:
                    moved = buffer.detach().to(there, copy=True)
                    seen[id(buffer)] = seen[id(moved)] = moved
                if buffer is not None:
                    part._buffers[name] = seen[id(buffer)]


def _own(module: nn.Module) -> nn.Module:
    """A copy with parameters of its own over the same memory."""
    memo: dict[int, Any] = {id(p): nn.Parameter(p.detach(), False) for p in module.parameters()}
    memo |= {id(buffer): buffer.detach() for buffer in module.buffers()}
    return copy.deepcopy(module, memo)


# --- classes of their own ---


def _subclass(cls: type[nn.Module], body: dict[str, Any]) -> type[nn.Module]:
    """A class of the same name: pipelines compare and save names, transformers finds what to record by them."""
    names = {"__module__": cls.__module__, "__qualname__": cls.__qualname__, "__doc__": cls.__doc__}
    return type(cls.__name__, (cls,), {**names, **body})


@functools.cache
def _guest_class(cls: type[nn.Module]) -> type[nn.Module]:
    return _subclass(cls, {name: _as_guest(cls, name) for name in METHODS if callable(getattr(cls, name, None))})


def _as_guest(cls: type[nn.Module], name: str) -> Callable[..., Any]:
    method = getattr(cls, name)

    @functools.wraps(method)
    def call(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        guest: Guest = vars(self)[_GUEST]
        with guest.present():
            return guest.room.apart(method(self, *args, **kwargs))

    return call


@functools.cache
def _block_class(cls: type[nn.Module]) -> type[nn.Module]:
    forward = cls.forward

    @functools.wraps(forward)
    def call(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        with vars(self)[_BLOCK].present():
            return forward(self, *args, **kwargs)

    return _subclass(cls, {"forward": call})


@functools.cache
def _device_class(cls: type[nn.Module]) -> type[nn.Module]:
    """Pipelines and modules ask where a module is by its first parameter, which may be elsewhere at the moment."""
    return _subclass(cls, {"device": property(lambda self: vars(self)[_DEVICE])})
