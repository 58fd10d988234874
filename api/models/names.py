"""What a model may be called, and the folder name that follows from it."""

from __future__ import annotations

import re

from api.errors import ApiError

_PART = r"[A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9])?"
_REVISION = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9._/+-]*[A-Za-z0-9_+-])?")
_MODEL_ID = re.compile(rf"{_PART}(?:/{_PART})?")


def is_model_id(model_id: str) -> bool:
    """Whether a name is safe: see ``check_model_id``."""
    return (
        len(model_id) <= 200 and bool(_MODEL_ID.fullmatch(model_id)) and ".." not in model_id and "--" not in model_id
    )


def check_model_id(model_id: str, field: str) -> str:
    """Return the id if its name is safe.

    A name is one or two parts of letters, digits, ``.``, ``_`` and ``-`` that begin and end with a
    letter or digit, so that no name can leave the models folder or reach a shell.

    Raises:
        ApiError: INVALID_INPUTS.
    """
    if not is_model_id(model_id):
        raise ApiError(
            "INVALID_INPUTS",
            'A model id looks like "org/name": letters, digits, ".", "_" and "-".',
            field=field,
            requested=model_id,
        )
    return model_id


def check_revision(revision: str, field: str) -> str:
    """Return the revision if it can be one: a branch, a tag, a commit or a fingerprint, as git allows them or stricter.

    Raises:
        ApiError: INVALID_INPUTS.
    """
    if revision and (len(revision) > 200 or not _REVISION.fullmatch(revision) or ".." in revision or "//" in revision):
        message = "A revision is a branch, a tag or a commit of the model's repository."
        raise ApiError("INVALID_INPUTS", message, field=field, requested=revision[:200])
    return revision


def folder_name(model_id: str) -> str:
    """The folder under MODELS_DIR that holds the model: ``org/name`` lies in ``org--name``."""
    return model_id.replace("/", "--")


def model_id_of(folder: str) -> str:
    """The inverse of ``folder_name``."""
    return folder.replace("--", "/", 1)
