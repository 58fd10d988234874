"""Brings the models that are wanted next into the host's memory, while others run; sends unused ones off the device."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence

from api.engine.cache import ModelCache
from api.errors import ApiError
from api.schema.generation import ModelRef

log = logging.getLogger("api.engine")


class Stager:
    """One thread that reads ahead.

    Args:
        cache: of the models.
        wishes: says which models are wanted, the next one first.
        idle_timeout: seconds after which an unused model leaves the device; 0: never.
    """

    def __init__(self, cache: ModelCache, wishes: Callable[[], Sequence[ModelRef]], idle_timeout: float = 0.0) -> None:
        self._cache = cache
        self._wishes = wishes
        self._idle_timeout = idle_timeout
        self._poked = threading.Event()
        self._closed = False
        self._failed: set[str] = set()
        self._full: dict[str, tuple[int, list[str]]] = {}
        """Models for which there was no room, with the version of the books and the models that were wanted sooner."""
        self._thread = threading.Thread(target=self._run, name="stage", daemon=True)
        self._thread.start()

    def poke(self) -> None:
        """Something is wanted, or there may be room for it."""
        self._poked.set()

    def close(self) -> None:
        """End the thread."""
        self._closed = True
        self._poked.set()
        self._thread.join(10)

    def _run(self) -> None:
        while not self._closed:
            self._poked.wait(self._idle_timeout / 4 or None)
            self._poked.clear()
            if self._idle_timeout:
                self._cache.expire(self._idle_timeout)
            try:
                self._stage()
            except Exception:  # whoever asks for that model is told; the others are still to be read ahead
                log.exception("reading ahead failed")

    def _stage(self) -> None:
        refs = self._wishes()
        keys = [ref.key for ref in refs]
        self._failed.intersection_update(keys)
        self._full = {key: then for key, then in self._full.items() if key in keys}
        for index, ref in enumerate(refs):
            if self._closed or self._poked.is_set():
                return  # what is wanted may be another by now
            if ref.key in self._failed or self._cache.tiers.warm(ref.key):
                continue
            if self._full.get(ref.key) == (self._cache.tiers.version, keys[:index]):
                continue  # nothing has changed since
            try:
                if not self._cache.stage(ref, keys[:index]):
                    self._full[ref.key] = self._cache.tiers.version, keys[:index]
            except (ApiError, MemoryError, OSError) as fault:
                log.info("%s is not read ahead: %s", ref.model_id, fault)
                self._failed.add(ref.key)
