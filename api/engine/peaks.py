"""How much memory module calls take beyond the weights, learned from those that were made.

Only from calls during which no job's own thread could allocate or free, as that would have the load of the moment
decide later on. What is kept are the least and the most that a row of a size ever took: a batch has fixed costs once, a
first call may have some that no later one has. A size that was not seen is on the line of the two seen ones next below
it, at its least steep, and as its neighbour where there is but one. Activations grow at least so fast, so that what is
said not to fit does not fit; what is not said may.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Hashable, Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch

_REMEMBERED = 4096
"""Sizes of calls: they are the clients' choice."""
_CODECS = ("encode", "decode")


_Sizes = dict[int, tuple[float, float]]
"""The least and the most bytes that a row took, by pixels."""


class Meter(Protocol):
    """Tells how much of a device's memory is allocated."""

    def begin(self) -> None:
        """A call begins."""

    def end(self) -> int:
        """Bytes at the most since it began, beyond those that there were then."""

    def free(self) -> int:
        """Bytes that could be allocated now."""


class CudaMeter:
    """By the counters of torch's allocator, which cost nothing to read and wait for nothing.

    Args:
        device: a CUDA device.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._before = self._most = 0

    @property
    def most(self) -> int:
        """Most bytes that were ever allocated; the allocator's own counter begins anew with every call."""
        return max(self._most, torch.cuda.max_memory_allocated(self._device))

    def restart(self) -> None:
        """Have ``most`` count from now on; for benchmarks."""
        self._most = 0
        torch.cuda.reset_peak_memory_stats(self._device)

    def begin(self) -> None:
        """See ``Meter``."""
        self._most = self.most
        self._before = torch.cuda.memory_allocated(self._device)
        torch.cuda.reset_peak_memory_stats(self._device)

    def end(self) -> int:
        """See ``Meter``."""
        return max(0, torch.cuda.max_memory_allocated(self._device) - self._before)

    def free(self) -> int:
        """See ``Meter``."""
        free, total = torch.cuda.mem_get_info(self._device)
        reserved = torch.cuda.memory_reserved(self._device)
        allowed = int(torch.cuda.get_per_process_memory_fraction(self._device) * total) - reserved
        return min(free, allowed) + reserved - torch.cuda.memory_allocated(self._device)


@dataclass(frozen=True)
class About:
    """What a job's calls are for.

    Attributes:
        build: what the model's memory depends on.
        codec: how the autoencoder is run.
        pixels: of one image; 0: not known.
        encodes: it begins with a picture.
        attention: that was asked for: its kernels differ most of all in the memory that they need.
    """

    build: Hashable
    codec: str
    pixels: int
    encodes: bool = False
    attention: str = "sdpa"


