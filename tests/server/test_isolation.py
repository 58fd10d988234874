"""Nothing of one request is left for the next: random adapters, safety settings, attention scales, prompts, models.

Each image is compared with plain diffusers, which gets a copy of the model for it and loads what the request asks for.
"""

from __future__ import annotations

import concurrent.futures
import copy
import hashlib
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from api.engine.device import Device
from api.engine.generate import Engine
from api.schema.generation import ModelRef
from tests.adapters import inversion, lora, random_halves, save_peft
from tests.generating import a_request
from tests.running import Server, images_of, running

MODELS = ("tiny/a", "tiny/b", "tiny/nsfw", "tiny/safe")
SCHEDULERS = ("EulerDiscreteScheduler", "DDIMScheduler", "DPMSolverMultistepScheduler")
PROMPTS = ("a circle", "a <x> square", "<y> and <x>", "a red star on a blue background")
SCALES = (0.0, 0.3, 1.0, -0.6)
TOGETHER = 12


@dataclass(frozen=True)
class Asked:
    """One request; everything that could leak from it."""

    model: str
    prompt: str
    seed: int
    steps: int
    scheduler: str
    loras: tuple[tuple[str, float], ...]
    words: tuple[str, ...]
    attention: float | None
    safety: bool

    @property
    def inputs(self) -> dict[str, Any]:
        found = {"prompt": self.prompt, "num_inference_steps": self.steps, "width": 64, "height": 64}
        return found | ({} if self.attention is None else {"cross_attention_kwargs": {"scale": self.attention}})


def draw_requests(count: int, seed: int) -> list[Asked]:
    rng = random.Random(seed)

    def one(number: int) -> Asked:
        loras = tuple((name, rng.choice(SCALES)) for name in rng.sample("abc", rng.choice((0, 0, 1, 1, 2, 3))))
        words = tuple(rng.sample("xy", rng.choice((0, 0, 1, 2))))
        return Asked(
            rng.choice(MODELS), rng.choice(PROMPTS), number, rng.choice((2, 3)), rng.choice(SCHEDULERS), loras, words,
            rng.choice((None, None, 0.0, 0.5)), rng.random() < 0.5,
        )  # fmt: skip

    return [one(number) for number in range(count)]


class Shop:
    """The adapters' files, and plain diffusers."""

    def __init__(self, folder: Path, models_dir: Path) -> None:
        self.models_dir = models_dir
        self._read: dict[str, dict[str, Any]] = {}
        self.folder = folder / "rnd--adapters"
        self.folder.mkdir(parents=True)
        components = self._pipe("tiny/a").components
        for number, name in enumerate("abc"):
            save_peft(self.folder / f"{name}.safetensors", random_halves(components, number, rank=2 + number))
        for number, name in enumerate("xy"):
            rows = torch.randn(1 + number, 32, generator=torch.Generator().manual_seed(9 + number))
            save_file({f"<{name}>": rows}, self.folder / f"{name}.safetensors")

    def path(self, name: str) -> Path:
        return self.folder / f"{name}.safetensors"

    def _pipe(self, model: str) -> Any:
        """A pipeline of its own, of modules of its own."""
        cls = diffusers.StableDiffusionPipeline
        if model not in self._read:
            self._read[model] = cls.from_pretrained(self.models_dir / model.replace("/", "--")).components
        parts = {name: copy.deepcopy(part) for name, part in self._read[model].items()}
        pipe = cls(**parts, requires_safety_checker=False)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def reference(self, asked: Asked) -> np.ndarray:
        pipe = self._pipe(asked.model)
        if not asked.safety:
            pipe.safety_checker = None
        pipe.scheduler = getattr(diffusers, asked.scheduler).from_config(pipe.scheduler.config)
        used = [(name, scale) for name, scale in asked.loras if scale]
        for name, _ in used:
            pipe.load_lora_weights(str(self.path(name)), adapter_name=name)
        if used:
            pipe.set_adapters([name for name, _ in used], [scale for _, scale in used])
        for name in asked.words:
            pipe.load_textual_inversion(str(self.path(name)), token=f"<{name}>")
        inputs = asked.inputs if used else {k: v for k, v in asked.inputs.items() if k != "cross_attention_kwargs"}
        with torch.no_grad():
            out = pipe(**inputs, generator=torch.Generator().manual_seed(asked.seed), output_type="np")
        return np.rint(out.images[0] * 255).astype(int)


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory, models_dir: Path) -> Shop:
    return Shop(tmp_path_factory.mktemp("shop"), models_dir)


