"""What sharing the device step by step gains: eight mixed requests at once against one at a time, in one process.

The baselines: the same requests through the same engine, one after the other; plain diffusers with all eight as one
uniform batch, which is the most that batching could give; and, for one request alone, the plain pipeline. Latency: a
short request that arrives behind a long one of another size, against its own time alone.

On a CPU with the demo model, on CUDA with Stable Diffusion 1.5 and XL of real size with random weights in fp16.
"""

from __future__ import annotations

import concurrent.futures
import threading
import time
from dataclasses import dataclass
from typing import Any

import diffusers
import torch

from api.engine.device import Device
from api.engine.generate import Engine
from api.schema.generation import GenerationRequest, ModelRef
from scripts.benchmarks import architectures
from scripts.benchmarks.measure import Figure, interleaved, median, milliseconds
from scripts.benchmarks.serving import ROOT

AT_ONCE = 8
SCHEDULERS = ("DDIMScheduler", "EulerDiscreteScheduler", "DPMSolverMultistepScheduler", "PNDMScheduler")
STEPS = (8, 10, 12, 14)
_PLAIN_STEPS = sum(STEPS) // len(STEPS)
_LONG_STEPS = 60
_AMID = 0.02
"""Seconds later in each round: it arrives at another moment of a step."""
_PROMPT = "a red circle on a blue background"


@dataclass(frozen=True)
class Case:
    """A model, and what is made with it.

    Attributes:
        name: for the figures.
        ref: which model.
        pipeline: its class.
        size: side length of the images in pixels.
        long_size: of those of the long request.
        rounds: how often all is measured.
    """

    name: str
    ref: ModelRef
    pipeline: str
    size: int
    long_size: int
    rounds: int

    def request(self, index: int, steps: int, scheduler: str, guidance: float, size: int = 0) -> GenerationRequest:
        """One text-to-image request."""
        inputs = {"prompt": _PROMPT, "num_inference_steps": steps, "guidance_scale": guidance}
        side = size or self.size
        return GenerationRequest(
            id=str(index),
            request_id=str(index),
            model=self.ref,
            pipeline=self.pipeline,
            scheduler=scheduler,
            inputs={**inputs, "width": side, "height": side, "num_images_per_prompt": 1},
            pictures={},
            seed=index,
            images=1,
            image_format="PNG",
            image_quality=95,
            attention="sdpa",
            safety_checker=True,
            meta={},
        )


def run() -> list[Figure]:
    """Measure."""
    diffusers.utils.logging.disable_progress_bar()
    demo = ModelRef("demo/shapes", "bench", "fp32", str(ROOT / "models" / "shapes"))
    figures = _measure(Case("demo model", demo, "StableDiffusionPipeline", 64, 96, 7), "cpu")
    if torch.cuda.is_available():
        for case in _of_real_size():
            figures += _measure(case, "cuda")
    return figures


def _of_real_size() -> list[Case]:
    sd, xl = (
        ModelRef(family, "bench", "fp16", str(architectures.model(family, "fp16", 1))) for family in ("sd1", "sdxl")
    )
    return [
        Case("SD 1.5", sd, "StableDiffusionPipeline", 512, 768, 5),
        Case("SDXL", xl, "StableDiffusionXLPipeline", 1024, 1024, 3),
    ]


def _measure(case: Case, device: str) -> list[Figure]:
    engine = Engine(Device(device), embeddings_limit=0)  # else what is compared would not encode the prompt
    with concurrent.futures.ThreadPoolExecutor(AT_ONCE) as pool:
        return [*_throughput(case, engine, pool), _latency(case, engine, pool)]


def _plain(case: Case, device: torch.device) -> Any:
    """The plain pipeline over the same files; with a VAE in fp32 where the model's own overflows in fp16, as ours."""
    dtype = architectures.DTYPES[case.ref.precision] if device.type == "cuda" else torch.float32
    plain: Any = diffusers.DiffusionPipeline.from_pretrained(case.ref.folder, dtype=dtype)
    plain.set_progress_bar_config(disable=True)
    plain.scheduler = diffusers.DDIMScheduler.from_config(plain.scheduler.config)
    return plain.to(device)


