"""The hub as a source of models: what a model id and a revision mean there, and its files.

Everything goes through ``huggingface_hub``, which brings tokens, HF_ENDPOINT, HF_HOME, proxies and Xet.
Its errors are turned into ours here. They are never chained or quoted: their texts hold signed URLs, and
a header that could not be sent is quoted with the token in it.
"""

from __future__ import annotations

import contextlib
import errno
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

import msgspec

from api.errors import ApiError
from api.models.hub_transfer import Mismatch, RemoteFile, headers, is_transient, retry_after, transfer, transport_error
from api.models.manifest import FileEntry, OnProgress
from api.models.names import check_model_id, check_revision
from api.models.parts import is_part
from api.models.select import MODEL_INDEX, Selection, select_files, select_part

ID_FIELD = "callInputs.MODEL_ID"
REVISION_FIELD = "callInputs.MODEL_REVISION"
PRECISIONS = ("fp16", "bf16", "fp32")

_TRIES = 3
_PAUSE = 0.5
_LONGEST_PAUSE = 5
_COMMIT = re.compile(r"[0-9a-f]{40}")
_TOKEN = re.compile(r"[\x21-\x7e]+")
_MEANINGLESS = (ValueError, KeyError, TypeError, AttributeError, msgspec.MsgspecError)
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT)

T = TypeVar("T")


class Plan(msgspec.Struct, frozen=True):
    """What to fetch for one model. It holds no token.

    Attributes:
        model_id: as it was asked for.
        repo: the id as the hub itself spells it, or what the repository is called today.
        commit: 40 hex digits; the same revision may mean another commit tomorrow.
        selection: the files of the repository that the pipeline needs.
        files: the same with sizes, hashes and addresses.
        source: the model's page, without credentials.
    """

    model_id: str
    repo: str
    commit: str
    selection: Selection
    files: tuple[RemoteFile, ...]
    source: str

    @property
    def size(self) -> int:
        """All files together, in bytes."""
        return sum(file.size for file in self.files)


def resolve(
    model_id: str,
    revision: str = "",
    precision: str = "",
    token: str | None = None,
    endpoint: str | None = None,
    part: str = "",
) -> Plan:
    """Ask the hub what a model is made of: three requests, no weights.

    Args:
        model_id: ``org/name``.
        revision: branch, tag or commit; empty: the default branch.
        precision: ``""``, ``fp32``, ``fp16`` or ``bf16``; see ``select_files``.
        token: what to authenticate with; None: what ``huggingface_hub`` finds (HF_TOKEN, a login under HF_HOME).
        endpoint: address of the hub; None: HF_ENDPOINT, or the public hub.
        part: what of a pipeline is wanted; empty: all of it.

    Raises:
        ApiError: INVALID_INPUTS, SOURCE_DENIED, MODEL_NOT_FOUND (for a missing revision ``available`` lists
            branches and tags), MODEL_BROKEN (see ``select_files``), SOURCE_UNREACHABLE.
    """
    from huggingface_hub import HfApi, constants, hf_hub_url

    check_model_id(model_id, ID_FIELD)
    check_revision(revision, REVISION_FIELD)
    token = _check_token(token)
    # HF_ENDPOINT that is set but empty is taken as an address by the library
    address = (endpoint or constants.ENDPOINT or "https://huggingface.co").rstrip("/")
    hub = _Hub(model_id, address, token)
    with hub.told(reading=True):
        try:
            info = _patiently(
                lambda: HfApi(endpoint=address).model_info(
                    model_id,
                    revision=revision or None,
                    files_metadata=True,
                    timeout=constants.HF_HUB_ETAG_TIMEOUT,
                    token=token,
                )
            )
        except Exception as fault:
            if type(fault).__name__ != "RevisionNotFoundError":
                raise
            raise _no_such_revision(hub, revision) from None
        repo, commit = check_model_id(str(info.id), ID_FIELD), str(info.sha)
        siblings = {sibling.rfilename: sibling for sibling in info.siblings or []}
        if not _COMMIT.fullmatch(commit):
            raise ValueError("no commit")

        def url(name: str) -> str:
            return hf_hub_url(model_id, name, revision=commit, endpoint=address)

        # The listing of a gated model is public, its files are not: this request also finds that out early.
        if part:
            selection = select_part(siblings, part, precision)
        else:
            index = hub.json(url(MODEL_INDEX)) if MODEL_INDEX in siblings else {}
            selection = select_files(siblings, index, precision)
        files = tuple(hub.remote_file(siblings[name], url(name)) for name in selection.files)
    return Plan(model_id, repo, commit, selection, files, hub.page)


