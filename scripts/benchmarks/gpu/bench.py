"""What the sections share: the clock, the cases, our engines and plain pipelines on the same device."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import gc
import inspect
import operator
import os
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import diffusers
import torch

from api.engine.budgets import budgets, host_memory
from api.engine.device import Device
from api.engine.generate import Engine
from api.engine.parts import Loader
from api.engine.settled import settle
from api.schema.generation import GenerationRequest, ModelRef
from api.settings import Settings
from scripts.benchmarks import architectures
from scripts.benchmarks.gpu.rows import Row, Table

PROMPT = "a red circle on a blue background"


@dataclass(frozen=True)
class Case:
    """A model, and what is made with it.

    Attributes:
        name: for the table.
        family: of ``architectures``.
        pipeline: its class.
        scheduler: its class.
        precision: of the files and of what is computed, on a GPU.
        side: of the images, in pixels.
        steps: of a whole image.
        guidance: its scale; 0: the model has none.
        size: see ``architectures.model``.
    """

    name: str
    family: str
    pipeline: str
    scheduler: str
    precision: str
    side: int
    steps: int
    guidance: float
    size: str

    @property
    def what(self) -> str:
        """For the table."""
        return f"{self.name}, {self.side}×{self.side}, {self.steps} steps"

    @functools.cached_property
    def folder(self) -> str:
        """Of its files, which are made if they are not there."""
        return str(architectures.model(self.family, self.precision, 1, self.size))

    def ref(self, **more: Any) -> ModelRef:
        """The model."""
        return ModelRef(f"bench/{self.family}", "bench", self.precision, self.folder, **more)

    def request(self, seed: int = 1, ref: ModelRef | None = None, **more: Any) -> GenerationRequest:
        """One text-to-image request.

        Args:
            seed: of its noise.
            ref: the model; as it is without.
            more: over the fields of a usual one, and ``steps``, ``guidance`` over the case's.
        """
        inputs = {"prompt": PROMPT, "num_inference_steps": more.pop("steps", self.steps), "width": self.side}
        inputs |= {"height": self.side, "guidance_scale": more.pop("guidance", self.guidance)}
        images = more.get("images", 1)
        usual = {"scheduler": self.scheduler, "pictures": {}, "images": 1, "image_format": "PNG", "image_quality": 95}
        fields = {**usual, "attention": settings_of({}).attention, "safety_checker": False, "meta": {}, **more}
        return GenerationRequest(
            id=str(seed), request_id=str(seed), model=ref or self.ref(), pipeline=self.pipeline, seed=seed,
            inputs={**inputs, "num_images_per_prompt": images}, **fields,
        )  # fmt: skip

    @property
    def guided(self) -> bool:
        """Whether a step takes two rows for each image."""
        return self.guidance > 1 and self.family != "flux"


@dataclass
class Bench:
    """One run of the benchmark.

    Attributes:
        device: ``cuda:0``, or ``cpu`` to try it out.
        size: ``real`` or ``tiny``.
        limit: seconds that it may take.
        table: what it found so far.
        rounds: how often a comparison is made at the most.
    """

    device: str
    size: str
    limit: float
    table: Table
    rounds: int = 5
    began: float = field(default_factory=time.monotonic)

    @property
    def is_cuda(self) -> bool:
        """Whether it is on a GPU."""
        return self.device.startswith("cuda")

    @property
    def left(self) -> float:
        """Seconds."""
        return self.limit - (time.monotonic() - self.began)

    def add(self, row: Row) -> Row:
        """One more row, which is told at once."""
        self.table.rows.append(row)
        print(f"[{time.monotonic() - self.began:5.0f} s] {row.section}: {' | '.join(row.cells())}", flush=True)
        return row

    def leave_out(self, what: str) -> None:
        """Say what was not measured, and why."""
        if what in self.table.left_out:
            return
        self.table.left_out.append(what)
        print(f"[{time.monotonic() - self.began:5.0f} s] left out: {what}", flush=True)

    def case(self, family: str) -> Case:
        """``sd1`` or ``sdxl``."""
        tiny = self.size == "tiny"
        if family == "sd1":
            name, pipeline, side = "SD 1.5", "StableDiffusionPipeline", 512
        else:
            name, pipeline, side = "SDXL", "StableDiffusionXLPipeline", 1024
        side, steps = (64, 3) if tiny else (side, 30)
        precision = "fp16" if self.is_cuda else "fp32"
        name = f"tiny {name}" if tiny else name
        return Case(name, family, pipeline, "EulerDiscreteScheduler", precision, side, steps, 5.0, self.size)

    @property
    def dtype(self) -> torch.dtype:
        """That plain pipelines of the cases are loaded in."""
        return torch.float16 if self.is_cuda else torch.float32

    @contextlib.contextmanager
    def engine(
        self, environ: Mapping[str, str] | None = None, device: Device | None = None, loader: Loader | None = None
    ) -> Iterator[Engine]:
        """An engine as a worker with these variables would make it, for as long as the block lasts."""
        settings = settings_of(environ or {})
        device = device or Device(self.device, **arguments(Device, settings))
        limits = budgets(settings.vram_limit, settings.ram_limit, device.memory(), host_memory())
        # prompts are always encoded, as a plain pipeline does it
        attention = settle(device, settings.state_dir)
        engine = Engine(
            device, limits, loader, attention=attention, **{**arguments(Engine, settings), "embeddings_limit": 0}
        )
        try:
            yield engine
        finally:
            engine.close()
            del engine
            self.clean()

    def clean(self) -> None:
        """Give back what nobody holds any more."""
        gc.collect()
        if self.is_cuda:
            torch.cuda.empty_cache()

    def plain(self, case: Case, dtype: torch.dtype | None = None) -> Any:
        """The plain pipeline over the same files."""
        pipe: Any = diffusers.DiffusionPipeline.from_pretrained(case.folder, dtype=dtype or self.dtype)
        pipe.set_progress_bar_config(disable=True)
        pipe.scheduler = getattr(diffusers, case.scheduler).from_config(pipe.scheduler.config)
        return pipe.to(self.device)

    def run_plain(self, pipe: Any, case: Case, seed: int = 1, steps: int = 0, output: str = "pil") -> Any:
        """One image of a plain pipeline, when it is there."""
        made = pipe(
            PROMPT, num_inference_steps=steps or case.steps, guidance_scale=case.guidance, width=case.side,
            height=case.side, generator=torch.Generator().manual_seed(seed), output_type=output,
        ).images  # fmt: skip
        self.synchronize()
        return made

    def synchronize(self) -> None:
        """Wait for the device."""
        if self.is_cuda:
            torch.cuda.synchronize()

    def against(self, case: Case) -> str:
        """What plain diffusers is here."""
        dtype = "float32" if not self.is_cuda else {"fp16": "float16", "bf16": "bfloat16"}[case.precision]
        return f"plain diffusers, {dtype}, SDPA, eager"


def settings_of(environ: Mapping[str, str]) -> Settings:
    """The settings of this process with some variables over its own."""
    return Settings.from_env({**os.environ, **environ})


_UNLIKE: dict[str, tuple[str, Callable[[Any], Any]]] = {
    "compiled": ("compile", lambda settings: settings.compile),
    "compile_cache": (
        "compile_cache", lambda settings: Path(settings.compile_cache or settings.state_dir / "compile").expanduser()
    ),
}  # fmt: skip
"""Arguments that are not called as their setting, or are made of it; as a worker makes them."""


def _heard(cls: type) -> dict[str, tuple[str, Callable[[Any], Any]]]:
    """Arguments that come from settings: the setting, and what is made of it."""
    known = {name: each.annotation for name, each in inspect.signature(cls).parameters.items()}
    fields = {each.name: each.type for each in dataclasses.fields(Settings)}
    same = (name for name, annotation in known.items() if fields.get(name) == annotation)
    found = {name: (name, operator.attrgetter(name)) for name in same}
    return {**found, **{name: how for name, how in _UNLIKE.items() if name in known and how[0] in fields}}


def heard_by(cls: type) -> list[str]:
    """The settings that a part of the engine is told."""
    return [name for name, _ in _heard(cls).values()]


def arguments(cls: type, settings: Settings) -> dict[str, Any]:
    """What settings say of a part of the engine."""
    return {name: make(settings) for name, (_, make) in _heard(cls).items()}
