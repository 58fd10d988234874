"""Which parts the models consist of, for as long as something of them is in memory."""

from __future__ import annotations

from collections.abc import Sequence

from api.engine.books import Moves, Part, Piece
from api.engine.headers import file_identity
from api.engine.offload import Offloaded
from api.engine.parts import Loader, PartSpec
from api.engine.tiers import Tiers
from api.errors import ApiError
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
        """A model's parts, as its files are now.

        Raises:
            ApiError: MODEL_BROKEN.
        """
        return self.current(ref) or self._loader.parts(ref)

    def current(self, ref: ModelRef) -> Sequence[PartSpec] | None:
        """The parts that a model was entered with; None if it was not, or its files have been replaced since."""
        with self._tiers.lock:
            known = self._entries.get(ref.key)
            if known is None and isinstance(ref, Offloaded):
                known = self._entries.get(ref.full)
        return known[1] if known and not any(map(_is_replaced, known[1])) else None

    def enter(self, ref: ModelRef, specs: Sequence[PartSpec]) -> bool:
        """Enter a model in the books, if it is not in there; whether it is in there with these parts."""
        with self._tiers.lock:
            on_device, in_host = self.pieces(ref, specs)
            self._tiers.know(ref.key, on_device, in_host, ref.full if isinstance(ref, Offloaded) else None)
            if not self._tiers.consists_of(ref.key, specs):
                return False
            self._entries[ref.key] = (ref, specs)
            return True

    def renew(self, ref: ModelRef, specs: Sequence[PartSpec]) -> Moves | None:
        """Enter a model with other parts than those that it has in the books; None while these are in use."""
        with self._tiers.lock:
            if (moves := self._tiers.renew(ref.key, *self.pieces(ref, specs))) is not None:
                self._entries[ref.key] = (ref, specs)
            return moves

    def pieces(self, ref: ModelRef, specs: Sequence[PartSpec]) -> tuple[Sequence[Piece], Sequence[Piece]]:
        """What a model takes on the device where it runs, and in the host's memory if it is offloaded."""
        unique = list({spec.key: spec for spec in specs}.values())
        if not isinstance(ref, Offloaded):
            return unique, ()
        return [Part(ref.key, ref.key, self._loader.offloading.room(specs, ref.mode))], unique

    def keys(self, model: str) -> set[str]:
        """The keys of what a model cannot run without on the device, as it was entered last."""
        ref, specs = self._entries.get(model, (None, ()))
        return {model} if isinstance(ref, Offloaded) else {spec.key for spec in specs}

    def refs(self) -> dict[str, ModelRef]:
        """Every model of which something is in memory, by key."""
        with self._tiers.lock:
            present = self._tiers.models()
            self._entries = {key: entry for key, entry in self._entries.items() if key in present}
            return {key: ref for key, (ref, _) in self._entries.items()}


def _is_replaced(spec: PartSpec) -> bool:
    """Whether a part's files are others than when its key was made. Of what is gone, there is what is in memory."""
    try:
        return spec.identities != tuple(map(file_identity, spec.files))
    except ApiError:
        return False
