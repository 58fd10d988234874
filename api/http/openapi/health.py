"""The operations of ``http/health.py``."""

from __future__ import annotations

from api.http.openapi.parts import Answer, Operation, Operations, array, flag, obj, ref, text, whole, words
from api.http.openapi.parts import answer as of
from api.settings import Settings

_STATE = words("STARTING", "READY", "BUSY", "DRAINING", "DEFUNCT", description="BUSY: no worker has a free slot")
_WORKER = obj(
    {
        "device": text(examples=["cuda:0"]),
        "name": {"type": ["string", "null"]},
        "ready": flag(),
        "busy": flag(),
        "running": whole("jobs that share the device now"),
        "restarts": whole(),
    }
)
_STATUS = {"state": _STATE, "queue": whole("requests and jobs that wait"), "workers": array(_WORKER)}
_EXAMPLE = {
    "state": "READY",
    "queue": 0,
    "workers": [{"device": "cpu", "name": "a CPU", "ready": True, "busy": False, "running": 0, "restarts": 0}],
}


def operations(_: Settings) -> Operations:
    """All of them."""
    ready = {**_EXAMPLE, "transfers": []}
    starting = {**ready, "state": "STARTING"}
    full = obj({**_STATUS, "transfers": array(ref("Transfer"), description="empty where there are keys")})
    legacy = obj({"state": words("healthy", "unhealthy"), "gpu": flag("whether there is a GPU")})
    return {
        "GET /health/live": Operation(
            id="live",
            tag="Health",
            summary="Does the process live?",
            answers={200: of("It lives.", obj({"state": words("LIVE")}), live={"state": "LIVE"})},
            open=True,
        ),
        "GET /health/ready": Operation(
            id="ready",
            tag="Health",
            summary="Can a worker run jobs?",
            answers={
                200: of("A worker can run jobs, at once or when others are done.", full, ready=ready),
                503: of("None can.", full, starting=starting),
            },
            open=True,
        ),
        "GET /ping": Operation(
            id="ping",
            tag="Health",
            summary="The same, as load balancers of serverless platforms ask",
            answers={
                200: of("A worker can run jobs.", obj(_STATUS), ready=_EXAMPLE),
                204: Answer("It is starting."),
                503: of("None can, and it is not starting.", obj(_STATUS), gone={**_EXAMPLE, "state": "DRAINING"}),
            },
            open=True,
        ),
        "GET /healthcheck": Operation(
            id="healthcheck",
            tag="Health",
            summary="As docker-diffusers-api has it",
            answers={
                200: of("It lives.", legacy, healthy={"state": "healthy", "gpu": True}),
                503: of("Its workers do not start.", legacy, unhealthy={"state": "unhealthy", "gpu": True}),
            },
            open=True,
        ),
    }