def fetch(
    plan: Plan, folder: Path, on_progress: OnProgress, *, token: str | None = None, workers: int = 8
) -> tuple[FileEntry, ...]:
    """Bring the files of a plan into a folder: these and no others.

    A file appears under its name when it is whole, its hash was compared and it is on the disk. What was
    interrupted, also by a kill, goes on where it stopped when this is called again with the same folder;
    until it returns, unfinished parts lie in ``.transfer`` there.

    Args:
        plan: from ``resolve``.
        folder: made if missing; for one call at a time.
        on_progress: called in this thread, at least five times a second; raise in it to stop.
        token: as for ``resolve``.
        workers: files at once.

    Returns:
        What lies there now, each with its SHA-256.

    Raises:
        ApiError: SOURCE_DENIED, SOURCE_UNREACHABLE, MODEL_NOT_FOUND, MODEL_CORRUPT, DISK_FULL.
    """
    token = _check_token(token)
    hub = _Hub(plan.model_id, plan.source.removesuffix(f"/{plan.model_id}"), token)

    def tell(phase: str, done: int, total: int | None) -> None:
        try:
            on_progress(phase, done, total)
        except Exception as fault:
            hub.not_ours = fault
            raise

    with hub.told():
        return transfer(plan.model_id, plan.commit, plan.files, folder, tell, token, workers)


def dataset_file(repo: str, name: str, token: str | None = None, endpoint: str | None = None) -> bytes | None:
    """A small file of a dataset on the hub, as it is on its default branch; None: there is none of that name.

    Args:
        repo: ``org/name`` of the dataset.
        name: of the file in it.
        token: as for ``resolve``.
        endpoint: as for ``resolve``.

    Raises:
        ApiError: SOURCE_DENIED, SOURCE_UNREACHABLE, MODEL_NOT_FOUND: there is no such dataset.
    """
    from huggingface_hub import constants, hf_hub_url
    from huggingface_hub.errors import EntryNotFoundError

    address = (endpoint or constants.ENDPOINT or "https://huggingface.co").rstrip("/")
    hub = _Hub(repo, address, _check_token(token))
    with hub.told():
        try:
            return hub.content(hf_hub_url(repo, name, repo_type="dataset", revision="main", endpoint=address))
        except EntryNotFoundError:
            return None


def cached(model_id: str, revision: str, cache_dir: Path, precision: str = "", part: str = "") -> Path | None:
    """Find a model in a hub cache folder, such as a platform brings along. No network, no lock, no write.

    The layout is that of ``huggingface_hub``: ``models--org--name/refs/main`` holds a commit,
    ``snapshots/COMMIT`` the files. A snapshot counts when every file that the pipeline needs is there; what
    the files hold is not looked at.

    Args:
        model_id: ``org/name``.
        revision: branch, tag or commit; empty: ``main``, or the only snapshot there is.
        cache_dir: the folder with the ``models--…`` folders.
        precision: see ``select_files``.
        part: as for ``resolve``.

    Returns:
        The snapshot's folder (its files may be links into ``blobs``), or None.

    Raises:
        ApiError: INVALID_INPUTS for a name that is not safe.
    """
    check_model_id(model_id, ID_FIELD)
    check_revision(revision, REVISION_FIELD)
    repository = cache_dir / f"models--{model_id.replace('/', '--')}"
    try:
        snapshot = _snapshot(repository, revision)
        if snapshot is None:
            return None
        names = [path.relative_to(snapshot).as_posix() for path in snapshot.rglob("*") if path.is_file()]
        if part:
            select_part(names, part, precision)
            return snapshot if is_part(snapshot, part) else None
        index = msgspec.json.decode((snapshot / MODEL_INDEX).read_bytes(), type=dict[str, Any])
        select_files(names, index, precision)
    except (OSError, msgspec.MsgspecError, ApiError):
        return None
    return snapshot


