"""Which of a part's weights come to the device together, where they stay in the host's memory.

What has one dimension or none stays on the device whatever happens: norms, biases, statistics. It is less than a
thousandth of a model, and some of it pipelines use in their own threads, such as a text encoder's last norm and an
autoencoder's statistics.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from api.engine.skeletons import ALIGNMENT, Skeleton

_SHARES = (2, 4, 8, 16, 32, 64)
"""A block takes at most this fraction of its part: a larger one is opened, and what it holds are the blocks. Whichever
fraction needs least memory is taken, the largest of those that need the same."""
_SMALL = 1024
"""What takes less than this fraction of its part is not worth coming by itself."""
_LISTS = (nn.ModuleList, nn.Sequential)


@dataclass(frozen=True)
class Weight:
    """A weight that comes and goes.

    Attributes:
        names: in its module; several where weights are tied.
        shape: of the tensor.
        dtype: in memory.
        offset: of its bytes in the part's buffer; in one that is made up where it has none.
        turned: it has its channels last on the device (``layout``).
    """

    names: tuple[str, ...]
    shape: tuple[int, ...]
    dtype: torch.dtype
    offset: int
    turned: bool = False

    @property
    def bytes(self) -> int:
        """Without what aligns the next one."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


@dataclass(frozen=True)
class Load:
    """Weights that come together.

    Attributes:
        weights: by offset.
        at: of each weight, its offset in the place that they come to.
        size: bytes of that place.
        begin: where the stretch of the part's buffer begins that is copied as it is; None: each weight is copied.
    """

    weights: tuple[Weight, ...]
    at: tuple[int, ...]
    size: int
    begin: int | None


@dataclass(frozen=True)
class Layout:
    """A part's weights, by when they come.

    Attributes:
        whole: all that comes and goes, at once.
        rest: what comes with the first block and stays until the part goes.
        blocks: by the names of their modules.
        small: bytes of what is always on the device.
    """

    whole: Load
    rest: Load
    blocks: dict[str, Load]
    small: int

    def block(self) -> int:
        """Bytes of the largest block."""
        return max((load.size for load in self.blocks.values()), default=0)


def of_skeleton(skeleton: Skeleton, turns: Callable[[torch.dtype], bool] = lambda dtype: False) -> Layout:
    """The layout of a part that our own reader knows.

    Args:
        skeleton: the part.
        turns: whether weights of a dtype that may have their channels last have them so on the device.
    """
    weights = [
        Weight(slot.targets, slot.shape, slot.dtype, slot.offset, slot.turns and turns(slot.dtype))
        for slot, owners in zip(skeleton.slots, skeleton.owners, strict=True)
        if len(slot.shape) > 1 and all(is_parameter for _, _, is_parameter in owners)
    ]
    return _layout(skeleton.module, weights, skeleton.bytes, one_buffer=True)


def of_module(module: nn.Module, size: int) -> Layout:
    """The layout of a part that a library has loaded.

    Args:
        module: the part.
        size: bytes of its parameters and buffers.
    """
    names: dict[int, list[str]] = {}
    tensors = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        if parameter.dim() > 1:
            names.setdefault(id(parameter), []).append(name)
            tensors[id(parameter)] = parameter
    weights, offset = [], 0
    for number, found in names.items():
        weights.append(Weight(tuple(found), tuple(tensors[number].shape), tensors[number].dtype, offset))
        offset += _aligned(weights[-1].bytes)
    return _layout(module, weights, size, one_buffer=False)


def _layout(module: nn.Module, weights: Sequence[Weight], size: int, one_buffer: bool) -> Layout:
    total = sum(weight.bytes for weight in weights)
    divided = [_divided(module, weights, total, share, one_buffer) for share in _SHARES]
    rest, blocks = min(
        divided, key=lambda way: way[0].size + 2 * max((load.size for load in way[1].values()), default=0)
    )
    return Layout(_load(weights, one_buffer), rest, blocks, size - total)


def _divided(
    module: nn.Module, weights: Sequence[Weight], total: int, share: int, one_buffer: bool
) -> tuple[Load, dict[str, Load]]:
    chosen = list(_blocks(module, "", weights, total, share))
    grouped: dict[str, list[Weight]] = {}
    rest: list[Weight] = []
    for weight in weights:
        homes = {next((name for name in chosen if each.startswith(f"{name}.")), "") for each in weight.names}
        # a tied weight of two blocks comes with neither
        home = homes.pop() if len(homes) == 1 else ""
        (grouped.setdefault(home, []) if home else rest).append(weight)
    return _load(rest, one_buffer), {name: _load(some, one_buffer) for name, some in grouped.items()}


def _blocks(module: nn.Module, name: str, weights: Sequence[Weight], total: int, share: int) -> Iterator[str]:
    """Names of the modules in lists that are small enough; they are called one after the other, as a whole."""
    for key, child in module.named_children():
        path = f"{name}.{key}" if name else key
        inside = [weight for weight in weights if weight.names[0].startswith(f"{path}.")]
        size = sum(weight.bytes for weight in inside)
        if size * _SMALL < total:
            continue
        if isinstance(module, _LISTS) and not isinstance(child, _LISTS) and size * share <= total:
            yield path
        elif not any(parameter is not None and parameter.dim() > 1 for parameter in child._parameters.values()):
            # one with weights of its own may use those of its children without calling them
            yield from _blocks(child, path, inside, total, share)


def _load(weights: Iterable[Weight], one_buffer: bool) -> Load:
    ordered = tuple(sorted(weights, key=lambda weight: weight.offset))
    if not ordered:
        return Load((), (), 0, None)
    compact = sum(_aligned(weight.bytes) for weight in ordered)
    begin = ordered[0].offset
    span = _aligned(ordered[-1].offset + ordered[-1].bytes - begin)
    if one_buffer and span <= compact + compact // 16:  # between them is what stays on the device anyway
        return Load(ordered, tuple(weight.offset - begin for weight in ordered), span, begin)
    at, offset = [], 0
    for weight in ordered:
        at.append(offset)
        offset += _aligned(weight.bytes)
    return Load(ordered, tuple(at), offset, None)


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT
