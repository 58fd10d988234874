"""Switching models: ours against plain diffusers over the same files.

Models of real size with random weights. A switch ends when every page of every weight was touched, because a mapped
file only promises them; that the weights are right is compared outside the timing. The baseline is the better of
``from_pretrained(...).to(device)`` and ``from_pretrained(..., device_map=...)``.
"""

from __future__ import annotations

import contextlib
import gc
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import diffusers
import torch
from torch import nn

from api.engine import buffers
from api.engine.device import Device
from api.engine.loader import PartLoader
from api.engine.parts import HostPart
from api.engine.spent import Spent, measuring
from api.schema.generation import ModelRef
from scripts.benchmarks.architectures import DTYPES, model
from scripts.benchmarks.measure import Figure, median

_ROUNDS = 5
_PAGE = 4096
_PINNED = 2**30
_HOST_LIMIT = 12 * 2**30
"""What a server of 24 GiB takes for models if it is not told otherwise: memory that one leaves is used by the next."""


class Computing(Device):
    """A device that computes in the precision that is asked for, on a CPU too."""

    def dtype(self, precision: str) -> torch.dtype:
        """As it is named."""
        return DTYPES[precision]


class Side:
    """One model, as ours and as plain diffusers load it."""

    def __init__(
        self, loader: PartLoader, family: str, precision: str, seed: int, device: torch.device, size: str = "real"
    ) -> None:
        self.name = f"{family}-{precision}-{seed}"
        self.folder = model(family, precision, seed, size)
        self.ref = ModelRef(self.name, "bench", precision, str(self.folder))
        self.dtype = DTYPES[precision]
        self.files = sorted(self.folder.glob("*/*.safetensors"))
        self._loader = loader
        self._device = device

    def bytes(self) -> int:
        """Of its files."""
        return sum(file.stat().st_size for file in self.files)

    def plain(self) -> dict[str, Any]:
        """``from_pretrained(...).to(device)``."""
        pipe = diffusers.DiffusionPipeline.from_pretrained(self.folder, dtype=self.dtype, local_files_only=True)
        return dict(pipe.to(self._device).components)

    def mapped(self) -> dict[str, Any]:
        """``from_pretrained(..., device_map=...)``."""
        pipe = diffusers.DiffusionPipeline.from_pretrained(
            self.folder, dtype=self.dtype, local_files_only=True, device_map=self._device.type
        )
        return dict(pipe.components)

    def hosted(self) -> dict[str, HostPart]:
        """Its parts in the host's memory."""
        return {spec.name: self._loader.read(spec) for spec in self._loader.parts(self.ref)}

    def ours(self, host: dict[str, HostPart] | None = None, onto: dict[str, nn.Module] | None = None) -> dict[str, Any]:
        """From the disk, or from the host tier, into new modules or into those that are there."""
        modules = {}
        for spec in self._loader.parts(self.ref):
            part = host[spec.name] if host else self._loader.read(spec)
            modules[spec.name] = self._loader.place(spec, part, onto[spec.name] if onto else None)
        return self._loader.assemble(self.ref, modules).components


def _modules(components: dict[str, Any]) -> dict[str, nn.Module]:
    return {name: part for name, part in components.items() if isinstance(part, nn.Module)}


def touch(components: dict[str, Any]) -> None:
    """Look at every page of every weight, or wait for the device."""
    for module in _modules(components).values():
        for tensor in (*module.parameters(), *module.buffers()):
            if tensor.is_cuda:
                torch.cuda.synchronize()
                break
            if tensor.numel():
                tensor.detach().reshape(-1).view(torch.uint8).numpy()[::_PAGE].sum()


def _checksum(components: dict[str, Any]) -> dict[str, float]:
    return {
        f"{name}.{key}": float(tensor.detach().double().abs().sum())
        for name, module in sorted(_modules(components).items())
        for key, tensor in module.named_parameters()
    }


