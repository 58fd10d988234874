"""Steps of a denoiser that are skipped where little has changed, for the job that asks for it and no other.

The hooks are diffusers' own (``diffusers.hooks``), on clones of the denoiser over the same weights. They keep what
blocks gave in earlier steps, so a clone belongs to one run of one job: its calls are merged with nobody's, and it ends
with it.

``first_block``: First Block Cache (of ParaAttention; TeaCache, arXiv:2411.19108): the first block is computed, and
where its residual differs from the last step's by no more than a threshold, the others add what they added then.
``taylorseer``: TaylorSeer (arXiv:2503.06923): attention is computed every so many steps, and extrapolated between.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from types import TracebackType
from typing import Any

from diffusers import FirstBlockCacheConfig, TaylorSeerCacheConfig
from diffusers.hooks._helpers import TransformerBlockRegistry
from torch import nn

from api.engine.cloning import clone
from api.errors import ApiError
from api.schema.generation import StepCache


class StepCaching:
    """What a job's denoisers are given for one run; to be entered for it.

    Args:
        wanted: None: nothing.
    """

    def __init__(self, wanted: StepCache | None) -> None:
        self._wanted = wanted
        self._made: list[nn.Module] = []

    def __enter__(self) -> StepCaching:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, fault: BaseException | None, trace: TracebackType | None
    ) -> None:
        # hooks and modules hold each other: what they keep would stay until the garbage collector comes by
        for module in self._made:
            for part in module.modules():
                registry: Any = vars(part).pop("_diffusers_hook", None)
                vars(part).pop("forward", None)
                for reference in registry._fn_refs if registry else ():
                    vars(reference).clear()
        self._made.clear()

    def applied(self, components: Mapping[str, Any]) -> dict[str, Any]:
        """The components, with denoisers of the job's own where it asks for that.

        Raises:
            ApiError: NOT_SUPPORTED: diffusers cannot do it with this model.
        """
        own = dict(components)
        if self._wanted is None:
            return own
        names = [name for name, part in own.items() if name.startswith("transformer") and _can_cache(part)]
        if not names:
            raise _unsupported("its denoiser has no blocks that diffusers knows")
        for name in names:
            own[name] = clone(own[name])
            self._made.append(own[name])
            _know_classes(own[name])
            try:
                own[name].enable_cache(_config(self._wanted))
            except (ValueError, IndexError, KeyError) as fault:
                raise _unsupported(str(fault)[:200]) from fault
            if not any("_diffusers_hook" in vars(part) for part in list(own[name].modules())[1:]):
                raise _unsupported("diffusers finds nothing in its denoiser to keep")
        return own


def _can_cache(part: Any) -> bool:
    return isinstance(part, nn.Module) and hasattr(part, "enable_cache")


def _config(wanted: StepCache) -> Any:
    if wanted.kind == "first_block":
        return FirstBlockCacheConfig(threshold=wanted.threshold)
    return TaylorSeerCacheConfig(cache_interval=int(wanted.threshold))


def _know_classes(module: nn.Module) -> None:
    """Have diffusers know the blocks of an offloaded model, whose classes are made over its own."""
    TransformerBlockRegistry._register()
    known = TransformerBlockRegistry._registry
    for cls in {type(part) for part in module.modules()}:
        base = next((base for base in cls.__mro__ if base in known), None)
        if base is not None and cls not in known:
            known[cls] = dataclasses.replace(known[base], _cls=cls, _cached_parameter_indices=None)


def _unsupported(why: str) -> ApiError:
    message = f"step_cache cannot be had with this model: {why}. Leave it out."
    return ApiError("NOT_SUPPORTED", message, field="callInputs.step_cache")
