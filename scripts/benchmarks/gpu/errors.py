"""The denoiser's error at each step against float32: ours as it runs, and plain diffusers' own.

What each of them was called with is called again on the same weights in float32, without TF32. So errors are those of
one step, and none of them that two runs have drifted apart.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map_only

from scripts.benchmarks.gpu.bench import Bench, Case
from scripts.benchmarks.gpu.latency import prepare
from scripts.benchmarks.gpu.rows import Row
from scripts.benchmarks.gpu.variants import AS_IT_IS, Variant, ask, usable
from scripts.benchmarks.measure import median

SECTION = "error of a denoiser step"
_STEPS = 6
_NO_WORSE = 1.05
"""Times eager's error: what kernels that sum in another order differ by."""
_Calls = list[tuple[tuple[Any, ...], dict[str, Any], torch.Tensor]]


def run(bench: Bench) -> None:
    """Both cases, as it is and with each option."""
    for family in ("sd1", "sdxl"):
        _one(bench, bench.case(family), [AS_IT_IS, *usable(bench, family)])


def _one(bench: Bench, case: Case, variants: list[Variant]) -> None:
    plain = bench.plain(case)
    denoiser: nn.Module = plain.unet
    calls: _Calls = []
    hook = denoiser.register_forward_hook(
        lambda _, args, kwargs, out: calls.append((args, kwargs, out[0].clone())), with_kwargs=True
    )
    bench.run_plain(plain, case, steps=_STEPS, output="latent")
    hook.remove()
    # on the CPU the plain one is float32 itself: float64 shows both
    exact = torch.float32 if bench.is_cuda else torch.float64
    reference = copy.deepcopy(denoiser).to(exact)
    name = type(denoiser).__name__
    eager = [_error(reference, exact, *call) for call in calls]
    for variant in variants:
        if bench.is_cuda and bench.left < 40:
            bench.leave_out(f"{SECTION}, {case.name}, {variant.name}: no time left")
            continue
        with bench.engine(variant.environ) as engine:
            ours: _Calls = []
            # what is compiled here is in the cache for the options that are timed later
            if prepare(bench, engine, variant, case)[1] is None:
                continue
            with _captured(engine.executor, name, ours):
                engine.generate(ask(variant, case, steps=_STEPS))
            errors = [_error(reference, exact, *call) for call in ours]
        mine, theirs = median(errors), median(eager)
        # where both are exact nothing is left to compare
        ratio = theirs / mine if mine else 1.0
        lossless = not variant.lossy
        bench.add(
            Row(
                SECTION, f"{case.name}, {variant.name}", mine, "of the output", theirs, bench.against(case), ratio,
                "no worse than eager's" if lossless else "", mine <= theirs * _NO_WORSE if lossless else None,
                variant.lossy, more={"worst": max(errors), "baseline_worst": max(eager)},
            )
        )  # fmt: skip
    del plain, reference, denoiser
    bench.clean()


@contextlib.contextmanager
def _captured(executor: Any, owner: str, calls: _Calls) -> Iterator[None]:
    """Keep what the calls of a class get and give, as jobs see them."""
    run = executor.run

    def keeping(ticket: Any, function: Any, args: Any, kwargs: Any) -> Any:
        out = run(ticket, function, args, kwargs)
        if type(getattr(function, "__self__", None)).__name__ == owner:
            calls.append((tuple(args), dict(kwargs), out[0].clone()))
        return out

    executor.run = keeping
    try:
        yield
    finally:
        del executor.run


@contextlib.contextmanager
def _without_tf32() -> Iterator[None]:
    places = [torch.backends.cuda.matmul, torch.backends.cudnn.conv] if torch.cuda.is_available() else []
    before = [place.fp32_precision for place in places]
    for place in places:
        place.fp32_precision = "ieee"
    try:
        yield
    finally:
        for place, was in zip(places, before, strict=True):
            place.fp32_precision = was


def _error(reference: nn.Module, dtype: torch.dtype, args: Any, kwargs: Any, out: torch.Tensor) -> float:
    """How far an output is from the exact one, relative to that one's length."""

    def exact(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to(dtype) if tensor.is_floating_point() else tensor

    args, kwargs = tree_map_only(torch.Tensor, exact, (args, kwargs))
    with torch.no_grad(), _without_tf32():
        right = reference(*args, **kwargs)[0]
        return float((out.to(dtype) - right).norm() / right.norm())
