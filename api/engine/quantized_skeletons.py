"""Skeletons whose linear layers are quantized: another architecture, with other slots, of exactly known size."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from api.engine.cloning import clone_with
from api.engine.headers import Header
from api.engine.quantization import Rule, layers
from api.engine.quantized_layers import QuantizedLinear, quantize
from api.engine.reading import copied, read
from api.engine.skeletons import ALIGNMENT, Skeleton, Slot

_PARTS = ("qdata", "scale")


@dataclass(frozen=True)
class Quantized(Skeleton):
    """A skeleton with quantized layers.

    Attributes:
        kind: ``int8``, ``fp8`` or ``nf4``.
        whole: of each such layer, its weight as the files and the plain skeleton have it.
        parts: of each, where what is held in its place goes: the slots of ``qdata`` and ``scale``.
        plain: the slots of everything else.
    """

    kind: str
    whole: tuple[Slot, ...]
    parts: tuple[tuple[Slot, ...], ...]
    plain: tuple[Slot, ...]


def quantized(skeleton: Skeleton, name: str, kind: str, dtype: torch.dtype, rule: Rule) -> Quantized | None:
    """The same architecture with quantized layers; None where it has none to quantize.

    Args:
        skeleton: of a part as it is.
        name: of the component.
        kind: ``int8``, ``fp8`` or ``nf4``.
        dtype: that the model computes in.
        rule: see ``quantization.layers``.
    """
    plain = {target for slot in skeleton.slots if slot.dtype == dtype for target in slot.targets}
    chosen = layers(name, skeleton.module, kind, plain, rule)
    if not chosen:
        return None
    memo: dict[int, Any] = {}
    module = clone_with(skeleton.module, memo)
    modules = dict(skeleton.module.named_modules(remove_duplicate=False))
    made: dict[int, QuantizedLinear] = {}
    wanted = {id(modules[one]) for one in chosen}
    for path, old in modules.items():  # also under its other names
        if id(old) not in wanted:
            continue
        parent, _, leaf = path.rpartition(".")
        new = made.get(id(old))
        if new is None:
            new = made[id(old)] = QuantizedLinear(kind, memo[id(old)], dtype, path)
        memo[id(modules[parent])]._modules[leaf] = new
    return _laid_out(skeleton, module, memo, made, kind)


def _laid_out(
    skeleton: Skeleton, module: nn.Module, memo: dict[int, Any], made: dict[int, QuantizedLinear], kind: str
) -> Quantized:
    slots: list[Slot] = []
    owners: list[tuple[tuple[nn.Module, str, bool], ...]] = []
    whole: list[Slot] = []
    parts: list[tuple[Slot, ...]] = []
    plain: list[Slot] = []
    offset = 0

    def add(source: str, targets: tuple[str, ...], shape: tuple[int, ...], dtype: torch.dtype) -> Slot:
        nonlocal offset
        slot = Slot(source, targets, shape, dtype, offset)
        slots.append(slot)
        offset += -(-slot.bytes // ALIGNMENT) * ALIGNMENT
        return slot

    for slot, places in zip(skeleton.slots, skeleton.owners, strict=True):
        layer = made.get(id(places[0][0]))
        if layer is None or places[0][1] != "weight":
            plain.append(add(slot.source, slot.targets, slot.shape, slot.dtype))
            owners.append(tuple((made.get(id(p), memo[id(p)]), leaf, is_parameter) for p, leaf, is_parameter in places))
            continue
        mine = []
        for name in _PARTS:
            tensor = getattr(layer, name)
            targets = tuple(f"{target.removesuffix('weight')}{name}" for target in slot.targets)
            mine.append(add(slot.source, targets, tuple(tensor.shape), tensor.dtype))
            owners.append(tuple((layer, name, True) for _ in places))
        whole.append(slot)
        parts.append(tuple(mine))
    rest = skeleton.bytes - sum(slot.bytes for slot in skeleton.slots)  # what is computed
    return Quantized(
        module=module,
        slots=tuple(slots),
        extent=offset,
        bytes=sum(slot.bytes for slot in slots) + rest,
        owners=tuple(owners),
        computed=tuple((memo[id(part)], name) for part, name in skeleton.computed),
        kind=kind,
        whole=tuple(whole),
        parts=tuple(parts),
        plain=tuple(plain),
    )


def fill_quantized(headers: Sequence[Header], skeleton: Quantized, flat: torch.Tensor) -> None:
    """Read a part and quantize it on the way, a layer at a time: beyond its own bytes one layer is in memory.

    Args:
        headers: of its files.
        skeleton: of the part.
        flat: of ``skeleton.extent`` bytes, to be filled.

    Raises:
        ApiError: MODEL_BROKEN; NOT_SUPPORTED: the package is not there.
        MemoryError: there is no room.
    """
    copied(headers, skeleton.plain, flat, skeleton.extent)
    home = {name: header for header in headers for name in header.tensors}
    with torch.no_grad():
        for whole, parts in zip(skeleton.whole, skeleton.parts, strict=True):
            alone = Slot(whole.source, whole.targets, whole.shape, whole.dtype, 0)
            layer = read([home[whole.source]], [alone], alone.bytes, shares=False, pin=False)
            made = quantize(skeleton.kind, layer.tensors[whole.targets[0]])
            for slot, name in zip(parts, _PARTS, strict=True):
                slot.of(flat).copy_(made[name])
