"""Every error a client can get: its code, its HTTP status, and what it means.

Errors are raised as ``ApiError`` where they are known and turned into HTTP in one place
(``api.http.errors``). ``docs/errors.md`` is checked against this table.
"""

from __future__ import annotations

from typing import Any

CODES: dict[str, tuple[int, str]] = {
    "INVALID_JSON": (400, "The body is not JSON, or not a JSON object."),
    "INVALID_INPUTS": (400, "A field has the wrong type or value; `field` names it."),
    "UNKNOWN_INPUT": (400, "A key that the pipeline, or this API, does not know."),
    "MISSING_INPUT": (400, "A key that this pipeline needs was not sent."),
    "INVALID_IMAGE": (400, "An image could not be decoded."),
    "INVALID_CROSS_ATTENTION_KWARGS": (400, "`cross_attention_kwargs` is not an object, or not one in a string."),
    "URL_NOT_ALLOWED": (400, "The address is not http(s), or leads into a private network."),
    "LIMIT_EXCEEDED": (400, "The request is over a limit of this server; the message names the limit."),
    "NO_MODEL_ID": (400, "No model was named and the server has no default."),
    "UNAUTHORIZED": (401, "There is no key, or none of the server's: send `Authorization: Bearer KEY`."),
    "SAFETY_REQUIRED": (403, "SAFETY_CHECKER is required, and the request or the model would do without one."),
    "REMOTE_CODE_NOT_ALLOWED": (403, "The pipeline would be code from the hub, and ALLOW_REMOTE_CODE is not set."),
    "NOT_FOUND": (404, "No such route."),
    "MODEL_NOT_FOUND": (
        404,
        "The source has no such model, or no such revision of it; `available` lists what there is.",
    ),
    "MODEL_MISMATCH": (
        404,
        "The model is not here, and this server, or this route, fetches none; `available` lists what is here.",
    ),
    "NO_SUCH_PIPELINE": (404, "diffusers has no pipeline class of that name."),
    "NO_SUCH_SCHEDULER": (404, "diffusers has no scheduler class of that name."),
    "NO_SUCH_EXTRA": (404, "`use_extra` names none of this server's extras; `available` lists them."),
    "NO_SUCH_JOB": (404, "There is no such job, or its result was kept as long as RESULT_TTL says and removed."),
    "NO_SUCH_WEBHOOK": (404, "There is no such webhook: it has arrived, or was given up long ago."),
    "METHOD_NOT_ALLOWED": (405, "The route exists, but not with this method."),
    "NOT_ACCEPTABLE": (406, "The `Accept` header asks for something the answer cannot be."),
    "BODY_TOO_LARGE": (413, "The body is larger than MAX_BODY."),
    "IMAGE_TOO_LARGE": (413, "An image has more pixels or bytes than allowed."),
    "INVALID_SCHEDULER": (422, "The scheduler exists but is not compatible with this model."),
    "PIPELINE_NOT_SUPPORTED": (422, "The pipeline exists but cannot be built from this model."),
    "NOT_SUPPORTED": (422, "A known option that this version does not offer."),
    "MODEL_BROKEN": (422, "The model's files are there, but cannot be loaded or converted."),
    "INVALID_ADAPTER": (422, "The file is no LoRA or textual inversion, or not one that fits this model."),
    "INVALID_UPSCALER": (422, "The file is no upscaler, or of a kind that is not run here; the message says which."),
    "PICKLE_NOT_ALLOWED": (422, "The weights are a pickle, and this server reads only safetensors."),
    "PIPELINE_ERROR": (422, "diffusers refused the inputs when the pipeline ran."),
    "QUEUE_FULL": (429, "Too many requests are waiting; try again after `Retry-After` seconds."),
    "RATE_LIMITED": (429, "The key has begun as many jobs in the last minute as it may (KEY_RATE_LIMIT)."),
    "TOO_MANY_JOBS": (429, "As many jobs of the key wait or run as it may have (KEY_CONCURRENCY)."),
    "TOO_MANY_WRONG_KEYS": (429, "Too many wrong keys came from the address; for a while no other is looked at."),
    "HEADERS_TOO_LARGE": (431, "The address and the headers of the request are longer than 8 KiB together."),
    "CANCELLED": (499, "The client went away, the job was cancelled, or a model was unloaded while it was loaded."),
    "INTERNAL_ERROR": (500, "A fault of the server; the log has the request id."),
    "SOURCE_UNREACHABLE": (502, "An image or a model could not be fetched from where it lies."),
    "UPLOAD_FAILED": (502, "The images could not be put where `output_url` or `s3Config` says."),
    "NOT_READY": (503, "No worker can run jobs at the moment."),
    "TOO_MANY_CONNECTIONS": (503, "As many connections are open as the server takes (MAX_CONNECTIONS)."),
    "WORKER_DIED": (503, "The server died three times while it ran this job for later."),
    "JOB_KILLED_WORKER": (422, "The worker died while it ran this job alone; it is not tried again for a while."),
    "TIMED_OUT": (504, "The request took longer than REQUEST_TIMEOUT, or a job than its policy allows."),
    "SOURCE_DENIED": (422, "The source of a model asks for a key, or the key may not read it."),
    "ARCHIVE_UNSAFE": (422, "A model's archive holds a path, a link or a size that is not unpacked."),
    "MODEL_CORRUPT": (502, "What was fetched is not what the source says it is."),
    "DISK_FULL": (507, "The model does not fit on the volume, or within its limit."),
    "OUT_OF_MEMORY": (507, "The request does not fit in the device's memory."),
}


_LONGEST = 200


def _shown(value: Any) -> Any:
    """What a client asked for, short, and in a form that JSON can hold."""
    if value is None or isinstance(value, bool) or (isinstance(value, int | float) and abs(value) < 2**63):
        return value
    if isinstance(value, list) and len(str(value)) <= _LONGEST and all(_shown(item) is item for item in value):
        return value
    text = str(value)
    return text if len(text) <= _LONGEST else text[:_LONGEST] + "…"


class ApiError(Exception):
    """An error that is told to the client.

    Args:
        code: a key of ``CODES``.
        message: what was wrong and what to do about it, one sentence or two.
        field: path of the offending field, e.g. ``modelInputs.width``.
        requested: what the client asked for.
        available: what it could have asked for.
        retry_after: seconds after which trying again makes sense.
    """

    def __init__(
        self,
        code: str,
        message: str,
        *,
        field: str | None = None,
        requested: Any = None,
        available: Any = None,
        retry_after: int | None = None,
    ) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.field = field
        self.requested = requested
        self.available = available
        self.retry_after = retry_after

    @property
    def status(self) -> int:
        """The HTTP status of this error."""
        return CODES[self.code][0]

    def body(self) -> dict[str, Any]:
        """The ``$error`` object, without the parts that are not set."""
        parts = {
            "code": self.code,
            "message": self.message,
            "field": self.field,
            "requested": _shown(self.requested),
            "available": self.available,
        }
        return {key: value for key, value in parts.items() if value is not None}


def nothing_to_offload(asked: str) -> ApiError:
    """Of OFFLOAD where weights are computed with where they lie."""
    message = (
        f"OFFLOAD {asked} saves no memory on a CPU, where weights are computed with where they lie. Leave it out; a "
        "model larger than the memory needs more of it."
    )
    return ApiError("NOT_SUPPORTED", message, field="callInputs.OFFLOAD", requested=asked, available=["auto", "none"])
