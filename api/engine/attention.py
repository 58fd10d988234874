"""Which attention kernels a job uses."""

from __future__ import annotations

import logging
from typing import Any

from api.engine.cloning import clone
from api.engine.loader import LoadedModel

log = logging.getLogger("api.engine")


def components_with(model: LoadedModel, wanted: str) -> tuple[dict[str, Any], str]:
    """The model's components with the wanted kernels, and what they really use.

    Args:
        model: its own modules are shared by all jobs and never switched: others over the same weights are.
        wanted: ``sdpa``, torch's own, or ``xformers``; what cannot be had falls back to ``sdpa`` and is logged once.
    """
    if wanted != "xformers":
        return model.components, "sdpa"
    if "xformers" not in model.variants:
        model.variants["xformers"] = _switched(model)
    return (model.variants["xformers"], "xformers") if model.variants["xformers"] else (model.components, "sdpa")


def _switched(model: LoadedModel) -> dict[str, Any]:
    switched = dict(model.components)
    try:
        for name, part in model.components.items():
            if hasattr(part, "attn_processors"):
                switched[name] = clone(part)
                switched[name].enable_xformers_memory_efficient_attention()
    except Exception as fault:  # absent, without operators for this device, or built for another torch
        log.warning("xformers was asked for and cannot be used (%s): sdpa instead", str(fault).strip()[:200])
        return {}
    return switched
