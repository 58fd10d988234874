"""Loaded by Schemathesis itself: how it reads lines of JSON."""

from __future__ import annotations

import json
from typing import Any

import schemathesis


@schemathesis.deserializer("application/x-ndjson")
def lines(_: Any, response: Any) -> list[Any]:
    return [json.loads(line) for line in response.content.splitlines()]
