"""The body of RunPod's ``run`` and ``runsync``: the input, and what is asked for beside it."""

from __future__ import annotations

from typing import Any, NamedTuple

from api.errors import ApiError
from api.schema.catalogue import nearest
from api.service.entries import Terms
from api.service.fetch import check_scheme
from api.service.runpod_input import RunpodInput, read_input
from api.service.s3_config import S3Config, read_s3_config

SYNC_RESULT_TTL = 60.0
"""Seconds that the result of ``runsync`` is kept, whose client has it already, as there."""
_KEYS = ("input", "webhook", "policy", "s3Config")
_POLICIES = ("executionTimeout", "ttl", "lowPriority")
_LONGEST = 7 * 86_400_000
_LONGEST_URL = 8192


class Asked(NamedTuple):
    """What a body of RunPod's routes asks for."""

    input: RunpodInput
    terms: Terms
    priority: str
    s3: S3Config | None


def read_body(data: dict[str, Any], *, owner: str, endpoint: str, sync: bool) -> Asked:
    """Check the shape of a body.

    Args:
        data: the JSON object.
        owner: whose job it is to be.
        endpoint: the word in the address.
        sync: it came to ``runsync``.

    Raises:
        ApiError: INVALID_INPUTS, UNKNOWN_INPUT, MISSING_INPUT, URL_NOT_ALLOWED, with the field.
    """
    sent = {key: value for key, value in data.items() if value is not None}
    for key in sent:
        if key not in _KEYS:
            hint = nearest(key, _KEYS) or f' Inputs such as "{key[:40]}" belong inside "input".'
            raise ApiError("UNKNOWN_INPUT", f"Unknown key.{hint}", field=key[:200], available=list(_KEYS))
    asked, policy = read_input(sent.get("input")), _read_policy(sent.get("policy", {}))
    seconds = {name: policy[name] / 1000 for name in ("executionTimeout", "ttl") if name in policy}
    terms = Terms(
        owner=owner,
        endpoint=endpoint,
        sync=sync,
        simple=asked.simple,
        webhook=_read_webhook(sent.get("webhook", "")),
        execution_timeout=seconds.get("executionTimeout"),
        ttl=seconds.get("ttl"),
        keep=SYNC_RESULT_TTL if sync else None,
    )
    s3 = read_s3_config(sent["s3Config"]) if "s3Config" in sent else None
    if s3 and ("output_url" in asked.call_inputs or "dest_url" in asked.call_inputs):
        message = "The images go to one place: send s3Config or output_url."
        raise ApiError("INVALID_INPUTS", message, field="s3Config")
    return Asked(asked, terms, "low" if policy.get("lowPriority") else "normal", s3)


def _read_policy(policy: Any) -> dict[str, Any]:
    if not isinstance(policy, dict):
        raise ApiError("INVALID_INPUTS", "Must be an object.", field="policy", requested=policy)
    sent = {key: value for key, value in policy.items() if value is not None}
    for key, value in sent.items():
        field = f"policy.{key[:200]}"
        if key not in _POLICIES:
            message = f"Unknown key.{nearest(key, _POLICIES)}"
            raise ApiError("UNKNOWN_INPUT", message, field=field, available=list(_POLICIES))
        if key == "lowPriority":
            if not isinstance(value, bool):
                raise ApiError("INVALID_INPUTS", "Must be true or false.", field=field, requested=value)
            continue
        least = 5_000 if key == "executionTimeout" else 10_000
        if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value <= _LONGEST:
            message = f"Must be milliseconds, from {least} to {_LONGEST}."
            raise ApiError("INVALID_INPUTS", message, field=field, requested=value)
    return sent


def _read_webhook(url: Any) -> str:
    if not isinstance(url, str) or len(url) > _LONGEST_URL:
        message = f"Must be a URL of at most {_LONGEST_URL} characters."
        raise ApiError("INVALID_INPUTS", message, field="webhook")
    if url:
        check_scheme(url, "webhook")
    return url
