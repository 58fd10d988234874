"""Reading safetensors into host memory: every way gives the bytes that the reference implementation gives."""

from __future__ import annotations

import gc
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from api.engine import buffers, reading
from api.engine.headers import Header, read_header
from api.engine.reading import BufferPart, read
from api.engine.skeletons import ALIGNMENT, Slot
from api.errors import ApiError

FLOATS = [torch.float32, torch.float16, torch.bfloat16]


def slots_for(header: Header, dtype: torch.dtype | None) -> tuple[list[Slot], int]:
    slots, offset = [], 0
    for name in sorted(header.tensors):
        entry = header.tensors[name]
        wanted = dtype if dtype and entry.dtype.is_floating_point else entry.dtype  # type: ignore[union-attr]
        slot = Slot(name, (f"m.{name}",), entry.shape, wanted, offset)  # type: ignore[arg-type]
        slots.append(slot)
        offset += -(-slot.bytes // ALIGNMENT) * ALIGNMENT
    return slots, offset


def read_all(path: Path, dtype: torch.dtype | None, shares: bool) -> BufferPart:
    header = read_header(path)
    slots, extent = slots_for(header, dtype)
    return read([header], slots, extent, shares=shares, pin=False)


def the_same(part: BufferPart, path: Path, dtype: torch.dtype | None) -> None:
    right = load_file(path)
    assert set(part.tensors) == {f"m.{name}" for name in right}
    for name, tensor in right.items():
        wanted = tensor.to(dtype) if dtype and tensor.is_floating_point() else tensor
        assert part.tensors[f"m.{name}"].dtype == wanted.dtype
        assert torch.equal(part.tensors[f"m.{name}"], wanted), name


def some(seed: int = 0, dtype: torch.dtype = torch.float16) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"a": (3,), "b": (700, 900), "c": (), "d": (0, 4), "e": (1, 5, 7), "f": (2048, 4096)}
    tensors = {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}
    return {**tensors, "ids": torch.arange(77)[None], "flag": torch.tensor([True, False, True])}


@pytest.mark.parametrize("shares", [True, False])
@pytest.mark.parametrize("dtype", [None, *FLOATS])
@pytest.mark.parametrize("stored", FLOATS)
def test_every_way_gives_what_the_reference_gives(
    stored: torch.dtype, dtype: torch.dtype | None, shares: bool, tmp_path: Path
) -> None:
    path = tmp_path / "x.safetensors"
    save_file(some(dtype=stored), path)
    part = read_all(path, dtype, shares)
    the_same(part, path, dtype)
    assert (part.flat is None) == (shares and dtype in (None, stored))


