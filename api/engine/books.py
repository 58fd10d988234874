"""The books of the tiers: parts, models, what is under way, and what they add up to. ``tiers`` keeps them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Protocol


class Piece(Protocol):
    """What the books must know of a part; ``PartSpec`` is one."""

    @property
    def key(self) -> str:
        """Equal for the same weights."""

    @property
    def architecture(self) -> str:
        """Equal for parts that can take each other's place."""

    @property
    def bytes(self) -> int:
        """In memory."""


class State(Enum):
    """Of a part in one tier."""

    ABSENT = "absent"
    COMING = "coming"
    """Being read into the host's memory, or copied onto the device."""
    HELD = "held"


class Turn(Enum):
    """What to do about a part that is to be in the host's memory."""

    READ = "read"
    """Read it; then say ``read_done`` or ``read_failed``."""
    HELD = "held"
    """It is there."""
    BUSY = "busy"
    """Another reads it."""
    FULL = "full"
    """There is no room until others are done."""


class NeverFits(Exception):
    """A model does not fit, whatever is evicted.

    Args:
        needed: bytes that it takes.
        limit: bytes there are for it.
        pinned: bytes of them that are taken by pinned models.
        tier: ``device`` or ``host``.
    """

    def __init__(self, needed: int, limit: int, pinned: int, tier: str) -> None:
        super().__init__(f"{needed} bytes do not fit in the {limit} of the {tier}, of which {pinned} are pinned")
        self.needed, self.limit, self.pinned, self.tier = needed, limit, pinned, tier


@dataclass(eq=False)
class Part:
    """A part's entry in the books.

    Attributes:
        host: its state in the host's memory.
        device: its state on the device.
        reader: somebody is reading it; else what is COMING to the host is a promise to one who will.
        owner: whose copy to the device is on its way.
        used: when a model with it was last used.
        models: those it belongs to.
        offloaded: models that need it in the host's memory, and bring it from there for each of their calls.
        promise: who has its bytes in the host's memory reserved, and will read it unless another does.
    """

    key: str
    architecture: str
    bytes: int
    host: State = State.ABSENT
    device: State = State.ABSENT
    reader: bool = False
    owner: Begun | None = None
    used: float = 0.0
    models: set[str] = field(default_factory=set)
    offloaded: set[str] = field(default_factory=set)
    promise: Begun | None = None


@dataclass(eq=False)
class Model:
    """A model's entry in the books.

    Attributes:
        parts: on the device where it is there; of an offloaded model the room that its parts take turns at.
        in_host: parts of an offloaded model, which stay in the host's memory as long as it is leased.
        full: of an offloaded model: what it is called where it is held as it is.
        leases: of running jobs, and of those that load it.
        pin: the tier that it is not evicted from, ``device`` or ``host``.
        leaving: where it goes when its last lease ends, or what is being read of it is there: ``host`` or ``disk``.
        left: where it was sent, and nobody has wanted it since: others may have all of its parts where they were, and
            it needs none of them there.
    """

    parts: tuple[str, ...]
    in_host: tuple[str, ...] = ()
    full: str | None = None
    leases: int = 0
    pin: str | None = None
    used: float = 0.0
    leaving: str | None = None
    left: str | None = None


@dataclass(eq=False)
class Books:
    """Every part and every model of which something is in memory, or that somebody is about to bring.

    Attributes:
        device_limit: bytes that parts may take on the device.
        host_limit: the same for the host's memory.
        shared: the device computes in the host's memory.
        capacity: bytes that the device has at all; None if that is not known.
        parts: by key.
        models: by key.
    """

    device_limit: int
    host_limit: int
    shared: bool
    capacity: int | None = None
    parts: dict[str, Part] = field(default_factory=dict)
    models: dict[str, Model] = field(default_factory=dict)

    @property
    def device_bytes(self) -> int:
        """On the device, or on their way there."""
        return total(part for part in self.parts.values() if part.device is not State.ABSENT)

    @property
    def host_bytes(self) -> int:
        """In the host's memory, or on their way there."""
        return total(part for part in self.parts.values() if part.host is not State.ABSENT)

    def of(self, model: str) -> list[Part]:
        """What a model has on the device where it runs."""
        return [self.parts[key] for key in self.models[model].parts]

    def offloaded(self, model: str) -> list[Part]:
        """What an offloaded model has in the host's memory where it runs."""
        return [self.parts[key] for key in self.models[model].in_host]

    def weights(self, model: str) -> list[Part]:
        """What is read from the disk for a model."""
        return self.offloaded(model) or self.of(model)

    def is_resident(self, model: str) -> bool:
        """Whether a model can run: all of it is on the device, or where an offloaded one has it."""
        on_device = all(part.device is State.HELD for part in self.of(model))
        return on_device and all(part.host is State.HELD for part in self.offloaded(model))

    def is_warm(self, model: str) -> bool:
        """Whether nothing of a model would have to be read."""
        if self.models[model].in_host:
            return all(part.host is State.HELD for part in self.offloaded(model))
        return all(State.HELD in (part.host, part.device) for part in self.of(model))

    def is_leased(self, part: Part) -> bool:
        """Whether somebody has a model with this part, or loads one."""
        return any(self.models[model].leases for model in part.models)

    def is_used_in_host(self, part: Part) -> bool:
        """Whether somebody has an offloaded model with this part, or loads one."""
        return any(self.models[model].leases for model in part.offloaded)

    def is_pinned(self, part: Part, tier: str | None = None) -> bool:
        """Whether a model with this part is pinned, to this tier or to any."""
        pins = {self.models[model].pin for model in part.models} - {None}
        return tier in pins if tier else bool(pins)


def total(parts: Iterable[Piece]) -> int:
    """Their bytes."""
    return sum(part.bytes for part in parts)


@dataclass(frozen=True)
class Moves:
    """What has left a tier, by the keys of the parts: whoever has it is to forget it."""

    device: tuple[str, ...] = ()
    host: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.device or self.host)


@dataclass(eq=False)
class Begun:
    """A model is leased, and its way to the device is free.

    Attributes:
        copy: the parts that its caller has to bring there, those in the host's memory first: once they are on the
            device they no longer stand in the way of the others.
        onto: for some of them, a part of the same architecture whose place on the device they take over.
        moves: what left.
        read: parts that its caller has to bring into the host's memory, where they have their room; of an offloaded
            model.
    """

    model: str
    copy: tuple[str, ...]
    onto: Mapping[str, str]
    moves: Moves
    read: tuple[str, ...] = ()
