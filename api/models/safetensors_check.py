"""Whether a safetensors file is whole, from its header and its length alone: no tensor is read.

Source: https://huggingface.co/docs/safetensors/index#format. Eight bytes, little-endian: the length N
of the header; N bytes of JSON that begin with ``{``; then the data, which the header's ``data_offsets``
cover without holes.
"""

from __future__ import annotations

import struct
from math import prod
from pathlib import Path
from typing import Annotated

import msgspec

MAX_HEADER = 100_000_000
"""Bytes of a header, at most; the limit of the reference implementation."""

_BITS = {
    "F4": 4,
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 16),
    **dict.fromkeys(("U32", "I32", "F32"), 32),
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 64),
}

_Count = Annotated[int, msgspec.Meta(ge=0)]


class _Tensor(msgspec.Struct, frozen=True):
    dtype: str
    shape: tuple[_Count, ...]
    data_offsets: tuple[_Count, _Count]


def safetensors_problem(path: Path) -> str | None:
    """What is wrong with a safetensors file, in words; None if it is whole.

    A dtype that this version does not know is not a problem; its offsets still count.

    Raises:
        OSError: the file cannot be read.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        if len(start) < 8:
            return "is too short for a safetensors file"
        (length,) = struct.unpack("<Q", start)
        if length > MAX_HEADER:
            return f"has a header of {length} bytes; {MAX_HEADER} are allowed"
        if length > size - 8:
            return f"ends within its header of {length} bytes"
        header = file.read(length)
    if not header.startswith(b"{"):
        return "has a header that is not a JSON object"
    try:
        parts = msgspec.json.decode(header, type=dict[str, msgspec.Raw])
        metadata = parts.pop("__metadata__", None)
        if metadata is not None:
            msgspec.json.decode(metadata, type=dict[str, str] | None)
        tensors = {name: msgspec.json.decode(part, type=_Tensor) for name, part in parts.items()}
    except (msgspec.DecodeError, UnicodeDecodeError) as fault:
        return f"has a header that cannot be read: {fault}"
    return _layout_problem(tensors, size - 8 - length)


def _layout_problem(tensors: dict[str, _Tensor], data: int) -> str | None:
    end = 0
    for name, tensor in sorted(tensors.items(), key=lambda item: item[1].data_offsets):
        first, last = tensor.data_offsets
        if first != end or last < first:
            return f"has a hole or an overlap before tensor {name!r}"
        bits = _BITS.get(tensor.dtype)
        if bits is not None and prod(tensor.shape) * bits != (last - first) * 8:
            return f"gives tensor {name!r} {last - first} bytes, which does not fit its shape"
        end = last
    if end != data:
        return f"holds {data} bytes of data instead of {end}"
    return None
