"""``scripts/bench [NAME…] [--json FILE]``: one line a benchmark, ours against a named baseline.

``scripts/bench gpu`` and ``scripts/bench sizes`` print tables of their own, and have arguments of their own.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import platform
import sys
from collections.abc import Callable
from pathlib import Path

from api.service.spawning import PREFERENCES
from scripts.benchmarks.measure import Figure

BENCHMARKS = ("overhead", "batching", "encode", "startup", "coldstart", "fetch", "switch", "prompts", "sharing")
"""Modules here, each with ``run() -> list[Figure]``; one needs what others do without, so they are imported late."""
TABLES = {"gpu": "scripts.benchmarks.gpu.command", "sizes": "scripts.benchmarks.gpu.sizes"}
"""Modules with a ``main`` that takes the other arguments."""


def _as_in_a_worker() -> None:
    """Begin again with the environment of a worker: the C library and OpenMP read theirs before the first line."""
    missing = {name: value for name, value in PREFERENCES.items() if name not in os.environ}
    if missing:
        again = [sys.executable, "-m", "scripts.benchmarks", *sys.argv[1:]]
        os.execve(sys.executable, again, os.environ | missing)  # noqa: S606 ourselves


def main() -> int:
    """Run what the command line names, or everything."""
    _as_in_a_worker()
    if sys.argv[1:2] and sys.argv[1] in TABLES:
        return int(importlib.import_module(TABLES[sys.argv[1]]).main(sys.argv[2:]))
    parser = argparse.ArgumentParser(prog="scripts/bench", description=__doc__)
    parser.add_argument(
        "names", nargs="*", metavar="NAME", help=f"{', '.join(BENCHMARKS)}; all without a name; or {', '.join(TABLES)}"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures to this file")
    args = parser.parse_args()
    unknown = [name for name in args.names if name not in BENCHMARKS]
    if unknown:
        parser.error(f"unknown benchmark {', '.join(unknown)}; there are {', '.join(BENCHMARKS)}")
    print(f"{platform.platform()}, {os.cpu_count()} cores, Python {platform.python_version()}", file=sys.stderr)
    figures = []
    for name in args.names or BENCHMARKS:
        run: Callable[[], list[Figure]] = importlib.import_module(f"scripts.benchmarks.{name}").run
        for figure in run():
            print(figure.line(), flush=True)
            figures.append(figure)
    if args.json:
        args.json.write_text(json.dumps([figure.as_json() for figure in figures], indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