@pytest.mark.parametrize("dtype", [None, torch.float32])
def test_a_file_that_is_not_in_the_page_cache(
    dtype: torch.dtype | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "x.safetensors"
    save_file(some(), path)
    flags: list[int] = []
    opened = os.open
    monkeypatch.setattr(reading, "_is_cold", lambda header: True)
    monkeypatch.setattr(os, "open", lambda path, how, *rest: flags.append(how) or opened(path, how, *rest))
    the_same(read_all(path, dtype, shares=False), path, dtype)
    assert any(how & os.O_DIRECT for how in flags)


def test_where_direct_reading_cannot_be_had(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.safetensors"
    save_file(some(), path)
    opened = os.open

    def refusing(path: Any, how: int, *rest: Any) -> int:
        if how & os.O_DIRECT:
            raise OSError(22, "Invalid argument")
        return opened(path, how, *rest)

    monkeypatch.setattr(reading, "_is_cold", lambda header: True)
    monkeypatch.setattr(os, "open", refusing)
    the_same(read_all(path, torch.float32, shares=False), path, torch.float32)


def test_coldness_is_seen(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_file({"a": torch.zeros(2**22)}, path)
    with path.open("rb") as file:
        os.fsync(file.fileno())
        while file.read(2**20):
            pass
        header = read_header(path)
        assert not reading._is_cold(header)
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    if not reading._is_cold(header):
        pytest.skip("this file system keeps its pages, or cannot say")


@settings(max_examples=60, deadline=None)
@given(
    shapes=st.lists(st.lists(st.integers(0, 40), max_size=3), min_size=1, max_size=30),
    block=st.integers(64, 4096),
    pieces=st.integers(1, 5),
    cold=st.booleans(),
    dtype=st.sampled_from([None, *FLOATS]),
    left_out=st.integers(0, 3),
)
def test_blocks_of_any_size(
    shapes: list[list[int]],
    block: int,
    pieces: int,
    cold: bool,
    dtype: torch.dtype | None,
    left_out: int,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    path = tmp_path_factory.mktemp("blocks") / "x.safetensors"
    kinds = [*FLOATS, torch.int64]
    tensors = {
        f"t{number}": torch.randn(shape).mul(9).to(kinds[number % len(kinds)]) for number, shape in enumerate(shapes)
    }
    save_file(tensors, path)
    header = read_header(path)
    slots, extent = slots_for(header, dtype)
    kept = slots[left_out:]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reading, "_BLOCK", block)
        patch.setattr(reading, "_PIECES", pieces)
        patch.setattr(reading, "_is_cold", lambda _: cold)
        part = read([header], kept, extent, shares=False, pin=False)
    assert part.flat is not None
    for slot in kept:
        tensor = tensors[slot.source]
        wanted = tensor.to(dtype) if dtype and tensor.is_floating_point() else tensor
        got = part.tensors[slot.targets[0]]
        assert torch.equal(got, wanted)
        assert got.numel() == 0 or (got.data_ptr() - part.flat.data_ptr()) % ALIGNMENT == 0
    for slot in slots[:left_out]:
        assert not slot.of(part.flat).view(torch.uint8).any() if slot.bytes and slot.shape else True


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-10])


def overlapping(path: Path) -> None:
    path.write_bytes(path.read_bytes().replace(b'"data_offsets":[0', b'"data_offsets":[9', 1))


def no_header(path: Path) -> None:
    path.write_bytes(b"\xff" * 100)


@pytest.mark.parametrize("shares", [True, False])
@pytest.mark.parametrize("damage", [cut, overlapping, no_header, lambda path: path.write_bytes(b""), Path.unlink])
def test_a_damaged_file_is_said_to_be_broken(damage: Callable[[Path], Any], shares: bool, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_file(some(), path)
    damage(path)
    with pytest.raises(ApiError) as caught:
        read_all(path, None, shares)
    assert caught.value.code == "MODEL_BROKEN"
    assert "x.safetensors" in caught.value.message


@pytest.mark.parametrize("shares", [True, False])
@pytest.mark.parametrize("dtype", [None, torch.float32])
def test_a_file_that_is_cut_after_its_header_was_read(shares: bool, dtype: torch.dtype | None, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_file(some(), path)
    header = read_header(path)
    slots, extent = slots_for(header, dtype)
    with path.open("r+b") as file:
        file.truncate(header.size // 2)
    with pytest.raises(ApiError) as caught:
        read([header], slots, extent, shares=shares, pin=False)
    assert caught.value.code == "MODEL_BROKEN"


def test_an_io_error_is_said_and_no_thread_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.safetensors"
    save_file(some(), path)
    before = threading.active_count()

    def failing(*_: Any) -> int:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(reading, "_is_cold", lambda header: False)
    monkeypatch.setattr(os, "preadv", failing)
    with pytest.raises(ApiError, match="Input/output error"):
        read_all(path, None, shares=False)
    assert threading.active_count() == before


def test_no_room_is_a_memory_error() -> None:
    with pytest.raises(MemoryError):
        buffers.buffer(2**60, pin=False)


def test_what_is_written_to_mapped_weights_stays_here(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_file(some(), path)
    before = path.read_bytes()
    read_all(path, None, shares=True).tensors["m.b"].zero_()
    assert path.read_bytes() == before


def test_pages_live_as_long_as_a_tensor_of_them(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_file(some(), path)

    def mapped() -> int:
        return Path("/proc/self/maps").read_text().count(str(path))

    part = read_all(path, None, shares=True)
    kept = part.tensors["m.b"]
    path.unlink()
    del part
    gc.collect()
    assert mapped() == 1
    assert np.isfinite(kept.float().numpy()).all()
    del kept
    gc.collect()
    assert mapped() == 0


def test_memory_is_given_back_to_cuda_before_it_is_freed(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a stand-in for CUDA's runtime: what is registered is exact, and is let go once, while it is still there."""
    calls: list[tuple[str, int, int]] = []

    class Runtime:
        def cudaHostRegister(self, address: int, size: int, _: int) -> int:
            calls.append(("register", address, size))
            return 0

        def cudaHostUnregister(self, address: int) -> None:
            there = f"{address:x}-" in Path("/proc/self/maps").read_text() or any(
                int(line.split("-")[0], 16) <= address < int(line.split("-")[1].split()[0], 16)
                for line in Path("/proc/self/maps").read_text().splitlines()
            )
            calls.append(("unregister" if there else "too late", address, 0))

    monkeypatch.setattr(torch.cuda, "cudart", Runtime)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    flat = buffers.buffer(3 * 2**20 + 5, pin=True)
    assert flat.numel() == 3 * 2**20 + 5
    view = flat[10:20]
    del flat
    gc.collect()
    assert [name for name, *_ in calls] == ["register"]
    assert calls[0][2] == 3 * 2**20 + 4096
    del view
    gc.collect()
    assert [name for name, *_ in calls] == ["register", "unregister"]
    assert calls[0][1] == calls[1][1]


def test_memory_that_a_part_has_left_is_used_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "_is_cold", lambda header: True)
    first, second = tmp_path / "1.safetensors", tmp_path / "2.safetensors"
    save_file(some(1), first)
    save_file(some(2), second)
    spare = buffers.Spare(2**30)

    def come(path: Path) -> BufferPart:
        header = read_header(path)
        slots, extent = slots_for(header, torch.float32)
        return read([header], slots, extent, shares=True, pin=False, spare=spare)

    part = come(first)
    place = part.flat.data_ptr()  # type: ignore[union-attr]
    kept = part.tensors["m.b"]
    del part
    gc.collect()
    assert spare.bytes == 0  # a tensor still uses it
    other = come(second)
    assert other.flat.data_ptr() != place  # type: ignore[union-attr]
    the_same(other, second, torch.float32)
    del kept
    gc.collect()
    assert spare.bytes > 0
    again = come(second)
    assert again.flat.data_ptr() == place  # type: ignore[union-attr]
    the_same(again, second, torch.float32)
    assert spare.bytes == 0
    spare.clear()
    assert spare.bytes == 0
