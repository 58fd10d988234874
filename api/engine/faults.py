"""What goes wrong when a model is loaded, in words that name it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import torch

from api.engine.device import shortage
from api.engine.headers import broken
from api.errors import ApiError
from api.schema.generation import ModelRef


@contextlib.contextmanager
def naming(ref: ModelRef) -> Iterator[None]:
    """Whatever a damaged file makes the libraries or us raise is MODEL_BROKEN, and says which model.

    Raises:
        ApiError: MODEL_BROKEN.
    """
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError):
        raise
    except Exception as fault:
        if isinstance(fault, ApiError) and fault.requested is not None:
            raise
        if text := shortage(fault):
            raise torch.OutOfMemoryError(text) from None
        raise ApiError(
            "MODEL_BROKEN",
            f'"{ref.model_id}" cannot be loaded: {_said(fault)}',
            field="callInputs.MODEL_ID",
            requested=ref.model_id,
        ) from fault


@contextlib.contextmanager
def as_broken(folder: Path) -> Iterator[None]:
    """The same of one part.

    Raises:
        ApiError: MODEL_BROKEN.
    """
    try:
        yield
    except (ApiError, torch.OutOfMemoryError, MemoryError):
        raise
    except Exception as fault:
        raise broken(folder, f"cannot be loaded ({_said(fault)})") from fault


def _said(fault: Exception) -> str:
    return str(fault) if isinstance(fault, ApiError) else f"{type(fault).__name__}: {str(fault)[:300]}"
