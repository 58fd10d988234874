"""How long one image takes, ours and plain in turn, with each option."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable

import numpy as np

from api.engine.generate import Engine
from scripts.benchmarks.gpu.bench import Bench, Case
from scripts.benchmarks.gpu.rows import Row
from scripts.benchmarks.gpu.variants import AS_IT_IS, Variant, ask, is_in_use, is_prepared, usable
from scripts.benchmarks.measure import median, milliseconds

SECTION = "latency"
_PREPARE = 150.0
_PREPARE_TINY = 60.0
"""Seconds that compiled code may take until it serves: on a GPU, and where it is only tried out."""
_AT_LEAST = 2


def run(bench: Bench) -> None:
    """Both cases, as it is; then each option."""
    for family in ("sd1", "sdxl"):
        _one(bench, bench.case(family), [AS_IT_IS])
        bench.clean()


def options(bench: Bench) -> None:
    """Each option, beside plain diffusers again."""
    known = {family: usable(bench, family) for family in ("sdxl", "sd1")}
    for variant in known["sdxl"]:
        for family in known:
            if bench.left < 60 and bench.is_cuda:
                bench.leave_out(f"{variant.name}, {bench.case(family).name}: no time left")
            else:
                _one(bench, bench.case(family), [variant])
                bench.clean()


def _one(bench: Bench, case: Case, variants: list[Variant]) -> None:
    plain = bench.plain(case)
    with contextlib.ExitStack() as stack:
        engines = {each.name: stack.enter_context(bench.engine(each.environ)) for each in variants}
        contenders: dict[str, Callable[[], object]] = {"plain": lambda: bench.run_plain(plain, case)}
        images, prepared = {}, {}
        for variant in variants:
            images[variant.name], prepared[variant.name] = prepare(bench, engines[variant.name], variant, case)
            contenders[variant.name] = _image(bench, engines[variant.name], variant, case)
        expected = np.stack([np.asarray(image) for image in bench.run_plain(plain, case)]).astype(int)
        times = _in_turn(bench, contenders)
        for variant in variants:
            if prepared[variant.name] is None:
                continue  # which ``prepare`` has said
            ours, baseline = median(times[variant.name]), median(times["plain"])
            off = np.abs(images[variant.name].astype(int) - expected)
            more = {"off_by_levels": float(off.mean()), "rounds": times[variant.name]}
            if variant.compiled:
                more["prepared_s"] = prepared[variant.name]
            bench.add(
                Row(
                    SECTION, f"{case.what}, {variant.name}", ours, "ms", baseline, bench.against(case),
                    baseline / ours, lossy=variant.lossy, more=more,
                )
            )  # fmt: skip


def _image(bench: Bench, engine: Engine, variant: Variant, case: Case) -> Callable[[], object]:
    def one() -> None:
        engine.generate(ask(variant, case))
        bench.synchronize()

    return one


def prepare(bench: Bench, engine: Engine, variant: Variant, case: Case) -> tuple[np.ndarray, float | None]:
    """Images of it until what it prepares is in use; the last one, and after how many seconds; None: never."""
    began, late = time.monotonic(), f"{variant.name}, {case.name}: not ready in time"
    limit = _PREPARE if bench.is_cuda else _PREPARE_TINY
    while True:
        done = engine.generate(ask(variant, case))
        took = time.monotonic() - began
        if not is_in_use(bench, variant, case, done.meta):
            return done.images, None
        if is_prepared(variant, done.meta):
            return done.images, took
        if took > min(limit, bench.left) or late in bench.table.left_out:  # not waited for again
            bench.leave_out(late)
            return done.images, None
        time.sleep(0.2)  # preparing may wait for it to be idle


def _in_turn(bench: Bench, contenders: dict[str, Callable[[], object]]) -> dict[str, list[float]]:
    """Milliseconds of each, another first in every round, for as long as there is time."""
    names = list(contenders)
    times: dict[str, list[float]] = {name: [] for name in names}
    for name in names:
        contenders[name]()
    for number in range(bench.rounds):
        if number >= _AT_LEAST and bench.left < 30:
            break
        for name in names[number % len(names) :] + names[: number % len(names)]:
            times[name].append(milliseconds(contenders[name]))
    return times
