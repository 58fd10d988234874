"""The demo model's own parts: the checker reads what was drawn, and the shipped model keeps its promise."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pytest

from scripts.demo_model.checker import check, read
from scripts.demo_model.drawing import draw
from scripts.demo_model.grammar import COLOURS, SHAPES, Scene, Thing, caption, sample_scene, sample_training_scene

ROOT = Path(__file__).resolve().parents[2]
MODEL = ROOT / "models" / "shapes"


def test_the_checker_reads_drawings() -> None:
    rng = random.Random(123)
    scenes = [sample_scene(rng) for _ in range(400)]
    assert sum(check(draw(scene, rng), scene).right for scene in scenes) >= 399


def test_the_checker_notices_every_kind_of_mistake() -> None:
    rng = random.Random(1)
    asked = Scene("one", (Thing("red", "circle"),), "blue")
    wrong = {
        "colour": Scene("one", (Thing("orange", "circle"),), "blue"),
        "shape": Scene("one", (Thing("red", "square"),), "blue"),
        "background": Scene("one", (Thing("red", "circle"),), "purple"),
        "count": Scene("two", (Thing("red", "circle"),), "blue"),
        "size": Scene("one", (Thing("red", "circle"),), "blue", size="small"),
        "place": Scene("one", (Thing("red", "circle"),), "blue", place="left"),
    }
    for part, scene in wrong.items():
        verdict = check(draw(scene, rng), asked)
        assert not getattr(verdict, part), part
        assert not verdict.right


def test_noise_and_nothing_are_never_right() -> None:
    rng = np.random.default_rng(0)
    asked = Scene("one", (Thing("red", "circle"),), "blue")
    for image in (rng.integers(0, 256, (64, 64, 3)), np.full((64, 64, 3), 60)):
        assert not check(image.astype(np.uint8), asked).right


def test_the_checker_reads_other_sizes() -> None:
    image = draw(Scene("one", (Thing("red", "star"),), "white"), random.Random(2)).repeat(3, 0).repeat(3, 1)
    (thing,) = read(image).things
    assert (thing.colour, thing.shape, thing.size) == ("red", "star", "normal")


def test_training_never_sees_what_is_held_out() -> None:
    rng = random.Random(5)
    assert not any(sample_training_scene(rng).held_out for _ in range(5000))
    seen = {(t.colour, t.shape) for _ in range(5000) for t in sample_training_scene(rng).things}
    assert len(seen) == len(COLOURS) * len(SHAPES) - 3


def test_captions_of_different_scenes_differ() -> None:
    rng = random.Random(6)
    scenes = {sample_scene(rng) for _ in range(3000)}
    assert len({caption(scene) for scene in scenes}) == len(scenes)


def test_the_model_is_small_and_in_the_ordinary_layout() -> None:
    files = [path for path in MODEL.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 12 * 2**20
    assert not [path for path in files if path.suffix in (".bin", ".ckpt", ".pt")]
    assert json.loads((MODEL / "model_index.json").read_text())["_class_name"] == "StableDiffusionPipeline"
    for name in ("vocab.json", "merges.txt", "tokenizer.json"):
        assert (MODEL / "tokenizer" / name).is_file()


@pytest.mark.slow
def test_a_sample_of_the_evaluation(demo) -> None:
    """Fifty of the 500 prompts at the guidance scale that old clients send; docs/demo-model.md has all."""
    from scripts.demo_model import evaluate

    asked = evaluate.questions()[::10]
    images = evaluate.pictures(demo, asked, 7.5)
    rows = evaluate.judge(asked, [check(image, q.scene) for q, image in zip(asked, images, strict=True)])
    assert rows[0].right >= 84
    assert rows[0].parts["background"] >= 96


@pytest.mark.slow
def test_the_whole_evaluation(demo) -> None:
    from scripts.demo_model import evaluate

    asked = evaluate.questions()
    images = evaluate.pictures(demo, asked, 4.0)
    rows = {
        row.group: row
        for row in evaluate.judge(asked, [check(im, q.scene) for q, im in zip(asked, images, strict=True)])
    }
    assert rows["all"].right >= 90
    assert rows["one object"].right >= 96
    assert rows["all"].parts["background"] >= 99
    assert rows["all"].parts["colour"] >= 99
