"""Reads the tensors of safetensors files into host memory.

Two ways, because measured they differ by far. Where the host's memory is the device's, and the files hold what is
wanted, their pages are mapped and all brought in at once: nothing is copied, and the page cache is not held twice.
Otherwise several threads read into one buffer of the exact size, and cast on the way.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import mmap
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

from api.engine.buffers import PAGE, Spare, advise, buffer
from api.engine.headers import Header, Stored, broken
from api.engine.parts import HostPart
from api.engine.skeletons import Slot

log = logging.getLogger("api.engine")

_BLOCK = 8 * 2**20
_PIECES = 256
"""Tensors that one block holds at most; the kernel takes 1024 buffers in a call."""
_WARM_THREADS = 4
_COLD_THREADS = 16
_SAMPLES = 16
POPULATE_READ = 22
_REMOTE = ("nfs", "cifs", "smb", "fuse", "9p", "ceph", "lustre", "virtiofs", "glusterfs", "beegfs")

_staging = Spare(_WARM_THREADS * (_BLOCK + 2 * PAGE))


@dataclass
class BufferPart(HostPart):
    """A part in one buffer.

    Attributes:
        flat: all its tensors, each at its slot's offset; None where they are pages of files.
    """

    flat: torch.Tensor | None = None


def read(
    headers: Sequence[Header],
    slots: Sequence[Slot],
    extent: int,
    *,
    shares: bool,
    pin: bool,
    spare: Spare | None = None,
) -> BufferPart:
    """Read a part.

    Args:
        headers: of its files.
        slots: where each tensor goes.
        extent: bytes of a buffer for them.
        shares: a module may use the host's own memory.
        pin: make the memory such that a GPU copies from it by itself.
        spare: memory that is there already, which is then read into.

    Raises:
        ApiError: MODEL_BROKEN.
        MemoryError: there is no room.
    """
    stored = _stored(headers)
    # from a disk it is faster to read past the page cache, if there is memory already
    there = spare is not None and spare.fits(extent) and any(map(_is_cold, headers))
    if shares and not there and can_map(headers, slots):
        part = _mapped(headers, slots, stored)
        if spare is not None:
            spare.count(part, part.bytes)
        return part
    return copied(headers, slots, buffer(extent, pin, spare), extent)


def _stored(headers: Sequence[Header]) -> dict[str, tuple[Header, Stored]]:
    return {name: (header, entry) for header in headers for name, entry in header.tensors.items()}


# --- mapped ---


def can_map(headers: Sequence[Header], slots: Sequence[Slot]) -> bool:
    """Whether files hold a part as it is to be, on this machine."""
    stored = _stored(headers)
    as_it_is = all(
        slot.dtype == stored[slot.source][1].dtype and stored[slot.source][1].begin % slot.dtype.itemsize == 0
        for slot in slots
    )
    return as_it_is and not any(_is_remote(header.path) for header in headers)


def _mapped(
    headers: Sequence[Header], slots: Sequence[Slot], stored: Mapping[str, tuple[Header, Stored]]
) -> BufferPart:
    pages = {header.path: _map(header) for header in headers if header.tensors}
    tensors = {}
    for slot in slots:
        header, entry = stored[slot.source]
        if entry.bytes:
            count = entry.bytes // slot.dtype.itemsize
            flat = torch.frombuffer(pages[header.path], dtype=slot.dtype, count=count, offset=entry.begin)
            tensors[slot.targets[0]] = flat.view(slot.shape)
        else:
            tensors[slot.targets[0]] = torch.empty(slot.shape, dtype=slot.dtype)
    return BufferPart(tensors, sum(header.size for header in headers))


def _map(header: Header) -> mmap.mmap:
    """The pages of a whole file, in memory; what would be written to them would be this process's own."""
    try:
        with header.path.open("rb") as file:
            pages = mmap.mmap(file.fileno(), header.size, access=mmap.ACCESS_COPY)
    except (OSError, ValueError) as fault:
        raise _fault(header.path, fault) from fault

    # a page that cannot be read is an error here, and would be a signal that kills the process later; no MADV_HUGEPAGE:
    # a cold file took twice as long so on a virtual machine
    def bring(begin: int) -> None:
        if number := advise(pages, begin, min(32 * _BLOCK, header.size - begin), POPULATE_READ):
            raise _fault(header.path, OSError(number, os.strerror(number)))

    with ThreadPoolExecutor(_WARM_THREADS, thread_name_prefix="map") as pool:
        list(pool.map(bring, range(0, header.size, 32 * _BLOCK)))
    return pages


