"""The models in a device's memory, least recently used first, within a budget in bytes."""

from __future__ import annotations

import logging
import threading
from collections import Counter, OrderedDict
from collections.abc import Callable

from api.engine.loader import LoadedModel
from api.schema.generation import ModelRef

log = logging.getLogger("api.engine")


class ModelCache:
    """Keeps models until their bytes are needed for another. What is leased stays.

    Models are read and forgotten on the device's thread only; everything else may be called from any.

    Args:
        budget: bytes that the models may take together; a single larger one is still tried.
        load: reads a model that is not here.
        freed: called after an eviction, when its memory can be given back.
    """

    def __init__(self, budget: int, load: Callable[[ModelRef], LoadedModel], freed: Callable[[], None]) -> None:
        self._budget = budget
        self._load = load
        self._freed = freed
        self._models: OrderedDict[str, LoadedModel] = OrderedDict()
        self._leases: Counter[str] = Counter()
        self._lock = threading.Lock()

    def __contains__(self, ref: ModelRef) -> bool:
        return ref.key in self._models

    def hold(self, ref: ModelRef) -> LoadedModel | None:
        """Lease the model if it is here."""
        with self._lock:
            model = self._models.get(ref.key)
            if model is not None:
                self._models.move_to_end(ref.key)
                self._leases[ref.key] += 1
            return model

    def lease(self, ref: ModelRef, expected_bytes: Callable[[], int]) -> LoadedModel | None:
        """The model, loaded if it is not here; it stays until it is released.

        Args:
            ref: which model.
            expected_bytes: says what it will take; room is made before it is read.

        Returns:
            None when there is no room for it beside those that are leased.
        """
        if model := self.hold(ref):
            return model
        if not self.make_room(expected_bytes()) and any(self._leases.values()):
            return None
        model = self._load(ref)
        with self._lock:
            self._models[ref.key] = model
            self._leases[ref.key] += 1
        log.info("loaded %s: %.1f MB", ref.key, model.bytes / 1e6)
        return model

    def release(self, ref: ModelRef) -> None:
        """A lease is over."""
        with self._lock:
            self._leases[ref.key] -= 1

    def make_room(self, needed: int) -> bool:
        """Forget models that nobody leases, the least recently used first; whether ``needed`` bytes now fit."""
        while (short := sum(self.sizes().values()) + needed > self._budget) and self._evict():
            pass
        return not short

    def clear_idle(self) -> bool:
        """Forget every model that nobody leases; whether there was any."""
        found = False
        while self._evict():
            found = True
        return found

    def _evict(self) -> bool:
        with self._lock:
            key = next((key for key in self._models if not self._leases[key]), None)
            if key is None:
                return False
            size = self._models.pop(key).bytes
        log.info("evicted %s: %.1f MB", key, size / 1e6)
        self._freed()
        return True

    def sizes(self) -> dict[str, int]:
        """Bytes by model key."""
        with self._lock:
            return {key: model.bytes for key, model in self._models.items()}
