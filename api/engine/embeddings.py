"""Remembers what text encoders returned: the same prompt again costs no call of them.

A result is known by the module that was called, itself and not its name, the method's arguments, and the tokens. What a
job has changed in its view of a module is called on the job's own tree, and is not remembered; a module with adapters
is another module. A module whose weights leave or are replaced takes its results with it.
"""

from __future__ import annotations

import functools
import threading
import weakref
from collections import OrderedDict, deque
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import torch
from diffusers.utils import BaseOutput
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from api.engine.merging import analyse, digest

_PLAIN = bool | int | float | str | None


class _Unknown(Exception):
    """A result holds something that is not copied."""


_Key = tuple[int, Hashable]
"""The id of a module, and what it was called with."""


class Layers(Sequence[torch.Tensor]):
    """Hidden states, one for each layer, fetched when they are looked at.

    Args:
        count: how many there are.
        take: fetches one of them; None in what is remembered, which holds none of them.
    """

    def __init__(self, count: int, take: Callable[[int], torch.Tensor] | None = None) -> None:
        self._count, self._take = count, take

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, at: Any) -> Any:
        if self._take is None:
            raise LookupError("these are of nobody's call")
        wanted = range(self._count)[at]
        return tuple(map(self._take, wanted)) if isinstance(wanted, range) else self._take(wanted)


class Embeddings:
    """The results in one worker's memory, those that were used last.

    Everything may be called from any thread.

    Args:
        limit: bytes of the device that they may take; 0: nothing is remembered.

    Attributes:
        hits: calls that were answered.
        misses: calls that were made, and might have been answered.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._lock = threading.Lock()
        self._found: OrderedDict[_Key, tuple[Any, int]] = OrderedDict()
        self._modules: dict[int, weakref.ref[nn.Module]] = {}
        self._gone: deque[int] = deque()
        """Modules that the garbage collector has taken, in whichever thread and under whichever lock."""
        self.bytes = self.hits = self.misses = 0

    def called(
        self, function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any], run: Callable[[], Any]
    ) -> Any:
        """What a module's method returns; the caller's own, to be written to as it likes.

        Args:
            function: the method, bound to its module; or anything else, which is called.
            args, kwargs: what it is called with.
            run: calls it.
        """
        module = getattr(function, "__self__", None)
        if not self._limit or not isinstance(module, PreTrainedModel) or module.training:
            return run()
        kind = _kind(function, type(module).__name__, args, kwargs)
        if kind is None:
            return run()
        key = id(module), kind
        result = self._recall(key)
        if result is not None:
            self.hits += 1
            if isinstance(layers := _states_of(result), Layers):
                again = functools.cache(lambda: _states_of(run()))
                result["hidden_states"] = self._layers(module, key, len(layers), again)
            return result
        self.misses += 1
        result = run()
        if isinstance(states := _states_of(result), tuple):
            result["hidden_states"] = self._layers(module, key, len(states), lambda: states)
        self._keep(module, key, result)
        return result

    def _layers(self, module: nn.Module, key: _Key, count: int, states: Callable[[], Any]) -> Layers:
        """The hidden states of a call, of which those are remembered that somebody wants: mostly one of thirty."""

        def take(index: int) -> torch.Tensor:
            at = key[0], (key[1], index)
            found: torch.Tensor | None = self._recall(at)
            if found is None:
                found = states()[index]
                self._keep(module, at, found)
            return found

        return Layers(count, take)

    def _recall(self, key: _Key) -> Any:
        """A copy of what is remembered; None if nothing is."""
        with self._lock:
            self._drop_gone()
            if key not in self._found:
                return None
            self._found.move_to_end(key)
            found = self._found[key][0]
        return _copied(found)

    def forget(self, module: nn.Module) -> None:
        """A module's weights are no longer what they were."""
        with self._lock:
            self._drop(id(module))

    def clear(self) -> bool:
        """Forget everything: memory is short. Whether there was anything."""
        with self._lock:
            there = bool(self._found)
            self._found.clear()
            self.bytes = 0
        return there

    def _keep(self, module: nn.Module, key: _Key, result: Any) -> None:
        try:
            size = _bytes(result)
            if size > self._limit:
                return
            own = _copied(result)
        except _Unknown:
            return
        with self._lock:
            if key[0] not in self._modules:
                self._modules[key[0]] = weakref.ref(module, self._noting(key[0]))
            if key not in self._found:
                self.bytes += size
            self._found[key] = own, size
            while self.bytes > self._limit:
                self.bytes -= self._found.popitem(last=False)[1][1]

    def _noting(self, which: int) -> Callable[[Any], None]:
        gone = self._gone
        return lambda _: gone.append(which)

    def _drop_gone(self) -> None:
        while self._gone:
            self._drop(self._gone.popleft())

    def _drop(self, which: int) -> None:
        if self._modules.pop(which, None) is not None:
            for key in [key for key in self._found if key[0] == which]:
                self.bytes -= self._found.pop(key)[1]


def _kind(function: Callable[..., Any], owner: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Hashable | None:
    """What a call depends on besides its module; None where that is not tokens alone."""
    call = analyse(function, owner, args, kwargs)
    if call is None or "input_ids" not in call.arguments:
        return None
    content: list[Hashable] = []
    for name in sorted(call.arguments):
        value = call.arguments[name]
        if isinstance(value, torch.Tensor):
            if value.is_floating_point() or value.is_complex():
                return None
            content.append((name, tuple(value.shape), digest(value)))
        elif not isinstance(value, _PLAIN):
            return None
    return getattr(function, "__name__", ""), call.key, tuple(content)


def _states_of(result: Any) -> Any:
    return result.get("hidden_states") if isinstance(result, ModelOutput) else None


def _copied(value: Any) -> Any:
    """The same, in memory of its own."""
    if isinstance(value, torch.Tensor):
        return value.detach().clone()
    if isinstance(value, _PLAIN):
        return value
    if isinstance(value, Layers):
        return Layers(len(value))
    if isinstance(value, ModelOutput | BaseOutput):
        return type(value)(**{name: _copied(item) for name, item in value.items()})
    if type(value) in (tuple, list):
        return type(value)(_copied(item) for item in value)
    raise _Unknown


def _bytes(value: Any) -> int:
    if isinstance(value, torch.Tensor):
        return value.nbytes
    if isinstance(value, ModelOutput | BaseOutput):
        return sum(map(_bytes, value.values()))
    if type(value) in (tuple, list):
        return sum(map(_bytes, value))
    if isinstance(value, _PLAIN | Layers):
        return 0
    raise _Unknown
