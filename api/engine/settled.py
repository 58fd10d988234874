"""Settles which attention kernels ``auto`` is on this GPU: measured once, and kept for every later start."""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import json
import logging
import os
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers.models import attention_dispatch as dispatch

from api.engine.attention import missing, run, usable_for
from api.engine.device import Device
from api.models.locks import FileLock
from api.schema.attention import NATIVE

log = logging.getLogger("api.engine")

FILE = "attention.json"
CANDIDATES = ("_native_cudnn", "_native_flash", "_native_efficient", "flash", "xformers")
SHAPES = (
    (2, 4096, 4096, 8, 40), (2, 4096, 77, 8, 40), (2, 1024, 1024, 8, 80),  # SD 1.5 at 512x512, with guidance
    (2, 4096, 4096, 10, 64), (2, 4096, 77, 10, 64), (2, 1024, 1024, 20, 64),  # SDXL at 1024x1024, with guidance
    (1, 4608, 4608, 24, 128),  # FLUX at 1024x1024
)  # fmt: skip
"""(batch, rows of the query, rows of the key, heads, size of a head)."""
WINS = 0.95
"""Of the time of torch's own choice, that another must not take more than."""
_ROUNDS = 3
_SECONDS = 0.8
"""After which nothing more is measured."""
_PATIENCE = 10.0
"""Seconds for another worker to say what it has measured."""
_KEPT = 63
"""Entries of other devices and versions."""
_PACKAGES = ("torch", "diffusers", "xformers", "flash-attn", "sageattention")

Measure = Callable[[str, tuple[int, ...]], float]
"""Seconds of a backend at a shape."""


def settle(device: Device, folder: Path, *, compiles: bool = False) -> Mapping[torch.dtype, str]:
    """What ``auto`` is, by dtype: what was kept in a folder, else measured now and kept there.

    It is the same for all workers of a container, and after each of their deaths. Where that cannot be had, because the
    folder cannot be written to, it is torch's own choice. Never raises; a CPU has but one attention.

    Args:
        device: that nothing is computed on yet.
        folder: ``STATE_DIR``.
        compiles: blocks are compiled, which is done with torch's own attention and no other.
    """
    _only_here()
    if compiles or not device.is_cuda:
        return {}
    try:
        dtype = torch.bfloat16 if torch.cuda.get_device_capability(device.torch) >= (8, 0) else torch.float16
        about = {"device": device.name, "capability": _capability(device.torch), "dtype": str(dtype)}
        measure = functools.partial(seconds, device.torch, dtype)
        sizes = sorted({shape[-1] for shape in SHAPES})
        usable = functools.partial(_usable, device.torch, dtype, sizes)
        chosen = kept_or(folder, about, versions(), lambda: fastest(usable, measure))
        device.release_cache()
    except Exception:
        log.warning("which attention is fastest could not be settled: sdpa", exc_info=True)
        return {}
    # what fits the one half precision fits the other; in fp32 there is nothing to choose without a loss
    return {} if chosen == NATIVE else {torch.float16: chosen, torch.bfloat16: chosen}


def _only_here() -> None:
    """What diffusers takes from its own environment variable would be switched for every job, and told by none."""
    registry = dispatch._AttentionBackendRegistry
    native = dispatch.AttentionBackendName.NATIVE
    if registry._active_backend != native:
        log.warning("DIFFUSERS_ATTN_BACKEND is not used here; ATTENTION says which attention requests get")
        registry.set_active_backend(native)


def _capability(device: torch.device) -> str:
    return ".".join(map(str, torch.cuda.get_device_capability(device)))


def versions() -> dict[str, str]:
    """Of the packages that kernels are in."""
    found = {}
    for name in _PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


# --- measured ---


def fastest(usable: Callable[[str], bool], measure: Measure, limit: float = _SECONDS) -> str:
    """The fastest of the lossless candidates over all shapes; torch's own choice unless another one clearly wins.

    Args:
        usable: whether a candidate can compute all of them.
        measure: see ``Measure``.
        limit: seconds after which nothing more is measured; what was not measured at all shapes does not win.
    """
    until = time.perf_counter() + limit
    taken = {NATIVE: sum(measure(NATIVE, shape) for shape in SHAPES)}
    for name in CANDIDATES:
        if time.perf_counter() > until or missing(name) is not None or not usable(name):
            continue
        try:
            taken[name] = sum(_timely(measure, name, shape, until) for shape in SHAPES)
        except Exception as fault:  # an operator that it has not for one of the shapes, or no time left
            log.info("attention %s is not measured: %s", name, " ".join(str(fault).split())[:200])
    best = min(taken, key=lambda name: taken[name])
    told = ", ".join(f"{name} {1000 * spent:.2f} ms" for name, spent in taken.items())
    chosen = best if taken[best] <= WINS * taken[NATIVE] else NATIVE
    log.info("attention auto is %s (%s)", chosen, told)
    return chosen


