"""A 1024x1024 PNG with its ``parameters`` chunk: our encoder against Pillow's default settings."""

from __future__ import annotations

import functools
import io

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from scipy import ndimage

from api.engine.encode import encode_png
from api.engine.metadata import Texts
from scripts.benchmarks.measure import Figure, interleaved, median

ROUNDS = 15
TEXT = "a photo of a mountain lake at dawn\nSteps: 30, Sampler: DPM++ 2M, CFG scale: 7, Seed: 1, Size: 1024x1024"
TEXTS = Texts(TEXT, "{}")


def picture(kind: str) -> np.ndarray:
    """uint8 (1024, 1024, 3): smooth structure with grain, as photographs have, or worse."""
    rng = np.random.default_rng(7)
    if kind == "noise":
        return rng.integers(0, 256, (1024, 1024, 3), dtype=np.uint8)
    base = ndimage.gaussian_filter(rng.normal(size=(1024, 1024, 3)), (40, 40, 0))
    detail = ndimage.gaussian_filter(rng.normal(size=(1024, 1024, 3)), (2, 2, 0))
    grain = rng.normal(size=(1024, 1024, 1))
    image = 128 + base / base.std() * 50 + detail / detail.std() * 12 + grain * 1.5
    return np.clip(image, 0, 255).astype(np.uint8)


def pillow(pixels: np.ndarray) -> bytes:
    """Pillow with its defaults."""
    info = PngInfo()
    info.add_text("parameters", TEXT)
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "PNG", pnginfo=info)
    return out.getvalue()


def run() -> list[Figure]:
    """Measure, after making sure that both files hold the same pixels and text."""
    figures = []
    for kind in ("photo", "noise"):
        pixels = picture(kind)
        ours, theirs = encode_png(pixels, TEXTS), pillow(pixels)
        for data in (ours, theirs):
            image = Image.open(io.BytesIO(data))
            assert np.array_equal(np.asarray(image), pixels)
            assert image.text["parameters"] == TEXT  # type: ignore[attr-defined]
        calls = [functools.partial(encode_png, pixels, TEXTS), functools.partial(pillow, pixels)]
        a, b = (median(times) for times in interleaved(calls, ROUNDS))
        more = {"size": f"{len(ours) / 1e6:.2f}MB", "baseline_size": f"{len(theirs) / 1e6:.2f}MB"}
        figures.append(Figure(f"encode-{kind}", a, b, "ms", "Pillow's default PNG", b / a, more))
    return figures
