"""What a model consists of: its components, their classes, configurations and weight files."""

from __future__ import annotations

import functools
import hashlib
import importlib
import inspect
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import ModelMixin
from torch import nn
from transformers import PreTrainedModel

from api.engine.headers import Header, broken, file_identity, read_header
from api.models.manifest import is_safe_path, read_manifest
from api.models.parts import CONFIG, class_of
from api.schema.generation import Addition

_UNIMPORTANT = ("_name_or_path", "_diffusers_version", "transformers_version", "_commit_hash", "torch_dtype")
"""Entries of a configuration that say where a model was saved, not what it is. What it computes in is asked for."""
_SMALL = 2**20
_VARIANT = re.compile(r"\.(fp16|bf16)[.-]")


@dataclass(frozen=True)
class Component:
    """One entry of a model's index.

    Attributes:
        name: in the pipeline, e.g. ``text_encoder_2``.
        library: ``diffusers``, ``transformers``, or a module of pipelines.
        class_name: its class there.
        cls: the class, or None for one that only the library can find.
        folder: where its files are.
        pipeline: the class that it is a component of, where diffusers has it.
        home: the folder that was installed as a whole; None: the one above its own.
    """

    name: str
    library: str
    class_name: str
    cls: type | None
    folder: Path
    pipeline: type | None = None
    home: Path | None = None

    @property
    def has_weights(self) -> bool:
        """Whether it is a module."""
        if self.cls is not None:
            return issubclass(self.cls, nn.Module)
        return any(self.folder.glob("*.safetensors"))


def components(folder: Path) -> list[Component]:
    """The components that a model's pipeline takes.

    Raises:
        ApiError: MODEL_BROKEN.
    """
    index = _read_json(folder / "model_index.json")
    name = index.get("_class_name")
    pipeline = getattr(diffusers, name, None) if isinstance(name, str) else None
    pipeline = pipeline if isinstance(pipeline, type) else None
    taken = _arguments(pipeline) if pipeline else None
    found = []
    for part, value in index.items():
        if part.startswith("_") or not (isinstance(value, list) and len(value) == 2):
            continue
        library, class_name = value
        if isinstance(library, str) and isinstance(class_name, str) and (taken is None or part in taken):
            if not is_safe_path(part) or "/" in part:
                raise broken(folder / "model_index.json", f"names a component {part!r}")
            cls = _class_of(library, class_name)
            found.append(Component(part, library, class_name, cls, folder / part, pipeline))
    return found


def alone(name: str, folder: Path, home: Path | None = None) -> Component:
    """A component that was saved by itself, and says in its own configuration what it is.

    Args:
        name: that it gets in the pipeline.
        folder: where its files are.
        home: see ``Component``.

    Raises:
        ApiError: MODEL_BROKEN.
    """
    config = _read_json(folder / CONFIG)
    library = "diffusers" if "_class_name" in config else "transformers"
    class_name = class_of(config)
    return Component(name, library, class_name, _class_of(library, class_name), folder, home=home)


def added(part: Addition) -> Component:
    """The component that a request adds to its model.

    Raises:
        ApiError: MODEL_BROKEN.
    """
    home = Path(part.folder)
    return alone(part.name, home / part.part, home)


@functools.lru_cache(maxsize=256)
def _arguments(cls: type) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(cls).parameters


def _class_of(library: str, name: str) -> type | None:
    known = library in ("diffusers", "transformers")
    module = importlib.import_module(library) if known else getattr(diffusers.pipelines, library, None)
    found = getattr(module, name, None)
    return found if isinstance(found, type) else None


def configuration(component: Component) -> dict[str, Any]:
    """A component's ``config.json`` without what does not matter to its weights.

    Raises:
        ApiError: MODEL_BROKEN.
    """
    return _important(_read_json(component.folder / "config.json"))


def side_files(component: Component) -> list[list[Any]]:
    """What a library may read beside a component's configuration and weights, such as settings for generation.

    Raises:
        ApiError: MODEL_BROKEN: a file cannot be read.
    """
    found: list[list[Any]] = []
    for path in sorted(component.folder.glob("*.json")):
        if path.name != "config.json":
            identity = file_identity(path)
            small = identity[1] <= _SMALL
            found.append([path.name, hashlib.sha256(path.read_bytes()).hexdigest() if small else identity])
    return found


def _important(config: dict[str, Any]) -> dict[str, Any]:
    return {
        name: _important(value) if isinstance(value, dict) else value
        for name, value in config.items()
        if name not in _UNIMPORTANT
    }


def _read_json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError) as fault:
        raise broken(path, f"cannot be read ({type(fault).__name__})") from fault
    if not isinstance(found, dict):
        raise broken(path, "is not a JSON object")
    return found


def variant_of(folder: Path, precision: str) -> str | None:
    """Which weight files of a folder to read: ``fp16`` or ``bf16`` where they are preferred or alone, else plain ones.

    diffusers names them ``diffusion_pytorch_model.fp16.safetensors``, and takes a component's plain files where
    the variant is missing, but not the other way round.
    """
    return _variant({path.relative_to(folder).as_posix() for path in folder.glob("*/*.safetensors")}, precision)


def variant_of_part(folder: Path, precision: str) -> str | None:
    """The same for the folder of one component."""
    return _variant({f"{folder.name}/{path.name}" for path in folder.glob("*.safetensors")}, precision)


