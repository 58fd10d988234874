"""Brings a model's parts from disk to host memory and from there onto the device, and puts a model together."""

from __future__ import annotations

import contextlib
import copy
import logging
import weakref
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import diffusers
import torch
from torch import nn

from api.engine import skeletons, upscalers
from api.engine.buffers import Spare, buffer
from api.engine.common_host import HostTier, name_of, read_common
from api.engine.device import Device
from api.engine.faults import as_broken, naming
from api.engine.headers import Header, file_identity, read_header
from api.engine.layout import mark, turn, turned
from api.engine.library import Weightless, load_module
from api.engine.offload import Offloading
from api.engine.owning import own, shared_unless_changed
from api.engine.parts import HostPart, PartSpec
from api.engine.plans import Plans
from api.engine.quantization import RULE, Rule
from api.engine.quantized_layers import has_quantized
from api.engine.quantized_skeletons import Quantized, fill_quantized
from api.engine.reading import BufferPart, can_map, copied, read
from api.engine.skeletons import Skeleton
from api.engine.specs import (
    components,
    variant_in,
)
from api.engine.spent import spending
from api.engine.tokenizers import taking_turns
from api.errors import ApiError
from api.schema.generation import ModelRef

log = logging.getLogger("api.engine")


class LoadedModel:
    """A model in memory: the parts that every pipeline over it shares.

    Attributes:
        ref: what was loaded.
        dtype: what it computes in.
        components: by name, as diffusers calls them.
        config: arguments of its pipeline class that are no components.
        bytes: of all parameters and buffers.
        quantized: the names of the components that have quantized layers.
        schedulers: by class name, with the model's settings, never run: jobs get copies.
        variants: modules over the same weights with something switched, such as the attention, by its name.
        latent_maps: what makes previews of latents, by the autoencoder's name; None where that cannot be.
    """

    def __init__(
        self,
        ref: ModelRef,
        dtype: torch.dtype,
        pipe: diffusers.DiffusionPipeline,
        additions: Mapping[str, nn.Module] = MappingProxyType({}),
    ) -> None:
        self.ref = ref
        self.dtype = dtype
        self.components: dict[str, Any] = {**taking_turns(pipe.components), **additions}
        self.config = {k: v for k, v in pipe.config.items() if k not in self.components and not k.startswith("_")}
        self.schedulers: dict[str, Any] = {}
        self.variants: dict[str, dict[str, Any]] = {}
        self.latent_maps: dict[str, Any] = {}
        modules = {name: part for name, part in self.components.items() if isinstance(part, nn.Module)}
        self.quantized = [name for name, part in modules.items() if ref.quantize and has_quantized(part)]
        self.bytes = sum(module_bytes(part) for part in self.components.values() if isinstance(part, nn.Module))


def module_bytes(module: nn.Module) -> int:
    """Of a module's parameters and buffers, each counted once."""
    seen: dict[int, torch.Tensor] = {}
    for part in module.modules():
        for tensor in (*part._parameters.values(), *part._buffers.values()):
            if tensor is not None:
                seen[id(tensor)] = tensor
    return sum(tensor.numel() * tensor.element_size() for tensor in seen.values())


