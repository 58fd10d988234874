"""Compiled code: requests while it is prepared, and a second start that finds it in the cache."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time

from scripts.benchmarks.gpu.bench import Bench, Case
from scripts.benchmarks.gpu.rows import Row
from scripts.benchmarks.gpu.variants import VARIANTS, Variant, ask, is_prepared, missing
from scripts.benchmarks.measure import median, milliseconds

SECTION = "compiled code"
P95 = "p95 of a request while code is prepared"
SECOND = "second start with a kept cache, until a request runs compiled"
_WAIT = 150.0
_AFTER = 40.0
"""Seconds that the second start may take: four times the mark."""
_REQUESTS = 12
_STEPS = 10


def run(bench: Bench) -> None:
    """With the first variant that has something to prepare, on SD 1.5, whose calls are shortest."""
    variant = next(each for each in VARIANTS if each.compiled)
    if why := missing(variant, bench.is_cuda):
        bench.leave_out(f"{SECTION}: {why}")
        return
    case = bench.case("sd1")
    with tempfile.TemporaryDirectory() as state:
        environ = {**variant.environ, "STATE_DIR": state}
        if _first(bench, case, variant, environ):
            _second(bench, case, environ)


def _first(bench: Bench, case: Case, variant: Variant, environ: dict[str, str]) -> bool:
    """Whether code was ready in time."""
    with bench.engine() as engine:
        engine.generate(case.request())
        eager = [milliseconds(lambda: engine.generate(case.request(steps=_STEPS))) for _ in range(_REQUESTS)]
    times: list[float] = []
    began = time.monotonic()
    with bench.engine(environ) as engine:
        engine.load(case.ref(**variant.ref))
        engine.generate(ask(variant, case, steps=1))  # what every first call takes, on either side
        while True:
            start = time.monotonic()
            done = engine.generate(ask(variant, case, steps=_STEPS))
            took = (time.monotonic() - start) * 1000
            if is_prepared(variant, done.meta):
                break
            times.append(took)
            if time.monotonic() - began > min(_WAIT if bench.is_cuda else _WAIT / 2, bench.left - 20):
                bench.leave_out(f"{SECTION}: not ready within {time.monotonic() - began:.0f} s")
                return False
    ready = time.monotonic() - began
    if len(times) < 5:
        bench.leave_out(f"{SECTION}, {P95}: ready after {len(times)} requests, too few for a p95")
    else:
        a, b = _p95(times), _p95(eager)
        more = {"requests": len(times), "median_ms": median(times), "ready_s": ready}
        bench.add(Row(SECTION, f"{case.name}, {P95}", a, "ms", b, "the same without COMPILE", b / a, more=more))
    return True


def _second(bench: Bench, case: Case, environ: dict[str, str]) -> None:
    """In a process of its own, as what is left in this one's memory would be no start."""
    command = [sys.executable, "-m", "scripts.benchmarks.gpu.second_start", bench.device, bench.size]
    wait = str(min(_AFTER, max(1.0, bench.left - 10)))
    done = subprocess.run(
        [*command, wait], env={**os.environ, **environ}, capture_output=True, text=True, check=True, timeout=600
    )
    found = json.loads(done.stdout.splitlines()[-1])
    if found["compiled_s"] is None:
        bench.leave_out(f"{SECTION}, {SECOND}: not within {wait} s, after {found['requests']} requests")
        return
    more = {name: found[name] for name in ("imports_s", "requests")}
    bench.add(Row(SECTION, f"{case.name}, {SECOND}", found["compiled_s"], "s", more=more))


def _p95(values: list[float]) -> float:
    return sorted(values)[max(0, -(-95 * len(values) // 100) - 1)]
