"""Upscalers as models: what a file of weights is, what it takes, and its module. Architectures are spandrel's."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn

from api.engine.device import shortage
from api.engine.headers import Header, file_identity, read_header
from api.engine.parts import PartSpec
from api.engine.spandrel_import import import_spandrel
from api.engine.specs import weights_identity
from api.errors import ApiError
from api.schema.generation import ModelRef

LIBRARY = "spandrel"
NAME = "upscaler"
"""What its one part is called."""
FIELD = "callInputs.upscale.model"
_CHANNELS = ((1, 1), (3, 3))
"""Of pictures that go in and come out: grey, or red, green and blue."""


@dataclass(frozen=True)
class Kind:
    """What a file of weights is.

    Attributes:
        architecture: spandrel's name for it.
        scale: how many times wider and higher its pictures become.
        channels: of its pictures: 1, or 3.
        dtypes: that it can compute in, beside float32.
        requirements: on the size of what it is given (spandrel's ``SizeRequirements``).
        tiles: a picture may be given to it in pieces.
        call: (module, picture) → picture, of an architecture that is not simply called; else None.
        floats: how many numbers it holds that are cast to what it computes in.
        others: bytes of what is not.
    """

    architecture: str
    scale: int
    channels: int
    dtypes: frozenset[torch.dtype]
    requirements: Any
    tiles: bool
    call: Callable[[nn.Module, torch.Tensor], torch.Tensor] | None
    floats: int
    others: int

    def dtype(self, wanted: torch.dtype) -> torch.dtype:
        """What it computes in where something is wanted."""
        return wanted if wanted in self.dtypes else torch.float32


@dataclass(frozen=True)
class Upscaler:
    """An upscaler in memory.

    Attributes:
        ref: what was loaded.
        module: on the device.
        kind: what it is.
        dtype: what it computes in.
        bytes: of its parameters and buffers.
    """

    ref: ModelRef
    module: nn.Module
    kind: Kind
    dtype: torch.dtype
    bytes: int


def kind_of(path: Path) -> Kind:
    """What a file is, from its header where that says enough; kept until the file changes.

    Raises:
        ApiError: MODEL_BROKEN, INVALID_UPSCALER; NOT_SUPPORTED: spandrel is not installed.
    """
    return _kind_of(path, file_identity(path))


@functools.lru_cache(maxsize=64)
def _kind_of(path: Path, identity: tuple[str, int, int, int]) -> Kind:
    header = read_header(path)
    try:
        import_spandrel()
    except ImportError as fault:
        message = (
            "spandrel is not installed here, which runs upscalers: pip install --no-deps -r requirements-nodeps.lock."
        )
        raise ApiError("NOT_SUPPORTED", message, field=FIELD, requested=path.name) from fault
    try:
        with torch.device("meta"):
            found = _described(_weightless(header), path)
    except ApiError:
        raise
    except Exception:  # a few look at values, or compute with them while they are built
        found = _described(load_file(path), path)
    if not isinstance(found, import_spandrel().ImageModelDescriptor):
        raise _invalid(path, f"{found.architecture.name} fills holes in pictures; it makes none larger")
    if found.purpose == "FaceSR":
        raise _invalid(path, f"{found.architecture.name} restores faces that were cut out and aligned before")
    channels = found.input_channels, found.output_channels
    if channels not in _CHANNELS:
        raise _invalid(path, f"it makes pictures of {channels[1]} channels of such of {channels[0]}")
    tensors = [*found.model.parameters(), *found.model.buffers()]
    floats = [tensor for tensor in tensors if tensor.is_floating_point()]
    halves = {torch.float16: found.supports_half, torch.bfloat16: found.supports_bfloat16}
    is_plain = found._call_fn.__qualname__.startswith("ImageModelDescriptor.")
    return Kind(
        architecture=str(found.architecture.id),
        scale=int(found.scale),
        channels=channels[0],
        dtypes=frozenset(dtype for dtype, can in halves.items() if can),
        requirements=found.size_requirements,
        tiles=found.tiling.name == "SUPPORTED",
        call=None if is_plain else found._call_fn,
        floats=sum(tensor.numel() for tensor in floats),
        others=sum(t.numel() * t.element_size() for t in tensors if not t.is_floating_point()),
    )


def spec_of(ref: ModelRef, wanted: torch.dtype) -> PartSpec:
    """An upscaler as the tiers see it, without a weight being read where that can be.

    Args:
        ref: of an upscaler.
        wanted: what is computed in, where the upscaler can.

    Raises:
        ApiError: MODEL_BROKEN, INVALID_UPSCALER.
    """
    path = Path(ref.folder)
    identity = file_identity(path)  # before the content is looked at: what changes later is seen
    kind = kind_of(path)
    dtype = kind.dtype(wanted)
    what = [LIBRARY, kind.architecture, str(dtype), weights_identity(path.parent, (path,))]
    key = hashlib.sha256(json.dumps(what).encode()).hexdigest()
    return PartSpec(
        name=NAME,
        key=key,
        architecture=f"{LIBRARY}:{key}",  # what spandrel has built is never overwritten
        bytes=kind.floats * dtype.itemsize + kind.others,
        folder=path.parent,
        library=LIBRARY,
        class_name=kind.architecture,
        dtype=dtype,
        files=(path,),
        identities=(identity,),
    )


def load(spec: PartSpec) -> nn.Module:
    """Its module in host memory; in any thread: spandrel patches nothing.

    Raises:
        ApiError: MODEL_BROKEN, INVALID_UPSCALER.
    """
    path = spec.files[0]
    read_header(path)
    module: nn.Module = _described(load_file(path), path).model
    return module.eval().requires_grad_(False).to(spec.dtype)


def assemble(ref: ModelRef, modules: Mapping[str, nn.Module]) -> Upscaler:
    """An upscaler from its one part."""
    module = modules[NAME]
    tensors = [*module.parameters(), *module.buffers()]
    size = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    return Upscaler(ref, module, kind_of(Path(ref.folder)), next(module.parameters()).dtype, size)


def _weightless(header: Header) -> dict[str, torch.Tensor]:
    return {
        name: torch.empty(entry.shape, dtype=entry.dtype or torch.uint8, device="meta")
        for name, entry in header.tensors.items()
    }


def _described(tensors: dict[str, torch.Tensor], path: Path) -> Any:
    """spandrel's descriptor of a state dict."""
    spandrel = import_spandrel()
    try:
        return spandrel.MAIN_REGISTRY.load(tensors)
    except spandrel.UnsupportedModelError as fault:
        raise _invalid(path, "none of the architectures that spandrel knows has such weights") from fault
    except Exception as fault:
        if any(tensor.is_meta for tensor in tensors.values()) or shortage(fault):
            raise
        message = f"its weights are not complete ({type(fault).__name__}: {str(fault)[:300]})"
        raise _invalid(path, message) from fault


def _invalid(path: Path, problem: str) -> ApiError:
    # of what was installed from an address, the name of the file says nothing
    return ApiError("INVALID_UPSCALER", f"The file is no upscaler: {problem}.", field=FIELD, requested=path.name)
