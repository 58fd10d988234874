"""LoRAs and textual inversions, for the jobs that ask for them and for no others.

A job with adapters gets clones of the modules that these change: trees of their own over the same weights, whose layers
add what the adapters say. Jobs with the same adapters at the same scales get the same clones, so that their calls are
merged; a module that no adapter of theirs changes is the shared one, and merged with everybody's.

The clones belong to the loaded model and leave with it. What adapters themselves take on the device is bounded: the
sets that were not used for longest are forgotten, and all of them when memory is short.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from api.engine.cloning import clone
from api.engine.community import class_of
from api.engine.inversions import Vectors, put_rows, read_inversions, tokenizer_of, with_tokens
from api.engine.loader import LoadedModel
from api.engine.lora_files import Layer, read_lora
from api.engine.quantized_layers import computes_in
from api.errors import ApiError
from api.schema.generation import GenerationRequest, Lora

MOST_SETS = 32
"""Sets of adapters that are kept, whatever they take: a clone of a large UNet is some megabytes of Python objects."""

_ATTENTION = ("cross_attention_kwargs", "joint_attention_kwargs", "attention_kwargs")
"""Arguments of pipelines in which ``scale`` is that of all LoRAs."""
_LORAS, _FILES = "_adapter_layers", "_adapter_files"
_SHOWN = 5
"""Names of unused tensors that are told."""


@dataclass(eq=False)
class _Loaded:
    """A LoRA on the device. In memory as long as a clone uses it."""

    layers: dict[str, dict[str, Layer]]
    unused: tuple[str, ...]
    bytes: int


class Adapters:
    """The adapters in one worker's memory.

    Args:
        device: where they are placed.
        limit: bytes of it that they may take, beyond those of running jobs.
    """

    def __init__(self, device: torch.device, limit: int) -> None:
        self._device = device
        self._limit = limit
        self._building = threading.Lock()
        self._lock = threading.Lock()
        self._loaded: weakref.WeakValueDictionary[Any, _Loaded] = weakref.WeakValueDictionary()
        self._modules: weakref.WeakValueDictionary[Any, nn.Module] = weakref.WeakValueDictionary()
        self._sets: OrderedDict[tuple[weakref.ref[LoadedModel], str], None] = OrderedDict()

    @property
    def bytes(self) -> int:
        """What LoRAs take on the device, those of running jobs included."""
        return sum(lora.bytes for lora in list(self._loaded.values()))

    def applied(
        self, model: LoadedModel, components: dict[str, Any], attention: str, request: GenerationRequest
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """A model's components as a request's adapters change them, and what is to be told of these.

        Args:
            model: that the components are of; it keeps what is made for it.
            components: with the attention, the placement and the IP-Adapters of the job. They are not changed.
            attention: its name.
            request: names the adapters.

        Raises:
            ApiError: NOT_SUPPORTED, INVALID_ADAPTER, INVALID_INPUTS.
        """
        factor = attention_scale(request.inputs)
        loras = [(lora, lora.scale * factor) for lora in request.loras if lora.scale * factor]
        if not loras and not request.inversions:
            return components, {}
        what = [
            request.pipeline,
            request.code.sha256 if request.code else "",
            [(lora.sha256, scale) for lora, scale in loras],
            [(inversion.sha256, inversion.token) for inversion in request.inversions],
            looking(request),
        ]
        name = f"adapters/{attention}/{_digest(what)}"
        own = model.variants.get(name)
        if own is None:
            with self._building:  # one at a time: what two jobs need is made once, and merges their calls
                own = model.variants.get(name) or self._made(model, components, attention, request, loras)
                model.variants[name] = own
        self._use(model, name)
        return {**components, **own["components"]}, own["told"]

    def clear(self) -> bool:
        """Forget what no running job uses; whether there was anything."""
        with self._lock:
            there = bool(self._sets)
            while self._sets:
                self._forget_oldest()
        return there

    def _use(self, model: LoadedModel, name: str) -> None:
        with self._lock:
            key = weakref.ref(model), name
            self._sets[key] = None
            self._sets.move_to_end(key)
            while len(self._sets) > 1 and (len(self._sets) > MOST_SETS or self.bytes > self._limit):
                self._forget_oldest()

    def _forget_oldest(self) -> None:
        (reference, name), _ = self._sets.popitem(last=False)
        if (model := reference()) is not None:
            model.variants.pop(name, None)

    def _made(
        self,
        model: LoadedModel,
        components: dict[str, Any],
        attention: str,
        request: GenerationRequest,
        loras: Sequence[tuple[Lora, float]],
    ) -> dict[str, Any]:
        pipeline = class_of(request)
        loaded = [(self._load(model, pipeline, components, lora), lora, scale) for lora, scale in loras]
        vectors = read_inversions(request.inversions, pipeline, components)
        changed = {name for lora, _, _ in loaded for name in lora.layers} | set(vectors)
        own = {}
        for name in sorted(changed):
            mine = [(lora.layers[name], which.sha256, scale) for lora, which, scale in loaded if name in lora.layers]
            words = [(i.sha256, i.token) for i in request.inversions] if name in vectors else []
            scales = tuple((sha256, scale) for _, sha256, scale in mine)
            base = looking(request) if name == "unet" else ()
            # not by its id: another model may have that one while what was made for this one is still there
            key = (weakref.ref(model), attention, name, base, scales, tuple(words))
            module = self._modules.get(key)
            if module is None:
                module = self._changed(components, name, [(a, c) for a, _, c in mine], vectors)
                vars(module)[_FILES] = [lora for lora, _, _ in loaded if name in lora.layers]
                self._modules[key] = module
            own[name] = module
            if name in vectors:
                tokenizer = tokenizer_of(name)
                own[tokenizer] = with_tokens(components[tokenizer], vectors[name][0])
        unused = {lora.name: file.unused for file, lora, _ in loaded if file.unused}
        told = {name: {"count": len(keys), "first": list(keys[:_SHOWN])} for name, keys in unused.items()}
        return {"components": own, "told": {"unused_adapter_keys": told} if told else {}}

    def _load(self, model: LoadedModel, pipeline: type, components: dict[str, Any], lora: Lora) -> _Loaded:
        key = (weakref.ref(model), pipeline, lora.sha256)
        loaded = self._loaded.get(key)
        if loaded is None:
            file = read_lora(lora, pipeline, components)
            layers = {
                name: {at: self._placed(layer, components[name].get_submodule(at)) for at, layer in found.items()}
                for name, found in file.layers.items()
            }
            size = sum(_bytes(layer) for found in layers.values() for layer in found.values())
            loaded = self._loaded[key] = _Loaded(layers, file.unused, size)
        return loaded

    def _placed(self, layer: Layer, target: nn.Module) -> Layer:
        dtype = computes_in(target)

        def moved(tensor: torch.Tensor) -> torch.Tensor:
            return tensor.to(self._device, dtype, copy=True)

        bias = None if layer.bias is None else moved(layer.bias)
        return Layer(moved(layer.down), moved(layer.up), bias, layer.alpha, layer.divisor)

    def _changed(
        self, components: dict[str, Any], name: str, loras: Sequence[tuple[dict[str, Layer], float]], vectors: Vectors
    ) -> nn.Module:
        """A clone of a component with LoRAs and new words."""
        own = clone(components[name])
        for at in dict.fromkeys(at for layers, _ in loras for at in layers):
            add_layers(own.get_submodule(at), [(layers[at], scale) for layers, scale in loras if at in layers])
        if name in vectors:
            _, rows = vectors[name]
            first = len(components[tokenizer_of(name)])
            table = own.get_input_embeddings().weight
            put_rows(own, first, rows.to(self._device, table.dtype))
        return own


def looking(request: GenerationRequest) -> tuple[tuple[str, str, float], ...]:
    """What the UNet looks at pictures through: with IP-Adapters it is another one, which is cloned."""
    return tuple((adapter.file, adapter.revision, adapter.scale) for adapter in request.ip_adapters)


def attention_scale(inputs: dict[str, Any]) -> float:
    """What ``cross_attention_kwargs`` and its like multiply the scales of all LoRAs with.

    Raises:
        ApiError: INVALID_INPUTS.
    """
    for name in _ATTENTION:
        given = inputs.get(name)
        if isinstance(given, dict) and "scale" in given:
            scale = given["scale"]
            if not isinstance(scale, int | float) or isinstance(scale, bool) or not math.isfinite(scale):
                field = f"modelInputs.{name}.scale"
                raise ApiError("INVALID_INPUTS", "Must be a number.", field=field, requested=scale)
            return float(scale)
    return 1.0


def without_scale(inputs: dict[str, Any]) -> dict[str, Any]:
    """The inputs for the pipeline, which would look for PEFT's layers in every module to scale them."""
    own = dict(inputs)
    for name in _ATTENTION:
        if isinstance(given := own.get(name), dict) and "scale" in given:
            own[name] = {key: value for key, value in given.items() if key != "scale"}
            if not own[name]:
                del own[name]
    return own


