"""Modules without weights, built once for each architecture, and copied for each model.

Nothing here patches torch for the whole process, as ``from_pretrained`` and ``accelerate.init_empty_weights`` do:
the mode that a module is built under is its thread's own.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from diffusers import ModelMixin
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    build_glob_alternation,
    rename_source_key,
)

from api.engine.cloning import clone_with, keep_text_model
from api.engine.headers import Stored
from api.engine.layout import turns

ALIGNMENT = 256
"""Bytes; what CUDA's own allocations are aligned to, more than any kernel asks for."""

_FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
# what a model makes of these is never a value that it keeps
_VALUELESS = frozenset({torch.empty, torch.rand, torch.randn, torch.empty_strided})
# take the type of their data, the default one only for Python's own numbers
_OF_DATA = frozenset({torch.tensor, torch.as_tensor, torch.asarray})
_FACTORIES = _VALUELESS | {torch.zeros, torch.ones, torch.full, torch.eye, torch.linspace, torch.logspace, torch.arange}
_CONVERSIONS = frozenset({"to", "float", "type", "type_as", "double", "half", "bfloat16", "from_numpy"})


class NotExactError(Exception):
    """A component is not what our own reader loads exactly as its library would."""


@dataclass(frozen=True)
class Slot:
    """Where one stored tensor goes.

    Attributes:
        source: its name in the files.
        targets: its names in the module; several where weights are tied.
        shape: of the tensor.
        dtype: in memory.
        offset: of its bytes in one buffer for the whole part.
        turns: it may have its channels last (``layout``).
    """

    source: str
    targets: tuple[str, ...]
    shape: tuple[int, ...]
    dtype: torch.dtype
    offset: int
    turns: bool = False

    @property
    def bytes(self) -> int:
        """What it takes in memory, without what aligns the next one."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize

    def of(self, flat: torch.Tensor) -> torch.Tensor:
        """The tensor within a buffer of bytes."""
        return flat[self.offset : self.offset + self.bytes].view(self.dtype).view(self.shape)


@dataclass(frozen=True)
class Skeleton:
    """An architecture: a module on ``meta``, never run and never changed, and where its weights go.

    Attributes:
        module: with the real values of what no file holds: the buffers that are computed.
        slots: by offset.
        extent: bytes of a buffer for all slots.
        bytes: of parameters and buffers in memory.
    """

    module: nn.Module
    slots: tuple[Slot, ...]
    extent: int
    bytes: int
    owners: tuple[tuple[tuple[nn.Module, str, bool], ...], ...]
    """For each slot its places: the submodule, the name there, and whether it is a parameter."""
    computed: tuple[tuple[nn.Module, str], ...]
    """Places of the buffers that no file holds."""


class _Building(TorchFunctionMode):
    """What is drawn at random or not set at all is made on ``meta``; everything else is computed on the CPU.

    So a buffer that a constructor computes has its values, and a weight costs nothing. The type that tensors get by
    default is this mode's: torch's own default is the whole process's.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self._dtype = dtype
        self.doubtful: str | None = None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if getattr(func, "__module__", None) == "torch.nn.init":
            tensor = args[0] if args else kwargs.get("tensor")
            if isinstance(tensor, torch.Tensor) and tensor.is_meta:
                return tensor
        # transformers asks with an empty tensor whether it builds on meta, where it initialises nothing
        asks = func is torch.tensor and len(args) == 1 and args[0] == []
        if (func in _VALUELESS or asks) and kwargs.get("device") is None:
            kwargs["device"] = "meta"
        made = func(*args, **kwargs)
        if self._dtype == torch.float32 or not isinstance(made, torch.Tensor) or made.dtype != torch.float32:
            return made
        if func in _FACTORIES or func in _OF_DATA:
            of_data = func in _OF_DATA and (hasattr(args[0], "dtype") if args else True)
            if kwargs.get("dtype") is None and not of_data and kwargs.get("out") is None:
                return func(*args, **{**kwargs, "dtype": self._dtype})
            return made
        name = getattr(func, "__name__", "")
        given = tree_leaves((args, kwargs))
        floats = any(isinstance(value, torch.Tensor) and value.is_floating_point() for value in given)
        if name not in _CONVERSIONS and kwargs.get("dtype") is None and not floats:
            self.doubtful = name  # of whole numbers and the default type: this mode cannot tell which that would be
        return made


