"""CUDA graphs of short module calls: what the host launches kernel by kernel is recorded once and launched as one.

A graph is of one kind of call: one module, as many rows, the same shapes, strides, dtypes and flags. What it holds are
the kernels of the call as it was made before, so that what it computes is the same to the bit. Its inputs are copied
into buffers of its own and its outputs out of them. For the device's thread alone, but for what says otherwise.

Recorded are the denoisers that jobs share, never a job's own tree (``views``: these calls are not mergeable), nor
modules with adapters or offloaded ones, which are not allowed here by whoever builds a job.
"""

from __future__ import annotations

import logging
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from diffusers.utils import BaseOutput
from torch import nn

from api.engine.device import shortage
from api.engine.merging import STEPS
from api.engine.tally import Tally

log = logging.getLogger("api.engine")

LIMIT = 2**30
"""Bytes that graphs may take, all together."""
MOST = 32
"""Graphs at a time."""
_SEEN = 3
"""Calls of a kind after which the next one is recorded."""
_LONGEST = 0.1
"""Seconds of a call beyond which nothing is gained: launching is a small part of it."""
_REMEMBERED = 1024


class Recorded(Protocol):
    """A call that was recorded.

    Attributes:
        bytes: that it holds on the device.
        output: what it returned; the next replay overwrites it.
    """

    bytes: int
    output: Any

    def replay(self) -> None:
        """Make the call again, with what is in its inputs now."""


class Backend(Protocol):
    """Records calls."""

    def record(self, function: Callable[[], Any]) -> Recorded:
        """Make a call, and record what the device is told meanwhile."""


