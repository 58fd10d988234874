"""The models in a device's memory, least recently used first, within a budget in bytes."""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable

from api.engine.loader import LoadedModel
from api.schema.generation import ModelRef

log = logging.getLogger("api.engine")


class ModelCache:
    """Keeps models until their bytes are needed for another.

    Not for several threads: the engine uses it from the one that owns the device.

    Args:
        budget: bytes that the models may take together; a single larger one is still tried.
        load: reads a model that is not here.
        release: called after an eviction, when its memory can be given back.
    """

    def __init__(self, budget: int, load: Callable[[ModelRef], LoadedModel], release: Callable[[], None]) -> None:
        self._budget = budget
        self._load = load
        self._release = release
        self._models: OrderedDict[str, LoadedModel] = OrderedDict()

    def __contains__(self, ref: ModelRef) -> bool:
        return ref.key in self._models

    def get(self, ref: ModelRef, expected_bytes: Callable[[], int]) -> LoadedModel:
        """The model, loaded if it is not here.

        Args:
            ref: which model.
            expected_bytes: says what it will take; room is made before it is read.
        """
        found = self._models.get(ref.key)
        if found:
            self._models.move_to_end(ref.key)
            return found
        self.make_room(expected_bytes())
        model = self._load(ref)
        self._models[ref.key] = model
        log.info("loaded %s: %.1f MB", ref.key, model.bytes / 1e6)
        return model

    def make_room(self, needed: int) -> None:
        """Forget models, the least recently used first, until ``needed`` bytes fit the budget."""
        evicted = False
        while self._models and sum(self.sizes().values()) + needed > self._budget:
            key, model = self._models.popitem(last=False)
            log.info("evicted %s: %.1f MB", key, model.bytes / 1e6)
            evicted = True
        if evicted:
            self._release()

    def clear_others(self, ref: ModelRef) -> bool:
        """Forget every model but one; whether there was any other."""
        others = [key for key in self._models if key != ref.key]
        for key in others:
            del self._models[key]
        if others:
            self._release()
        return bool(others)

    def sizes(self) -> dict[str, int]:
        """Bytes by model key."""
        return {key: model.bytes for key, model in self._models.items()}
