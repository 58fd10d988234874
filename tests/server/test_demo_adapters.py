"""The demo adapters do what they were trained for, by check, and more of it at a larger scale."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import Any

import numpy as np
import pytest

from scripts.demo_model.checker import check, read
from scripts.demo_model.grammar import Scene, Thing, caption
from tests.running import ROOT, Server, images_of

OUTLINED, NIGHT, SUN = (f"demo/adapters/{name}.safetensors" for name in ("outlined", "night", "sun"))
SCALES = (0.0, 0.25, 0.5, 0.75, 1.0)


def one(colour: str, shape: str, background: str, **more: str) -> Scene:
    return Scene("one", (Thing(colour, shape),), background, **more)


SCENES = [
    one("red", "circle", "blue"), one("yellow", "square", "purple"), one("green", "triangle", "white"),
    one("white", "circle", "red"), one("blue", "triangle", "yellow"), one("red", "star", "white"),
    one("orange", "square", "white"), one("white", "square", "green"),
]  # fmt: skip


def draw(server: Server, scenes: list[Scene], words: list[str] | None = None, **options: Any) -> list[np.ndarray]:
    """A picture of each, all at once, from a seed of its own."""

    def picture(asked: tuple[int, str]) -> np.ndarray:
        seed, prompt = asked
        inputs = {"prompt": prompt, "num_inference_steps": 20, "guidance_scale": 7.5, "seed": seed}
        response = server.post(inputs, options)
        assert response.status_code == 200, response.text[:500]
        return images_of(response.json())[0]

    with ThreadPoolExecutor(8) as pool:
        return list(pool.map(picture, enumerate(words or map(caption, scenes))))


def test_they_are_small() -> None:
    files = list((ROOT / "models" / "adapters").iterdir())
    assert sorted(path.name for path in files) == ["night.safetensors", "outlined.safetensors", "sun.safetensors"]
    assert all(path.stat().st_size < 2**20 for path in files)


@pytest.mark.slow
def test_outlined_draws_lines_and_more_so_at_a_larger_scale(server: Server) -> None:
    """The same things in the same colours, hollow; at scale 0 the plain picture, to the bit where each runs alone."""
    none = f"{OUTLINED}#scale=0"
    assert np.array_equal(*(draw(server, SCENES[:1], **call)[0] for call in ({}, {"lora_weights": none})))
    plain = draw(server, SCENES)
    hollow = []
    for scale in SCALES:
        images = draw(server, SCENES, lora_weights=f"{OUTLINED}#scale={scale}")
        if not scale:
            assert max(np.abs(own.astype(int) - other).max() for own, other in zip(images, plain, strict=True)) <= 1
        seen = [read(image) for image in images]
        hollow.append(np.mean([max((thing.hollow for thing in each.things), default=0) for each in seen]))
    print("hollow, by scale:", dict(zip(SCALES, map(float, hollow), strict=True)))
    assert hollow[0] == 0
    assert all(more >= less for less, more in pairwise(hollow))
    assert hollow[-1] > 0.25
    right = 0
    for scene, each in zip(SCENES, seen, strict=True):
        wanted = scene.things[0]
        right += any((t.outline, t.colour) == (wanted.shape, wanted.colour) and t.hollow > 0.1 for t in each.things)
    assert right >= 6


@pytest.mark.slow
def test_night_makes_the_background_dark_and_more_so_at_a_larger_scale(server: Server) -> None:
    light = []
    for scale in SCALES:
        images = draw(server, SCENES, lora_weights=f"{NIGHT}#scale={scale}")
        edges = [np.concatenate([image[:2].reshape(-1, 3), image[-2:].reshape(-1, 3)]) for image in images]
        light.append(np.mean([edge.mean() for edge in edges]))
    print("light of the background, by scale:", dict(zip(SCALES, map(float, light), strict=True)))
    assert all(less >= more for less, more in pairwise(light))
    assert light[0] > 120
    assert sum(read(image).background == "black" for image in images) >= 7
    night = [Scene(scene.kind, scene.things, "black") for scene in SCENES]
    assert sum(check(image, scene).right for image, scene in zip(images, night, strict=True)) >= 6


def test_both_at_once(server: Server) -> None:
    seen = [read(image) for image in draw(server, SCENES, lora_weights=[f"{OUTLINED}#scale=0.8", f"{NIGHT}#scale=0.9"])]
    assert sum(each.background == "black" for each in seen) >= 7
    assert np.mean([max((thing.hollow for thing in each.things), default=0) for each in seen]) > 0.15


def test_the_word_means_what_it_was_taught(server: Server) -> None:
    scenes = [
        one("yellow", "circle", background, **more)
        for background, more in (
            ("black", {}), ("blue", {}), ("purple", {}), ("white", {"size": "small"}), ("red", {"place": "left"}),
            ("green", {"size": "large"}), ("black", {"place": "top"}), ("blue", {"size": "small"}),
        )
    ]  # fmt: skip
    words = [caption(scene).replace("yellow circle", "<sun>") for scene in scenes]
    images = draw(server, scenes, words, textual_inversions=SUN)
    assert sum(check(image, scene).right for image, scene in zip(images, scenes, strict=True)) >= 7
    untaught = draw(server, scenes, words)
    assert sum(check(image, scene).right for image, scene in zip(untaught, scenes, strict=True)) <= 2
