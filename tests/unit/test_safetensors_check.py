from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, deserialize
from safetensors.numpy import save

from api.models.safetensors_check import safetensors_problem

ARRAYS = {
    "a": np.arange(6, dtype=np.float32).reshape(2, 3),
    "b": np.ones((3,), np.float16),
    "scalar": np.array(1.5, np.float64),
    "empty": np.zeros((0, 4), np.int8),
}
WHOLE = save(ARRAYS, metadata={"format": "pt"})


def problem(tmp_path: Path, content: bytes) -> str | None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    return safetensors_problem(path)


def made(header: Any, data: bytes = b"", raw: bytes | None = None) -> bytes:
    text = json.dumps(header).encode() if raw is None else raw
    return struct.pack("<Q", len(text)) + text + data


def tensor(first: int, last: int, dtype: str = "U8", shape: list[int] | None = None) -> dict[str, Any]:
    return {"dtype": dtype, "shape": [last - first] if shape is None else shape, "data_offsets": [first, last]}


def test_whole_files_have_no_problem(tmp_path: Path) -> None:
    assert problem(tmp_path, WHOLE) is None
    assert problem(tmp_path, save({})) is None
    assert problem(tmp_path, made({"x": tensor(0, 3, "U7", [1])}, b"abc")) is None, "a dtype of the future"
    assert problem(tmp_path, made({"x": tensor(0, 3, "F4", [6])}, b"abc")) is None, "less than a byte each"


def test_every_truncation_is_found(tmp_path: Path) -> None:
    for length in range(len(WHOLE)):
        assert problem(tmp_path, WHOLE[:length]), length
    assert problem(tmp_path, WHOLE + b"\0")


@pytest.mark.parametrize(
    ("content", "word"),
    [
        (b"", "too short"),
        (b"<html>not found</html>", "header"),
        (b"version https://git-lfs.github.com/spec/v1\n", "header"),
        (made({}, raw=b" {}"), "not a JSON object"),
        (made({}, raw=b"{"), "cannot be read"),
        (made({"x": {"dtype": "U8"}}), "cannot be read"),
        (made({"x": tensor(0, 3, shape=[-3])}, b"abc"), "cannot be read"),
        (made({"__metadata__": {"a": 1}}), "cannot be read"),
        (made({"x": tensor(1, 3)}, b"abc"), "hole"),
        (made({"x": tensor(0, 2), "y": tensor(1, 3)}, b"abc"), "overlap"),
        (made({"x": tensor(0, 1), "y": tensor(2, 3)}, b"abc"), "hole"),
        (made({"x": tensor(0, 3, "F32", [1])}, b"abc"), "shape"),
        (made({"x": tensor(0, 3)}, b"abcd"), "4 bytes of data"),
        (struct.pack("<Q", 2**63) + b"{}", "allowed"),
    ],
)
def test_what_is_wrong_is_said(tmp_path: Path, content: bytes, word: str) -> None:
    assert word in (problem(tmp_path, content) or "")


@settings(max_examples=300, deadline=None)
@given(position=st.integers(0, len(WHOLE) - 1), bit=st.integers(0, 7))
def test_what_the_library_refuses_is_found(position: int, bit: int, tmp_path_factory: pytest.TempPathFactory) -> None:
    """With one bit of a file flipped: whatever does not open later is told now."""
    content = bytearray(WHOLE)
    content[position] ^= 1 << bit
    try:
        deserialize(bytes(content))
        opens = True
    except (SafetensorError, ValueError) as fault:
        opens = "unknown variant" in str(fault)  # a dtype of the future is not our judgement
    found = problem(tmp_path_factory.getbasetemp(), bytes(content))
    assert opens or found