def fill_page_cache(files: Sequence[Path]) -> None:
    """Read files, so that they are in the page cache."""
    scratch = bytearray(2**24)
    for file in files:
        with file.open("rb", buffering=0) as opened:
            while opened.readinto(scratch):
                pass


def drop_page_cache(files: Sequence[Path]) -> None:
    """Have files forgotten by the page cache, but for pages that something maps."""
    for file in files:
        with file.open("rb") as opened:
            os.fsync(opened.fileno())
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _seconds(prepare: Callable[[], object], load: Callable[[], dict[str, Any]]) -> float:
    gc.collect()  # pages that something still maps stay in memory
    prepare()
    began = time.perf_counter()
    loaded = load()
    touch(loaded)
    took = time.perf_counter() - began
    del loaded
    return took


def _compared(
    name: str, contenders: dict[str, Callable[[], dict[str, Any]]], prepare: Callable[[], object], more: dict[str, Any]
) -> Figure:
    """Ours and the baselines in turn, another first in each round."""
    names = list(contenders)
    times: dict[str, list[float]] = {contender: [] for contender in names}
    for number in range(_ROUNDS + 1):
        for contender in names[number % len(names) :] + names[: number % len(names)]:
            took = _seconds(prepare, contenders[contender])
            if number:
                times[contender].append(took)
    medians = {contender: median(taken) for contender, taken in times.items()}
    ours = medians.pop("ours")
    best = min(medians, key=lambda contender: medians[contender])
    more = {**more, **{f"s_{contender}": round(took, 3) for contender, took in medians.items()}}
    more |= {"load": round(os.getloadavg()[0], 1), "rounds": times}
    return Figure(f"switch-{name}", ours, medians[best], "s", f"diffusers, {best}", medians[best] / ours, more)


def _cpu() -> list[Figure]:
    # SDXL in fp32, or two of it, would be most of the memory of a small machine
    return [*_cpu_family("sd1", "fp32", pair=True), *_cpu_family("sdxl", "bf16", pair=False), _cpu_cast()]


def _cpu_family(family: str, precision: str, pair: bool) -> list[Figure]:
    loader, device = PartLoader(Computing("cpu"), _HOST_LIMIT), torch.device("cpu")
    a = Side(loader, family, precision, 1, device)
    b = Side(loader, family, precision, 2, device) if pair else None
    _check(a, b)
    what = {"GB": round(a.bytes() / 1e9, 2)}
    plain = {"plain": a.plain, "device_map": a.mapped}

    def warm() -> None:
        fill_page_cache(a.files)

    host = a.hosted()
    figures = [_compared(f"host-{family}", {"ours": lambda: a.ours(host), **plain}, warm, what)]
    figures[-1].more |= _phases(lambda: a.ours(host))
    if b:
        resident = _modules(b.ours())
        in_place = {"ours": lambda: a.ours(host, resident), **plain}
        figures.append(_compared(f"host-same-{family}", in_place, warm, what))
        resident = {}
    host = {}  # pages that are mapped stay in the page cache
    for name, prepare in (("disk", warm), ("cold", lambda: drop_page_cache(a.files))):
        figures.append(_compared(f"{name}-{family}", {"ours": a.ours, **plain}, prepare, what))
        prepare()
        figures[-1].more |= _phases(a.ours)
    return figures


def _cpu_cast() -> Figure:
    """Files in fp16, computed in fp32, as the server does it on a CPU."""
    side = Side(PartLoader(Computing("cpu"), _HOST_LIMIT), "sd1", "fp16", 1, torch.device("cpu"))
    side.ref, side.dtype = ModelRef(side.name, "bench", "fp32", str(side.folder)), torch.float32
    contenders = {"ours": side.ours, "plain": side.plain, "device_map": side.mapped}
    what = {"GB": round(side.bytes() / 1e9, 2)}
    figure = _compared("disk-cast-sd1", contenders, lambda: fill_page_cache(side.files), what)
    figure.more |= _phases(side.ours)
    return figure


def _phases(load: Callable[[], object]) -> dict[str, float]:
    spent = Spent()
    with measuring(spent):
        load()
    return {f"s_{name}": round(seconds, 3) for name, seconds in vars(spent).items()}


