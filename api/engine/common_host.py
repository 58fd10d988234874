"""The host's memory that the workers of a container share, as one of them sees it.

What a worker reads there, every other one maps; nobody writes to it afterwards. Who may have how much of it is settled
outside (``HostTier``); this is what the engine does with the answer.
"""

from __future__ import annotations

import gc
import hashlib
import logging
import mmap
import os
import threading
import time
import weakref
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from enum import Enum
from typing import TYPE_CHECKING, Protocol

import torch

from api.engine.buffers import Pages, advise, pin_pages, protect, whole_pages
from api.engine.headers import file_identity
from api.engine.parts import PartSpec
from api.engine.reading import POPULATE_READ, BufferPart
from api.engine.skeletons import Slot

if TYPE_CHECKING:
    from api.engine.cache import ModelCache

log = logging.getLogger("api.engine")

_PAUSE = 0.2
"""Seconds after which room is claimed again that was refused because it was another worker's turn."""


_IN_VAIN, _COLLECT = 4, 40
"""How often in a row this worker is asked in vain before it looks for garbage, which stops all else for a moment; and
when it does so again."""


class Room(Enum):
    """The answer to a claim."""

    GRANTED = "granted"
    LATER = "later"
    """Another worker's turn: what is held for this is to be let go, and it is to be claimed again."""
    REFUSED = "refused"
    """There is none now."""


class HostTier(Protocol):
    """The tier. May be used from any thread; names are of parts, equal for equal bytes.

    Attributes:
        on_let_go: called, in a thread of the tier's, to let so many bytes go that no job uses.
        on_pause: called with whether to begin with nothing new.
    """

    on_let_go: Callable[[int], None]
    on_pause: Callable[[bool], None]

    def claim(self, sizes: Mapping[str, int], *, wait: bool, over: Callable[[], bool]) -> Room:
        """Have room for parts, all of them or none.

        Args:
            sizes: bytes by name.
            wait: wait for it, others are asked to let go; else REFUSED where there is none at once.
            over: asked while it waits; LATER when it said so.

        Raises:
            MemoryError: there never will be, or it took too long.
        """

    def open(self, name: str, size: int) -> tuple[int, bool]:
        """A descriptor of the memory of a part that was claimed; waits while another worker reads it.

        Args:
            name: of the part.
            size: bytes of the memory.

        Returns:
            The descriptor, and whether the part is there. Else it is to be read, and ``read`` to be called.

        Raises:
            MemoryError: there is none.
        """

    def read(self, name: str, *, well: bool) -> None:
        """The part is whole now, or never will be."""

    def release(self, name: str) -> None:
        """What was claimed once is not needed any more."""

    def clear(self) -> None:
        """What no worker has is not to be kept for later."""


class Rooms:
    """The room that this worker has claimed in the tier.

    Args:
        tier: where.
        named: what a part is called there; see ``name_of``.
    """

    def __init__(self, tier: HostTier, named: Callable[[PartSpec], str]) -> None:
        self._tier = tier
        self._named = named
        self._lock = threading.Lock()
        self._unused: Counter[str] = Counter()
        """What was claimed and is yet to be read."""

    def take(self, specs: Sequence[PartSpec], *, wait: bool, over: Callable[[], bool]) -> bool:
        """Claim room for parts, for all of them or for none.

        Args:
            specs: which.
            wait: a job needs them.
            over: asked while it waits.

        Returns:
            Whether there is room. Not where it is another worker's turn, or ``over`` said so.

        Raises:
            MemoryError: there never will be, or it took too long.
        """
        sizes = {self._named(spec): spec.bytes for spec in specs}
        if sizes and self._tier.claim(sizes, wait=wait, over=over) is not Room.GRANTED:
            return False
        with self._lock:
            self._unused.update(sizes.keys())
        return True

    def give_back(self, specs: Sequence[PartSpec]) -> None:
        """What of ``take`` was not used is not needed any more."""
        for name in {self._named(spec) for spec in specs}:
            if self._use(name):
                self._tier.release(name)

    def need(self, spec: PartSpec, *, wait: bool, over: Callable[[], bool]) -> bool:
        """Have room for one part that is to be read now; as ``take``, unless it was taken before.

        What is read ahead has room of its own: where it cannot be read, the job that took room for it still has that.
        """
        if wait and self._use(self._named(spec)):
            return True
        while not (took := self.take([spec], wait=wait, over=over)) and wait and not over():
            time.sleep(_PAUSE)  # another's turn; what this job holds beside can leave the host's memory meanwhile
        return took and self._use(self._named(spec))

    def _use(self, name: str) -> bool:
        with self._lock:
            if not self._unused[name]:
                del self._unused[name]
                return False
            self._unused[name] -= 1
            if not self._unused[name]:
                del self._unused[name]
            return True


