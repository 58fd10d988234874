"""The operation of ``http/usage.py``."""

from __future__ import annotations

from api.http.openapi.parts import Operation, Operations, array, maybe, number, obj, text, whole
from api.http.openapi.parts import answer as of
from api.settings import Settings

_LIMITS = obj(
    {
        "jobsPerMinute": maybe(whole("that it may begin; null: no limit")),
        "concurrency": maybe(whole("jobs of it that may wait or run; null: no limit")),
        "jobs": whole("that do now"),
    }
)
_USED = obj(
    {
        "owner": text("the name of the key; empty where none is needed"),
        "requests": whole("that came to their end"),
        "images": whole(),
        "device_seconds": number("that its jobs were computed for"),
        "load_seconds": number("that models were loaded for them"),
        "failures": whole(),
        "limits": _LIMITS,
    }
)
_EXAMPLE = {
    "usage": [
        {
            "owner": "alice", "requests": 12, "images": 15, "device_seconds": 31.5, "load_seconds": 0.9, "failures": 1,
            "limits": {"jobsPerMinute": 60, "concurrency": None, "jobs": 0},
        }
    ],
    "since": 1795286406268,
}  # fmt: skip


def operations(_: Settings) -> Operations:
    """It alone."""
    usage = obj({"usage": array(_USED), "since": whole("milliseconds since 1970: when counting began")})
    return {
        "GET /usage": Operation(
            id="usage",
            tag="Keys",
            summary="What a key has had of the server",
            description="Of the key that asks; of every key, where it is one of `ADMIN_KEYS`.",
            answers={200: of("What was counted.", usage, alice=_EXAMPLE)},
        ),
    }
