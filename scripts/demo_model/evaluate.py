"""Asks the demo model 500 questions and counts the right answers.

The prompts are drawn with a fixed seed: 400 whose combinations of words training saw (the
pictures themselves are new), 100 whose combinations it never saw.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields

import diffusers
import numpy as np
import torch
from diffusers import StableDiffusionPipeline

from scripts.demo_model.checker import Verdict, check
from scripts.demo_model.grammar import Scene, caption, sample_scene
from scripts.demo_model.run import Progress

SEEN, UNSEEN = 400, 100
STEPS = 20
GUIDANCE = (7.5, 4.0, 2.0)
OTHER_SCHEDULERS = ("DDIM", "UniPCMultistep", "EulerDiscrete", "EulerAncestralDiscrete", "LMSDiscrete", "PNDM")


@dataclass(frozen=True)
class Question:
    """One prompt of the evaluation and the seed of its picture."""

    scene: Scene
    seed: int

    @property
    def prompt(self) -> str:
        """The plain caption of the scene."""
        return caption(self.scene)


def questions(seen: int = SEEN, unseen: int = UNSEEN, seed: int = 99) -> list[Question]:
    """The evaluation's prompts, the unseen combinations last."""
    rng = random.Random(seed)
    groups: dict[bool, list[Scene]] = {False: [], True: []}
    while len(groups[False]) < seen or len(groups[True]) < unseen:
        scene = sample_scene(rng)
        groups[scene.held_out].append(scene)
    scenes = groups[False][:seen] + groups[True][:unseen]
    return [Question(scene, 1_000_000 + index) for index, scene in enumerate(scenes)]


def pictures(
    pipe: StableDiffusionPipeline, asked: list[Question], guidance: float, steps: int = STEPS, batch: int = 10
) -> Iterator[np.ndarray]:
    """uint8 (H, W, 3) for every question, each from its own seed."""
    for first in range(0, len(asked), batch):
        part = asked[first : first + batch]
        out = pipe(
            [q.prompt for q in part],
            generator=[torch.Generator().manual_seed(q.seed) for q in part],
            num_inference_steps=steps,
            guidance_scale=guidance,
            output_type="np",
        )
        yield from np.rint(out.images * 255).astype(np.uint8)


@dataclass(frozen=True)
class Row:
    """One line of the evaluation table: shares of right answers in percent."""

    group: str
    prompts: int
    right: float
    parts: dict[str, float]


def _row(group: str, verdicts: Iterable[Verdict]) -> Row:
    rows = list(verdicts)
    share = lambda values: 100 * sum(values) / max(len(rows), 1)  # noqa: E731
    parts = {f.name: share(getattr(v, f.name) for v in rows) for f in fields(Verdict)}
    return Row(group, len(rows), share(v.right for v in rows), parts)


def judge(asked: list[Question], verdicts: list[Verdict]) -> list[Row]:
    """The table's rows: all, seen and unseen apart, and by kind of scene."""
    both = list(zip(asked, verdicts, strict=True))
    single = [(q, v) for q, v in both if q.scene.kind == "one"]
    rows = [
        _row("all", verdicts),
        _row("all, seen", (v for q, v in both if not q.scene.held_out)),
        _row("all, unseen", (v for q, v in both if q.scene.held_out)),
        _row("one object", (v for _, v in single)),
        _row("one object, seen", (v for q, v in single if not q.scene.held_out)),
        _row("one object, unseen", (v for q, v in single if q.scene.held_out)),
        _row("one, at a place", (v for q, v in single if q.scene.place != "centre")),
        _row("one, small or large", (v for q, v in single if q.scene.size != "normal")),
    ]
    return rows + [_row(kind, (v for q, v in both if q.scene.kind == kind)) for kind in ("two", "three", "pair")]


def table(rows: list[Row]) -> str:
    """The rows as Markdown."""
    names = [f.name for f in fields(Verdict)]
    lines = [
        f"| prompts | number | all right | {' | '.join(names)} |",
        f"| --- | ---: | ---: | {' | '.join('---:' for _ in names)} |",
    ]
    for row in rows:
        cells = " | ".join(f"{row.parts[name]:.1f}" for name in names)
        lines.append(f"| {row.group} | {row.prompts} | **{row.right:.1f}** | {cells} |")
    return "\n".join(lines)


def with_scheduler(pipe: StableDiffusionPipeline, name: str) -> StableDiffusionPipeline:
    """The same pipeline with another scheduler, made from the model's own configuration."""
    cls = getattr(diffusers, f"{name}Scheduler")
    other = StableDiffusionPipeline(**{**pipe.components, "scheduler": cls.from_config(pipe.scheduler.config)})
    other.set_progress_bar_config(disable=True)
    return other


def report(pipe: StableDiffusionPipeline, seen: int = SEEN, unseen: int = UNSEEN) -> str:
    """The whole evaluation as Markdown; minutes on two CPU cores."""
    asked = questions(seen, unseen)
    out = []
    for guidance in GUIDANCE:
        progress = Progress(f"guidance {guidance}", len(asked))
        verdicts = []
        for question, image in zip(asked, pictures(pipe, asked, guidance), strict=True):
            verdicts.append(check(image, question.scene))
            progress.step(len(verdicts))
        out.append(f"### DPMSolverMultistep, {STEPS} steps, guidance {guidance}\n\n{table(judge(asked, verdicts))}\n")
    singles = [q for q in asked if q.scene.kind == "one"][:60]
    lines = ["| scheduler | 20 steps | 50 steps |", "| --- | ---: | ---: |"]
    for name in OTHER_SCHEDULERS:
        other = with_scheduler(pipe, name)
        shares = []
        for steps in (20, 50):
            images = pictures(other, singles, 7.5, steps)
            verdicts = [check(image, q.scene) for q, image in zip(singles, images, strict=True)]
            shares.append(f"{_row('', verdicts).right:.0f}")
            print(f"{name} {steps} steps: {shares[-1]} % right", flush=True)
        lines.append(f"| {name} | {' | '.join(shares)} |")
    title = f"### Other schedulers, guidance 7.5: one-object prompts all right (%), {len(singles)} prompts"
    return "\n".join([*out, title, "", *lines, ""])
