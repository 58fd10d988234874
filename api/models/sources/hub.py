"""The hub as a source: a repository at a commit."""

from __future__ import annotations

from pathlib import Path, PurePosixPath

import msgspec

from api.errors import ApiError
from api.models import hub
from api.models.conversion import convert_pickles
from api.models.hub_transfer import RemoteFile
from api.models.keys import HubFiles, model_key
from api.models.manifest import OnProgress, list_files
from api.models.refs import SourceRef
from api.models.sources.remote import hub_token
from api.models.sources.source import Got, Source
from api.settings import Settings

_SMALL = 16 * 2**20
_WEIGHTS = (".safetensors", ".bin")


class HubSource(Source):
    """A repository on the hub.

    Args:
        ref: names repository, revision and precision.
        settings: the hub's address and token.

    Raises:
        ApiError: see ``hub.resolve``.
    """

    def __init__(self, ref: SourceRef, settings: Settings) -> None:
        self.is_known = True
        self._token = hub_token(settings) or None
        self._allow_pickle = settings.allow_pickle != "0"
        plan = hub.resolve(ref.repo, ref.revision, ref.precision, self._token, settings.hf_endpoint or None, ref.part)
        self._plan = plan
        selection = plan.selection
        if selection.needs_conversion and not self._allow_pickle:
            raise pickle_not_allowed(ref.repo)
        self.key = model_key(HubFiles(plan.repo, plan.commit, selection.variant, ref.part))
        self.origin, self.revision, self.variant = plan.source, plan.commit, selection.variant
        self.size = plan.size
        self.bytes = plan.size * (2 if selection.needs_conversion else 1)

    def configuration(self, folder: Path, on_progress: OnProgress) -> bool:
        """The files that are no weights; they are few and small."""
        small = tuple(file for file in self._plan.files if _is_small(file))
        hub.fetch(msgspec.structs.replace(self._plan, files=small), folder, on_progress, token=self._token)
        return True

    def fetch(self, folder: Path, on_progress: OnProgress) -> Got:
        """Every file that the pipeline needs; weights that are pickles become safetensors."""
        files = hub.fetch(self._plan, folder, on_progress, token=self._token)
        if self._plan.selection.needs_conversion:
            convert_pickles(folder, on_progress, allow_pickle=self._allow_pickle)
            files = tuple(entry for entry in list_files(folder) if not entry.path.startswith("."))
        return Got(files, verified=True)


def pickle_not_allowed(name: str) -> ApiError:
    """The error for weights that are only there as ``.bin``."""
    message = f"{name} has weights only as .bin, which are pickles, and this server takes none (ALLOW_PICKLE=0)."
    return ApiError("PICKLE_NOT_ALLOWED", message, field="callInputs.MODEL_ID", requested=name)


def _is_small(file: RemoteFile) -> bool:
    return PurePosixPath(file.path).suffix not in _WEIGHTS and file.size < _SMALL
