"""Mixed requests at once: images a second, against plain diffusers that makes one after the other."""

from __future__ import annotations

import concurrent.futures
from typing import Any

import diffusers

from scripts.benchmarks.gpu.bench import PROMPT, Bench, Case
from scripts.benchmarks.gpu.rows import Row
from scripts.benchmarks.measure import median, milliseconds

SECTION = "batching"
AT_ONCE = (1, 2, 4, 8, 16)
SCHEDULERS = ("DDIMScheduler", "EulerDiscreteScheduler", "DPMSolverMultistepScheduler", "PNDMScheduler")
STEPS = (8, 10, 12, 14)
_ROUNDS = 3


def run(bench: Bench) -> None:
    """Both cases."""
    for family in ("sd1", "sdxl"):
        _one(bench, bench.case(family))
        bench.clean()


def _one(bench: Bench, case: Case) -> None:
    kinds = len(SCHEDULERS)
    steps = (2, 3) if bench.size == "tiny" else STEPS
    plain = bench.plain(case)
    schedulers = [getattr(diffusers, name).from_config(plain.scheduler.config) for name in SCHEDULERS]

    def one_by_one(count: int) -> None:
        for number in range(count):
            _plain(bench, plain, case, schedulers[number % kinds], steps[number % len(steps)], number)

    with bench.engine() as engine, concurrent.futures.ThreadPoolExecutor(max(AT_ONCE)) as pool:
        engine.generate(case.request(steps=2))
        one_by_one(1)
        for count in AT_ONCE:
            if bench.is_cuda and bench.left < 45:
                bench.leave_out(f"batching, {case.name}, {count} and more at once: no time left")
                break
            mixed = [
                case.request(number, steps=steps[number % len(steps)], scheduler=SCHEDULERS[number % kinds],
                             guidance=3.0 + number % 3)
                for number in range(count)
            ]  # fmt: skip
            before = engine.executor.calls, engine.executor.runs
            ours, theirs = [], []
            same = min(count, kinds)  # one after the other, the mix has the same rate however often it comes
            list(pool.map(engine.generate, mixed))
            for number in range(min(_ROUNDS, bench.rounds)):
                if number and bench.left < 60 and bench.is_cuda:
                    break
                ours.append(milliseconds(lambda: list(pool.map(engine.generate, mixed))))  # noqa: B023 called at once
                theirs.append(milliseconds(lambda: one_by_one(same)))  # noqa: B023
            rate, baseline = count * 1000 / median(ours), same * 1000 / median(theirs)
            calls, runs = engine.executor.calls - before[0], engine.executor.runs - before[1]
            bench.add(
                Row(
                    SECTION, f"{case.name}, {case.side}×{case.side}, {count} mixed at once", rate, "images/s",
                    baseline, f"{bench.against(case)}, one at a time", rate / baseline,
                    more={"calls": calls, "runs": runs},
                )
            )  # fmt: skip


def _plain(bench: Bench, pipe: Any, case: Case, scheduler: Any, steps: int, number: int) -> None:
    pipe.scheduler = scheduler
    pipe(
        PROMPT, num_inference_steps=steps, guidance_scale=3.0 + number % 3, width=case.side, height=case.side,
        output_type="pil",
    )  # fmt: skip
    bench.synchronize()