class Peaks:
    """What calls take, for each of their rows.

    Args:
        meter: of the device; None: nothing is learned.
        room: bytes that this process may use on the device, settled at the start; None: not known.
    """

    def __init__(self, meter: Meter | None = None, room: int | None = None) -> None:
        self.meter = meter
        self.room = room
        self.kept: Callable[[], int] = lambda: 0
        """Says the bytes that a meter takes for free, and that calls cannot have: those of CUDA graphs."""
        self._lock = threading.Lock()
        self._known: dict[tuple[Hashable, str], dict[tuple[str, str], _Sizes]] = {}
        """By build and attention, and way to run the autoencoder, then class and method."""
        self._sizes = 0

    @contextlib.contextmanager
    def measuring(
        self, about: About | None, owner: str, method: str, rows: int, waiting: Callable[[], object] = lambda: True
    ) -> Iterator[None]:
        """Learn from a call that is made within the block, on the device's thread; nothing of one that fails.

        Args:
            about: what it is for; None: nothing that is learned.
            owner: the class of its module.
            method: its name.
            rows: how many it has.
            waiting: says which jobs there are, where every one of them waits for the device; else nothing. Where that
                is another before and after the call, nothing is learned.
        """
        if self.meter is None or about is None or not about.pixels or not (before := waiting()):
            yield
            return
        self.meter.begin()
        yield
        size = self.meter.end()
        if waiting() == before:
            self.note(about, owner, method, rows, size)

    def note(self, about: About, owner: str, method: str, rows: int, size: int) -> None:
        """A call of so many rows took so many bytes."""
        with self._lock:
            if self._sizes >= _REMEMBERED:
                self._known.clear()
                self._sizes = 0
            calls = self._known.setdefault(_own_kind(about, method), {})
            sizes = calls.setdefault((owner, method), {})
            self._sizes += about.pixels not in sizes
            each = size / rows
            whole = size if _sliced(about, method) else each  # tiles are of one image at a time
            least, most = sizes.get(about.pixels, (each, whole))
            sizes[about.pixels] = min(each, least), max(whole, most)

    def most(self, about: About) -> float:
        """Bytes that the largest call for one image takes, as far as is known; the executor splits what has more."""
        with self._lock:
            found = [
                _at(sizes, about.pixels)
                for kind in ("forward", "decode")
                for (_, method), sizes in self._known.get(_kind(about, kind), {}).items()
                if method != "encode" or about.encodes
            ]
        return max(found, default=0.0)

    def expected(self, about: About, rows: Mapping[str, int]) -> float:
        """Bytes that the largest call of a job takes beyond the weights, where it runs alone and nothing is split.

        Args:
            about: what is asked for.
            rows: by the class of a module, that its calls have: twice the images for a denoiser with guidance. One for
                those that are not named, and for an autoencoder that takes slices.
        """
        with self._lock:
            known = {
                key: (sizes, rows.get(key[0], 1))
                for kind in ("forward", "decode")
                for key, sizes in self._known.get(_kind(about, kind), {}).items()
            }
            found = {key: _at(sizes, about.pixels) * count for key, (sizes, count) in known.items()}
            if about.codec != "full":
                found |= {key: _at(sizes, about.pixels) for key, (sizes, _) in known.items() if key[1] in _CODECS}
                own = self._known.get(_own_kind(about, "decode"), {})
                found |= {key: sizes[about.pixels][1] for key, sizes in own.items() if about.pixels in sizes}
        return max((size for (_, method), size in found.items() if method != "encode" or about.encodes), default=0.0)

    def exceeds(self, about: About, weights: Callable[[], int]) -> bool:
        """Whether a job does not fit, were it alone on the device.

        Args:
            about: what is asked for.
            weights: says the bytes of the weights that are on the device meanwhile.
        """
        if self.room is None or not about.pixels:
            return False
        most = self.most(about)
        return most > 0 and weights() + most > self.room

    def rows(self, about: About | None, owner: str, method: str) -> int | None:
        """How many rows of a call fit in what is free; None: not known."""
        if self.meter is None or about is None:
            return None
        with self._lock:
            sizes = self._known.get(_kind(about, method), {}).get((owner, method))
            each = _at(sizes, about.pixels) if sizes else 0.0
        return max(1, int((self.meter.free() - self.kept()) / each)) if each else None


def _sliced(about: About, method: str) -> bool:
    """Whether a call has one row at a time, however many there are."""
    return about.codec != "full" and method in _CODECS


def _kind(about: About, method: str) -> tuple[Hashable, str]:
    """Where to look: slices are of one image, which takes what it takes."""
    build, codec = _own_kind(about, method)
    return build, "full" if codec == "sliced" else codec


def _own_kind(about: About, method: str) -> tuple[Hashable, str]:
    """Where to enter: a call of several slices says nothing of one row of a call without."""
    return (about.build, about.attention), about.codec if method in _CODECS else ""


def _at(sizes: _Sizes, pixels: int) -> float:
    """What a row takes at the least, at a size that may not have been seen; 0 below all that were."""
    known = sorted(size for size in sizes if size <= pixels)
    if not known:
        return 0.0
    last = known[-1]
    least = sizes[last][0]
    if last == pixels or len(known) == 1:
        return least
    slope = max(0.0, (least - sizes[known[-2]][1]) / (last - known[-2]))
    return least + slope * (pixels - last)