def _snapshot(repository: Path, revision: str) -> Path | None:
    if _COMMIT.fullmatch(revision):
        commit = revision
    else:
        ref = repository / "refs" / (revision or "main")
        commit = ref.read_text().strip() if ref.is_file() else ""
    if not commit and not revision:
        snapshots = [path for path in (repository / "snapshots").iterdir() if path.is_dir()]
        return snapshots[0] if len(snapshots) == 1 else None
    found = repository / "snapshots" / commit
    return found if _COMMIT.fullmatch(commit) and found.is_dir() else None


class _Hub:
    """One model on one hub, and how its errors are told."""

    def __init__(self, model_id: str, address: str, token: str | None) -> None:
        parts = urlsplit(address)
        self.model_id = model_id
        self.host = parts.netloc.rpartition("@")[2]
        self.page = f"{parts.scheme}://{self.host}{parts.path}/{model_id}"
        self._refs = f"{address}/api/models/{model_id}/refs"
        self._token = token
        self.not_ours: Exception | None = None
        """What the caller raised to stop; it passes as it is."""

    def json(self, url: str) -> dict[str, Any]:
        """GET a small JSON object."""
        return msgspec.json.decode(self.content(url), type=dict[str, Any])

    def content(self, url: str) -> bytes:
        """GET a small file."""
        # not HfApi.list_repo_refs and the like: those wait forever for a server that does not answer
        from huggingface_hub import constants, get_session, hf_raise_for_status

        def get() -> bytes:
            response = get_session().get(url, headers=headers(self._token), timeout=constants.HF_HUB_ETAG_TIMEOUT)
            hf_raise_for_status(response)
            return response.content

        return _patiently(get)

    def refs(self) -> tuple[list[str], list[str]]:
        """Branches and tags."""
        found = self.json(self._refs)
        branches, tags = ([str(ref["name"]) for ref in found.get(kind, [])] for kind in ("branches", "tags"))
        return branches, tags

    def remote_file(self, sibling: Any, url: str) -> RemoteFile:
        """What the listing says of a file; its size is asked for where the listing has none."""
        from huggingface_hub import get_hf_file_metadata

        size = sibling.size
        if size is None:
            size = _patiently(lambda: get_hf_file_metadata(url, token=self._token)).size
        if size is None:
            raise ValueError("no size")
        sha256 = sibling.lfs.sha256 if sibling.lfs else None
        return RemoteFile(sibling.rfilename, int(size), sha256, None if sha256 else sibling.blob_id, url)

    @contextlib.contextmanager
    def told(self, *, reading: bool = False) -> Iterator[None]:
        """Turn what the library raises into ApiError; with ``reading``, also answers that mean nothing."""
        try:
            yield
        except ApiError:
            raise
        except Exception as fault:
            error = None if fault is self.not_ours else self._error(fault)
            if error is None and reading and isinstance(fault, _MEANINGLESS):
                error = self._unreachable("what it answered is not what a hub answers")
            if error is None:
                raise
            raise error from None

    def _error(self, fault: Exception) -> ApiError | None:
        from huggingface_hub import errors

        if isinstance(fault, errors.HfHubHTTPError):
            return self._refusal(fault)
        if isinstance(fault, Mismatch):
            message = f"{fault.path} of {self.model_id} from {self.host} is not what the hub says it is: {fault.why}."
            return ApiError("MODEL_CORRUPT", message, field=ID_FIELD, requested=self.model_id)
        if isinstance(fault, errors.OfflineModeIsEnabled):
            return self._unreachable("HF_HUB_OFFLINE is set")
        if isinstance(fault, errors.HFValidationError):
            return ApiError("INVALID_INPUTS", "The hub allows no such model id.", field=ID_FIELD)
        if isinstance(fault, OSError) and fault.errno in _NO_SPACE:
            message = f"There is not enough room on the disk for {self.model_id}."
            return ApiError("DISK_FULL", message, field=ID_FIELD, requested=self.model_id)
        if isinstance(fault, (transport_error(), ConnectionError)):
            return self._unreachable(_in_words(fault))
        return None

    def _refusal(self, fault: Any) -> ApiError:
        from huggingface_hub import errors

        status = fault.response.status_code
        # a gated repository is also one that was not found, in the library's classes
        if isinstance(fault, errors.GatedRepoError):
            return self._denied(f"it is gated: accept its licence at {self.page}")
        if isinstance(fault, errors.DisabledRepoError):
            return self._denied("it was disabled")
        if isinstance(fault, errors.RepositoryNotFoundError):
            return self._missing("has no such model, or it is private: set HF_TOKEN to a token that may read it")
        if isinstance(fault, errors.EntryNotFoundError):
            return self._missing("has the model, but not one of the files that it lists")
        if status in (401, 403):
            return self._denied(f"the answer was {status}")
        if status in (404, 410):
            return self._missing("has no such model")
        return self._unreachable(f"it answered {status}", retry_after(fault))

    def _denied(self, why: str) -> ApiError:
        if self._token:
            then = "the token that is set (HF_TOKEN) is wrong, expired, or its account has no access"
        else:
            then = "set HF_TOKEN to a token of an account that has access"
        message = f"{self.host} does not give out {self.model_id}: {why}; {then}."
        return ApiError("SOURCE_DENIED", message, field=ID_FIELD, requested=self.model_id)

    def _missing(self, why: str) -> ApiError:
        return ApiError("MODEL_NOT_FOUND", f"{self.host} {why}.", field=ID_FIELD, requested=self.model_id)

    def _unreachable(self, why: str, wait: int | None = None) -> ApiError:
        message = f"{self.model_id} could not be fetched from {self.host}: {why}."
        return ApiError("SOURCE_UNREACHABLE", message, field=ID_FIELD, requested=self.model_id, retry_after=wait)