def name_of(spec: PartSpec, *, own: bool, mapped: bool) -> str:
    """What a part is called in the tier: what is one name takes its bytes once.

    Args:
        spec: which part.
        own: a library makes its module, in memory of its own.
        mapped: it is pages of its files.
    """
    if own:
        return f"{spec.key}/{os.getpid()}"  # memory of this process alone
    if mapped:
        files = repr(spec.identities or tuple(map(file_identity, spec.files)))
        return f"{spec.key}/{hashlib.sha256(files.encode()).hexdigest()[:16]}"
    return spec.key


def read_common(
    tier: HostTier,
    name: str,
    slots: Sequence[Slot],
    extent: int,
    fill: Callable[[torch.Tensor], object],
    *,
    pin: bool,
) -> BufferPart:
    """A part in the tier: read there by this worker, or mapped as another one has read it.

    Args:
        tier: that has room for it.
        name: of the part.
        slots: where each tensor goes.
        extent: bytes of a buffer for them.
        fill: reads it into such a buffer; raises where the files are not those any more that the name was made of.
        pin: make the memory such that a GPU copies from it by itself.

    Raises:
        ApiError: MODEL_BROKEN.
        MemoryError: there is no room.
    """
    size = whole_pages(extent)
    descriptor, there = tier.open(name, size)
    try:
        if os.fstat(descriptor).st_size != size:
            raise RuntimeError(f"{name} has another size in the host tier")
        if not there:
            try:
                pages = Pages.over(descriptor, size, mmap.MAP_SHARED)
                advise(pages, 0, size, mmap.MADV_HUGEPAGE)
                fill(torch.frombuffer(pages, dtype=torch.uint8)[:extent])
            except BaseException:
                tier.read(name, well=False)
                raise
            tier.read(name, well=True)
            del pages
        pages = _view(descriptor, size, pin)
    finally:
        os.close(descriptor)
    weakref.finalize(pages, tier.release, name).atexit = False  # the end of the last tensor
    flat = torch.frombuffer(pages, dtype=torch.uint8)[:extent]
    return BufferPart({slot.targets[0]: slot.of(flat) for slot in slots}, extent, read=not there, flat=flat)


def _view(descriptor: int, size: int, pin: bool) -> Pages:
    """The memory of a part that is there, so that nobody else's is changed by what might be written to it here."""
    if not pin:
        # what is written is this process's own; read, or everything would be copied at once
        pages = Pages.over(descriptor, size, mmap.MAP_PRIVATE)
        if number := advise(pages, 0, size, POPULATE_READ):
            raise OSError(number, os.strerror(number))
        return pages
    # A GPU needs the pages themselves: of a private mapping that may be written to, CUDA would pin copies, and one that
    # may only be read not every driver registers. So it is registered first, and then closed to writing by the CPU.
    pages = Pages.over(descriptor, size, mmap.MAP_SHARED)
    pin_pages(pages)
    protect(pages)
    return pages


def share(cache: ModelCache, tier: HostTier, named: Callable[[PartSpec], str]) -> None:
    """Have a cache keep its host copies in the tier, and let go of them when another worker needs the room."""
    cache.rooms = Rooms(tier, named)
    in_vain = 0

    def let_go(size: int) -> None:
        nonlocal in_vain
        in_vain = 0 if cache.let_go(size) else in_vain + 1
        if in_vain % _COLLECT == _IN_VAIN:
            gc.collect()  # what left the books may be held by objects in a ring

    tier.on_let_go, tier.on_pause = let_go, cache.pause
