"""Models whose weights stay in the host's memory, and come to the device for each of their calls.

``model``: one part of the model at a time. ``sequential``: one block of it. They come to a room on the device that is
made once for the model; nothing is copied back, the host's copy has not changed. The device's thread brings what it is
about to run, so nobody's weights leave while they are used.

The parameters themselves stay what they are and are bound to other memory, so whatever shares them (a job's view, a
clone with tiles switched on) comes along. What calls the bringing is a class over the module's own and no hook: hooks
hang on one object, and are left behind by ``forward`` called directly, as the executor does.

A module holds what it is a guest by, that holds the room, and nothing the other way: where objects hold each other in a
ring, their memory stays until the garbage collector comes by.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import nn
from torch.utils._pytree import tree_map_only

from api.engine import skeletons
from api.engine.blocks import Layout, Load, of_module, of_skeleton
from api.engine.device import Device
from api.engine.parts import HostPart, PartSpec
from api.engine.reading import BufferPart
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
        return f"{self.folder}@{self.revision}:{self.precision}"

    @property
    def plain(self) -> ModelRef:
        """The same model held as it is."""
        return ModelRef(self.model_id, self.revision, self.precision, self.folder)


def held_as(ref: ModelRef, mode: str) -> ModelRef:
    """A model held in a way: ``full``, ``model`` or ``sequential``."""
    if mode == "full":
        return ref
    return Offloaded(ref.model_id, ref.revision, ref.precision, ref.folder, mode)


class Carrier:
    """Copies to the device, on CUDA beside what it computes.

    Args:
        device: where to.
    """

    def __init__(self, device: Device) -> None:
        self.device = device
        self._stream = torch.cuda.Stream(device.torch) if device.is_cuda else None
        self.ahead = self._stream is not None
        """Whether a copy and a computation go on at once, so that it pays to bring a block before it is called."""

    def own(self, place: torch.Tensor) -> torch.Tensor:
        """Keep memory from being given to another before the last copy to it is done."""
        if self._stream is not None:
            place.record_stream(self._stream)
        return place

    def start(self, copies: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> Any:
        """Have (to, from) pairs copied once all that the device was told before is done.

        Returns:
            To be given to ``wait``.
        """
        if self._stream is None:
            for there, here in copies:
                there.copy_(here)
            return None
        self._stream.wait_stream(torch.cuda.current_stream(self.device.torch))
        with torch.cuda.stream(self._stream):
            for there, here in copies:
                there.copy_(here, non_blocking=True)
            return self._stream.record_event()

    def wait(self, copied: Any) -> None:
        """What the device is told from now on comes after these copies."""
        if copied is not None:
            torch.cuda.current_stream(self.device.torch).wait_event(copied)


_T = TypeVar("_T")


def _of(reference: weakref.ref[_T] | None) -> _T | None:
    return None if reference is None else reference()


class _Bound:
    """The weights of a load, and where they are now.

    Args:
        load: which.
        parameters: by the first name.
        host: the same, in the host's memory.
        flat: the part's buffer there; None: it has none.
    """

    def __init__(
        self,
        load: Load,
        parameters: Mapping[str, nn.Parameter],
        host: Mapping[str, torch.Tensor],
        flat: torch.Tensor | None,
    ) -> None:
        self.size = load.size
        self._load = load
        self._flat = flat
        self._pairs = [(parameters[weight.names[0]], host[weight.names[0]]) for weight in load.weights]
        self._views: dict[int, list[torch.Tensor]] = {}

    def copies(self, place: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """What has to be copied to bring them to a place."""
        begin = self._load.begin
        if begin is not None and self._flat is not None:
            length = min(self.size, len(self._flat) - begin)
            return [(place[:length], self._flat[begin : begin + length])]
        return [(there, here) for there, (_, here) in zip(self._at(place), self._pairs, strict=True)]

    def bind(self, place: torch.Tensor) -> None:
        """From now on the weights are those at this place."""
        for (parameter, _), there in zip(self._pairs, self._at(place), strict=True):
            parameter.data = there

    def leave(self) -> None:
        """From now on they are those in the host's memory."""
        for parameter, here in self._pairs:
            parameter.data = here

    def _at(self, place: torch.Tensor) -> list[torch.Tensor]:
        # a room has few places, and a part over a thousand weights
        known = self._views.get(place.data_ptr())
        if known is None:
            known = self._views[place.data_ptr()] = [
                place[at : at + weight.bytes].view(weight.dtype).view(weight.shape)
                for weight, at in zip(self._load.weights, self._load.at, strict=True)
            ]
        return known


