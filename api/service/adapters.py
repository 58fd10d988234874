"""Gets the LoRAs and textual inversions that a request names, and says what is wrong with them before a worker does."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Coroutine, Sequence
from pathlib import PurePosixPath
from typing import Any, TypeVar

import msgspec

from api.errors import ApiError
from api.models.adapter_header import inversion_problem, lora_problem, read_shapes, token_of
from api.models.adapters import FIELDS, LORA, Asked, adapter_ref, file_name, repository_of
from api.models.description import InstalledModel
from api.models.library import BUNDLED_ORG, InstalledAdapter, Library
from api.models.refs import SourceRef
from api.schema.generation import Inversion, Lora
from api.schema.transfers import Transfer
from api.service.fetcher import Fetcher
from api.settings import Settings

OPTIONS = ("lora_weights", "textual_inversions")
_T = TypeVar("_T")


class Chosen(msgspec.Struct, frozen=True):
    """The adapters of a request, here and checked.

    Attributes:
        loras: in the order of the request.
        inversions: in the order of the request.
        meta: what ``$meta`` says of them: can be sent again.
        timings: what it took to get them, milliseconds by phase.
    """

    loras: tuple[Lora, ...] = ()
    inversions: tuple[Inversion, ...] = ()
    meta: dict[str, Any] = {}
    timings: dict[str, int] = {}


class Adapters:
    """Finds, fetches and checks adapters.

    Args:
        settings: where from.
        library: what is here.
        fetcher: gets what is not.
    """

    def __init__(self, settings: Settings, library: Library, fetcher: Fetcher) -> None:
        self._settings = settings
        self._library = library
        self._fetcher = fetcher

    def check(self, options: dict[str, Any]) -> None:
        """What can be said of a request's adapters without looking for them.

        Raises:
            ApiError: INVALID_INPUTS.
        """
        for asked in _asked(options):
            adapter_ref(asked, self._settings)

    async def choose(
        self,
        options: dict[str, Any],
        model: InstalledModel,
        held: contextlib.ExitStack,
        on_event: Callable[[Transfer], None] | None = None,
    ) -> Chosen:
        """Have a request's adapters here.

        Args:
            options: checked ``callInputs``.
            model: that they are for.
            held: keeps them on the volume until it is closed.
            on_event: called with what happens while they are fetched.

        Raises:
            ApiError: INVALID_ADAPTER, INVALID_INPUTS; what their sources say.
        """
        asked = _asked(options)
        if not asked:
            return Chosen()
        found = await _together([self.get(each, held, on_event) for each in asked])
        made = await asyncio.to_thread(
            lambda: [_checked(each, adapter, model) for each, (adapter, _) in zip(asked, found, strict=True)]
        )
        inversions = [made_of for made_of in made if isinstance(made_of, Inversion)]
        _check_tokens(inversions)
        meta: dict[str, Any] = {}
        for each, one, (adapter, _) in zip(asked, made, found, strict=True):
            meta.setdefault(OPTIONS[each.kind != LORA], []).append(_told(each, one, adapter))
        loras = tuple(one for one in made if isinstance(one, Lora))
        return Chosen(loras, tuple(inversions), meta, _summed([timings for _, timings in found]))

    async def get(
        self, asked: Asked, held: contextlib.ExitStack, on_event: Callable[[Transfer], None] | None
    ) -> tuple[InstalledAdapter, dict[str, int]]:
        """One adapter or upscaler, held as soon as it is here: room for others is made while it waits for them."""
        adapter, timings = await self._get(asked, on_event)
        held.enter_context(self._fetcher.hold(adapter.path.parent))
        return adapter, timings

    async def _get(
        self, asked: Asked, on_event: Callable[[Transfer], None] | None
    ) -> tuple[InstalledAdapter, dict[str, int]]:
        ref = adapter_ref(asked, self._settings)
        if (named := repository_of(asked)) and not asked.revision:
            local = await asyncio.to_thread(self._library.find_local_adapter, *named)
            if local is not None:
                _check_digest(asked, local)
                return local, {}
            if named[0].startswith(f"{BUNDLED_ORG}/"):
                raise self._no_such(asked, ref)
        try:
            fetched = await self._fetcher.ensure_adapter(ref, on_event)
        except ApiError as error:
            if error.field is not None:
                raise
            field, requested = FIELDS[asked.kind], error.requested or ref.model_id
            raise ApiError(error.code, error.message, field=field, requested=requested) from error
        return fetched.adapter, fetched.timings

    def _no_such(self, asked: Asked, ref: SourceRef) -> ApiError:
        message = f'"{ref.model_id}" is not one of the adapters that come with this server.'
        available = [f"{BUNDLED_ORG}/adapters/{name}" for name in self._library.bundled_adapters()]
        field = FIELDS[asked.kind]
        return ApiError("MODEL_NOT_FOUND", message, field=field, requested=asked.address, available=available)


async def _together(work: Sequence[Coroutine[Any, Any, _T]]) -> list[_T]:
    """The results of all; when one fails, none goes on."""
    tasks = [asyncio.ensure_future(each) for each in work]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _asked(options: dict[str, Any]) -> list[Asked]:
    return [asked for name in OPTIONS for asked in options.get(name) or ()]


def _checked(asked: Asked, adapter: InstalledAdapter, model: InstalledModel) -> Lora | Inversion:
    """In a thread."""
    try:
        shapes = read_shapes(adapter.path)
    except (OSError, ValueError) as fault:
        raise _invalid(asked, adapter, f"cannot be read: {fault}") from fault
    if asked.kind == LORA:
        if problem := lora_problem(shapes, model.folder):
            raise _invalid(asked, adapter, problem)
        return Lora(adapter.name, str(adapter.path), adapter.sha256, asked.scale)
    if problem := inversion_problem(shapes, model.folder):
        raise _invalid(asked, adapter, problem)
    token = asked.token or token_of(shapes) or PurePosixPath(file_name(asked)).stem
    if not token or len(token.split()) > 1:
        message = f'{adapter.name} names no word that could stand for it; say one: "#token=…".'
        raise ApiError("INVALID_INPUTS", message, field=FIELDS[asked.kind], requested=adapter.name)
    return Inversion(adapter.name, str(adapter.path), adapter.sha256, token)


def _invalid(asked: Asked, adapter: InstalledAdapter, problem: str) -> ApiError:
    message = f"{adapter.name} {problem}."
    return ApiError("INVALID_ADAPTER", message, field=FIELDS[asked.kind], requested=adapter.name)


def _check_digest(asked: Asked, adapter: InstalledAdapter) -> None:
    if asked.sha256 and asked.sha256 != adapter.sha256:
        message = f"{adapter.name} has the SHA-256 {adapter.sha256} instead of {asked.sha256}."
        raise ApiError("MODEL_CORRUPT", message, field=FIELDS[asked.kind], requested=adapter.name)


def _check_tokens(inversions: Sequence[Inversion]) -> None:
    tokens = [inversion.token for inversion in inversions]
    for token in tokens:
        if tokens.count(token) > 1:
            message = f'Two textual inversions have the token "{token}"; give one another with "#token=…".'
            raise ApiError("INVALID_INPUTS", message, field="callInputs.textual_inversions", requested=token)


def _told(asked: Asked, made: Lora | Inversion, adapter: InstalledAdapter) -> dict[str, Any]:
    told: dict[str, Any] = {"url": adapter.name.partition("#")[0], "sha256": adapter.sha256}
    told |= {"fname": asked.fname} if asked.fname and "://" in asked.address else {}
    told |= {"revision": asked.revision} if asked.revision else {}
    return told | ({"scale": made.scale} if isinstance(made, Lora) else {"token": made.token})


def _summed(timings: Sequence[dict[str, int]]) -> dict[str, int]:
    phases = dict.fromkeys(phase for each in timings for phase in each)
    return {phase: max(each.get(phase, 0) for each in timings) for phase in phases}
