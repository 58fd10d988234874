"""Signs webhooks: as docker-diffusers-api does, for those who check that, and in two ways that are safe.

``sig`` in the body is its md5, which holds against nobody who can extend a text, and breaks where a receiver writes the
JSON again in its own way. The headers sign the bytes that are sent:

- ``X-Signature: t=<seconds>,v1=<hex>``: HMAC-SHA256 under SIGN_KEY, as it is, of ``<seconds>.<id>.<body>``, where the
  id is that of ``X-Webhook-Id``;
- ``webhook-id``, ``webhook-timestamp``, ``webhook-signature``: Standard Webhooks
  (https://github.com/standard-webhooks/standard-webhooks/blob/main/spec/standard-webhooks.md), for its libraries.
  A SIGN_KEY that begins with ``whsec_`` is base64 there; else its bytes are the key.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import json
from typing import Any

_PREFIX = "whsec_"


def check_key(key: str) -> None:
    """Whether a SIGN_KEY can be used.

    Raises:
        ValueError: what is wrong, in half a sentence.
    """
    try:
        if not _standard_key(key):
            raise ValueError
    except ValueError:
        raise ValueError("what follows whsec_ must be base64, as Standard Webhooks has it") from None


def native_body(event: dict[str, Any], key: str) -> bytes:
    """An event as it is sent, with ``sig`` at its end where there is a key."""
    event = {name: _plain(value) for name, value in event.items()}
    if key:
        event["sig"] = hashlib.md5((_compact(event) + key).encode(), usedforsecurity=False).hexdigest()
    return _compact(event).encode()


def headers(webhook_id: str, body: bytes, key: str, now: float) -> list[tuple[str, str]]:
    """What a webhook is sent with.

    Args:
        webhook_id: the same at every try, so that a receiver knows what it has got before.
        body: as it is sent.
        key: SIGN_KEY; empty: it is not signed.
        now: seconds since the epoch, of this try.
    """
    seconds = str(int(now))
    found = [("X-Webhook-Id", webhook_id), ("webhook-id", webhook_id), ("webhook-timestamp", seconds)]
    if key:
        ours = hmac.new(key.encode(), f"{seconds}.{webhook_id}.".encode() + body, hashlib.sha256).hexdigest()
        theirs = hmac.new(_standard_key(key), f"{webhook_id}.{seconds}.".encode() + body, hashlib.sha256).digest()
        found.append(("X-Signature", f"t={seconds},v1={ours}"))
        found.append(("webhook-signature", f"v1,{base64.b64encode(theirs).decode()}"))
    return found


def _standard_key(key: str) -> bytes:
    if not key.startswith(_PREFIX):
        return key.encode()
    text = key.removeprefix(_PREFIX)
    try:
        return base64.b64decode(text + "=" * (-len(text) % 4), validate=True)
    except binascii.Error as fault:
        raise ValueError(str(fault)) from None


def _compact(event: dict[str, Any]) -> str:
    return json.dumps(event, separators=(",", ":"))


def _plain(value: Any) -> Any:
    """Whole numbers without a fraction: receivers in JavaScript write the JSON again for ``sig``, and 1.0 as 1."""
    if isinstance(value, dict):
        return {name: _plain(inner) for name, inner in value.items()}
    return int(value) if isinstance(value, float) and value.is_integer() else value
