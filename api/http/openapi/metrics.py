"""The operation of ``http/metrics.py``."""

from __future__ import annotations

from api.http.openapi.parts import Answer, Operation, Operations
from api.settings import Settings


def operations(_: Settings) -> Operations:
    """It alone."""
    lines = {"type": "string"}
    return {
        "GET /metrics": Operation(
            id="metrics",
            tag="Health",
            summary="What Prometheus reads",
            description="What keys used is told of the key that asks; of every key, where it is one of `ADMIN_KEYS`.",
            answers={
                200: Answer(
                    "In its text format, or as OpenMetrics where `Accept` asks for it.",
                    {"text/plain": lines, "application/openmetrics-text": lines},
                )
            },
        ),
    }
