"""Which parts the models consist of, for as long as something of them is in memory."""

from __future__ import annotations

from collections.abc import Sequence

from api.engine.parts import Loader, PartSpec
from api.engine.tiers import Tiers
from api.schema.generation import ModelRef


class Known:
    """The models that are in the books, by what they are called and what they are made of.

    Args:
        tiers: the books.
        loader: asked for the parts of a model that is not in there.
    """

    def __init__(self, tiers: Tiers, loader: Loader) -> None:
        self._tiers = tiers
        self._loader = loader
        self._entries: dict[str, tuple[ModelRef, Sequence[PartSpec]]] = {}

    def parts(self, ref: ModelRef) -> Sequence[PartSpec]:
        """A model's parts.

        Raises:
            ApiError: MODEL_BROKEN.
        """
        with self._tiers.lock:
            known = self._entries.get(ref.key)
        return known[1] if known else self._loader.parts(ref)

    def enter(self, ref: ModelRef, specs: Sequence[PartSpec]) -> None:
        """Enter a model in the books, if it is not in there."""
        with self._tiers.lock:
            self._entries[ref.key] = (ref, specs)
            self._tiers.know(ref.key, specs)

    def keys(self, model: str) -> set[str]:
        """The keys of a model's parts, as it was entered last."""
        return {spec.key for spec in self._entries[model][1]} if model in self._entries else set()

    def refs(self) -> dict[str, ModelRef]:
        """Every model of which something is in memory, by key."""
        with self._tiers.lock:
            present = self._tiers.models()
            self._entries = {key: entry for key, entry in self._entries.items() if key in present}
            return {key: ref for key, (ref, _) in self._entries.items()}