def _check(a: Side, b: Side | None) -> None:
    """Before anything is timed: ours are the weights that plain diffusers loads, by whichever way they came."""
    right = _checksum(a.plain())
    assert _checksum(a.ours()) == right
    host = a.hosted()
    assert _checksum(a.ours(host)) == right
    if b:
        resident = _modules(b.ours())
        assert _checksum(b.ours()) != right
        assert _checksum(a.ours(host, resident)) == right


# --- with a GPU ---


def _cuda() -> list[Figure]:
    """Against the bus and against plain diffusers."""
    device = Computing("cuda")
    rate = _pinned_rate(device.torch)
    return [figure for family in ("sd1", "sdxl") for figure in _cuda_family(family, device, rate)]


def _cuda_family(family: str, device: Computing, rate: float) -> list[Figure]:
    loader = PartLoader(device, _HOST_LIMIT)
    a, b = (Side(loader, family, "fp16", seed, device.torch) for seed in (1, 2))
    _check(a, b)
    plain = {"plain": a.plain, "device_map": a.mapped}

    def warm() -> None:
        fill_page_cache(a.files)

    def cool() -> None:
        drop_page_cache(a.files)

    read_rate = _read_rate(a.files)
    host = a.hosted()
    size = sum(part.bytes for part in host.values())
    what = {"GB": round(size / 1e9, 2), "bus_GBps": round(rate / 1e9, 1), "read_GBps": round(read_rate / 1e9, 1)}
    resident = _modules(b.ours())
    figures = [
        _compared(f"cuda-host-{family}", {"ours": lambda: a.ours(host), **plain}, warm, what),
        _compared(f"cuda-host-same-{family}", {"ours": lambda: a.ours(host, resident), **plain}, warm, what),
    ]
    floor = size / rate
    for figure in figures:
        figure.more |= {"of_bus_time": round(figure.ours / floor, 3), "overhead_s": round(figure.ours - floor, 3)}
    host, resident = {}, {}
    for name, prepare in (("disk", warm), ("cold", cool)):
        figures.append(_compared(f"cuda-{name}-{family}", {"ours": a.ours, **plain}, prepare, what))
        figures[-1].more["of_slower_rate"] = round(size / figures[-1].ours / min(rate, read_rate), 3)
    return figures


def _pinned_rate(device: torch.device) -> float:
    """Bytes a second from pinned memory to the device."""
    source = buffers.buffer(_PINNED, pin=True)
    target = torch.empty(_PINNED, dtype=torch.uint8, device=device)
    times = []
    for _ in range(_ROUNDS + 1):
        torch.cuda.synchronize()
        began = time.perf_counter()
        target.copy_(source, non_blocking=True)
        torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    return _PINNED / median(times[1:])


def _read_rate(files: Sequence[Path]) -> float:
    """Bytes a second of several threads that read into memory that is there already."""
    from concurrent.futures import ThreadPoolExecutor

    block = 8 * 2**20
    largest = max(files, key=lambda file: file.stat().st_size)
    size = largest.stat().st_size
    target = memoryview(buffers.buffer(size, pin=False).numpy())
    times = []
    with contextlib.ExitStack() as stack:
        file = stack.enter_context(largest.open("rb", buffering=0))
        pool = stack.enter_context(ThreadPoolExecutor(4))
        for _ in range(_ROUNDS + 1):
            began = time.perf_counter()
            list(pool.map(lambda at: os.preadv(file.fileno(), [target[at : at + block]], at), range(0, size, block)))
            times.append(time.perf_counter() - began)
    return size / median(times[1:])


def run() -> list[Figure]:
    """All of it; what needs a GPU only where there is one."""
    diffusers.utils.logging.disable_progress_bar()
    diffusers.utils.logging.set_verbosity_error()
    print(f"load average {os.getloadavg()}", file=sys.stderr)
    return _cpu() + (_cuda() if torch.cuda.is_available() else [])
