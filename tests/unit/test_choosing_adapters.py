"""The adapters of one request, which come one after the other: those that are here stay, and failures leave nothing behind."""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from api.errors import ApiError
from api.models.adapters import INVERSION, read_asked
from api.models.library import InstalledAdapter
from api.service import adapters
from api.service.adapters import Adapters
from api.service.fetcher import FetchedAdapter
from api.settings import Settings


class Fetcher:
    """Brings what it is told to, when it is told to."""

    def __init__(self) -> None:
        self.held: Counter[str] = Counter()
        self.arrived = {name: asyncio.Event() for name in ("first", "second")}
        self.left: list[str] = []

    async def ensure_adapter(self, ref: Any, on_event: Any) -> FetchedAdapter:
        name = ref.model_id.rpartition("/")[2]
        try:
            if name == "broken":
                raise ApiError("SOURCE_UNREACHABLE", "It is away.")
            await self.arrived[name].wait()
        finally:
            self.left.append(name)
        return FetchedAdapter(InstalledAdapter(name, Path("volume") / name / "file", "0" * 64), {})

    @contextlib.contextmanager
    def hold(self, *folders: Path) -> Iterator[None]:
        names = [folder.name for folder in folders]
        self.held.update(names)
        try:
            yield
        finally:
            self.held.subtract(names)


class Library:
    def find_local_adapter(self, *_: str) -> None:
        return None


@pytest.fixture
def fetcher() -> Fetcher:
    return Fetcher()


def choosing(fetcher: Any, held: contextlib.ExitStack, *names: str) -> asyncio.Task[Any]:
    options = {"textual_inversions": read_asked([f"https://host/{name}" for name in names], INVERSION, "x")}
    library: Any = Library()
    return asyncio.ensure_future(Adapters(Settings(), library, fetcher).choose(options, None, held))  # type: ignore[arg-type]


async def settle() -> None:
    for _ in range(10):
        await asyncio.sleep(0)


async def test_what_is_here_is_held_while_others_are_fetched(fetcher: Fetcher, monkeypatch: pytest.MonkeyPatch) -> None:
    def problem(*_: Any) -> Any:
        assert fetcher.held == {"first": 1, "second": 1}
        raise ApiError("INVALID_ADAPTER", "as far as this goes")

    monkeypatch.setattr(adapters, "_checked", problem)
    with contextlib.ExitStack() as held:
        task = choosing(fetcher, held, "first", "second")
        fetcher.arrived["first"].set()
        await settle()
        assert fetcher.held == {"first": 1}
        fetcher.arrived["second"].set()
        with pytest.raises(ApiError, match="as far as this goes"):
            await task
        assert fetcher.held == {"first": 1, "second": 1}
    assert not +fetcher.held


@pytest.mark.parametrize("how", ["one fails", "the client leaves"])
async def test_nothing_is_waited_for_or_held_any_more(fetcher: Fetcher, how: str) -> None:
    names = ("first", "second", "broken") if how == "one fails" else ("first", "second")
    with contextlib.ExitStack() as held:
        task = choosing(fetcher, held, *names)
        if how == "one fails":
            with pytest.raises(ApiError, match="away"):
                await task
        else:
            await settle()
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
    assert sorted(fetcher.left) == sorted(names)
    fetcher.arrived["first"].set()
    await settle()
    assert not +fetcher.held