def _timely(measure: Measure, name: str, shape: tuple[int, ...], until: float) -> float:
    if time.perf_counter() > until:
        raise TimeoutError("there was no time left")
    return measure(name, shape)


def _usable(device: torch.device, dtype: torch.dtype, sizes: Sequence[int], name: str) -> bool:
    return all(usable_for(name, device, dtype, size, tell=False) for size in sizes)


def seconds(device: torch.device, dtype: torch.dtype, name: str, shape: tuple[int, ...]) -> float:
    """The shortest of some calls, after one that is not counted, on a GPU's own clock.

    Raises:
        Exception: the backend has no operator for the shape.
    """
    batch, rows, keys, heads, size = shape
    query = torch.randn(batch, rows, heads, size, device=device, dtype=dtype)
    key, value = torch.randn(2, batch, keys, heads, size, device=device, dtype=dtype)
    spent = []
    with torch.no_grad():
        run(name, query, key, value)
        for _ in range(_ROUNDS):
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            run(name, query, key, value)
            end.record()
            end.synchronize()
            spent.append(begin.elapsed_time(end) / 1000)
    return min(spent)


# --- kept ---


def kept_or(
    folder: Path, about: Mapping[str, str], now: Mapping[str, str], choose: Callable[[], str], wait: float = _PATIENCE
) -> str:
    """What was kept for a device and versions, else what is chosen now, and kept.

    Of two workers that begin at once one chooses and the other waits for it. Should the first fail or die meanwhile, as
    a kernel that was built for another device may have it, torch's own choice stays kept: nothing is tried again.

    Args:
        folder: where it is kept.
        about: of the device.
        now: versions.
        choose: says it, where nothing is kept.
        wait: seconds for another worker.

    Raises:
        OSError: nothing can be kept there.
        TimeoutError: the other worker did not say.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / f"{FILE}.lock")
    until = time.monotonic() + wait

    def patient() -> None:
        if time.monotonic() > until:
            raise TimeoutError("another worker did not say which attention it has settled")

    lock.acquire(on_wait=patient)
    try:
        entries = _read(folder / FILE)
        mine = [entry for entry in entries if {name: entry.get(name) for name in about} == dict(about)]
        known = next((entry for entry in mine if entry.get("versions") == dict(now)), None)
        if known is not None:
            return str(known["attention"])
        others = entries[-_KEPT:]
        entry_now = {**about, "versions": dict(now)}
        _write(folder / FILE, [*others, {**entry_now, "attention": NATIVE}])
        chosen = choose()
        for entry in mine[-1:]:
            if entry["attention"] != chosen:
                log.warning(
                    "attention auto is %s with %s; it was %s with %s: images of the same seed may differ in rounding",
                    chosen, _named(now), entry["attention"], _named(entry["versions"]),
                )  # fmt: skip
        _write(folder / FILE, [*others, {**entry_now, "attention": chosen}])
        return chosen
    finally:
        lock.release()


def _named(packages: Mapping[str, str]) -> str:
    return ", ".join(f"{name} {version}" for name, version in packages.items())


def _read(path: Path) -> list[dict[str, Any]]:
    """The entries of the file; those that nobody can use are left out."""
    try:
        found = json.loads(path.read_bytes())
    except FileNotFoundError:
        return []
    except (OSError, ValueError) as fault:
        log.warning("%s cannot be read (%s): it is written anew", path, fault)
        return []
    entries = found if isinstance(found, list) else []
    names = {NATIVE, *CANDIDATES}
    return [
        entry
        for entry in entries
        if isinstance(entry, dict) and entry.get("attention") in names and isinstance(entry.get("versions"), dict)
    ]


def _write(path: Path, entries: list[dict[str, Any]]) -> None:
    """All of it or nothing."""
    descriptor, name = tempfile.mkstemp(prefix=f".{FILE}.", dir=path.parent)
    try:
        with os.fdopen(descriptor, "w") as file:
            json.dump(entries, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