def add_layers(module: nn.Module, layers: Sequence[tuple[Layer, float]]) -> None:
    """Have a linear layer or a convolution, of a clone, add what LoRAs say.

    By a class over the module's own, as offloading does it: its weights stay where they are, or come for the call.
    """
    vars(module)[_LORAS] = tuple((layer, layer.factor(scale)) for layer, scale in layers)
    module.__class__ = _class_with_layers(type(module))  # type: ignore[arg-type]


@functools.cache
def _class_with_layers(cls: type[nn.Module]) -> type[nn.Module]:
    forward = cls.forward
    added: Callable[..., torch.Tensor] = _convolved if issubclass(cls, nn.Conv2d) else _linear

    @functools.wraps(forward)
    def call(self: nn.Module, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        out: torch.Tensor = forward(self, x, *args, **kwargs)
        for layer, factor in vars(self)[_LORAS]:
            out = out + added(self, layer, x.to(layer.down.dtype)) * factor
        return out

    return type(cls.__name__, (cls,), {"__module__": cls.__module__, "__qualname__": cls.__qualname__, "forward": call})


def _linear(module: nn.Module, layer: Layer, x: torch.Tensor) -> torch.Tensor:
    return F.linear(F.linear(x, layer.down), layer.up, layer.bias)


def _convolved(module: nn.Module, layer: Layer, x: torch.Tensor) -> torch.Tensor:
    down = F.conv2d(x, layer.down, None, module.stride, module.padding, module.dilation, module.groups)
    return F.conv2d(down, layer.up, layer.bias)


def _bytes(layer: Layer) -> int:
    tensors = [part for part in (layer.down, layer.up, layer.bias) if part is not None]
    return sum(part.numel() * part.element_size() for part in tensors)


def _digest(what: Any) -> str:
    return hashlib.sha256(json.dumps(what).encode()).hexdigest()[:16]
