"""Rooms on the device, and the weights that come to them from the host's memory for a call.

A module holds what it is a guest by, that holds the room, and nothing the other way: where objects hold each other in a
ring, their memory stays until the garbage collector comes by.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import nn
from torch.utils._pytree import tree_map_only

from api.engine.blocks import Load
from api.engine.device import Device
from api.engine.layout import turn, turned


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

    def start(self, copies: Sequence[tuple[torch.Tensor, torch.Tensor]], turning: Sequence[torch.Tensor] = ()) -> Any:
        """Have (to, from) pairs copied once all that the device was told before is done, and some turned round then.

        Returns:
            To be given to ``wait``.
        """
        if self._stream is None:
            for there, here in copies:
                there.copy_(here)
            for tensor in turning:
                turn(tensor)
            return None
        self._stream.wait_stream(torch.cuda.current_stream(self.device.torch))
        with torch.cuda.stream(self._stream):
            for there, here in copies:
                there.copy_(here, non_blocking=True)
            for tensor in turning:
                turn(tensor)
            return self._stream.record_event()

    def wait(self, copied: Any) -> None:
        """What the device is told from now on comes after these copies."""
        if copied is not None:
            torch.cuda.current_stream(self.device.torch).wait_event(copied)


_T = TypeVar("_T")


def _of(reference: weakref.ref[_T] | None) -> _T | None:
    return None if reference is None else reference()


class Bound:
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

    def turning(self, place: torch.Tensor) -> list[torch.Tensor]:
        """What is to be turned round when it is there: what was copied as one stretch of bytes."""
        if self._load.begin is None or self._flat is None:
            return []
        return [there for there, weight in zip(self._at(place), self._load.weights, strict=True) if weight.turned]

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
            plain = [
                place[at : at + weight.bytes].view(weight.dtype).view(weight.shape)
                for weight, at in zip(self._load.weights, self._load.at, strict=True)
            ]
            known = self._views[place.data_ptr()] = [
                turned(there) if weight.turned else there
                for there, weight in zip(plain, self._load.weights, strict=True)
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
        """Have a part there, and the one that was there leave.

        Raises:
            RuntimeError: that one is running.
        """
        if (other := self.guest) is guest:
            return
        if other is not None:
            if other.calls:
                raise RuntimeError("a part of an offloaded model was called by another one")
            other.leave()
        self._guest = None  # where a copy fails, nobody is there
        guest.come()
        self._guest = weakref.ref(guest)

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

    def __init__(self, room: Room, rest: Bound) -> None:
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
        copied = self.room.carrier.start(self._rest.copies(place), self._rest.turning(place))
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
        if (last := _of(self._last)) is not None and last is not block:
            last.after = weakref.ref(block)
        self._last = weakref.ref(block)
        if len(self._places) > 1 and (following := _of(block.after)) is not None and following.place is None:
            self._fetch(following, block)
        self.active = block

    def _fetch(self, block: Block, running: Block | None = None) -> None:
        """Have a block brought to the place of one that does not run."""
        number = next(n for n, other in enumerate(self._in_place) if other is None or _of(other) is not running)
        if (other := _of(self._in_place[number])) is not None:
            other.leave()
        self._in_place[number] = None  # where the copy fails, nobody is there
        block.come(self._places[number], self.room.carrier)
        self._in_place[number] = weakref.ref(block)


class Block:
    """Some modules of a part, which come when they are called.

    Args:
        guest: the part.
        bound: its weights.
    """

    def __init__(self, guest: Guest, bound: Bound) -> None:
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
        self.copied = carrier.start(self._bound.copies(place), self._bound.turning(place))
        self._bound.bind(place)
        self.place = place

    def leave(self) -> None:
        """Leave the place to another."""
        self._bound.leave()
        self.place = None
