from __future__ import annotations

import io
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from api.engine.encode import encode, encode_png
from api.engine.metadata import Texts

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
    image = Image.open(io.BytesIO(encode_png(np.zeros((8, 8, 3), np.uint8), Texts(text, '{"a": 1}'))))
    assert image.text == {"parameters": text, "meta": '{"a": 1}'}


def comment(image: Image.Image) -> str:
    """A1111's text, as its own tools read it: piexif's ``UserComment.load`` takes UNICODE for big-endian UTF-16."""
    found = image.getexif().get_ifd(0x8769)[0x9286]
    assert found.startswith(b"UNICODE\0")
    return found[8:].decode("utf-16-be")


@pytest.mark.parametrize("image_format", ["JPEG", "WEBP", "AVIF", "JXL"])
@pytest.mark.parametrize("text", ["a red circle\nSteps: 20, Seed: 1", "赤い丸 🎨"])
def test_other_formats_hold_the_same_in_exif(image_format: str, text: str) -> None:
    if image_format == "JXL":
        pytest.importorskip("pillow_jxl")
    pixels = np.full((16, 16, 3), 90, np.uint8)
    data = encode(pixels, image_format, texts=Texts(text, '{"seed": 1}'))
    image = Image.open(io.BytesIO(data))
    assert image.format in (image_format, "JXL")
    assert b"MM\0*" in image.info["exif"][:12]  # the byte order that the comment is in
    assert comment(image) == text
    assert json.loads(image.getexif()[0x010E]) == {"seed": 1}
    assert not Image.open(io.BytesIO(encode(pixels, image_format))).getexif()


def test_a_jpeg_drops_what_does_not_fit_and_others_keep_it() -> None:
    pixels, long = np.zeros((8, 8, 3), np.uint8), Texts("a" * 20_000, json.dumps("b" * 40_000))
    image = Image.open(io.BytesIO(encode(pixels, "JPEG", texts=long)))
    assert comment(image) == long.parameters and 0x010E not in image.getexif()
    image = Image.open(io.BytesIO(encode(pixels, "JPEG", texts=Texts("a" * 40_000, "{}"))))
    assert 0x8769 not in image.getexif()
    image = Image.open(io.BytesIO(encode(pixels, "WEBP", texts=long)))
    assert comment(image) == long.parameters and image.getexif()[0x010E] == long.meta


@pytest.mark.parametrize("image_format", ["JPEG", "WEBP", "AVIF"])
def test_lossy_formats_are_close(image_format: str) -> None:
    ramp = np.broadcast_to(np.arange(64, dtype=np.uint8)[None, :, None] * 3, (64, 64, 3)).copy()
    image = Image.open(io.BytesIO(encode(ramp, image_format, 95)))
    assert image.format == image_format
    assert np.abs(np.asarray(image.convert("RGB")).astype(int) - ramp).mean() < 3


@pytest.mark.parametrize("image_format", ["PNG", "WEBP", "JXL"])
@pytest.mark.parametrize("how", [{"quality": 100}, {"quality": 60, "lossless": True}])
def test_lossless_keeps_every_pixel(image_format: str, how: dict) -> None:
    if image_format == "JXL":
        pytest.importorskip("pillow_jxl")
    pixels = np.random.default_rng(1).integers(0, 256, (32, 32, 3)).astype(np.uint8)
    data = encode(pixels, image_format, **how)
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(data)).convert("RGB")), pixels)


@pytest.mark.parametrize("image_format", ["JPEG", "AVIF"])
def test_formats_that_cannot_be_lossless_say_so(image_format: str) -> None:
    with pytest.raises(ValueError, match="cannot be lossless"):
        encode(np.zeros((8, 8, 3), np.uint8), image_format, lossless=True)


@pytest.mark.parametrize("image_format", ["JPEG", "WEBP", "AVIF"])
def test_less_quality_is_fewer_bytes(image_format: str) -> None:
    pixels = np.random.default_rng(1).integers(0, 256, (64, 64, 3)).astype(np.uint8)
    sizes = [len(encode(pixels, image_format, quality)) for quality in (20, 60, 95)]
    assert sizes == sorted(set(sizes))


@pytest.mark.parametrize("bad", [np.zeros((4, 4, 2), np.uint8), np.zeros((4, 4), np.uint8), np.zeros((4, 4, 3))])
def test_other_shapes_and_types_are_refused(bad: np.ndarray) -> None:
    with pytest.raises(ValueError, match="expected uint8"):
        encode_png(bad)