class PartLoader:
    """The ``Loader`` of one device. Its methods may be called from several threads, ``place`` from the device's.

    Args:
        device: where modules are placed.
        host_limit: bytes of the host's memory that parts may take: what one has left is kept for the next within it.
        rule: what is quantized where a model is to be.
        tier: the host's memory that workers share: they have room there for what is read. None: it is this one's.
    """

    def __init__(self, device: Device, host_limit: int = 0, tier: HostTier | None = None, rule: Rule = RULE) -> None:
        self._device = device
        self._tier = tier
        self._spare = Spare(host_limit)
        self._weightless = Weightless()
        self._plans = Plans(device, rule)
        # one buffer under each module that was copied to the device
        self._flats: weakref.WeakKeyDictionary[nn.Module, torch.Tensor] = weakref.WeakKeyDictionary()
        self._stream = torch.cuda.Stream(device.torch) if device.is_cuda else None
        self.offloading = Offloading(device, self._plans.skeleton)

    def parts(self, ref: ModelRef) -> Sequence[PartSpec]:
        """The parts of a model, without reading a weight.

        Raises:
            ApiError: MODEL_BROKEN.
        """
        with spending("build"), naming(ref):
            return self._plans.parts(ref)

    # --- from disk to host ---

    def release(self) -> None:
        """Give back the memory that is kept for parts to come."""
        if self._tier:
            self._tier.clear()
        self._spare.clear()

    def read(self, spec: PartSpec) -> HostPart:
        """Read a part from disk into host memory; in any thread unless ``spec.by_library``.

        Raises:
            ApiError: MODEL_BROKEN, also when the files are not those any more that the part's key was made of.
            MemoryError: there is no room.
        """
        with spending("read"):
            _check_unchanged(spec)
            host = self._read_common(spec) if self._tier else self._read(spec)
            _check_unchanged(spec)
            return host

    def named(self, spec: PartSpec) -> str:
        """What a part is called in the host tier; see ``common_host.name_of``."""
        own = _makes_module(spec)
        return name_of(spec, own=own, mapped=not own and self._is_mapped(spec))

    def _is_mapped(self, spec: PartSpec) -> bool:
        skeleton = self._plans.skeleton(spec)
        if not self._device.shares_host or isinstance(skeleton, Quantized):
            return False
        with as_broken(spec.folder):
            return can_map([read_header(path) for path in spec.files], skeleton.slots)

    def _read_common(self, spec: PartSpec) -> HostPart:
        """The same where workers share the host's memory, and there is room for this part."""
        assert self._tier is not None
        name = self.named(spec)
        skeleton = None if _makes_module(spec) or self._is_mapped(spec) else self._plans.skeleton(spec)
        try:
            if skeleton is None or not skeleton.extent:
                host = self._read(spec)
                weakref.finalize(host, self._tier.release, name).atexit = False
                return host
            with as_broken(spec.folder):
                headers = [read_header(path) for path in spec.files]

                def fill(flat: torch.Tensor) -> None:
                    _fill(headers, skeleton, flat)
                    _check_unchanged(spec)

                pin = self._device.is_cuda
                return read_common(self._tier, name, skeleton.slots, skeleton.extent, fill, pin=pin)
        except BaseException:
            self._tier.release(name)
            raise

    def _read(self, spec: PartSpec) -> HostPart:
        if spec.library == upscalers.LIBRARY:
            with as_broken(spec.folder):
                module = upscalers.load(spec)
            part = HostPart({}, module_bytes(module), module)
            self._spare.count(part, part.bytes)
            return part
        if spec.by_library:
            with as_broken(spec.folder):
                module = load_module(
                    spec.folder.parent,
                    spec.folder.name,
                    spec.library,
                    spec.class_name,
                    spec.dtype,
                    variant_in(spec.files),
                )
            part = HostPart({}, module_bytes(module), module)
            self._spare.count(part, part.bytes)
            return part
        skeleton = self._plans.skeleton(spec)
        shares, pin = self._device.shares_host, self._device.is_cuda
        with as_broken(spec.folder):
            headers = [read_header(path) for path in spec.files]
            if isinstance(skeleton, Quantized):
                flat = buffer(skeleton.extent, pin, self._spare)
                return _fill(headers, skeleton, flat)
            return read(headers, skeleton.slots, skeleton.extent, shares=shares, pin=pin, spare=self._spare)

    # --- from host to device ---

    def vacate(self, spec: PartSpec, onto: nn.Module) -> None:
        """Let go of the host's memory under a module that is to be taken over.

        Args:
            spec: the part that comes.
            onto: a module of the same architecture that nobody uses any more.
        """
        if self._device.shares_host:
            for tensor in skeletons.held(onto, self._plans.skeleton(spec)).values():
                tensor.data = tensor.data.new_empty(0)

    def place(self, spec: PartSpec, host: HostPart, onto: nn.Module | None) -> nn.Module:
        """Make a part's module on the device, on the device's thread.

        Args:
            spec: which part.
            host: its weights.
            onto: a module of the same architecture that nobody uses any more: it takes over its storage.

        Raises:
            torch.OutOfMemoryError: there is no room on the device.
        """
        if host.module is not None:
            with spending("copy"):
                return self._moved(host.module)
        skeleton = self._plans.skeleton(spec)
        if onto is not None:
            with spending("copy"):
                self._take_over(onto, skeleton, host)
            return onto
        if self._device.shares_host:
            with spending("build"):
                return skeletons.fill(skeleton, host.tensors, self._device.torch)
        return self._copied(skeleton, host)

    def _copied(self, skeleton: Skeleton, host: HostPart) -> nn.Module:
        with spending("copy"):
            flat = torch.empty(skeleton.extent, dtype=torch.uint8, device=self._device.torch)
            turning = [slot.turns and self._device.turns(slot.dtype) for slot in skeleton.slots]
            tensors = {
                slot.targets[0]: turned(slot.of(flat)) if turns else slot.of(flat)
                for slot, turns in zip(skeleton.slots, turning, strict=True)
            }
        with self._copying():
            with spending("copy"):
                _copy(skeleton, host, flat, tensors)
            with spending("build"):  # while the bytes are on their way
                module = skeletons.fill(skeleton, tensors, self._device.torch)
            with spending("copy"):
                self._wait()
        self._flats[module] = flat
        if any(turning):
            mark(module)
        return module

    def _take_over(self, onto: nn.Module, skeleton: Skeleton, host: HostPart) -> None:
        """Other weights for a module. Its storage stays where it is, unless the host's own memory is used."""
        tensors = skeletons.held(onto, skeleton)
        if self._device.shares_host:
            for name, tensor in tensors.items():
                tensor.data = host.tensors[name]
            return
        flat = self._flats.get(onto)
        if flat is not None and any(
            tensors[slot.targets[0]].data_ptr() != flat.data_ptr() + slot.offset for slot in skeleton.slots
        ):
            flat = None  # somebody gave it other storage since
        with self._copying(), torch.no_grad():
            _copy(skeleton, host, flat, tensors)
            self._wait()

    @contextlib.contextmanager
    def _copying(self) -> Iterator[None]:
        """Copies go on a stream of their own, after what the device was told before."""
        if self._stream is None:
            yield
            return
        self._stream.wait_stream(torch.cuda.current_stream(self._device.torch))
        with torch.cuda.stream(self._stream):
            yield

    def _wait(self) -> None:
        if self._stream is not None:
            self._stream.synchronize()

    def _moved(self, module: nn.Module) -> nn.Module:
        if self._device.shares_host:
            return module
        memo: dict[int, Any] = {}
        for tensor in (*module.parameters(), *module.buffers()):
            there = tensor.detach().to(self._device.torch, copy=True)
            memo[id(tensor)] = nn.Parameter(there, False) if isinstance(tensor, nn.Parameter) else there
        return copy.deepcopy(module, memo)

    # --- a whole model ---

    def assemble(self, ref: ModelRef, modules: Mapping[str, nn.Module]) -> Any:
        """A model from its parts and from what has no weights: tokenizers, scheduler, configuration.

        Args:
            ref: which model.
            modules: by the name of the component.

        Raises:
            ApiError: MODEL_BROKEN.
        """
        folder = Path(ref.folder)
        if ref.is_upscaler:
            return upscalers.assemble(ref, modules)
        with spending("build"), naming(ref):
            rest = [part for part in components(folder) if not part.has_weights]
            others = {part.name: modules[part.name] for part in ref.additions}
            own_modules = {name: module for name, module in modules.items() if name not in others}
            named = {part.name for part in components(folder)}
            replacing = {name: module for name, module in others.items() if name in named}
            shared = {**own_modules, **replacing, **{part.name: self._weightless.get(part) for part in rest}}
            given = {name: own(part) for name, part in shared.items()}  # constructors write to what they are given
            pipe = diffusers.DiffusionPipeline.from_pretrained(
                ref.folder, **given, local_files_only=True, trust_remote_code=False
            )
            model = LoadedModel(ref, self._device.dtype(ref.precision), pipe, others)
            for name, module in own_modules.items():
                if model.components.get(name) is given[name]:
                    model.components[name] = shared_unless_changed(given[name], module)
            return model