@pytest.fixture(scope="module")
def busy(shop: Shop, models_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Models switch, and adapters leave and come again."""
    size = sum(path.stat().st_size for path in (models_dir / "tiny--a").rglob("*.safetensors"))
    env = {
        "MODELS_DIR": str(models_dir), "LOCAL_MODELS": str(shop.folder.parent), "RUNTIME_DOWNLOADS": "0",
        "VRAM_LIMIT": str(4 * size), "ADAPTERS_LIMIT": "300000", "OMP_NUM_THREADS": "1", "MODEL_ID": "tiny/a",
    }  # fmt: skip
    with running(env, tmp_path_factory.mktemp("log") / "server.log") as server:
        yield server


def send(server: Server, asked: Asked) -> np.ndarray:
    options: dict[str, Any] = {"MODEL_ID": asked.model, "SCHEDULER": asked.scheduler, "safety_checker": asked.safety}
    if asked.loras:
        options["lora_weights"] = [f"rnd/adapters/{name}.safetensors#scale={scale}" for name, scale in asked.loras]
    if asked.words:
        options["textual_inversions"] = [f"rnd/adapters/{name}.safetensors" for name in asked.words]
    response = server.post({**asked.inputs, "seed": asked.seed}, options)
    assert response.status_code == 200, response.text[:500]
    return images_of(response.json())[0].astype(int)


def all_right(server: Server, shop: Shop, requests: list[Asked]) -> None:
    with concurrent.futures.ThreadPoolExecutor(TOGETHER) as pool:
        images = list(pool.map(lambda asked: send(server, asked), requests))
    worst = 0
    for asked, image in zip(requests, images, strict=True):
        off = int(np.abs(image - shop.reference(asked)).max())
        assert off <= 1, (off, asked)
        worst = max(worst, off)
    print(f"{len(requests)} requests, {len({r.loras for r in requests})} sets of LoRAs, worst {worst} of 255 levels")


def test_each_gets_its_own(busy: Server, shop: Shop) -> None:
    all_right(busy, shop, draw_requests(30, seed=4))


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_each_of_five_hundred_gets_its_own(busy: Server, shop: Shop) -> None:
    all_right(busy, shop, draw_requests(500, seed=5))


def weights_of(engine: Engine) -> dict[str, str]:
    return {
        f"{key}/{name}.{at}": hashlib.sha256(tensor.detach().contiguous().numpy().tobytes()).hexdigest()
        for key, model in engine.cache._models.items()
        for name, part in model.components.items()
        if isinstance(part, torch.nn.Module)
        for at, tensor in (*part.named_parameters(), *part.named_buffers())
    }


@pytest.mark.parametrize("count", [40, pytest.param(500, marks=[pytest.mark.slow, pytest.mark.timeout(1800)])])
def test_the_weights_are_what_they_were(shop: Shop, count: int) -> None:
    """Every parameter and buffer, and a plain image; as the engine has them, beneath the server."""
    engine = Engine(Device("cpu"), adapters_limit=300_000)
    refs = {name: ModelRef(name, "main", "fp32", str(shop.models_dir / name.replace("/", "--"))) for name in MODELS}

    def generate(asked: Asked) -> np.ndarray:
        request = a_request(
            str(asked.seed), refs[asked.model], "StableDiffusionPipeline", asked.scheduler, asked.inputs,
            seed=asked.seed, safety_checker=asked.safety,
            loras=tuple(lora(shop.path(name), scale) for name, scale in asked.loras),
            inversions=tuple(inversion(shop.path(name), f"<{name}>") for name in asked.words),
        )  # fmt: skip
        return engine.generate(request).images

    plain = [Asked(name, "a circle", 1, 2, SCHEDULERS[0], (), (), None, False) for name in MODELS]
    images = [generate(asked) for asked in plain]
    before = weights_of(engine)
    assert len(before) > 500
    with concurrent.futures.ThreadPoolExecutor(TOGETHER) as pool:
        list(pool.map(generate, draw_requests(count, seed=6)))
    assert weights_of(engine) == before
    assert all(np.array_equal(generate(asked), image) for asked, image in zip(plain, images, strict=True))
