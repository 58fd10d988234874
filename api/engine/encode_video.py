"""Encodes the frames of finished videos, off the device's thread; the codecs release the GIL.

MP4 is H.264 by x264, as players of all kinds can show it: 4:2:0 (a side of odd length gets its last column or row
twice), BT.709 and said so, the index in front so that it plays while it loads. PyAV was chosen for it: it brings
FFmpeg's libraries in its wheels, and needs no program beside it. GIF and WebP are Pillow's, which keep a frame that
comes twice in a row once, and show it for as long.
The same frames give the same bytes: nothing is dated, the number of the encoder's threads is no machine's, and colours
are converted with FFmpeg's exact arithmetic.
"""

from __future__ import annotations

import io
import tempfile
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from api.engine.metadata import Texts
from api.schema.videos import VIDEO_FORMATS

_ENCODERS = ("libx264", "libopenh264", "mpeg4")
"""Of which a build of FFmpeg has some; the last one is not H.264, but every build has it."""
_THREADS = 4
"""x264 gives other bytes for another number of them."""
_BT709, _LIMITED = 1, 1
"""ISO/IEC 23091-2: primaries, transfer and matrix; FFmpeg's name of the limited range."""
_BEST_CRF, _WORST_CRF = 8, 45
_GIF_UNIT = 10
"""Milliseconds."""


def encode_video(
    fps: float,
    frames: np.ndarray,
    video_format: str,
    quality: int = 75,
    *,
    lossless: bool = False,
    texts: Texts | None = None,
) -> bytes:
    """Encode one video.

    Args:
        fps: frames a second; a fraction such as 23.976 is kept to a thousandth of it.
        frames: uint8 (F, H, W, 3).
        video_format: one of ``VIDEO_FORMATS``.
        quality: 1-100, for MP4 and WEBP.
        lossless: keep every pixel; WEBP only.
        texts: kept in the file: an MP4 and a GIF as a comment, a WEBP as EXIF.

    Raises:
        ValueError: an unknown format, one that cannot be lossless, or frames of another shape or type.
        ImportError: there is no PyAV to write an MP4.
    """
    if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[3] != 3 or not len(frames):
        raise ValueError(f"expected uint8 (F, H, W, 3), not {frames.dtype} {frames.shape}")
    if video_format not in VIDEO_FORMATS:
        raise ValueError(f"unknown video format {video_format}")
    if lossless and not VIDEO_FORMATS[video_format].lossless:
        raise ValueError(f"{video_format} cannot be lossless")
    if video_format == "MP4":
        return _mp4(fps, frames, quality, texts)
    more: dict[str, Any] = {}
    if video_format == "WEBP":
        more = {"quality": quality, "lossless": lossless, "method": 4, "duration": durations(fps, len(frames), 1)}
        more |= {"exif": texts.exif()} if texts else {}
        pictures = [Image.fromarray(frame) for frame in frames]
    else:
        more = {"duration": durations(fps, len(frames), _GIF_UNIT), "disposal": 1, "optimize": False}
        more |= {"comment": texts.meta.encode()} if texts else {}
        pictures = [Image.fromarray(frame).quantize(256) for frame in frames]
    out = io.BytesIO()
    pictures[0].save(out, video_format, save_all=True, append_images=pictures[1:], loop=0, **more)
    return out.getvalue()


def durations(fps: float, frames: int, unit: int) -> list[int]:
    """Milliseconds for which each frame is shown, in whole units; they add up to the length of the video.

    Args:
        fps: frames a second.
        frames: how many.
        unit: the smallest time that the format can tell, in milliseconds.
    """
    ends = [max(number, round(number * 1000 / fps / unit)) * unit for number in range(frames + 1)]
    return [end - begin for begin, end in pairwise(ends)]


def _mp4(fps: float, frames: np.ndarray, quality: int, texts: Texts | None) -> bytes:
    import av  # 0.1 s, and nobody who makes images needs it

    height, width = (side + side % 2 for side in frames.shape[1:3])
    rate = rate_of(fps)
    # the index can be moved to the front of what has a name only
    with tempfile.TemporaryDirectory(prefix="video-") as folder:
        path = Path(folder, "video.mp4")
        options = {"movflags": "+faststart", "fflags": "+bitexact"}
        with av.open(str(path), "w", format="mp4", options=options) as container:
            if texts:
                container.metadata["comment"] = texts.meta
                container.metadata["description"] = texts.parameters
            stream: Any = container.add_stream(_encoder(), rate=rate, options=_settings(quality))
            stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
            context = stream.codec_context
            context.time_base = 1 / rate
            context.thread_count = _THREADS
            context.color_primaries = context.color_trc = context.colorspace = _BT709
            context.color_range = _LIMITED
            for number, frame in enumerate(frames):
                picture = _as_yuv(frame, width, height)
                picture.pts, picture.time_base = number, 1 / rate
                container.mux(stream.encode(picture))
            container.mux(stream.encode(None))
        return path.read_bytes()


def rate_of(fps: float) -> Fraction:
    """Frames a second as containers tell them: 23.976 is 24000/1001, as television has it."""
    television = Fraction(round(fps * 1.001) * 1000, 1001)
    if television and abs(fps - television) < 5e-4:
        return television
    return Fraction(fps).limit_denominator(1000)


def _as_yuv(frame: np.ndarray, width: int, height: int) -> Any:
    from av import VideoFrame
    from av.video.reformatter import Interpolation

    more = height - frame.shape[0], width - frame.shape[1]
    if any(more):
        frame = np.pad(frame, ((0, more[0]), (0, more[1]), (0, 0)), mode="edge")
    exact = Interpolation.BICUBIC | Interpolation.ACCURATE_RND | Interpolation.BITEXACT | Interpolation.FULL_CHR_H_INP
    picture = VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")
    yuv = picture.reformat(
        format="yuv420p", interpolation=int(exact), src_color_range="JPEG", dst_color_range="MPEG",
        dst_colorspace="ITU709",
    )  # fmt: skip
    yuv.color_range, yuv.colorspace = _LIMITED, _BT709
    return yuv


def _encoder() -> str:
    import av

    return next(name for name in _ENCODERS if name in av.codecs_available)


def _settings(quality: int) -> dict[str, str]:
    """Of the encoder: constant quality, from 1 to 100."""
    crf = _WORST_CRF - (_WORST_CRF - _BEST_CRF) * (quality - 1) / 99
    named = _encoder()
    if named == "libx264":
        # with macroblock trees up to one small file in ten was another, why is not known; without them, or x264's
        # assembly, none of some hundreds was
        return {"crf": f"{crf:.1f}", "preset": "medium", "flags": "+bitexact", "x264-params": "mbtree=0"}
    if named == "mpeg4":
        return {"qscale": f"{max(1, round(crf / 2 - 3))}", "flags": "+bitexact"}
    return {"flags": "+bitexact"}