def build(
    cls: type, config: Mapping[str, Any], stored: Mapping[str, Stored], dtype: torch.dtype, one_file: bool
) -> Skeleton:
    """Build the skeleton of a component of ``diffusers`` or ``transformers``.

    Args:
        cls: its class.
        config: its ``config.json``.
        stored: what its files hold.
        dtype: that it computes in.
        one_file: its weights are not sharded: diffusers renames old keys only then.

    Raises:
        NotExactError: the files and the module do not match exactly, so that its library has to load it.
    """
    if config.get("quantization_config") is not None:
        raise NotExactError("it is quantized")
    mode = _Building(dtype)
    try:
        with mode:
            module = _constructed(cls, config, dtype)
    except NotExactError:
        raise
    except Exception as fault:  # whatever a constructor makes of a configuration, its library says it better
        raise NotExactError(f"{cls.__name__} is not built: {fault}") from fault
    module.eval()
    if isinstance(module, ModelMixin):
        slots = _diffusers_slots(module, stored, dtype, one_file)
    else:
        slots = _transformers_slots(module, stored, dtype)
    computed = _computed(module)
    if mode.doubtful and any(b.is_floating_point() for b in computed):
        raise NotExactError(f"the type of what it computes by {mode.doubtful} is not known")
    if any(buffer.is_meta for buffer in computed):
        raise NotExactError("it has buffers that no file holds and no constructor computes")
    for part in module.modules():
        kept = [value for name, value in part.__dict__.items() if name not in ("_parameters", "_buffers", "_modules")]
        if any(isinstance(value, torch.Tensor) and value.is_meta for value in tree_leaves(kept)):
            raise NotExactError(f"{type(part).__name__} keeps a weight beside its parameters")
    _forget_values(module)
    extent = max((slot.offset + slot.bytes for slot in slots), default=0)
    held = sum(slot.bytes for slot in slots) + sum(b.numel() * b.element_size() for b in computed)
    parts = dict(module.named_modules(remove_duplicate=False))
    owners = tuple(tuple(_place(parts, target) for target in slot.targets) for slot in slots)
    if isinstance(module, ModelMixin):
        slots = tuple(
            replace(slot, turns=all(turns(module, part, leaf) for part, leaf, _ in places))
            for slot, places in zip(slots, owners, strict=True)
        )
    places = tuple((part, name) for part in module.modules() for name in part._non_persistent_buffers_set)
    return Skeleton(module, slots, -(-extent // ALIGNMENT) * ALIGNMENT, held, owners, places)


def _place(parts: Mapping[str, nn.Module], target: str) -> tuple[nn.Module, str, bool]:
    parent, _, leaf = target.rpartition(".")
    return parts[parent], leaf, leaf in parts[parent]._parameters


def _constructed(cls: Any, config: Mapping[str, Any], dtype: torch.dtype) -> nn.Module:
    if issubclass(cls, ModelMixin):
        return cls.from_config(dict(config))
    settings, unused = cls.config_class.from_dict(dict(config), return_unused_kwargs=True)
    if unused or getattr(settings, "fusion_config", None) or getattr(type(settings), "extra_files", None):
        raise NotExactError("its configuration asks for something special")
    if getattr(settings, "transformers_weights", None) is not None:
        raise NotExactError("its configuration names its weight file")
    settings.dtype = dtype
    for name in settings.sub_configs:
        if (below := getattr(settings, name, None)) is not None:
            below.dtype = dtype
    module = cls(settings)
    if module.can_generate():
        raise NotExactError("it has settings for generation")
    return module


def _computed(module: nn.Module) -> list[torch.Tensor]:
    """Buffers that no file holds."""
    seen = {
        id(buffer): buffer
        for part in module.modules()
        for name, buffer in part._buffers.items()
        if buffer is not None and name in part._non_persistent_buffers_set
    }
    return list(seen.values())


def _forget_values(module: nn.Module) -> None:
    """Whatever constructors made of weights other than on ``meta``."""
    blank: dict[int, torch.Tensor] = {}
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None:
                empty = torch.empty_like(parameter, device="meta")
                part._parameters[name] = blank.setdefault(id(parameter), nn.Parameter(empty, requires_grad=False))
        for name, buffer in part._buffers.items():
            if buffer is not None and name not in part._non_persistent_buffers_set:
                part._buffers[name] = blank.setdefault(id(buffer), torch.empty_like(buffer, device="meta"))


# --- which stored tensor goes where ---


def _diffusers_slots(module: Any, stored: Mapping[str, Stored], dtype: torch.dtype, one_file: bool) -> tuple[Slot, ...]:
    names = {name: name for name in stored}
    if one_file:
        module._fix_state_dict_keys_on_load(names)  # keys of old attention blocks
    ignored = module._keys_to_ignore_on_load_unexpected or []
    kept = module._keep_in_fp32_modules or []

    def held_in(name: str, _: torch.Tensor) -> torch.dtype:
        return torch.float32 if any(part in name.split(".") for part in kept) else dtype

    pairs = {source: target for target, source in names.items()}
    return _matched(module, stored, pairs, ignored, held_in)


def _transformers_slots(module: Any, stored: Mapping[str, Stored], dtype: torch.dtype) -> tuple[Slot, ...]:
    transforms = get_model_conversion_mapping(module)
    renamings = [entry for entry in transforms if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in transforms if isinstance(entry, WeightConverter)]
    state = module.state_dict()
    pairs = {}
    for source in stored:
        target, converter = rename_source_key(source, renamings, converters, module.base_model_prefix, state)
        if target not in state and source in state:
            target, converter = rename_source_key(source, [], [], module.base_model_prefix, state)
        if converter is not None:
            raise NotExactError(f"{source} is converted when it is read")
        pairs[source] = target
    module._weight_conversions = [entry for entry in transforms if entry.was_used()]
    buffers = [name for name, _ in module.named_buffers()]
    ignored = list(module._keys_to_ignore_on_load_unexpected or [])
    ignored += [r"rotary_emb\.inv_freq"] if any(name.endswith("rotary_emb.inv_freq") for name in buffers) else []
    ignored += [r"(^|\.)position_ids$"] if any(name.endswith("position_ids") for name in buffers) else []
    plan = module._get_dtype_plan(dtype)
    pattern, groups, _ = build_glob_alternation(list(plan)) if plan else (None, {}, {})

    def held_in(name: str, tensor: torch.Tensor) -> torch.dtype:
        found = pattern.search(name) if pattern else None
        return plan[groups[found.lastgroup]] if found else tensor.dtype

    return _matched(module, stored, pairs, ignored, held_in)


def _matched(
    module: nn.Module, stored: Mapping[str, Stored], pairs: Mapping[str, str], ignored: Any, held_in: Any
) -> tuple[Slot, ...]:
    """A slot for each tensor of the module, or an error when one is missing, left over, or differs.

    Args:
        module: just built.
        stored: what the files hold.
        pairs: name in the module by name in the files.
        ignored: patterns of names that may be left over.
        held_in: says the dtype in memory of (name in the module, tensor there).
    """
    state = module.state_dict(keep_vars=True)
    names: dict[int, list[str]] = defaultdict(list)
    for name, tensor in state.items():
        if not isinstance(tensor, torch.Tensor):
            raise NotExactError(f"{name} is not a tensor")
        names[id(tensor)].append(name)
    sources: dict[int, str] = {}
    for source, target in pairs.items():
        if target in state:
            if sources.setdefault(id(state[target]), source) != source:
                raise NotExactError(f"{target} is stored more than once")
        elif not any(re.search(pattern, target) for pattern in ignored):
            raise NotExactError(f"{target} is not in the module")
    slots: list[Slot] = []
    offset = 0
    for number, targets in sorted(names.items(), key=lambda item: item[1]):
        tensor, stored_as = state[targets[0]], sources.get(number)
        if stored_as is None:
            raise NotExactError(f"{targets[0]} is not in the files")
        entry = stored[stored_as]
        dtype = held_in(targets[0], tensor) if tensor.is_floating_point() else tensor.dtype
        if tuple(tensor.shape) != entry.shape:
            raise NotExactError(f"{stored_as} has the shape {entry.shape} instead of {tuple(tensor.shape)}")
        if entry.dtype != dtype and (entry.dtype not in _FLOATS or dtype not in _FLOATS):
            raise NotExactError(f"{stored_as} is {entry.dtype}, which is not read as {dtype}")
        slot = Slot(stored_as, tuple(targets), entry.shape, dtype, offset)
        slots.append(slot)
        offset += -(-slot.bytes // ALIGNMENT) * ALIGNMENT
    if len({name for name, _ in module.named_parameters(remove_duplicate=False)} - set(state)):
        raise NotExactError("it has parameters outside its state")
    return tuple(slots)


# --- modules of it ---


def fill(skeleton: Skeleton, tensors: Mapping[str, torch.Tensor], device: torch.device) -> nn.Module:
    """A module of the skeleton's architecture over given weights.

    Args:
        skeleton: the architecture.
        tensors: by the first name of each slot, on the device.
        device: for the buffers that no file holds.
    """
    memo: dict[int, Any] = {}
    module = clone_with(skeleton.module, memo)
    for slot, owners in zip(skeleton.slots, skeleton.owners, strict=True):
        tensor = tensors[slot.targets[0]]
        parameter = nn.Parameter(tensor, requires_grad=False) if any(owner[2] for owner in owners) else None
        buffer = tensor.detach()  # another object: one that the host keeps would be given other memory with the module
        for part, leaf, is_parameter in owners:
            if is_parameter:
                memo[id(part)]._parameters[leaf] = parameter
            else:
                memo[id(part)]._buffers[leaf] = buffer
    moved: dict[int, torch.Tensor] = {}
    for part, name in skeleton.computed:
        if (buffer := part._buffers.get(name)) is not None:
            if id(buffer) not in moved:
                moved[id(buffer)] = buffer.to(device, copy=True)
            memo[id(part)]._buffers[name] = moved[id(buffer)]
    keep_text_model(module)
    return module


def held(module: nn.Module, skeleton: Skeleton) -> dict[str, torch.Tensor]:
    """The tensors of a module of the skeleton's architecture, by the first name of each slot."""
    parts = dict(module.named_modules(remove_duplicate=False))
    found = {}
    for slot in skeleton.slots:
        parent, _, leaf = slot.targets[0].rpartition(".")
        part = parts[parent]
        tensor = part._parameters.get(leaf)
        found[slot.targets[0]] = tensor if tensor is not None else part._buffers[leaf]
    return found
