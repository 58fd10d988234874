"""Writes safetensors files one tensor after the other, so that memory holds one tensor at most.

Source: https://huggingface.co/docs/safetensors/index#format.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import torch

from api.errors import ApiError

_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_CHUNK = 2**24


def bytes_of(tensors: Iterable[torch.Tensor]) -> int:
    """Bytes that tensors take when they are written."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def write(path: Path, tensors: Mapping[str, torch.Tensor], on_bytes: Callable[[int], None]) -> None:
    """Write tensors as they are, without changing their precision.

    Args:
        path: of the file.
        tensors: on the CPU, by name.
        on_bytes: called with the bytes of weights written since the last call.

    Raises:
        ApiError: MODEL_BROKEN for a dtype that the format does not have.
        OSError: it cannot be written.
    """
    # the widest first: then every tensor is aligned to its elements, as the reference implementation does it
    names = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}  # transformers reads nothing without it
    end = 0
    for name in names:
        tensor = tensors[name]
        if tensor.dtype not in _NAMES:
            raise ApiError("MODEL_BROKEN", f"{name} has the type {tensor.dtype}, which safetensors cannot hold.")
        first, end = end, end + bytes_of([tensor])
        header[name] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [first, end]}
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    with path.open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        for name in names:
            flat = tensors[name].detach().contiguous().reshape(-1).view(torch.uint8)
            for part in flat.split(_CHUNK):
                file.write(memoryview(part.numpy()))
                on_bytes(part.numel())
    path.chmod(0o644)
