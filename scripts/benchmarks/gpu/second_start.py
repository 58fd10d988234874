"""``python -m scripts.benchmarks.gpu.second_start DEVICE SIZE SECONDS``: from an engine that begins to compiled code.

Its environment says what is compiled and where the cache is. Prints JSON: ``compiled_s`` is null where it took longer.
"""

from __future__ import annotations

import json
import sys
import time

began = time.monotonic()

from scripts.benchmarks.gpu.bench import Bench  # noqa: E402 the imports are timed
from scripts.benchmarks.gpu.rows import Table  # noqa: E402
from scripts.benchmarks.gpu.variants import VARIANTS, is_prepared  # noqa: E402


def main(device: str, size: str, limit: float) -> None:
    """Send requests until one runs compiled."""
    imported = time.monotonic()
    variant = next(each for each in VARIANTS if each.compiled)
    bench = Bench(device, size, limit, Table({}))
    case = bench.case("sd1")
    requests, took = 0, None
    with bench.engine() as engine:
        start = time.monotonic()
        while time.monotonic() - start < limit:
            requests += 1
            done = engine.generate(case.request(steps=2))
            if is_prepared(variant, done.meta):
                took = time.monotonic() - start
                break
    print(json.dumps({"compiled_s": took, "imports_s": imported - began, "requests": requests}))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], float(sys.argv[3]))
