"""What is left to diffusers and transformers: what our own reader does not know, and what has no weights."""

from __future__ import annotations

import hashlib
import threading
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers.pipelines.pipeline_loading_utils import ALL_IMPORTABLE_CLASSES, load_sub_model

from api.engine.cloning import keep_text_model
from api.engine.headers import file_identity
from api.engine.specs import Component
from api.engine.tokenizers import taking_turns

_KEPT = 256


def load_module(
    folder: Path, name: str, library: str, class_name: str, dtype: torch.dtype, variant: str | None
) -> torch.nn.Module:
    """Load a module onto the CPU, as ``DiffusionPipeline.from_pretrained`` does it for each component.

    It patches torch process-wide while it runs: no other work may go on meanwhile.

    Args:
        folder: of the model.
        name: of the component.
        library: that has its class.
        class_name: there.
        dtype: that it computes in.
        variant: of its weight files.

    Raises:
        Exception: whatever a damaged file makes the libraries raise.
    """
    module: torch.nn.Module = _load(folder, name, library, class_name, dtype, variant)
    module.eval().requires_grad_(False)
    keep_text_model(module)
    return module


def _load(
    folder: Path, name: str, library: str, class_name: str, dtype: torch.dtype | None, variant: str | None
) -> Any:
    return load_sub_model(
        library_name=library,
        class_name=class_name,
        importable_classes=ALL_IMPORTABLE_CLASSES,
        pipelines=diffusers.pipelines,
        is_pipeline_module=hasattr(diffusers.pipelines, library),
        pipeline_class=None,
        dtype=dtype,
        provider=None,
        sess_options=None,
        device_map=None,
        max_memory=None,
        offload_folder=None,
        offload_state_dict=None,
        model_variants={name: variant} if variant else {},
        name=name,
        variant=variant,
        low_cpu_mem_usage=True,
        cached_folder=str(folder),
        use_safetensors=True,
        provider_options=None,
        disable_mmap=False,
        trust_remote_code=False,
    )


class Weightless:
    """Tokenizers, schedulers and the like, read once for all models that have the same.

    They are never changed in place: each model gets its own (``owning``), jobs get copies of schedulers, and all take
    turns at tokenizers.
    """

    def __init__(self) -> None:
        self._parts: dict[str, Any] = {}
        self._hashes: dict[tuple[str, int, int, int], str] = {}
        self._lock = threading.Lock()

    def get(self, component: Component) -> Any:
        """A component without weights.

        Raises:
            ApiError: MODEL_BROKEN: it is gone.
            Exception: whatever a damaged file makes the libraries raise.
        """
        key = self._key(component)
        with self._lock:
            part = self._parts.get(key)
        if part is None:
            part = _load(component.folder.parent, component.name, component.library, component.class_name, None, None)
            part = taking_turns({component.name: part})[component.name]
            with self._lock:
                while len(self._parts) >= _KEPT:
                    self._parts.pop(next(iter(self._parts)))
                # of two threads that read it at once, both get the first: they are to take turns at one lock
                part = self._parts.setdefault(key, part)
        return part

    def _key(self, component: Component) -> str:
        digest = hashlib.sha256(f"{component.library}.{component.class_name}".encode())
        files = component.folder.iterdir() if component.folder.is_dir() else ()
        for path in sorted(path for path in files if path.is_file()):
            identity = file_identity(path)
            if identity not in self._hashes:
                if len(self._hashes) > 16 * _KEPT:
                    self._hashes.clear()
                self._hashes[identity] = hashlib.sha256(path.read_bytes()).hexdigest()
            digest.update(f"\0{path.name}\0{self._hashes[identity]}".encode())
        return digest.hexdigest()
