"""Which errors a route may answer: groups of codes that several of them share."""

ADMISSION = (
    "INVALID_JSON", "INVALID_INPUTS", "UNKNOWN_INPUT", "MISSING_INPUT", "INVALID_IMAGE",
    "INVALID_CROSS_ATTENTION_KWARGS", "URL_NOT_ALLOWED", "LIMIT_EXCEEDED", "NO_MODEL_ID", "SAFETY_REQUIRED",
    "REMOTE_CODE_NOT_ALLOWED", "MODEL_NOT_FOUND", "MODEL_MISMATCH", "NO_SUCH_PIPELINE", "NO_SUCH_SCHEDULER",
    "NO_SUCH_EXTRA", "BODY_TOO_LARGE", "IMAGE_TOO_LARGE", "INVALID_SCHEDULER", "PIPELINE_NOT_SUPPORTED",
    "NOT_SUPPORTED", "MODEL_BROKEN", "INVALID_ADAPTER", "INVALID_UPSCALER", "PICKLE_NOT_ALLOWED",
    "SOURCE_UNREACHABLE", "NOT_READY",
)  # fmt: skip
"""Of a request that is read and checked, without its model being fetched."""
FETCH = ("SOURCE_DENIED", "ARCHIVE_UNSAFE", "MODEL_CORRUPT", "DISK_FULL", "TIMED_OUT", "CANCELLED")
"""Of a model that is fetched, beside ``ADMISSION``."""
RUN = ("QUEUE_FULL", "PIPELINE_ERROR", "JOB_KILLED_WORKER", "OUT_OF_MEMORY", "UPLOAD_FAILED")
"""Of a request that is run while its client waits, beside the other two."""
NAMING = (
    "INVALID_INPUTS", "UNKNOWN_INPUT", "NO_MODEL_ID", "MODEL_NOT_FOUND", "MODEL_MISMATCH", "NOT_SUPPORTED",
    "MODEL_BROKEN", "URL_NOT_ALLOWED", "PICKLE_NOT_ALLOWED",
)  # fmt: skip
"""Of ``callInputs`` that name a model."""
