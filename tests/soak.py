"""What the long suites share: requests drawn from a seed, their images compared, a process looked at."""

from __future__ import annotations

import concurrent.futures
import json
import os
import random
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from tests.running import as_base64

SCHEDULERS = (
    "DDIMScheduler",
    "DDPMScheduler",
    "DPMSolverMultistepScheduler",
    "EulerAncestralDiscreteScheduler",
    "EulerDiscreteScheduler",
    "UniPCMultistepScheduler",
)
SIZES = (32, 48, 64)
_COLOURS = ("red", "green", "blue", "yellow", "white", "black", "orange", "purple")
_SHAPES = ("circle", "square", "triangle", "star", "ring", "cross")


def size_of(name: str, default: int) -> int:
    """How much of a suite to run: an environment variable such as SOAK_REQUESTS, or the default."""
    return int(os.environ.get(name, default))


@dataclass(frozen=True)
class Order:
    """One request in the native dialect."""

    model_inputs: dict[str, Any]
    call_inputs: dict[str, Any]

    @property
    def key(self) -> str:
        """Equal for equal requests."""
        return json.dumps([self.model_inputs, self.call_inputs], sort_keys=True)

    @property
    def kind(self) -> str:
        inputs = self.model_inputs
        return "inpaint" if "mask_image" in inputs else "img2img" if "image" in inputs else "txt2img"

    @property
    def scheduler(self) -> str:
        return str(self.call_inputs["SCHEDULER"])

    @property
    def body(self) -> dict[str, Any]:
        return {"modelInputs": self.model_inputs, "callInputs": self.call_inputs}


def draw_order(rng: random.Random, models: tuple[str, ...]) -> Order:
    """A request that differs from others in all that could leak from one into another."""
    size, steps = rng.choice(SIZES), rng.randint(1, 30)
    inputs: dict[str, Any] = {
        "prompt": f"a {rng.choice(_COLOURS)} {rng.choice(_SHAPES)} on a {rng.choice(_COLOURS)} background",
        "num_inference_steps": steps,
        "guidance_scale": rng.choice((1.0, round(rng.uniform(1, 9), 2), round(rng.uniform(1, 9), 2))),
    }
    if rng.random() < 0.3:
        inputs["negative_prompt"] = f"{rng.choice(_COLOURS)} {rng.choice(_SHAPES)}"
    _draw_seeds(rng, inputs)
    kind = rng.choice(("txt2img", "txt2img", "txt2img", "img2img", "inpaint"))
    if kind == "txt2img":
        inputs["width"] = inputs["height"] = size
        if rng.random() < 0.2:
            inputs["width"] = rng.choice(SIZES)
    else:
        inputs["image"] = as_base64(_picture(rng, size))
        # of fewer than one step there is nothing to do
        inputs["strength"] = max(round(rng.uniform(0.3, 1.0), 2), min(1.0, 1.01 / steps))
    if kind == "inpaint":
        mask = np.zeros((size, size, 3), np.uint8)
        mask[:, rng.randrange(8, size - 8) :] = 255
        inputs["mask_image"] = as_base64(mask)
    return Order(inputs, {"MODEL_ID": rng.choice(models), "SCHEDULER": rng.choice(SCHEDULERS)})


def _draw_seeds(rng: random.Random, inputs: dict[str, Any]) -> None:
    """One seed for one image or several, a list of seeds, or a list of prompts."""
    inputs["seed"] = rng.randrange(2**32)
    several = rng.random()
    if several < 0.1:
        inputs["num_images_per_prompt"] = rng.choice((2, 3))
    elif several < 0.25:
        inputs["num_images_per_prompt"] = count = rng.choice((2, 3))
        inputs["seed"] = [rng.randrange(2**32) for _ in range(count)]
    elif several < 0.35:
        inputs["prompt"] = [inputs["prompt"], f"a {rng.choice(_COLOURS)} {rng.choice(_SHAPES)}"]
        if "negative_prompt" in inputs:
            inputs["negative_prompt"] = [inputs["negative_prompt"]] * 2


def _picture(rng: random.Random, size: int) -> np.ndarray:
    picture = np.full((size, size, 3), [rng.randrange(256) for _ in range(3)], np.uint8)
    at = rng.randrange(4, size // 2)
    picture[at : at + size // 3, at : at + size // 3] = [rng.randrange(256) for _ in range(3)]
    return picture


def shared_out(
    rng: random.Random, orders: list[Order], run: Callable[[Order], None], most: int = 32, warm_up: int = 0
) -> None:
    """Run them all, from 1 to ``most`` at a time, in portions; the first of ``warm_up`` with ``most``."""
    start, at_once = 0, most
    while start < len(orders):
        count = warm_up if start == 0 and warm_up else rng.randint(at_once, 3 * at_once)
        with concurrent.futures.ThreadPoolExecutor(at_once) as pool:
            for done in [pool.submit(run, order) for order in orders[start : start + count]]:
                done.result()
        start, at_once = start + count, rng.choice((1, 2, 3, 5, 8, 13, 21, most))


@dataclass
class Differences:
    """How far images are from those made alone."""

    worst: dict[tuple[str, str], float] = field(default_factory=lambda: defaultdict(float))
    spread: dict[str, Counter[int]] = field(default_factory=lambda: defaultdict(Counter))
    images: int = 0

    def note(self, order: Order, images: Iterable[np.ndarray], wanted: Iterable[np.ndarray]) -> float:
        """Compare; the greatest difference."""
        greatest = 0.0
        for image, reference in zip(images, wanted, strict=True):
            assert image.shape == reference.shape
            apart = float(np.abs(image.astype(float) - reference).max())
            greatest = max(greatest, apart)
            self.images += 1
            self.spread[order.scheduler][round(apart)] += 1
        self.worst[order.scheduler, order.kind] = max(self.worst[order.scheduler, order.kind], greatest)
        return greatest

    def __str__(self) -> str:
        lines = [f"{self.images} images"]
        for scheduler in sorted(self.spread):
            worst = {kind: value for (name, kind), value in sorted(self.worst.items()) if name == scheduler}
            lines.append(
                f"  {scheduler}: by greatest difference {dict(sorted(self.spread[scheduler].items()))}, {worst}"
            )
        return "\n".join(lines)


def threads_of(pid: int) -> int:
    """How many threads a process has."""
    return len(list(Path(f"/proc/{pid}/task").iterdir()))


def memory_of(pid: int) -> float:
    """Resident memory of a process in MB that is its own: files that are mapped come and go."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) / 1024
    raise LookupError("RssAnon")
