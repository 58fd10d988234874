"""A model as the tiers see it: parts, each with an identity, a size and an architecture."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from api.schema.generation import ModelRef

Run = Callable[..., Any]
"""Runs a function on the device's thread; also takes ``cancelled``, which is asked while it waits."""


@dataclass(frozen=True)
class PartSpec:
    """One component with weights, as it will be in memory; read from headers and configuration alone.

    Attributes:
        name: of the component in its pipeline, e.g. ``unet``.
        key: two specs with the same key are the same weights in the same dtype, whichever model they belong to.
        architecture: two specs with the same architecture have modules that can take each other's weights.
        bytes: of its parameters and buffers in memory.
        folder: where its files lie.
        library: ``diffusers`` or ``transformers``, or another package that the model's index names.
        class_name: its class there.
        dtype: that it computes in.
        files: its weight files.
        by_library: it is not one that our own reader knows: the library loads it, which patches torch process-wide
            meanwhile, so that nothing else may run.
        identities: of the files when the key was made (``headers.file_identity``).
        quantize: what its large layers are quantized to; empty: none of them is.
    """

    name: str
    key: str
    architecture: str
    bytes: int
    folder: Path
    library: str
    class_name: str
    dtype: torch.dtype
    files: tuple[Path, ...]
    by_library: bool = False
    identities: tuple[tuple[str, int, int, int], ...] = ()
    quantize: str = ""


@dataclass
class HostPart:
    """A part's weights in host memory: immutable, whoever uses them.

    Attributes:
        tensors: by the name that the module knows them by.
        bytes: that they take.
        module: instead of tensors, what a library has loaded.
        read: they were read for this; else another worker had read them.
    """

    tensors: Mapping[str, torch.Tensor]
    bytes: int
    module: nn.Module | None = None
    read: bool = True


class Offloads(Protocol):
    """What makes models whose weights stay in the host's memory."""

    def room(self, specs: Sequence[PartSpec], mode: str) -> int:
        """Bytes that a model takes on the device, whichever of its parts runs.

        Args:
            specs: its parts.
            mode: ``model`` or ``sequential``.
        """

    def make(self, specs: Sequence[PartSpec], hosts: Mapping[str, HostPart], mode: str) -> dict[str, nn.Module]:
        """The modules of a model, by name; on the device's thread.

        Args:
            specs: its parts.
            hosts: their weights, by key.
            mode: ``model`` or ``sequential``.

        Raises:
            torch.OutOfMemoryError: there is no room on the device.
        """


class Loader(Protocol):
    """What moves weights. ``tiers`` decides what is moved when."""

    @property
    def offloading(self) -> Offloads:
        """For models that do not fit on the device as they are."""

    def parts(self, ref: ModelRef) -> Sequence[PartSpec]:
        """The parts of a model, without reading a weight.

        Raises:
            ApiError: MODEL_BROKEN.
        """

    def read(self, spec: PartSpec) -> HostPart:
        """Read a part from disk into host memory; in any thread unless ``spec.by_library``.

        Raises:
            ApiError: MODEL_BROKEN.
            MemoryError: there is no room.
        """

    def release(self) -> None:
        """Give back the memory that is kept for parts to come."""

    def vacate(self, spec: PartSpec, onto: nn.Module) -> None:
        """Let go of the host's memory under a module that is to be taken over.

        Args:
            spec: the part that comes.
            onto: a module of the same architecture that nobody uses any more.
        """

    def place(self, spec: PartSpec, host: HostPart, onto: nn.Module | None) -> nn.Module:
        """Make a part's module on the device, on the device's thread.

        Args:
            spec: which part.
            host: its weights.
            onto: a module of the same architecture that nobody uses any more: it takes over its storage.

        Raises:
            torch.OutOfMemoryError: there is no room on the device.
        """

    def assemble(self, ref: ModelRef, modules: Mapping[str, nn.Module]) -> Any:
        """A model from its parts and from what has no weights: tokenizers, scheduler, configuration.

        Args:
            ref: which model.
            modules: by the name of the component.
        """
