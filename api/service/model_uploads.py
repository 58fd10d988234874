"""Puts models where MODEL_URL said that they are to be kept, once an image was made with them."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import msgspec

from api.errors import ApiError
from api.models.archive_pack import pack
from api.models.locations import Location
from api.models.s3_upload import upload
from api.models.sources.remote import access_to
from api.schema.transfers import Transfer
from api.service.progress import Tracker
from api.service.threads import in_thread, soon
from api.settings import Settings

log = logging.getLogger("api.fetch")


class _Stopped(Exception):
    """The server stops."""


class ModelUploads:
    """What is to be uploaded, and what is being uploaded.

    Args:
        settings: the keys for it.
        held: counts who keeps a folder on the volume, by its name.
    """

    def __init__(self, settings: Settings, held: Counter[str]) -> None:
        self._settings = settings
        self._held = held
        self._asked: dict[str, Location] = {}
        self._trackers: dict[str, Tracker] = {}
        self._stopping = False

    def ask(self, folder: Path, location: Location) -> None:
        """Have a model uploaded when it was used."""
        self._asked[folder.name] = location

    def due(self, folder: Path, on_event: Callable[[Transfer], None] | None) -> Coroutine[Any, Any, None] | None:
        """The upload that was asked for, to be run now; None where none was.

        Args:
            folder: the model.
            on_event: called with what happens.
        """
        location = self._asked.pop(folder.name, None)
        return None if location is None else self._upload(folder, location, on_event)

    def now(self) -> list[Transfer]:
        """Everything that is on its way now."""
        return [transfer for tracker in self._trackers.values() for transfer in tracker.now()]

    def stop(self) -> None:
        """Break off what runs."""
        self._stopping = True

    async def _upload(self, folder: Path, location: Location, on_event: Callable[[Transfer], None] | None) -> None:
        loop = asyncio.get_running_loop()

        def tell(event: Transfer) -> None:
            if on_event is not None:
                if location.kind != "prefix":  # packed while it is sent
                    soon(loop, on_event, msgspec.structs.replace(event, kind="compress"))
                soon(loop, on_event, event)

        tracker = self._trackers[folder.name] = Tracker(folder.name, tell)
        self._held[folder.name] += 1
        by_hand = f"By hand: python -m api models push {folder.name} {location}"
        try:
            access = access_to(location, self._settings, trusted=True)
            await in_thread(
                lambda: upload(folder, location, self._reporting(tracker), access, pack=pack), f"upload {folder.name}"
            )
            log.info("uploaded %s to %s in %d ms", folder.name, location, tracker.timings.get("upload", 0))
        except ApiError as error:
            if error.code == "SOURCE_UNREACHABLE":
                self._asked[folder.name] = location  # tried again when the model is used again
            log.error("%s was not uploaded: %s %s %s", folder.name, error.code, error.message, by_hand)
        except _Stopped:
            log.warning("the upload of %s was broken off. %s", folder.name, by_hand)
        except Exception:
            log.exception("uploading %s failed. %s", folder.name, by_hand)
        finally:
            self._held[folder.name] -= 1
            del self._trackers[folder.name]

    def _reporting(self, tracker: Tracker) -> Callable[[str, int, int | None], None]:
        def report(phase: str, done: int, total: int | None) -> None:
            if self._stopping:
                raise _Stopped
            tracker.report(phase, done, total)

        return report
