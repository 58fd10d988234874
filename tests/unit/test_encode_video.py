"""Encoded videos, read back with the same library's decoder and with Pillow's."""

from __future__ import annotations

import io
from typing import Any

import av
import numpy as np
import pytest
from PIL import Image

from api.engine.encode_video import durations, encode_video, rate_of
from api.engine.metadata import Texts

TEXTS = Texts("a prompt\nSteps: 3", '{"seed": 7}')


def film(frames: int = 5, height: int = 46, width: int = 62) -> np.ndarray:
    """Ramps of colour that move."""
    y, x = np.mgrid[:height, :width]
    channels = [
        [np.clip(x * 3 + number * 5, 0, 255), y * 4, np.full_like(x, 40 + 20 * number)] for number in range(frames)
    ]
    return np.moveaxis(np.array(channels), 1, -1).astype(np.uint8)


def read_mp4(data: bytes) -> tuple[np.ndarray, Any]:
    """Frames as RGB, and the stream."""
    container = av.open(io.BytesIO(data))
    stream = container.streams.video[0]
    decoded = list(container.decode(video=0))
    assert [frame.time for frame in decoded] == pytest.approx(
        [number / float(stream.average_rate) for number in range(len(decoded))]
    )
    how: Any = {"format": "rgb24", "src_colorspace": "ITU709", "dst_color_range": "JPEG"}
    return np.stack([frame.reformat(**how).to_ndarray() for frame in decoded]), stream


def read_pictures(data: bytes) -> tuple[np.ndarray, list[int], Image.Image]:
    """Frames as RGB and how long each is shown."""
    image: Any = Image.open(io.BytesIO(data))
    frames, shown = [], []
    for number in range(image.n_frames):
        image.seek(number)
        image.load()
        frames.append(np.asarray(image.convert("RGB")))
        shown.append(image.info["duration"])
    return np.stack(frames), shown, image


@pytest.mark.parametrize("fps", [8.0, 23.976, 12.5])
def test_an_mp4_shows_the_frames_at_their_times(fps: float) -> None:
    frames = film()
    data = encode_video(fps, frames, "MP4", texts=TEXTS)
    seen, stream = read_mp4(data)
    assert seen.shape == frames.shape
    assert np.abs(seen.astype(int) - frames).mean() < 4
    assert stream.average_rate == rate_of(fps) == pytest.approx(fps, abs=5e-4)
    context = stream.codec_context
    assert (context.name, context.pix_fmt) == ("h264", "yuv420p")
    assert (context.color_primaries, context.color_trc, context.colorspace, context.color_range) == (1, 1, 1, 1)
    assert data.index(b"moov") < data.index(b"mdat")  # plays while it loads
    assert stream.container.metadata["comment"] == TEXTS.meta
    assert stream.container.metadata["description"] == TEXTS.parameters


def test_odd_sides_get_their_last_line_twice() -> None:
    frames = film(3, 45, 61)
    seen, _ = read_mp4(encode_video(8, frames, "MP4"))
    assert seen.shape == (3, 46, 62, 3)
    assert np.abs(seen[:, :45, :61].astype(int) - frames).mean() < 4
    assert np.abs(seen[:, 45, :61].astype(int) - frames[:, 44]).mean() < 8


def test_a_lower_quality_is_smaller_and_farther_from_the_frames() -> None:
    frames = np.random.default_rng(0).integers(0, 256, (4, 48, 64, 3), np.uint8)
    best, worst = (encode_video(8, frames, "MP4", quality) for quality in (100, 1))
    assert len(best) > 3 * len(worst)
    distance = [np.abs(read_mp4(data)[0].astype(int) - frames).mean() for data in (best, worst)]
    assert distance[0] < distance[1]


def test_a_lossless_webp_holds_every_pixel_and_the_exact_length() -> None:
    frames = film(9)
    seen, shown, image = read_pictures(encode_video(23.976, frames, "WEBP", lossless=True, texts=TEXTS))
    assert np.array_equal(seen, frames)
    assert sum(shown) == round(9 * 1000 / 23.976)
    assert image.getexif()[0x010E] == TEXTS.meta


def test_a_gif_is_close_and_as_long() -> None:
    frames = film(9)
    seen, shown, image = read_pictures(encode_video(12, frames, "GIF", texts=TEXTS))
    assert np.abs(seen.astype(int) - frames).mean() < 6
    assert sum(shown) == 750
    assert image.info["comment"] == TEXTS.meta.encode() and image.info["loop"] == 0


@pytest.mark.parametrize("video_format", ["MP4", "GIF", "WEBP"])
def test_the_same_frames_are_the_same_bytes(video_format: str) -> None:
    frames = film(9, 47, 63)
    found = [encode_video(23.976, frames, video_format, texts=TEXTS) for _ in range(3)]
    assert len(set(found)) == 1
    if video_format == "MP4":  # with x264's trees of macroblocks one file in a hundred was another, some in ten
        assert b"mbtree=0" in found[0]


@pytest.mark.parametrize(
    ("fps", "frames", "unit", "expected"),
    [(10, 3, 10, [100, 100, 100]), (30, 3, 10, [30, 40, 30]), (50, 2, 10, [20, 20]), (120, 3, 1, [8, 9, 8])],
)
def test_durations_add_up(fps: float, frames: int, unit: int, expected: list[int]) -> None:
    assert durations(fps, frames, unit) == expected


@pytest.mark.parametrize(
    ("video_format", "frames", "more"),
    [
        ("MP4", film(1)[0], {}),
        ("MP4", film().astype(np.float32), {}),
        ("AVI", film(), {}),
        ("GIF", film(), {"lossless": True}),
    ],
)
def test_what_cannot_be_encoded(video_format: str, frames: np.ndarray, more: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"expected uint8|unknown|lossless"):
        encode_video(8, frames, video_format, **more)
