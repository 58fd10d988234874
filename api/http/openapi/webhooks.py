"""The operations of ``http/webhooks.py``."""

from __future__ import annotations

from api.http.openapi.parts import Operation, Operations, array, obj, path, query, text, whole, words
from api.http.openapi.parts import answer as of
from api.settings import Settings

_ENTRY = obj(
    {
        "id": text("as `X-Webhook-Id` says it to the receiver"),
        "state": words("waiting", "failed", description="failed: it was given up"),
        "kind": words("native", "runpod"),
        "job": text("which job it is about"),
        "url": text("without what may be a secret"),
        "created": whole("milliseconds since 1970"),
        "tries": whole(),
        "due": whole("when it is tried again"),
        "givenUp": whole("when it was given up"),
        "error": text("what went wrong the last time"),
    },
    "due", "givenUp", "error",
)  # fmt: skip
_EXAMPLE = {
    "id": "msg_15dfccd203f24d9f", "state": "failed", "kind": "native", "job": "15dfccd203f24d9f",
    "url": "https://example.com/hook", "created": 1795286406268, "tries": 12, "givenUp": 1795372806268,
    "error": "503 Service Unavailable",
}  # fmt: skip


def operations(_: Settings) -> Operations:
    """Both of them."""
    return {
        "GET /webhooks": Operation(
            id="listWebhooks",
            tag="Webhooks",
            summary="Webhooks that wait, or were given up",
            description="Those of the key that asks; of every key, where it is one of `ADMIN_KEYS`.",
            parameters=(
                query("state", words("waiting", "failed"), "only those"),
                query("limit", whole(minimum=1, maximum=1000, default=100), "how many"),
            ),
            answers={200: of("The newest first.", obj({"webhooks": array(_ENTRY)}), given_up={"webhooks": [_EXAMPLE]})},
            errors=("INVALID_INPUTS", "NOT_READY"),
        ),
        "POST /webhooks/{id}/redeliver": Operation(
            id="redeliverWebhook",
            tag="Webhooks",
            summary="Send one again",
            description="One that was given up begins anew; one that waits is sent now.",
            parameters=(path("id", text(minLength=1), "as it is listed", "msg_15dfccd203f24d9f"),),
            answers={202: of("It will be sent.", _ENTRY, again={**_EXAMPLE, "state": "waiting"})},
            errors=("NO_SUCH_WEBHOOK", "NOT_READY"),
        ),
    }
