"""Reads the tensors of a file of weights. Nothing is ever unpickled freely."""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from api.errors import ApiError

_TRAINER = ("pytorch_lightning.", "lightning.", "lightning_fabric.")
_NUMPY = ("numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar", "numpy.dtype")


class _Ignored:
    """Stands for an object of a trainer beside the weights: takes everything, does nothing."""

    def __new__(cls, *_: Any, **__: Any) -> _Ignored:
        return super().__new__(cls)

    def __setstate__(self, _: Any) -> None:
        pass


def read_tensors(
    path: Path,
    name: str,
    field: str | None = None,
    inner: Mapping[str, str] | None = None,
    nested: Sequence[str] = (),
) -> dict[str, torch.Tensor]:
    """The tensors of a safetensors or torch file, mapped from disk rather than read where that is possible.

    A pickle is read by torch's weights-only loader. Callbacks of the trainer and numbers of numpy, which
    the original Stable Diffusion files hold beside their weights, become objects that do nothing.

    Args:
        path: of the file; its content says what it is.
        name: for messages.
        field: for errors.
        inner: dictionaries in a pickle whose first tensor is taken, and what it is called then.
        nested: names that a pickle may have the weights under; the first that it has.

    Raises:
        ApiError: MODEL_BROKEN.
        OSError: the file cannot be read.
    """
    with path.open("rb") as file:
        start = file.read(9)
    tensors: dict[str, torch.Tensor]
    if start[8:] == b"{" and not start.startswith(b"PK"):
        try:
            with safe_open(path, framework="pt") as file:
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        except SafetensorError as fault:
            raise ApiError("MODEL_BROKEN", f"{name} cannot be read: {fault}.", field=field) from fault
    else:
        tensors = _flat(_within(_unpickle(path, name, field), nested), inner or {})
        for key, tensor in tensors.items():
            # an expanded view would become many times its file, on the disk and in memory
            size = tensor.numel() * tensor.element_size()
            if tensor.layout != torch.strided or size > tensor.untyped_storage().nbytes():
                raise ApiError("MODEL_BROKEN", f"{name} holds {key}, which is larger than its data.", field=field)
    if not tensors:
        raise ApiError("MODEL_BROKEN", f"{name} holds no weights.", field=field)
    return tensors


def _unpickle(path: Path, name: str, field: str | None) -> Any:
    try:
        # files from before torch 1.6 are no zip archives, and cannot be mapped or looked into
        zipped = zipfile.is_zipfile(path)
        found = torch.serialization.get_unsafe_globals_in_checkpoint(path) if zipped else []
        ignored = [(_Ignored, known) for known in found if known.startswith(_TRAINER) or known in _NUMPY]
        with torch.serialization.safe_globals(ignored):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except OSError:
        raise
    except pickle.UnpicklingError as fault:
        raise ApiError("MODEL_BROKEN", _refusal(name, str(fault)), field=field) from fault
    except MemoryError:
        raise
    except Exception as fault:  # whatever a damaged file makes torch raise
        raise ApiError(
            "MODEL_BROKEN", f"{name} cannot be read ({type(fault).__name__}: {str(fault)[:200]}).", field=field
        ) from fault


def _refusal(name: str, fault: str) -> str:
    what = next((line.strip() for line in fault.splitlines() if "global" in line.lower()), fault.strip())
    return (
        f"{name} is a pickle that holds more than weights, and was refused: nothing is ever unpickled freely. "
        f"Use a .safetensors file of this model. ({what[:200]})"
    )


def _within(loaded: Any, names: Sequence[str]) -> Any:
    found = [loaded[name] for name in names if isinstance(loaded, dict) and isinstance(loaded.get(name), dict)]
    return found[0] if found else loaded


def _flat(loaded: Any, inner_names: Mapping[str, str]) -> dict[str, torch.Tensor]:
    """The state dict, out of ``state_dict`` where trainers put it; what is no tensor is left out."""
    while isinstance(loaded, dict) and isinstance(loaded.get("state_dict"), dict):
        inner = loaded["state_dict"]
        step = loaded.get("global_step")
        if isinstance(step, int) and "global_step" not in inner:
            inner = {**inner, "global_step": torch.tensor(step)}
        loaded = inner
    if not isinstance(loaded, dict):
        return {}
    for key, new in inner_names.items():
        within = loaded.get(key)
        first = (
            next((v for v in within.values() if isinstance(v, torch.Tensor)), None)
            if isinstance(within, dict)
            else None
        )
        if first is not None:
            return {new: first.detach()}
    return {key: value for key, value in loaded.items() if isinstance(key, str) and isinstance(value, torch.Tensor)}
