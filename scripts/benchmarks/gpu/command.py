"""``scripts/bench gpu``: its arguments, its sections, and what it writes."""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import subprocess
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import diffusers
import torch
import transformers

from scripts.benchmarks.gpu import batches, compiled, errors, flux, latency, loads, places, tail, verdicts
from scripts.benchmarks.gpu.bench import Bench
from scripts.benchmarks.gpu.rows import Table, finite

SECTIONS: dict[str, Callable[[Bench], None]] = {
    "latency": latency.run,
    "placements": places.run,
    "batching": batches.run,
    "loads": loads.run,
    "errors": errors.run,
    "options": latency.options,
    "compiled": compiled.run,
    "flux": flux.run,
    "tail": tail.run,
}
"""The most important first."""
_LEAST = 15.0
"""Seconds without which no section is begun on a GPU."""


def main(argv: Sequence[str]) -> int:
    """Measure, and print the table as Markdown.

    Returns:
        0; 1: a section failed, or a figure is no number.
    """
    args = _parser().parse_args(argv)
    if args.device.startswith("cuda") and not torch.cuda.is_available():
        print(
            f"torch {torch.__version__} finds no CUDA device. To try the benchmark out here: "
            "scripts/bench gpu --device cpu --size tiny",
            file=sys.stderr,
        )
        return 2
    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()
    warnings.simplefilter("ignore", FutureWarning)
    names = args.sections or list(SECTIONS)
    with tempfile.TemporaryDirectory() as state:
        os.environ.setdefault("STATE_DIR", state)  # what is learned is not to be found by the next run
        bench = Bench(args.device, args.size, args.limit, Table(_machine(args)), args.rounds)
        _run(bench, names)
    table = bench.table
    for row in verdicts.judge(table):
        table.rows.insert(0, row)
    if args.out:
        args.out.write_text(table.markdown() + "\n", encoding="utf-8")
    if args.json:
        args.json.write_text(json.dumps(table.as_json(), indent=1) + "\n", encoding="utf-8")
    print(f"\n{table.markdown()}")
    return int(bool(table.failed) or not finite(table.rows))


def _run(bench: Bench, names: Sequence[str]) -> None:
    for name in names:
        if bench.is_cuda and bench.left < _LEAST:
            bench.leave_out(f"{name}: no time left of {bench.limit:.0f} s")
            continue
        try:
            SECTIONS[name](bench)
        except Exception as fault:
            # a lent machine is lent for minutes: the other sections are worth having
            traceback.print_exc()
            bench.table.failed.append(f"{name}: {type(fault).__name__}: {str(fault)[:300]}")
        bench.clean()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="scripts/bench gpu", description=__doc__)
    parser.add_argument("sections", nargs="*", choices=[*SECTIONS, []], help="all without a name")
    parser.add_argument("--device", default="cuda:0", help="cuda:N; cpu to try it out")
    parser.add_argument("--size", default="real", choices=("real", "tiny"), help="of the architectures")
    parser.add_argument("--limit", type=float, default=560.0, metavar="SECONDS", help="that it may take")
    parser.add_argument("--rounds", type=int, default=5, help="of comparisons, at the most")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the table there as Markdown")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures there")
    return parser


def _machine(args: argparse.Namespace) -> dict[str, str]:
    found = {
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "device": args.device,
        "size": args.size,
        "card": f"{platform.machine()} CPU, {os.cpu_count()} cores",
        "driver": "none",
    }
    if args.device.startswith("cuda"):
        found["card"] = torch.cuda.get_device_name(args.device)
        found["memory"] = f"{torch.cuda.get_device_properties(args.device).total_memory / 2**30:.1f} GiB"
        found["driver"] = _driver()
    versions = [f"{module.__name__} {module.__version__}" for module in (torch, diffusers, transformers)]
    cuda = [f"CUDA {torch.version.cuda}", f"cuDNN {torch.backends.cudnn.version()}"] if torch.version.cuda else []
    return {**found, "versions": ", ".join([f"Python {platform.python_version()}", *versions, *cuda])}


def _driver() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return "not known"
    return done.stdout.splitlines()[0].strip()
