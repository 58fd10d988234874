from __future__ import annotations

import io

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from api.engine.encode import encode, encode_png

KINDS = {
    "noise": lambda h, w, c, rng: rng.integers(0, 256, (h, w, c)),
    "flat": lambda h, w, c, rng: np.full((h, w, c), 200),
    "ramp": lambda h, w, c, rng: np.broadcast_to(np.arange(w)[None, :, None] % 256, (h, w, c)),
    "rows": lambda h, w, c, rng: np.broadcast_to(np.arange(h)[:, None, None] % 256, (h, w, c)),
}


def decode(data: bytes, channels: int) -> np.ndarray:
    image = Image.open(io.BytesIO(data))
    image.verify()
    image = Image.open(io.BytesIO(data))
    assert image.mode == {1: "L", 3: "RGB", 4: "RGBA"}[channels]
    return np.asarray(image).reshape(image.height, image.width, channels)


@settings(max_examples=80, deadline=None)
@given(
    height=st.integers(1, 70),
    width=st.integers(1, 70),
    channels=st.sampled_from([1, 3, 4]),
    kind=st.sampled_from(sorted(KINDS)),
    seed=st.integers(0, 99),
)
def test_png_pixels_are_identical(height: int, width: int, channels: int, kind: str, seed: int) -> None:
    pixels = KINDS[kind](height, width, channels, np.random.default_rng(seed)).astype(np.uint8)
    assert np.array_equal(decode(encode_png(pixels), channels), pixels)


def test_png_of_a_view_that_is_not_contiguous() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (20, 30, 3)).astype(np.uint8)[::2, ::-1]
    assert np.array_equal(decode(encode_png(pixels), 3), pixels)


@pytest.mark.parametrize("text", ["a red circle\nSteps: 20, Seed: 1", "ein roter Kreis, größer", "赤い丸 🎨"])
def test_parameters_come_back(text: str) -> None:
    image = Image.open(io.BytesIO(encode_png(np.zeros((8, 8, 3), np.uint8), text)))
    assert image.text["parameters"] == text


@pytest.mark.parametrize("image_format", ["JPEG", "WEBP"])
def test_lossy_formats_are_close(image_format: str) -> None:
    ramp = np.broadcast_to(np.arange(64, dtype=np.uint8)[None, :, None] * 3, (64, 64, 3)).copy()
    image = Image.open(io.BytesIO(encode(ramp, image_format, 95)))
    assert image.format == image_format
    assert np.abs(np.asarray(image.convert("RGB")).astype(int) - ramp).mean() < 3


def test_webp_at_100_is_lossless() -> None:
    pixels = np.random.default_rng(1).integers(0, 256, (32, 32, 3)).astype(np.uint8)
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(encode(pixels, "WEBP", 100))).convert("RGB")), pixels)


@pytest.mark.parametrize("bad", [np.zeros((4, 4, 2), np.uint8), np.zeros((4, 4), np.uint8), np.zeros((4, 4, 3))])
def test_other_shapes_and_types_are_refused(bad: np.ndarray) -> None:
    with pytest.raises(ValueError, match="expected uint8"):
        encode_png(bad)
