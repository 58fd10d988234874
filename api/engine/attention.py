"""Which attention kernels a pipeline uses."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator

import diffusers

log = logging.getLogger("api.engine")
_told: set[str] = set()


@contextlib.contextmanager
def attention(pipe: diffusers.DiffusionPipeline, wanted: str) -> Iterator[str]:
    """Use the wanted kernels while a pipeline runs, and put back what was there.

    Args:
        pipe: its modules are shared with later jobs, so nothing may stay switched.
        wanted: ``sdpa``, torch's own, or ``xformers``; what cannot be had falls back to ``sdpa``
            and is logged once.

    Yields:
        What is really used.
    """
    if wanted != "xformers":
        yield "sdpa"
        return
    modules = [m for m in pipe.components.values() if hasattr(m, "attn_processors")]
    before = [(module, dict(module.attn_processors)) for module in modules]
    try:
        pipe.enable_xformers_memory_efficient_attention()
        used = "xformers"
    except Exception as fault:  # absent, without operators for this device, or built for another torch
        used = "sdpa"
        if str(fault) not in _told:
            _told.add(str(fault))
            log.warning("xformers was asked for and cannot be used (%s): sdpa instead", str(fault).strip()[:200])
    try:
        yield used
    finally:
        for module, processors in before:
            module.set_attn_processor(processors)
