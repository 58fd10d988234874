"""The little language of the demo model: scenes, their captions, and what training never sees."""

from __future__ import annotations

import itertools
import random
from dataclasses import dataclass, replace

COLOURS = ("red", "green", "blue", "yellow", "purple", "orange", "white", "black")
SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
KINDS = ("one", "two", "three", "pair")
SIZES = ("small", "normal", "large")
PLACES = ("centre", "left", "right", "top", "bottom")
PLURALS = {shape: shape + "s" for shape in SHAPES} | {"cross": "crosses"}

# Whole colour-shape pairs, and one in ten of all colour-shape-background triples, are kept out of
# training, so that the evaluation can tell composing from remembering.
HELD_OUT_PAIRS = frozenset({("purple", "star"), ("orange", "ring"), ("green", "cross")})
_ALL_TRIPLES = [t for t in itertools.product(COLOURS, SHAPES, COLOURS) if t[0] != t[2]]
HELD_OUT_TRIPLES = frozenset(random.Random(2026).sample(_ALL_TRIPLES, len(_ALL_TRIPLES) // 10))


@dataclass(frozen=True)
class Thing:
    """One object: a colour and a shape."""

    colour: str
    shape: str


@dataclass(frozen=True)
class Scene:
    """What a picture shows. ``things`` holds two entries for a pair and one otherwise.

    Attributes:
        kind: one of ``KINDS``; "two" and "three" repeat the same thing.
        things: the objects, left to right.
        background: one of ``COLOURS``, different from every thing's colour.
        size: one of ``SIZES``; anything but "normal" only with kind "one".
        place: one of ``PLACES``; anything but "centre" only with kind "one" and not "large".
    """

    kind: str
    things: tuple[Thing, ...]
    background: str
    size: str = "normal"
    place: str = "centre"

    @property
    def held_out(self) -> bool:
        """True when training must not see this combination of words."""
        return any(
            (t.colour, t.shape) in HELD_OUT_PAIRS or (t.colour, t.shape, self.background) in HELD_OUT_TRIPLES
            for t in self.things
        )


def sample_scene(rng: random.Random) -> Scene:
    """Draw any scene of the grammar, held out or not."""
    kind = rng.choices(KINDS, weights=(50, 15, 15, 20))[0]
    background, *colours = rng.sample(COLOURS, 3)
    things = tuple(Thing(c, rng.choice(SHAPES)) for c in colours)
    scene = Scene(kind, things if kind == "pair" else things[:1], background)
    if kind != "one":
        return scene
    variant = rng.random()
    if variant < 0.5:
        return scene
    if variant < 0.7:
        return replace(scene, size=rng.choice(("small", "large")))
    size = rng.choice(("normal", "normal", "small"))
    return replace(scene, size=size, place=rng.choice(PLACES[1:]))


def sample_training_scene(rng: random.Random) -> Scene:
    """Draw a scene that training may see."""
    while (scene := sample_scene(rng)).held_out:
        pass
    return scene


def _article(word: str) -> str:
    return "an" if word[0] in "aeiou" else "a"


def _noun(scene: Scene, thing: Thing, colour: bool, shape: bool) -> str:
    words = [] if scene.size == "normal" else [scene.size]
    words += [thing.colour] if colour else []
    words.append(thing.shape if shape else "shape")
    return f"{_article(words[0])} {' '.join(words)}"


def caption(scene: Scene, rng: random.Random | None = None) -> str:
    """Put a scene into words.

    Args:
        scene: what to describe.
        rng: varies the wording (synonyms, short forms, a leading "a picture of"); without it the
            wording is the plain one that the evaluation uses.
    """
    first = scene.things[0]
    if scene.kind == "one":
        text = _noun(scene, first, colour=True, shape=True)
    elif scene.kind == "pair":
        joint = " next to " if rng and rng.random() < 0.2 else " and "
        text = joint.join(_noun(scene, t, colour=True, shape=True) for t in scene.things)
    else:
        text = f"{scene.kind} {first.colour} {PLURALS[first.shape]}"
    if scene.place != "centre":
        text += f" at the {scene.place}" if not rng or rng.random() < 0.7 else f" on the {scene.place}"
    short = rng is not None and rng.random() < 0.4
    where = scene.background if short else f"{_article(scene.background)} {scene.background} background"
    text += f" on {where}"
    if rng is None:
        return text
    if scene.size == "large" and rng.random() < 0.5:
        text = text.replace("a large", "a big", 1)
    if rng.random() < 0.15:
        text = rng.choice(("a picture of ", "an image of ", "a photo of ", "a drawing of ")) + text
    return text


@dataclass(frozen=True)
class Labels:
    """What a caption says, part by part; ``None`` where it says nothing."""

    kind: str | None = None
    colour: str | None = None
    shape: str | None = None
    colour2: str | None = None
    shape2: str | None = None
    background: str | None = None
    size: str | None = None
    place: str | None = None


LABEL_VALUES: dict[str, tuple[str | None, ...]] = {
    "kind": (None, *KINDS),
    "colour": (None, *COLOURS),
    "shape": (None, *SHAPES),
    "colour2": (None, *COLOURS),
    "shape2": (None, *SHAPES),
    "background": (None, *COLOURS),
    "size": (None, *SIZES),
    "place": (None, *PLACES),
}


def describe(scene: Scene, rng: random.Random) -> tuple[str, Labels]:
    """A caption for training with what it says: mostly whole, sometimes only a part of the scene.

    Partial captions ("a red circle", "a blue background") are what makes short prompts and
    negative prompts mean something.
    """
    first = scene.things[0]
    if scene.kind == "one" and rng.random() < 0.15:
        part = rng.randrange(5)
        place = {"size": scene.size, "place": scene.place, "kind": "one"}
        if part == 0:
            return _noun(scene, first, True, True), Labels(colour=first.colour, shape=first.shape, **place)
        if part == 1:
            return _noun(scene, first, False, True), Labels(shape=first.shape, **place)
        if part == 2:
            text = f"{_noun(scene, first, False, True)} on a {scene.background} background"
            return text, Labels(shape=first.shape, background=scene.background, **place)
        if part == 3:
            text = f"{_noun(scene, first, True, False)} on a {scene.background} background"
            return text, Labels(colour=first.colour, background=scene.background, **place)
        text = f"{_article(scene.background)} {scene.background} background"
        return text, Labels(background=scene.background)
    second = scene.things[1] if scene.kind == "pair" else None
    labels = Labels(
        kind=scene.kind,
        colour=first.colour,
        shape=first.shape,
        colour2=second.colour if second else None,
        shape2=second.shape if second else None,
        background=scene.background,
        size=scene.size,
        place=scene.place,
    )
    return caption(scene, rng), labels


def words() -> list[str]:
    """Every word that captions use, the most useful first: what the tokenizer learns."""
    glue = "a an on the and at next to background picture image photo drawing of shape shapes"
    return [
        *glue.split(),
        *COLOURS,
        *SHAPES,
        *PLURALS.values(),
        *KINDS,
        *("small", "large", "big"),
        *PLACES,
    ]