def _variant(names: set[str], precision: str) -> str | None:
    for variant in ("fp16", "bf16"):
        own = {name for name in names if f".{variant}." in name or f".{variant}-" in name}
        folders = {name.partition("/")[0] for name in own}
        plain = {name.partition("/")[0] for name in names if not _VARIANT.search(name)}
        if own and (variant == precision or not folders <= plain):
            return variant
    return None


def variant_in(files: tuple[Path, ...]) -> str | None:
    """The variant that weight files are of."""
    found = [match[1] for path in files if (match := _VARIANT.search(path.name))]
    return found[0] if found else None


@dataclass(frozen=True)
class Weights:
    """A component's weight files.

    Attributes:
        headers: of the files.
        sharded: an index names them.
        plain: they are named and laid out as the library's own reader would take them, with nothing to choose.
    """

    headers: tuple[Header, ...]
    sharded: bool
    plain: bool

    @property
    def files(self) -> tuple[Path, ...]:
        """Where they are."""
        return tuple(header.path for header in self.headers)


def weights(component: Component, variant: str | None) -> Weights:
    """The weight files that the libraries would read for a component.

    Raises:
        ApiError: MODEL_BROKEN: there are none, or one is damaged.
    """
    folder = component.folder
    try:
        names = {path.name for path in folder.iterdir()}
    except OSError as fault:
        raise broken(folder, f"cannot be read: {fault.strerror}") from fault
    # as diffusers decides it for each component
    variant = variant if any(_second(name).startswith(variant or " ") for name in names) else None
    stem = "diffusion_pytorch_model" if component.cls and issubclass(component.cls, ModelMixin) else "model"
    dot = f".{variant}" if variant else ""
    single, index = f"{stem}{dot}.safetensors", f"{stem}.safetensors.index{dot}.json"
    if single in names and index not in names:
        return Weights((read_header(folder / single),), sharded=False, plain=True)
    if index in names and single not in names:
        shards = _read_json(folder / index).get("weight_map")
        if isinstance(shards, dict) and all(isinstance(shard, str) for shard in shards.values()):
            files = sorted(set(shards.values()))
            if not all(is_safe_path(file) for file in files):
                raise broken(folder / index, "names a file outside its folder")
            headers = tuple(read_header(folder / file) for file in files)
            stored = [name for header in headers for name in header.tensors]
            return Weights(headers, sharded=True, plain=sorted(stored) == sorted(shards))
    found = sorted(name for name in names if name.endswith(".safetensors"))
    ours = [name for name in found if (_VARIANT.search(name) is not None) == (variant is not None)] or found
    if not ours:
        raise broken(folder, "has no weights in safetensors files")
    return Weights(tuple(read_header(folder / name) for name in ours), sharded=len(ours) > 1, plain=False)


def _second(name: str) -> str:
    return name.split(".")[1] if "." in name else ""


def computed_in(component: Component, config: Mapping[str, Any], dtype: torch.dtype) -> torch.dtype:
    """What a component of a model is held in: the model's dtype, but for a VAE that overflows in fp16.

    The pipelines would cast such a one up for every image. Those of SD 1.x and 2.x never do, whatever its configuration
    says (it says so by default), and need not: they are the ones without ``upcast_vae``.
    """
    if component.name != "vae" or dtype != torch.float16 or component.cls is None:
        return dtype
    if component.pipeline is not None and not hasattr(component.pipeline, "upcast_vae"):
        return dtype
    default = _arguments(component.cls).get("force_upcast")
    forced = config.get("force_upcast", default.default if default else False)
    return torch.float32 if forced is True else dtype


def weights_identity(model: Path, files: tuple[Path, ...]) -> list[str]:
    """What the content of weight files is known by: their SHA-256 from the model's manifest, else the files themselves.

    A file that was changed after the model was installed, or has another size, is not what the manifest says. The
    manifest's own time of change says nothing: it is set anew whenever the model is used.

    Raises:
        ApiError: MODEL_BROKEN: a file is gone.
    """
    manifest = read_manifest(model)
    entries = {entry.path: entry for entry in manifest.files} if manifest else {}
    installed = _nanoseconds(manifest.installed) if manifest else 0
    known = []
    for path in files:
        identity = file_identity(path)
        entry = entries.get(path.relative_to(model).as_posix())
        if entry and entry.sha256 and entry.size == identity[1] and identity[2] <= installed:
            known.append(f"sha256:{entry.sha256.lower()}")
        else:
            known.append(f"file:{identity}")
    return known


def _nanoseconds(time: str) -> int:
    """The end of an ISO 8601 second; 0 for what is none."""
    try:
        return (int(datetime.fromisoformat(time).timestamp()) + 1) * 10**9
    except (ValueError, OverflowError, OSError):
        return 0


def is_known(cls: type | None) -> bool:
    """Whether our own reader may try a class: one of the two libraries' own models, not one that stands for others."""
    if cls is None or not issubclass(cls, ModelMixin | PreTrainedModel):
        return False
    legacy = getattr(diffusers.models.modeling_utils, "LegacyModelMixin", None)
    return cls.__module__.startswith(("diffusers.", "transformers.")) and not (legacy and issubclass(cls, legacy))