def _throughput(case: Case, engine: Engine, pool: concurrent.futures.ThreadPoolExecutor) -> list[Figure]:
    plain = _plain(case, engine.device.torch)
    mixed = [case.request(i, STEPS[i % 4], SCHEDULERS[i % 4], 3.0 + i % 3) for i in range(AT_ONCE)]
    single = case.request(0, _PLAIN_STEPS, "DDIMScheduler", 5.0)

    def uniform(count: int) -> None:
        plain(
            [_PROMPT] * count,
            num_inference_steps=_PLAIN_STEPS,
            guidance_scale=5.0,
            width=case.size,
            height=case.size,
            generator=[torch.Generator().manual_seed(i) for i in range(count)],
        )
        engine.device.synchronize()

    before = engine.executor.calls, engine.executor.runs
    # jobs in threads of their own, as in a worker; the baselines in this one, which keeps all cores for itself
    together, one_by_one, batch, alone, bare = interleaved(
        [
            lambda: list(pool.map(engine.generate, mixed)),
            lambda: [pool.submit(engine.generate, each).result() for each in mixed],
            lambda: uniform(AT_ONCE),
            lambda: pool.submit(engine.generate, single).result(),
            lambda: uniform(1),
        ],
        case.rounds,
    )
    calls, runs = engine.executor.calls - before[0], engine.executor.runs - before[1]
    speed, merged = AT_ONCE * 1000 / median(together), {"calls": calls, "runs": runs}
    figures = [
        Figure(
            f"batching, {case.name}, 8 mixed at once",
            speed,
            AT_ONCE * 1000 / median(baseline),
            "images/s",
            against,
            median(baseline) / median(together),
            merged,
        )
        for baseline, against in (
            (one_by_one, "the same requests one at a time"),
            (batch, "plain diffusers, one uniform batch of 8"),
        )
    ]
    ratio = median(bare) / median(alone)
    name = f"batching, {case.name}, one alone"
    return [*figures, Figure(name, median(alone), median(bare), "ms", "the plain pipeline", ratio)]


def _latency(case: Case, engine: Engine, pool: concurrent.futures.ThreadPoolExecutor) -> Figure:
    """A short request that arrives in the midst of a long one's steps.

    The mark: its own time, and one call of the long one's, which may have just begun, and a fifth.
    """
    long = case.request(1, _LONG_STEPS, "DDIMScheduler", 5.0, size=case.long_size)
    short = case.request(2, min(STEPS), "DDIMScheduler", 4.0)
    alone, behind, whole = [], [], []
    for turn in range(case.rounds + 1):
        own = milliseconds(lambda: pool.submit(engine.generate, short).result())
        long_alone = milliseconds(lambda: pool.submit(engine.generate, long).result())
        stepping = threading.Event()
        first = pool.submit(_generate_telling, engine, long, stepping)
        stepping.wait()
        time.sleep(_AMID * turn)
        late = milliseconds(lambda: pool.submit(engine.generate, short).result())
        assert not first.done(), "the long request was over before the short one"
        first.result()
        if turn:
            alone.append(own)
            behind.append(late)
            whole.append(long_alone)
    call = median(whole) / _LONG_STEPS
    mark = 1.2 * median(alone) + call
    return Figure(
        f"{case.name}, a short request behind a long one",
        median(behind),
        median(alone),
        "ms",
        "its own time; the ratio is to its own time, one call and a fifth",
        mark / median(behind),
        {"the_long_one_ms": f"{median(whole):.0f}", "one_call_of_it_ms": f"{call:.0f}", "mark_ms": f"{mark:.0f}"},
    )


def _generate_telling(engine: Engine, wanted: GenerationRequest, stepping: threading.Event) -> None:
    engine.generate(wanted, on_step=lambda step, total: stepping.set())
