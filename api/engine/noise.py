"""Random numbers of a job's own, where a library draws from torch's global ones.

Jobs run at the same time: whoever draws from the global generator gets what the others left.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

_DRAWS = frozenset({torch.multinomial, torch.Tensor.multinomial})
"""What ``generate`` of transformers draws its tokens with; it takes no generator."""


class Seeded(TorchFunctionMode):
    """While it is entered, tokens that this thread draws come from generators that are seeded for the job.

    Args:
        seed: of the generators, one for each device.
    """

    def __init__(self, seed: int) -> None:
        super().__init__()
        self._seed = seed
        self._generators: dict[torch.device, torch.Generator] = {}

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func in _DRAWS and kwargs.get("generator") is None:
            kwargs = {**kwargs, "generator": self.generator(args[0].device)}
        return func(*args, **kwargs)

    def generator(self, device: torch.device) -> torch.Generator:
        """The job's generator on a device."""
        if device not in self._generators:
            self._generators[device] = torch.Generator(device).manual_seed(self._seed)
        return self._generators[device]
