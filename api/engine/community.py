"""Runs the code of community pipelines, which whoever admitted the request was allowed to fetch."""

from __future__ import annotations

import hashlib
import importlib.util
import sys
import threading
from pathlib import Path
from typing import Any

import diffusers

from api.errors import ApiError
from api.schema.generation import Code, GenerationRequest

_FIELD = "callInputs.PIPELINE"
_lock = threading.Lock()
_classes: dict[str, type[diffusers.DiffusionPipeline]] = {}


def class_of(request: GenerationRequest) -> type[diffusers.DiffusionPipeline]:
    """The pipeline class that a request is run with.

    Raises:
        ApiError: see ``community_class``.
    """
    if request.code:
        return community_class(request.code)
    found: type[diffusers.DiffusionPipeline] = getattr(diffusers, request.pipeline)
    return found


def community_class(code: Code) -> type[diffusers.DiffusionPipeline]:
    """The pipeline class of a file, whose code is run once.

    Args:
        code: where it lies; its digest is what was admitted.

    Raises:
        ApiError: PIPELINE_NOT_SUPPORTED: the file was changed, needs what is not installed, or holds no such pipeline.
    """
    with _lock:
        found = _classes.get(code.sha256)
        if found is None:
            found = _classes[code.sha256] = _loaded(code)
        return found


def _loaded(code: Code) -> type[diffusers.DiffusionPipeline]:
    path = Path(code.path)
    if hashlib.sha256(path.read_bytes()).hexdigest() != code.sha256:
        raise _unfit(path.stem, "its file was changed since the request was admitted; send it again")
    name = f"diffusers_community_{code.sha256[:16]}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and the like look their module up
    try:
        spec.loader.exec_module(module)
    except Exception as fault:
        del sys.modules[name]
        raise _unfit(path.stem, f"{type(fault).__name__}: {str(fault)[:300]}") from fault
    found: Any = getattr(module, code.class_name, None)
    if not isinstance(found, type) or not issubclass(found, diffusers.DiffusionPipeline):
        raise _unfit(path.stem, f"{code.class_name} is no pipeline")
    return found


def _unfit(name: str, why: str) -> ApiError:
    message = f"The community pipeline {name} cannot be run: {why}."
    return ApiError("PIPELINE_NOT_SUPPORTED", message, field=_FIELD, requested=name)