class CudaBackend:
    """Records with ``torch.cuda.CUDAGraph``, all graphs in one pool.

    None of them runs beside another, and what one returns is copied before the next.

    Args:
        device: a CUDA device.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)
        self._pool: Any = None
        self._graphs: weakref.WeakSet[_CudaRecorded] = weakref.WeakSet()

    def record(self, function: Callable[[], Any]) -> Recorded:
        """See ``Backend``."""
        if not self._graphs:  # the pool has gone with the last of them
            self._pool = torch.cuda.graph_pool_handle()
        stream, usual = self._stream, torch.cuda.current_stream(self._device)
        stream.wait_stream(usual)
        with torch.cuda.stream(stream):
            function()  # what libraries set up for a stream at its first call is not to be recorded
        usual.wait_stream(stream)
        torch.cuda.synchronize(self._device)
        before = torch.cuda.memory_reserved(self._device)
        graph = torch.cuda.CUDAGraph()
        # other threads may allocate meanwhile: what they do is not to break the recording
        try:
            with torch.cuda.graph(graph, pool=self._pool, stream=stream, capture_error_mode="thread_local"):
                output = function()
        finally:
            # where a recording fails, torch leaves the thread on its stream, which waits for nothing that jobs do
            torch.cuda.set_stream(usual)
        # ``torch.cuda.graph`` gives cached memory back when it begins: what was reserved may even be less than before
        size = max(torch.cuda.memory_reserved(self._device) - before, _bytes(output))
        recorded = _CudaRecorded(graph, output, size, self._device)
        self._graphs.add(recorded)
        return recorded


class _CudaRecorded:
    def __init__(self, graph: Any, output: Any, size: int, device: torch.device) -> None:
        self._graph, self.output, self.bytes, self._device = graph, output, size, device

    def replay(self) -> None:
        """See ``Recorded``."""
        self._graph.replay()

    def __del__(self) -> None:
        with suppress(Exception):  # the interpreter may be ending
            torch.cuda.synchronize(self._device)  # a graph that runs is not destroyed


@dataclass(eq=False)
class _Graph:
    recorded: Recorded
    inputs: list[torch.Tensor]
    bytes: int
    module: weakref.ref[nn.Module]
    where: tuple[int, ...]
    """The addresses of its weights."""


class Graphs:
    """The graphs of one device.

    Args:
        backend: records.
        device: where inputs are kept.
        limit: bytes that they may take.
        tally: counts them.

    Attributes:
        recorded: how many calls were recorded.
        replayed: how many calls were made by a graph.
    """

    def __init__(self, backend: Backend, device: torch.device, limit: int = LIMIT, tally: Tally | None = None) -> None:
        self._backend = backend
        self._device = device
        self._limit = limit
        self._tally = tally or Tally()
        self._lock = threading.RLock()
        self._allowed: weakref.WeakSet[nn.Module] = weakref.WeakSet()
        self._where: weakref.WeakKeyDictionary[nn.Module, tuple[int, ...]] = weakref.WeakKeyDictionary()
        """The addresses of the weights of modules; of one that is not in it, they are to be looked at."""
        self._graphs: OrderedDict[Hashable, _Graph] = OrderedDict()
        self._seen: OrderedDict[Hashable, int] = OrderedDict()
        self._refused: OrderedDict[Hashable, None] = OrderedDict()
        self._unfit: weakref.WeakSet[nn.Module] = weakref.WeakSet()
        """Modules that could not be recorded: what waits for the device does so with every shape."""
        self.recorded = self.replayed = 0

    @property
    def bytes(self) -> int:
        """What graphs hold on the device. In any thread."""
        with self._lock:
            return sum(graph.bytes for graph in self._graphs.values())

    def allow(self, module: nn.Module) -> None:
        """Have calls of a module recorded, whose tree does not change; its weights may (``moved``). In any thread."""
        with self._lock:
            self._allowed.add(module)

    def moved(self) -> None:
        """Weights have left, or are others from now on. In any thread.

        The graphs of a module stay good where its weights are at the same addresses, which is looked at before its next
        call.
        """
        with self._lock:
            self._where.clear()

    def clear(self) -> bool:
        """Forget all graphs; whether there were any. In any thread: memory is short."""
        with self._lock:
            there = bool(self._graphs)
            self._graphs.clear()
            self._seen.clear()
            return there

    def plan(
        self,
        function: Callable[..., Any],
        arguments: Mapping[str, Any],
        flags: Hashable,
        otherwise: Callable[[], Any],
        seconds: float,
        calm: bool,
    ) -> Callable[[], Any] | None:
        """What makes a call by a graph; None: it is to be made as it is.

        Args:
            function: a module's bound method.
            arguments: by name.
            flags: all about the call but its tensors, as ``Mergeable.key``.
            otherwise: makes the call as it is, should recording fail.
            seconds: that it should take.
            calm: nobody else uses the device now: it may be recorded.
        """
        module = getattr(function, "__self__", None)
        if not isinstance(module, nn.Module) or function.__name__ != "forward":
            return None
        with self._lock:
            if module not in self._allowed or module in self._unfit:
                return None
            self._look_after(module)
            arguments = numbered(arguments)
            shapes = tuple((tuple(each.shape), each.stride(), each.dtype) for each in _tensors(arguments))
            key = id(module), flags, shapes
            graph = self._graphs.get(key)
            if graph is not None:
                self._graphs.move_to_end(key)
            elif not self._is_due(key, seconds) or not calm:
                return None

        def call() -> Any:
            made = graph or self._record(key, function, arguments)
            if made is None:
                return otherwise()
            for static, given in zip(made.inputs, _tensors(arguments), strict=True):
                static.copy_(given)
            made.recorded.replay()
            self.replayed += 1
            return _copied(made.recorded.output)

        return call

    def _look_after(self, module: nn.Module) -> None:
        """Drop the graphs of a module whose weights are elsewhere by now, and those of modules that are no more."""
        if module in self._where:
            return
        where = _addresses(module)
        for key, graph in list(self._graphs.items()):
            of = graph.module()
            if of is None or (of is module and graph.where != where):
                del self._graphs[key]
        self._where[module] = where

    def _is_due(self, key: Hashable, seconds: float) -> bool:
        if key in self._refused or seconds > _LONGEST:
            return False
        self._seen[key] = self._seen.pop(key, 0) + 1
        if len(self._seen) > _REMEMBERED:
            self._seen.popitem(last=False)
        return self._seen[key] > _SEEN

    def _record(self, key: Hashable, function: Any, arguments: Mapping[str, Any]) -> _Graph | None:
        inputs: list[torch.Tensor] = []
        static, where = _with_own(arguments, self._device, inputs), _addresses(function.__self__)
        try:
            recorded = self._backend.record(lambda: function(**static))
        except Exception as fault:  # it waits for the device, say, or copies from the host
            if shortage(fault):
                self.clear()
            else:
                self._unfit.add(function.__self__)
            self._refuse(key, f"{type(fault).__name__}: {fault}")
            return None
        graph = _Graph(recorded, inputs, recorded.bytes + _bytes(inputs), weakref.ref(function.__self__), where)
        if graph.bytes > self._limit or not _is_known(recorded.output):
            self._refuse(key, f"it takes {graph.bytes} bytes" if _is_known(recorded.output) else "of what it returns")
            return None
        with self._lock:
            self._graphs[key] = graph
            while len(self._graphs) > MOST or sum(each.bytes for each in self._graphs.values()) > self._limit:
                self._graphs.popitem(last=False)
        self._seen.pop(key, None)
        self.recorded += 1
        self._tally.compiled("graph")
        log.info("a call of %s is a CUDA graph from now on", type(function.__self__).__name__)
        return graph

    def _refuse(self, key: Hashable, why: str) -> None:
        log.info("a kind of call is not recorded as a CUDA graph: %s", why[:300])
        self._refused[key] = None
        if len(self._refused) > _REMEMBERED:
            self._refused.popitem(last=False)


def _addresses(module: nn.Module) -> tuple[int, ...]:
    return tuple(tensor.data_ptr() for tensor in (*module.parameters(), *module.buffers()))


def _tensors(value: Any) -> list[torch.Tensor]:
    """The tensors of arguments, in their order."""
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, Mapping):
        return [tensor for key in sorted(value) for tensor in _tensors(value[key])]
    if isinstance(value, list | tuple):
        return [tensor for item in value for tensor in _tensors(item)]
    return []


def _with_own(value: Any, device: torch.device, inputs: list[torch.Tensor]) -> Any:
    """The same with tensors of their own, in the order of ``_tensors``."""
    if isinstance(value, torch.Tensor):
        # of the same strides: they decide which kernels run
        own = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=device)
        inputs.append(own.copy_(value))
        return own
    if isinstance(value, Mapping):
        made = {key: _with_own(value[key], device, inputs) for key in sorted(value)}
        return {key: made[key] for key in value}
    if isinstance(value, list | tuple):
        return type(value)(_with_own(item, device, inputs) for item in value)
    return value


def numbered(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments whose timestep is a tensor, also where it was given as a number: a graph would keep that forever."""
    return {
        name: torch.tensor([value], dtype=torch.float64 if isinstance(value, float) else torch.int64)
        if name in STEPS and type(value) in (int, float)
        else value
        for name, value in arguments.items()
    }


def _is_known(value: Any) -> bool:
    if isinstance(value, BaseOutput):
        return all(map(_is_known, value.values()))
    return value is None or isinstance(value, torch.Tensor) or (type(value) is tuple and all(map(_is_known, value)))


def _copied(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.clone()
    if isinstance(value, BaseOutput):
        return type(value)(**{name: _copied(item) for name, item in value.items()})
    return tuple(map(_copied, value)) if type(value) is tuple else value


def _bytes(value: Any) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in _tensors(value))
