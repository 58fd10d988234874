"""What workers and the keeper of the common host tier say to each other, one message in a packet of a Unix socket.

Worker and keeper stand on one machine and come from one image: there are no versions of this.
"""

from __future__ import annotations

import msgspec


class Hello(msgspec.Struct, tag=True):
    """A worker is there, and has measured what models may take; the first one's word counts."""

    limit: int


class Claim(msgspec.Struct, tag=True):
    """Have room for parts: for all of them or for none.

    Attributes:
        id: to be answered with ``Granted``, ``Later`` or ``Refused``.
        sizes: bytes by the name of the part.
        wait: a job needs them: others are asked to let go, and it is answered when there is room. Else it is answered
            at once.
    """

    id: int
    sizes: dict[str, int]
    wait: bool


class Withdraw(msgspec.Struct, tag=True):
    """A claim that waits is given up. It is answered all the same, by ``Later`` unless another answer is on its way."""

    id: int


class Open(msgspec.Struct, tag=True):
    """Have the memory of a part for which there is room; answered with ``Opened``.

    Attributes:
        size: bytes of it.
    """

    id: int
    name: str
    size: int


class Read(msgspec.Struct, tag=True):
    """The part that this worker was to read is whole; or, not ``well``, it never will be."""

    name: str
    well: bool


class Release(msgspec.Struct, tag=True):
    """The room of a part is not needed any more by one of those for whom it was claimed."""

    name: str


class Clear(msgspec.Struct, tag=True):
    """Parts that nobody has are not to be kept for later."""


class Went(msgspec.Struct, tag=True):
    """What could be let go after ``LetGo`` has been let go; what has left says so itself."""


class Settled(msgspec.Struct, tag=True):
    """The answer to ``Hello``: bytes that the parts of all workers may take together."""

    limit: int


class Granted(msgspec.Struct, tag=True):
    """There is room, and it is held."""

    id: int


class Later(msgspec.Struct, tag=True):
    """It is another worker's turn: let go of what is held for this, and claim it again."""

    id: int


class Refused(msgspec.Struct, tag=True):
    """There is no room now, and nobody was asked to make any; or there never will be."""

    id: int


class Opened(msgspec.Struct, tag=True):
    """The memory of a part, in the descriptor that comes with it. Unless it is ``there``, it is to be read by you."""

    id: int
    there: bool


class LetGo(msgspec.Struct, tag=True):
    """Another needs room: let so many bytes go that no job uses; answered with ``Went``."""

    size: int


class Pause(msgspec.Struct, tag=True):
    """Begin with nothing new: what is in use is wanted by another worker once it is not."""


class Resume(msgspec.Struct, tag=True):
    """``Pause`` is over."""


ToKeeper = Hello | Claim | Withdraw | Open | Read | Release | Clear | Went
FromKeeper = Settled | Granted | Later | Refused | Opened | LetGo | Pause | Resume

_encoder = msgspec.msgpack.Encoder()
_to_keeper = msgspec.msgpack.Decoder(ToKeeper)
_from_keeper = msgspec.msgpack.Decoder(FromKeeper)
LARGEST = 2**16
"""Bytes of a message at most; a part takes about a hundred."""


def packed(message: ToKeeper | FromKeeper) -> bytes:
    """A message as it is sent."""
    return _encoder.encode(message)


def parse_to_keeper(data: bytes) -> ToKeeper:
    """What a worker has sent."""
    return _to_keeper.decode(data)


def parse_from_keeper(data: bytes) -> FromKeeper:
    """What the keeper has sent."""
    return _from_keeper.decode(data)
