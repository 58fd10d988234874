"""Draws scenes as anti-aliased 64x64 pictures, with a little jitter of place, size and colour."""

from __future__ import annotations

import math
import random

import numpy as np

from scripts.demo_model.grammar import Scene

SIDE = 64

RGB = {
    "red": (220, 40, 40),
    "green": (40, 170, 70),
    "blue": (45, 80, 220),
    "yellow": (245, 220, 50),
    "purple": (140, 50, 175),
    "orange": (245, 140, 35),
    "white": (245, 245, 245),
    "black": (20, 20, 20),
}

_GRID = np.stack(np.meshgrid(np.arange(SIDE) + 0.5, np.arange(SIDE) + 0.5), axis=-1).astype(np.float32)


def _polygon(radii: list[float], start: float) -> np.ndarray:
    angles = start + np.arange(len(radii)) * 2 * math.pi / len(radii)
    r = np.asarray(radii)
    return np.stack([r * np.cos(angles), r * np.sin(angles)], axis=-1).astype(np.float32)


def _cross(arm: float, half: float) -> np.ndarray:
    a, h = arm, half
    points = [(h, a), (h, h), (a, h), (a, -h), (h, -h), (h, -a)]
    points += [(-x, -y) for x, y in points]
    return np.asarray(points, dtype=np.float32)


_UP = -math.pi / 2
_POLYGONS = {
    "square": np.asarray([(-0.85, -0.85), (0.85, -0.85), (0.85, 0.85), (-0.85, 0.85)], dtype=np.float32),
    "triangle": _polygon([1.12] * 3, _UP) + np.asarray([0, 0.2], dtype=np.float32),
    "star": _polygon([1.12, 0.5] * 5, _UP),
    "cross": _cross(1.0, 0.33),
}


def _polygon_distance(p: np.ndarray, corners: np.ndarray) -> np.ndarray:
    """Signed distance of points (H, W, 2) to a simple polygon, negative inside."""
    nearest = np.full(p.shape[:2], np.inf, dtype=np.float32)
    inside = np.zeros(p.shape[:2], dtype=bool)
    for a, b in zip(corners, np.roll(corners, -1, axis=0), strict=True):
        edge, rel = b - a, p - a
        along = np.clip((rel @ edge) / (edge @ edge), 0, 1)
        nearest = np.minimum(nearest, ((rel - along[..., None] * edge) ** 2).sum(-1))
        crosses = (a[1] > p[..., 1]) != (b[1] > p[..., 1])
        if a[1] != b[1]:
            x = a[0] + (p[..., 1] - a[1]) * edge[0] / edge[1]
            inside ^= crosses & (p[..., 0] < x)
    return np.where(inside, -1, 1) * np.sqrt(nearest)


def _distance(shape: str, p: np.ndarray, r: float) -> np.ndarray:
    if shape == "circle":
        return np.hypot(p[..., 0], p[..., 1]) - r
    if shape == "ring":
        return np.abs(np.hypot(p[..., 0], p[..., 1]) - 0.76 * r) - 0.24 * r
    return _polygon_distance(p / r, _POLYGONS[shape]) * r


def _layout(scene: Scene, rng: random.Random) -> list[tuple[float, float, float]]:
    """Centre and radius, in pixels, of every object."""
    if scene.kind == "three":
        r = rng.uniform(10.0, 11.2)
        spots = [(18.0, 20.0), (46.0, 20.0), (32.0, 45.0)]
    elif scene.kind in ("two", "pair"):
        r = rng.uniform(10.8, 12.2)
        spots = [(18.0, 32.0), (46.0, 32.0)]
    else:
        dx, dy = {"left": (-1, 0), "right": (1, 0), "top": (0, -1), "bottom": (0, 1)}.get(scene.place, (0, 0))
        placed = (dx, dy) != (0, 0)
        low, high = {"small": (8.5, 9.5), "normal": (13, 14) if placed else (15, 18), "large": (24, 26.5)}[scene.size]
        r = rng.uniform(low, high)
        reach = 18.0 if scene.size == "small" else 14.5
        spots = [(32 + reach * dx, 32 + reach * dy)]
    wobble = 0.8 if scene.size == "large" or scene.kind != "one" else 1.6
    return [(x + rng.uniform(-wobble, wobble), y + rng.uniform(-wobble, wobble), r) for x, y in spots]


def _paint(colour: str, rng: random.Random) -> np.ndarray:
    jitter = [rng.uniform(-9, 9) for _ in range(3)]
    return np.clip(np.add(RGB[colour], jitter), 0, 255).astype(np.float32)


def draw(scene: Scene, rng: random.Random, line: float = 0) -> np.ndarray:
    """Draw a scene.

    Args:
        scene: what to draw.
        rng: for the jitter.
        line: width in pixels of the lines that shapes are drawn with, hollow; 0: they are filled.

    Returns:
        uint8 array (64, 64, 3), RGB.
    """
    image = np.broadcast_to(_paint(scene.background, rng), (SIDE, SIDE, 3)).copy()
    spots = _layout(scene, rng)
    things = scene.things if scene.kind == "pair" else scene.things * len(spots)
    paints = {t: _paint(t.colour, rng) for t in scene.things}
    for thing, (x, y, r) in zip(things, spots, strict=True):
        turn = math.radians(rng.uniform(-5, 5))
        rotation = np.asarray([[math.cos(turn), -math.sin(turn)], [math.sin(turn), math.cos(turn)]], dtype=np.float32)
        points = (_GRID - np.asarray([x, y], dtype=np.float32)) @ rotation
        distance = _distance(thing.shape, points, r)
        if line:
            distance = np.abs(distance + line / 2) - line / 2
        cover = np.clip(0.5 - distance, 0, 1)[..., None]
        image += cover * (paints[thing] - image)
    return np.rint(image).astype(np.uint8)
