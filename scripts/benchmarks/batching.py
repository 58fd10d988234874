"""What sharing the device step by step gains: eight mixed requests at once against one at a time, in one process.

The baselines: the same requests through the same engine, one after the other; plain diffusers with all eight as one
uniform batch, which is the most that batching could give; and, for one request alone, the plain pipeline. Latency: a
short request that arrives behind a long one of another size, against its own time alone.
"""

from __future__ import annotations

import concurrent.futures
import threading
import time
from typing import Any

import diffusers
import torch

from api.engine.device import Device
from api.engine.generate import Engine
from api.schema.generation import GenerationRequest, ModelRef
from scripts.benchmarks.measure import Figure, interleaved, median, milliseconds
from scripts.benchmarks.serving import ROOT

MODEL = ROOT / "models" / "shapes"
AT_ONCE = 8
ROUNDS = 7
SCHEDULERS = ("DDIMScheduler", "EulerDiscreteScheduler", "DPMSolverMultistepScheduler", "PNDMScheduler")
STEPS = (8, 10, 12, 14)
_LONG_STEPS = 60
_AMID = 0.02
"""Seconds later in each round: it arrives at another moment of a step."""
_PLAIN_STEPS = sum(STEPS) // len(STEPS)


def request(index: int, steps: int, scheduler: str, guidance: float, size: int = 64) -> GenerationRequest:
    """One text-to-image request for the demo model."""
    inputs = {"prompt": "a red circle on a blue background", "num_inference_steps": steps, "guidance_scale": guidance}
    return GenerationRequest(
        id=str(index),
        request_id=str(index),
        model=ModelRef("demo/shapes", "bench", "fp32", str(MODEL)),
        pipeline="StableDiffusionPipeline",
        scheduler=scheduler,
        inputs={**inputs, "width": size, "height": size, "num_images_per_prompt": 1},
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
    engine = Engine(Device("cpu"))
    mixed = [request(i, STEPS[i % 4], SCHEDULERS[i % 4], 3.0 + i % 3) for i in range(AT_ONCE)]
    with concurrent.futures.ThreadPoolExecutor(AT_ONCE) as pool:
        return [*_throughput(engine, mixed, pool), _latency(engine, pool)]


def _throughput(
    engine: Engine, mixed: list[GenerationRequest], pool: concurrent.futures.ThreadPoolExecutor
) -> list[Figure]:
    plain: Any = diffusers.StableDiffusionPipeline.from_pretrained(MODEL, dtype=torch.float32)
    plain.set_progress_bar_config(disable=True)
    plain.scheduler = diffusers.DDIMScheduler.from_config(plain.scheduler.config)
    single = request(0, _PLAIN_STEPS, "DDIMScheduler", 5.0)

    def uniform(count: int) -> None:
        plain(
            [str(single.inputs["prompt"])] * count,
            num_inference_steps=_PLAIN_STEPS,
            guidance_scale=5.0,
            generator=[torch.Generator().manual_seed(i) for i in range(count)],
        )

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
        ROUNDS,
    )
    calls, runs = engine.executor.calls - before[0], engine.executor.runs - before[1]

    def speed(times: list[float]) -> float:
        return AT_ONCE * 1000 / median(times)

    unit = "images/s"
    return [
        Figure(
            "batching, 8 mixed at once",
            speed(together),
            speed(one_by_one),
            unit,
            "the same requests one at a time",
            median(one_by_one) / median(together),
            {"calls": calls, "runs": runs},
        ),
        Figure(
            "batching, 8 mixed at once",
            speed(together),
            speed(batch),
            unit,
            "plain diffusers, one uniform batch of 8",
            median(batch) / median(together),
        ),
        Figure(
            "batching, one alone", median(alone), median(bare), "ms", "the plain pipeline", median(bare) / median(alone)
        ),
    ]


def _generate_telling(engine: Engine, wanted: GenerationRequest, stepping: threading.Event) -> None:
    engine.generate(wanted, on_step=lambda step, total: stepping.set())


def _latency(engine: Engine, pool: concurrent.futures.ThreadPoolExecutor) -> Figure:
    """A short request that arrives in the midst of a long one's steps.

    The mark: its own time, and one call of the long one's, which may have just begun, and a fifth.
    """
    long, short = request(1, _LONG_STEPS, "DDIMScheduler", 5.0, size=96), request(2, 8, "DDIMScheduler", 5.0)
    alone, behind, whole = [], [], []
    for turn in range(ROUNDS + 1):
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
    more = {"the_long_one_ms": f"{median(whole):.0f}", "one_call_of_it_ms": f"{call:.0f}", "mark_ms": f"{mark:.0f}"}
    ratio = mark / median(behind)
    return Figure(
        "a short request behind a long one",
        median(behind),
        median(alone),
        "ms",
        "its own time; the ratio is to its own time, one call and a fifth",
        ratio,
        more,
    )