def _no_such_revision(hub: _Hub, revision: str) -> ApiError:
    branches, tags = hub.refs()
    there = f"Branches: {', '.join(branches) or 'none'}; tags: {', '.join(tags) or 'none'}."
    hint = " A precision is not a revision: use MODEL_PRECISION." if revision in PRECISIONS else ""
    return ApiError(
        "MODEL_NOT_FOUND",
        f'{hub.model_id} has no revision "{revision}".{hint} {there}',
        field=REVISION_FIELD,
        requested=revision,
        available=[*branches, *tags],
    )


def _check_token(token: str | None) -> str | None:
    from huggingface_hub import constants, get_token

    if not token and not constants.HF_HUB_DISABLE_IMPLICIT_TOKEN:
        token = get_token()
    token = (token or "").strip()
    if token and not _TOKEN.fullmatch(token):
        raise ApiError("SOURCE_DENIED", "The token for the hub (HF_TOKEN) holds characters that no token has.")
    return token or None


def _patiently(call: Callable[[], T]) -> T:
    """Call again after a fault that may pass; waits a few seconds in all."""
    for attempt in range(1, _TRIES + 1):
        try:
            return call()
        except Exception as fault:
            wait = retry_after(fault) or _PAUSE * 2**attempt / 2
            if attempt == _TRIES or not is_transient(fault) or wait > _LONGEST_PAUSE:
                raise
            time.sleep(wait)
    raise AssertionError


def _in_words(fault: Exception) -> str:
    """The kind of a network fault; its text may hold what must not be told."""
    kind = type(fault).__name__
    if "Timeout" in kind:
        return "no answer in time"
    return {"ConnectError": "no connection", "RemoteProtocolError": "the connection was cut"}.get(kind, kind)
