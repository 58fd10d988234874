"""Parts that a request adds to its model, such as ControlNets: named, found or fetched, kept while they are used."""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Sequence
from typing import Any, NamedTuple

from api.errors import ApiError
from api.models.description import InstalledModel
from api.models.library import Library
from api.models.part_refs import PartRef, read_part, repeated
from api.models.refs import SourceRef
from api.schema.generation import Addition
from api.schema.transfers import Transfer
from api.service.fetcher import Fetcher
from api.settings import Settings

_OF_THE_MODEL = "callInputs."


class Wanted(NamedTuple):
    """What a request names, and where it says so."""

    name: str
    field: str
    ref: PartRef


class Added(NamedTuple):
    """A part that is here.

    Attributes:
        wanted: as it was asked for; its name is that of the component.
        model: what it is.
    """

    wanted: Wanted
    model: InstalledModel

    @property
    def addition(self) -> Addition:
        """What a worker is told to load."""
        model = self.model
        return Addition(self.wanted.name, model.revision, str(model.folder), model.part)

    @property
    def again(self) -> str:
        """What names it in this version."""
        return repeated(self.wanted.ref, self.model.revision)

    @property
    def shown(self) -> str:
        """What to call it in a message."""
        return self.wanted.ref.source.model_id


Check = Callable[[list[Added]], Awaitable[object]]


class Additions:
    """Finds and fetches parts.

    Args:
        settings: the default storage.
        library: what is here.
        fetcher: gets what is not.
    """

    def __init__(self, settings: Settings, library: Library, fetcher: Fetcher) -> None:
        self._settings = settings
        self._library = library
        self._fetcher = fetcher

    def read(self, options: dict[str, Any], ref: SourceRef) -> list[Wanted]:
        """What checked ``callInputs`` name.

        Args:
            options: with the names.
            ref: of the model, whose precision is preferred.

        Raises:
            ApiError: INVALID_INPUTS.
        """
        found = []
        for number, text in enumerate(options.get("controlnets", ())):
            field = f"callInputs.controlnets[{number}]"
            part = read_part(text, field, self._settings, ref.precision)
            found.append(Wanted(f"controlnet_{number}" if number else "controlnet", field, part))
        return found

    async def find(self, wanted: Sequence[Wanted]) -> list[Added] | None:
        """The parts, if all are here; nothing is fetched.

        Raises:
            ApiError: one is here and cannot be read; it is neither here nor anywhere that is asked.
        """
        found = []
        for one in wanted:
            with _about(one.field):
                model = await self._here(one.ref.source)
                if model is None:
                    if not self._fetcher.is_local(one.ref.source):
                        return None
                    model = (await self._fetcher.ensure(one.ref.source)).model
            found.append(Added(one, model))
        return found

    async def ensure(
        self,
        wanted: Sequence[Wanted],
        check: Check,
        held: contextlib.ExitStack,
        on_event: Callable[[Transfer], None] | None,
    ) -> tuple[list[Added], dict[str, int]]:
        """Wait until all parts are here.

        Args:
            wanted: which.
            check: awaited with those that are known so far, before the weights of the last of them are fetched; raises
                what is wrong with the request.
            held: keeps them on the volume until it is closed.
            on_event: called with what happens meanwhile.

        Returns:
            The parts, and milliseconds by phase.

        Raises:
            ApiError: what ``check`` raises; what their sources say.
        """
        found, took = list[Added](), Counter[str]()
        for one in wanted:
            model = await self._here(one.ref.source)
            if model is None:

                async def checked(model: InstalledModel, one: Wanted = one) -> object:
                    return await check([*found, Added(one, model)])

                with _about(one.field):
                    fetched = await self._fetcher.ensure(one.ref.source, checked, on_event)
                model = fetched.model
                took.update(fetched.timings)
            held.enter_context(self._fetcher.hold(model.folder))
            found.append(Added(one, model))
        return found, dict(took)

    async def _here(self, ref: SourceRef) -> InstalledModel | None:
        return self._library.recall(ref) or await asyncio.to_thread(self._library.find, ref)


@contextlib.contextmanager
def _about(field: str) -> Iterator[None]:
    """What is said of a model's name is said of the part's."""
    try:
        yield
    except ApiError as error:
        if error.field is None or error.field.startswith(f"{_OF_THE_MODEL}MODEL_") or "HF_MODEL" in error.field:
            raise ApiError(
                error.code,
                error.message,
                field=field,
                requested=error.requested,
                available=error.available,
                retry_after=error.retry_after,
            ) from error
        raise
