"""What a safetensors file holds, from its header alone.

Source: https://huggingface.co/docs/safetensors/index#format.
"""

from __future__ import annotations

import functools
import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import msgspec
import torch

from api.errors import ApiError
from api.models.safetensors_check import safetensors_problem

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


@dataclass(frozen=True)
class Stored:
    """One tensor in a file.

    Attributes:
        dtype: None for one that torch does not have.
        shape: of the tensor.
        begin: of its bytes, from the start of the file.
        bytes: that it takes there.
    """

    dtype: torch.dtype | None
    shape: tuple[int, ...]
    begin: int
    bytes: int


@dataclass(frozen=True)
class Header:
    """One file.

    Attributes:
        path: where it is.
        size: of the whole file.
        tensors: by their names in the file, in the order of their bytes.
    """

    path: Path
    size: int
    tensors: Mapping[str, Stored]

    @functools.cached_property
    def shapes(self) -> str:
        """A digest of the names, types and shapes."""
        listed = sorted((name, str(entry.dtype), entry.shape) for name, entry in self.tensors.items())
        return hashlib.sha256(repr(listed).encode()).hexdigest()


class _Entry(msgspec.Struct):
    dtype: str
    shape: tuple[int, ...]
    data_offsets: tuple[int, int]


def file_identity(path: Path) -> tuple[str, int, int, int]:
    """What changes when a file does: its real path, size, time of change and inode.

    Raises:
        ApiError: MODEL_BROKEN: it is not there.
    """
    try:
        real = os.path.realpath(path)
        status = os.stat(real)  # noqa: PTH116
    except OSError as fault:
        raise broken(path, f"cannot be read: {fault.strerror}") from fault
    return real, status.st_size, status.st_mtime_ns, status.st_ino


def read_header(path: Path) -> Header:
    """The header of a file, checked against the file's length; kept until the file changes.

    Raises:
        ApiError: MODEL_BROKEN.
    """
    return _read_header(path, file_identity(path))


@functools.lru_cache(maxsize=256)
def _read_header(path: Path, identity: tuple[str, int, int, int]) -> Header:
    try:
        if problem := safetensors_problem(path):
            raise broken(path, problem)
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            entries = msgspec.json.decode(file.read(length), type=dict[str, msgspec.Raw])
    except OSError as fault:
        raise broken(path, f"cannot be read: {fault.strerror}") from fault
    entries.pop("__metadata__", None)
    decoded = {name: msgspec.json.decode(entry, type=_Entry) for name, entry in entries.items()}
    tensors = {
        name: Stored(
            _DTYPES.get(entry.dtype),
            entry.shape,
            8 + length + entry.data_offsets[0],
            entry.data_offsets[1] - entry.data_offsets[0],
        )
        for name, entry in sorted(decoded.items(), key=lambda item: item[1].data_offsets)
    }
    return Header(path, identity[1], tensors)


def broken(path: Path, problem: str) -> ApiError:
    """The error for a file or folder of a model that cannot be loaded; says which, without where on this machine."""
    name = "/".join(path.parts[-3:])
    return ApiError("MODEL_BROKEN", f"{name} {problem}. Remove the model and fetch it again.")