class Room:
    """Memory on the device that the parts of one model take turns at.

    Args:
        size: bytes.
        carrier: brings them.
    """

    def __init__(self, size: int, carrier: Carrier) -> None:
        self.flat = carrier.own(torch.empty(size, dtype=torch.uint8, device=carrier.device.torch))
        self.carrier = carrier
        self._guest: weakref.ref[Guest] | None = None

    @property
    def guest(self) -> Guest | None:
        """The part that is there."""
        return _of(self._guest)

    def bring(self, guest: Guest) -> None:
        """Have a part there, and the one that was there leave."""
        if (other := self.guest) is guest:
            return
        if other is not None:
            other.leave()
        self._guest = weakref.ref(guest)
        guest.come()

    def apart(self, value: Any) -> Any:
        """What a call returns, with nothing in it that is a weight: others come to the same memory."""
        mine = self.flat.untyped_storage().data_ptr()

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            return tensor.clone() if tensor.untyped_storage().data_ptr() == mine else tensor

        return tree_map_only(torch.Tensor, keep, value)


class Guest:
    """A part that comes to a room: as a whole, or what it needs all the time and then block by block.

    Args:
        room: where to.
        rest: what comes first, and stays until the part leaves.
    """

    def __init__(self, room: Room, rest: _Bound) -> None:
        self.room = room
        self._rest = rest
        self._places: list[torch.Tensor] = []
        self._in_place: list[weakref.ref[Block] | None] = []
        self._last: weakref.ref[Block] | None = None
        self.active: Block | None = None
        self.calls = 0

    def __deepcopy__(self, memo: Any) -> Guest:
        return self  # clones have the same weights

    def divide(self, largest: int, count: int) -> None:
        """Make places for so many blocks behind the rest."""
        begin = self._rest.size
        self._places = [self.room.flat[begin + n * largest : begin + (n + 1) * largest] for n in range(count)]
        self._in_place = [None] * count

    @contextlib.contextmanager
    def present(self) -> Iterator[None]:
        """Be there for a call."""
        self.room.bring(self)
        self.calls += 1
        try:
            yield
        finally:
            self.calls -= 1

    def come(self) -> None:
        """Take the room."""
        place = self.room.flat
        copied = self.room.carrier.start(self._rest.copies(place))
        self._rest.bind(place)
        self.room.carrier.wait(copied)

    def leave(self) -> None:
        """Leave the room to another."""
        self._rest.leave()
        for place in self._in_place:
            if (block := _of(place)) is not None:
                block.leave()
        self._in_place = [None] * len(self._places)
        self._last = None

    def enter(self, block: Block) -> None:
        """A block is about to be run."""
        if self.active is not None or not self.calls or self.room.guest is not self:
            raise RuntimeError("a block of an offloaded model was called from outside of it")
        if block.place is None:
            self._fetch(block)
        self.room.carrier.wait(block.copied)
        self.active = block
        if (last := _of(self._last)) is not None and last is not block:
            last.after = weakref.ref(block)
        self._last = weakref.ref(block)
        if len(self._places) > 1 and (following := _of(block.after)) is not None and following.place is None:
            self._fetch(following)

    def _fetch(self, block: Block) -> None:
        """Have a block brought to the place of one that does not run."""
        number = next(n for n, other in enumerate(self._in_place) if other is None or _of(other) is not self.active)
        if (other := _of(self._in_place[number])) is not None:
            other.leave()
        self._in_place[number] = weakref.ref(block)
        block.come(self._places[number], self.room.carrier)


class Block:
    """Some modules of a part, which come when they are called.

    Args:
        guest: the part.
        bound: its weights.
    """

    def __init__(self, guest: Guest, bound: _Bound) -> None:
        self._guest = guest
        self._bound = bound
        self.place: torch.Tensor | None = None
        self.copied: Any = None
        self.after: weakref.ref[Block] | None = None
        """What was called next the last time."""

    def __deepcopy__(self, memo: Any) -> Block:
        return self

    @contextlib.contextmanager
    def present(self) -> Iterator[None]:
        """Be there for a call."""
        self._guest.enter(self)
        try:
            yield
        finally:
            self._guest.active = None

    def come(self, place: torch.Tensor, carrier: Carrier) -> None:
        """Be brought to a place."""
        self.copied = carrier.start(self._bound.copies(place))
        self._bound.bind(place)
        self.place = place

    def leave(self) -> None:
        """Leave the place to another."""
        self._bound.leave()
        self.place = None


# --- making one ---


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
            while len(self._layouts) >= _KEPT:
                del self._layouts[next(iter(self._layouts))]
            known = self._layouts[spec.architecture] = of_skeleton(self._skeleton(spec))
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

        def bound(load: Load) -> _Bound:
            return _Bound(load, parameters, data, flat)

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
