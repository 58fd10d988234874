"""One device: what it computes in, how much memory it has, how much is used."""

from __future__ import annotations

import contextlib
import ctypes
import logging
import platform
from collections.abc import Iterator

import torch

from api.engine.budgets import Memory
from api.engine.peaks import CudaMeter, Meter
from api.engine.stopwatch import CpuStopwatch, CudaStopwatch, Stopwatch
from api.schema.counts import DeviceMemory

log = logging.getLogger("api.engine")

_DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}

_LOST = ("CUDA error", "CUDA driver error", "cuDNN error")
_HARMLESS = ("out of memory", "CUDNN_STATUS_NOT_SUPPORTED", "CUDNN_STATUS_BAD_PARAM")
"""What errors of a device hold, after which it can be used no more, and after which it can."""


class Device:
    """The device that an engine owns.

    Args:
        name: ``cpu``, ``cuda`` or ``cuda:N``.
        required: raise when a GPU is named that torch cannot use; otherwise fall back to the CPU.
        channels_last: whether weights of convolutions are turned round (``layout``) on a device with memory of its own:
            ``auto``: in half precision on a GPU; ``0``: never; ``1``: in every precision.
        tf32: a GPU may compute products of fp32 in TF32. Torch knows one such switch for the whole process.

    Raises:
        RuntimeError: torch cannot use the device.
    """

    def __init__(self, name: str, required: bool = True, channels_last: str = "auto", tf32: bool = False) -> None:
        if name.startswith("cuda") and not torch.cuda.is_available():
            if required:
                raise RuntimeError(f"DEVICES names {name}, but this torch ({torch.__version__}) finds no GPU")
            log.warning("there is a GPU, but this torch (%s) cannot use it: computing on the CPU", torch.__version__)
            name = "cpu"
        self.torch = torch.device(name)
        self.is_cuda = self.torch.type == "cuda"
        self._meter = CudaMeter(self.torch) if self.is_cuda else None
        self.shares_host = not self.is_cuda
        """Modules on it may use the host's own memory; a test says no, to go the way of a GPU."""
        self._threads = torch.get_num_threads()  # later each thread has its own number
        self._channels_last = channels_last
        self.tf32 = tf32 and self.is_cuda
        if self.is_cuda:
            torch.set_float32_matmul_precision("high" if tf32 else "highest")
            torch.backends.cudnn.allow_tf32 = tf32  # torch's own default is on

    @property
    def name(self) -> str:
        """What people call the device."""
        if self.is_cuda:
            return torch.cuda.get_device_name(self.torch)
        return f"{platform.machine()} CPU, {self._threads} threads"

    def dtype(self, precision: str) -> torch.dtype:
        """What a precision is computed in here. A CPU computes in fp32 always: fp16 is 20 times slower there."""
        return _DTYPES[precision] if self.is_cuda else torch.float32

    def turns(self, dtype: torch.dtype) -> bool:
        """Whether convolutions of a dtype have weights with the channels last here."""
        half = dtype in (torch.float16, torch.bfloat16)
        return self._channels_last == "1" or (self._channels_last == "auto" and self.is_cuda and half)

    def memory(self) -> Memory | None:
        """What a GPU has, and what others leave of it; None for a CPU, which has the host's."""
        if not self.is_cuda:
            return None
        free, total = torch.cuda.mem_get_info(self.torch)
        allowed = int(torch.cuda.get_per_process_memory_fraction(self.torch) * total)
        return Memory(min(total, allowed), min(free, allowed - torch.cuda.memory_reserved(self.torch)))

    def mem_usage(self) -> float:
        """Allocated share of the device's peak, as the old system reports it; 0 on a CPU."""
        if not self.is_cuda:
            return 0
        peak = self._meter.most if self._meter else 0
        return torch.cuda.memory_allocated(self.torch) / peak if peak else 0

    def allocations(self) -> DeviceMemory | None:
        """What this process has of a GPU's memory; None for a CPU. Waits for nothing."""
        if not self.is_cuda:
            return None
        allocated, reserved = torch.cuda.memory_allocated(self.torch), torch.cuda.memory_reserved(self.torch)
        return DeviceMemory(allocated, reserved, self._meter.most if self._meter else allocated)

    def stopwatch(self) -> Stopwatch:
        """What times its calls."""
        return CudaStopwatch(self.torch) if self.is_cuda else CpuStopwatch()

    def meter(self) -> Meter | None:
        """What measures the memory that its calls take; None for a CPU, which does not say."""
        return self._meter

    def synchronize(self) -> None:
        """Wait for everything that was queued on the device."""
        if self.is_cuda:
            torch.cuda.synchronize(self.torch)

    def release_cache(self) -> None:
        """Give freed memory back to the device."""
        if self.is_cuda:
            torch.cuda.empty_cache()
        release_host_memory()


def is_fatal(fault: BaseException) -> bool:
    """Whether the device is of no use any more to this process: after such an error every later call fails, too.

    CUDA's errors are sticky: "the only way to continue is to terminate the process" (CUDA C++ Programming Guide, error
    checking). Not fatal are a lack of memory, and what cuDNN says about one call.

    Args:
        fault: asked together with what it was raised from.
    """
    return any(map(_is_lost, _behind(fault)))


def shortage(fault: BaseException) -> str | None:
    """What torch said of a lack of memory, where a fault comes from that; libraries give it other names."""
    return next((str(each) for each in _behind(fault) if isinstance(each, torch.OutOfMemoryError)), None)


def _behind(fault: BaseException) -> Iterator[BaseException]:
    seen: BaseException | None = fault
    while seen is not None:
        yield seen
        seen = seen.__cause__ or seen.__context__


def _is_lost(fault: BaseException) -> bool:
    text = str(fault)
    if isinstance(fault, torch.OutOfMemoryError) or any(part in text for part in _HARMLESS):
        return False
    return isinstance(fault, torch.AcceleratorError) or any(part in text for part in _LOST)


def release_host_memory() -> None:
    """Give the heap's free pages back to the system: what many threads have freed lies scattered and stays otherwise.

    ``malloc_trim(3)``; a C library without it keeps them.
    """
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