def _makes_module(spec: PartSpec) -> bool:
    """Whether a library makes the module of a part, so that it is nothing but that."""
    return spec.by_library or spec.library == upscalers.LIBRARY


def _fill(headers: Sequence[Header], skeleton: Skeleton, flat: torch.Tensor) -> BufferPart:
    """Read a part into a buffer of its own extent."""
    if isinstance(skeleton, Quantized):
        fill_quantized(headers, skeleton, flat)
        return BufferPart({slot.targets[0]: slot.of(flat) for slot in skeleton.slots}, skeleton.extent, flat=flat)
    return copied(headers, skeleton.slots, flat, skeleton.extent)


def _check_unchanged(spec: PartSpec) -> None:
    """Other weights are never read under the key of those that were there: models that share the part have it too."""
    if spec.identities == tuple(map(file_identity, spec.files)):
        return
    name = "/".join(spec.folder.parts[-2:])
    raise ApiError("MODEL_BROKEN", f"The files of {name} were changed while they were used. Send the request again.")


def _copy(skeleton: Skeleton, host: HostPart, flat: torch.Tensor | None, tensors: Mapping[str, torch.Tensor]) -> None:
    source = host.flat if isinstance(host, BufferPart) else None
    if flat is not None and source is not None:
        flat.copy_(source, non_blocking=True)
        for tensor in tensors.values():
            turn(tensor)
        return
    for slot in skeleton.slots:
        tensors[slot.targets[0]].copy_(host.tensors[slot.targets[0]], non_blocking=True)


_loaders: weakref.WeakKeyDictionary[Device, PartLoader] = weakref.WeakKeyDictionary()


def loader_of(device: Device) -> PartLoader:
    """The loader of a device, with all that it has built for it."""
    loader = _loaders.get(device)
    if loader is None:
        loader = _loaders.setdefault(device, PartLoader(device))
    return loader


def load(ref: ModelRef, device: Device) -> LoadedModel:
    """Load a model from its folder. Safetensors only; nothing is unpickled or downloaded.

    What our own reader does not know is loaded by its library, which patches torch process-wide while it runs: no other
    work may go on meanwhile.

    Raises:
        ApiError: MODEL_BROKEN; OUT_OF_MEMORY is left to the caller as torch raises it.
    """
    loader = loader_of(device)
    with naming(ref):
        modules = {spec.name: loader.place(spec, loader.read(spec), None) for spec in loader.parts(ref)}
    model: LoadedModel = loader.assemble(ref, modules)
    return model