def _is_remote(path: Path) -> bool:
    """Whether a file lies on another machine, so that its pages may be slow to come back or may not come at all."""
    device = os.stat(path).st_dev  # noqa: PTH116
    wanted = f"{os.major(device)}:{os.minor(device)}"
    try:
        lines = Path("/proc/self/mountinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return False
    for line in lines:
        fields, _, rest = line.partition(" - ")
        if fields.split()[2] == wanted:
            return rest.startswith(_REMOTE)
    return False


# --- copied ---


@dataclass(frozen=True)
class _Piece:
    """Some elements of one tensor."""

    begin: int
    bytes: int
    dtype: torch.dtype
    to: int
    as_dtype: torch.dtype

    @property
    def to_bytes(self) -> int:
        return self.bytes // self.dtype.itemsize * self.as_dtype.itemsize


@dataclass(frozen=True)
class _Block:
    """A stretch of a file without holes, and where its pieces go."""

    header: Header
    pieces: tuple[_Piece, ...]

    @property
    def begin(self) -> int:
        return self.pieces[0].begin

    @property
    def end(self) -> int:
        return self.pieces[-1].begin + self.pieces[-1].bytes

    @property
    def casts(self) -> bool:
        return any(piece.dtype != piece.as_dtype for piece in self.pieces)


def _blocks(header: Header, slots: Mapping[str, Slot]) -> Iterator[_Block]:
    pieces: list[_Piece] = []
    for name, entry in header.tensors.items():
        slot = slots.get(name)
        if slot is None or entry.dtype is None:
            continue
        step = _BLOCK // entry.dtype.itemsize * entry.dtype.itemsize
        for at in range(0, entry.bytes, step):
            to = slot.offset + at // entry.dtype.itemsize * slot.dtype.itemsize
            piece = _Piece(entry.begin + at, min(step, entry.bytes - at), entry.dtype, to, slot.dtype)
            last = pieces[-1] if pieces else None
            full = last and (piece.begin + piece.bytes - pieces[0].begin > _BLOCK or len(pieces) == _PIECES)
            if last and (full or last.begin + last.bytes != piece.begin):
                yield _Block(header, tuple(pieces))
                pieces = []
            pieces.append(piece)
    if pieces:
        yield _Block(header, tuple(pieces))


def copied(headers: Sequence[Header], slots: Sequence[Slot], flat: torch.Tensor, extent: int) -> BufferPart:
    """Read into a buffer, each tensor to its slot, and cast on the way; see ``read``."""
    by_source = {slot.source: slot for slot in slots}
    blocks = [block for header in headers for block in _blocks(header, by_source)]
    cold = any(_is_cold(header) for header in headers)
    with contextlib.ExitStack() as opened:
        files = {header.path: _File(header, cold, opened) for header in headers}
        _in_threads(
            _COLD_THREADS if cold else _WARM_THREADS,
            blocks,
            lambda staging, block: _fill(files[block.header.path], block, flat, staging),
        )
    return BufferPart({slot.targets[0]: slot.of(flat) for slot in slots}, extent, flat=flat)


class _File:
    """An open file, past the page cache where it is not in there and the file system can."""

    def __init__(self, header: Header, cold: bool, opened: contextlib.ExitStack) -> None:
        self.path = header.path
        self.direct = cold
        try:
            try:
                self.descriptor = os.open(header.path, os.O_RDONLY | (os.O_DIRECT if cold else 0))
            except OSError:
                self.direct = False
                self.descriptor = os.open(header.path, os.O_RDONLY)
        except OSError as fault:
            raise _fault(header.path, fault) from fault
        opened.callback(os.close, self.descriptor)


def _in_threads(count: int, blocks: Sequence[_Block], work: Callable[[torch.Tensor, _Block], None]) -> None:
    """Do the work in threads, each with memory for what cannot be read into place; the first error is raised."""
    left = iter(blocks)
    lock = threading.Lock()
    faults: list[BaseException] = []

    def run() -> None:
        try:
            torch.set_num_threads(1)  # of this thread: it casts beside others that do
            staging = buffer(_BLOCK + 2 * PAGE, pin=False, spare=_staging)
            while not faults:
                with lock:
                    block = next(left, None)
                if block is None:
                    return
                work(staging, block)
        except BaseException as fault:
            faults.append(fault)

    mine = torch.get_num_threads()
    threads = [threading.Thread(target=run, name=f"read-{n}") for n in range(min(count, len(blocks)))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    torch.set_num_threads(mine)  # which is also what threads that come later begin with
    if faults:
        raise faults[0]


def _fill(file: _File, block: _Block, flat: torch.Tensor, staging: torch.Tensor) -> None:
    try:
        if not file.direct and not block.casts:
            _read_exactly(
                file, [_memory(flat[piece.to : piece.to + piece.bytes]) for piece in block.pieces], block.begin
            )
            return
        begin = block.begin // PAGE * PAGE if file.direct else block.begin
        length = block.end - begin
        whole = -(-length // PAGE) * PAGE if file.direct else length
        _read_exactly(file, [_memory(staging[:whole])], begin, length)
    except OSError as fault:
        raise _fault(file.path, fault) from fault
    for piece in block.pieces:
        at = piece.begin - begin
        source = staging[at : at + piece.bytes]
        source = source if at % piece.dtype.itemsize == 0 else source.clone()
        flat[piece.to : piece.to + piece.to_bytes].view(piece.as_dtype).copy_(source.view(piece.dtype))


def _memory(tensor: torch.Tensor) -> memoryview:
    return memoryview(tensor.numpy())


def _read_exactly(file: _File, views: list[memoryview], offset: int, enough: int | None = None) -> None:
    """Fill buffers in turn; ``enough`` bytes will do, as the end of a file is not the end of a page."""
    left = enough if enough is not None else sum(len(view) for view in views)
    while left > 0:
        count = os.preadv(file.descriptor, views, offset)
        if not count:
            raise broken(file.path, "has become shorter")
        left -= count
        offset += count
        while left > 0 and count:
            taken = min(count, len(views[0]))
            views[0] = views[0][taken:]
            count -= taken
            if not views[0]:
                views.pop(0)


def _is_cold(header: Header) -> bool:
    """Whether most of a file is not in the page cache, by a few samples that do not wait for the disk."""
    missing = 0
    sample = bytearray(1)
    with header.path.open("rb", buffering=0) as file:
        for number in range(_SAMPLES):
            try:
                os.preadv(file.fileno(), [sample], header.size * number // _SAMPLES, os.RWF_NOWAIT)
            except BlockingIOError:
                missing += 1
            except OSError:  # a file system that cannot say
                return False
    return missing * 2 > _SAMPLES


def _fault(path: Path, fault: Exception) -> Exception:
    if isinstance(fault, OSError) and fault.errno == errno.ENOMEM:
        return MemoryError(str(fault))
    return broken(path, f"cannot be read: {getattr(fault, 'strerror', None) or fault}")
