"""Reads a picture back: what is on it, judged by eye-like measures alone.

Shares no code, colours or sizes with ``drawing``: colours are named by hue, shapes by outline
(holes, solidity, radial harmonics), sizes by the share of the picture they cover. It judges any
picture, drawn or generated, of any side length.
"""

from __future__ import annotations

import colorsys
import math
from dataclasses import dataclass

import numpy as np
from scipy import ndimage
from scipy.spatial import ConvexHull, QhullError

from scripts.demo_model.grammar import Scene

_HUES = (
    (14, "red"),
    (42, "orange"),
    (74, "yellow"),
    (185, "green"),
    (258, "blue"),
    (332, "purple"),
    (361, "red"),
)
_ZOOM = 4
_MIN_DIFFERENCE = 42.0
"""RGB distance at which a pixel no longer belongs to the background."""
_SPECK = 14 / 64**2
"""Share of the picture below which something is dirt, not an object."""


@dataclass(frozen=True)
class Seen:
    """One object read from a picture. Lengths are shares of the picture's side.

    ``outline`` is the shape of its outer edge, ``hollow`` the share of what that encloses that is background.
    """

    colour: str
    shape: str
    radius: float
    x: float
    y: float
    outline: str = ""
    hollow: float = 0.0

    @property
    def size(self) -> str:
        """small, normal or large."""
        return "small" if self.radius < 0.175 else "normal" if self.radius < 0.33 else "large"

    @property
    def place(self) -> str:
        """Where the object lies: centre, left, right, top, bottom, or corner."""
        dx, dy = self.x - 0.5, self.y - 0.5
        across, along = abs(dx) > 0.11, abs(dy) > 0.11
        if across and along:
            return "corner"
        if across:
            return "left" if dx < 0 else "right"
        if along:
            return "top" if dy < 0 else "bottom"
        return "centre"


@dataclass(frozen=True)
class Reading:
    """What a picture shows: its background colour and the objects on it."""

    background: str
    things: tuple[Seen, ...]


@dataclass(frozen=True)
class Verdict:
    """Which parts of a scene a picture got right."""

    background: bool
    count: bool
    colour: bool
    shape: bool
    size: bool
    place: bool

    @property
    def right(self) -> bool:
        """Everything is as asked."""
        return all((self.background, self.count, self.colour, self.shape, self.size, self.place))


def colour_name(rgb: np.ndarray) -> str:
    """The plain name of an RGB colour (0-255), by hue, saturation and value."""
    hue, saturation, value = colorsys.rgb_to_hsv(*(float(c) / 255 for c in rgb))
    if value < 0.28:
        return "black"
    if saturation < 0.22:
        return "white" if value > 0.72 else "grey"
    return next(name for limit, name in _HUES if hue * 360 < limit)


def shape_name(mask: np.ndarray) -> str:
    """The shape of one connected region (bool array, magnified enough to have a smooth outline)."""
    filled = ndimage.binary_fill_holes(mask)
    area = filled.sum()
    if (area - mask.sum()) / area > 0.05:
        return "ring"
    edge = np.argwhere(filled & ~ndimage.binary_erosion(filled)).astype(float)
    ys, xs = np.nonzero(filled)
    offsets = edge - [ys.mean(), xs.mean()]
    reach = np.hypot(*offsets.T)
    angles = np.arctan2(offsets[:, 0], offsets[:, 1])
    bins = ((angles + math.pi) / (2 * math.pi) * 90).astype(int) % 90
    profile = np.array([reach[bins == k].max(initial=0) for k in range(90)])
    spectrum = np.abs(np.fft.rfft(profile))
    three, four, five = spectrum[3:6] / spectrum[0]
    if _solidity(edge, area) > 0.885:
        if max(three, four, five) < 0.027:
            return "circle"
        return "triangle" if three > four else "square"
    return ("triangle", "cross", "star")[int(np.argmax((three, four, five)))]


def _solidity(edge: np.ndarray, area: float) -> float:
    try:
        return float(area / ConvexHull(edge).volume)
    except QhullError:
        return 1.0


def read(image: np.ndarray) -> Reading:
    """Read a picture.

    Args:
        image: uint8 (H, W, 3) RGB, square.
    """
    side = image.shape[0]
    pixels = image.astype(float)
    margin = max(1, side // 32)
    inner = np.zeros(image.shape[:2], dtype=bool)
    inner[margin:-margin, margin:-margin] = True
    background = np.median(pixels[~inner], axis=0)
    difference = np.linalg.norm(pixels - background, axis=-1)
    regions, count = ndimage.label(difference > _MIN_DIFFERENCE)
    things = []
    for region in range(1, count + 1):
        where = regions == region
        if where.mean() < _SPECK:
            continue
        strongest = where & (difference >= np.quantile(difference[where], 0.5))
        paint = np.median(pixels[strongest], axis=0)
        things.append(_look_at(pixels, background, paint, ndimage.binary_dilation(where, iterations=2)))
    return Reading(colour_name(background), tuple(sorted(things, key=lambda t: (t.x, t.y))))


def _look_at(pixels: np.ndarray, background: np.ndarray, paint: np.ndarray, near: np.ndarray) -> Seen:
    side = pixels.shape[0]
    line = paint - background
    cover = np.clip((pixels - background) @ line / (line @ line), 0, 1) * near
    mask = ndimage.zoom(cover, _ZOOM, order=1, grid_mode=True, mode="grid-constant") > 0.5
    parts, count = ndimage.label(mask)
    if count > 1:
        mask = parts == 1 + int(np.argmax(ndimage.sum_labels(mask, parts, range(1, count + 1))))
    shape = shape_name(mask)
    ys, xs = np.nonzero(mask)
    outline = np.argwhere(mask).astype(float)
    hull = ConvexHull(outline).volume if len(outline) > 9 else float(len(outline))
    # a triangle of a given size covers half of what the other shapes cover
    radius = math.sqrt(hull / math.pi) / (0.72 if shape == "triangle" else 1.0)
    scale = _ZOOM * side
    filled = ndimage.binary_fill_holes(mask)
    hollow = 1 - float(mask.sum() / filled.sum())
    place = (xs.mean() + 0.5) / scale, (ys.mean() + 0.5) / scale
    return Seen(colour_name(paint), shape, radius / scale, *place, shape_name(filled), hollow)


def check(image: np.ndarray, scene: Scene) -> Verdict:
    """Compare a picture with the scene that was asked for.

    A pair may stand in either order. Size and place are asked of a single object only.
    """
    reading = read(image)
    expected = {"one": 1, "two": 2, "three": 3, "pair": 2}[scene.kind]
    wanted = scene.things if scene.kind == "pair" else scene.things * expected
    seen = reading.things
    single = scene.kind == "one" and len(seen) == 1
    return Verdict(
        background=reading.background == scene.background,
        count=len(seen) == expected,
        colour=sorted(t.colour for t in seen) == sorted(t.colour for t in wanted),
        shape=sorted((t.colour, t.shape) for t in seen) == sorted((t.colour, t.shape) for t in wanted),
        size=scene.kind != "one" or (single and seen[0].size == scene.size),
        place=scene.kind != "one" or (single and seen[0].place == scene.place),
    )
