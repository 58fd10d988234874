"""Schemas of answers that several routes share."""

from __future__ import annotations

from typing import Any

from api.http.openapi.parts import Schema, array, flag, maybe, number, obj, ref, text, whole, words
from api.schema.catalogue import AUTO
from api.service.intake import PRIORITIES
from api.service.jobs import JobState

_PICTURE = {"type": "string", "contentEncoding": "base64", "contentMediaType": "image/*"}
_ANY: Schema = {"type": "object", "additionalProperties": True}
_MILLISECONDS = "milliseconds since 1970"

META = obj(
    {
        "MODEL_ID": text("which model"),
        "MODEL_REVISION": text("which commit of it, or a fingerprint of its files"),
        "MODEL_PRECISION": text("what its weights are held in", examples=["fp32"]),
        "PIPELINE": text("what was asked for, or chosen for what the request holds", examples=list(AUTO)[:1]),
        "SCHEDULER": text("the scheduler class"),
        "pipeline": text("the pipeline class"),
        "modelInputs": {**_ANY, "description": "every input, with the seed that was drawn; pictures by their SHA-256"},
        "device": text("what it was computed on", examples=["cuda:0"]),
        "dtype": text("what it was computed in", examples=["float16"]),
        "placement": text("how the model was held", examples=["full", "tiled", "model+tiled"]),
        "numerics": text("two images with the same one are the same"),
        "versions": {"type": "object", "additionalProperties": {"type": "string"}},
    },
    "device", "dtype", "placement", "numerics", "versions",
    additionalProperties=True,
    description="Everything that is needed to do it again.",
)  # fmt: skip
TIMINGS: Schema = {
    "type": "object",
    "additionalProperties": {"type": "integer", "minimum": 0},
    "description": "Milliseconds: download, extract, convert, init, loadModel, inference, upscale, encode, upload.",
}
IMAGES: dict[str, Schema] = {
    "image_base64": {**_PICTURE, "description": "the image, where there is one"},
    "images_base64": array(_PICTURE, description="the images, where there are several"),
    "image_url": text("where the image is, where `output_url` was sent"),
    "image_urls": array(text(), description="where the images are"),
}
VIDEOS: dict[str, Schema] = {
    "video_base64": text("the video, where the pipeline makes one", contentEncoding="base64"),
    "videos_base64": array(text(contentEncoding="base64"), description="the videos, where there are several"),
    "video_url": text("where the video is, where `output_url` was sent"),
    "video_urls": array(text(), description="where the videos are"),
}
RESULT = obj(
    {
        "$meta": ref("Meta"),
        **IMAGES,
        **VIDEOS,
        "latents_base64": text("safetensors, where `output` asked for latents", contentEncoding="base64"),
        "mask_base64": {**_PICTURE, "description": "where `output` asked for the mask"},
        "nsfw_content_detected": array(flag(), description="for each image, where a safety checker ran"),
        "$timings": ref("Timings"),
        "$mem_usage": number("share of the device's memory that was taken, 0 on a CPU"),
    },
    *IMAGES, *VIDEOS, "latents_base64", "mask_base64", "nsfw_content_detected",
)  # fmt: skip
PROGRESS = obj(
    {
        "step": whole("steps that are done"),
        "total": whole("steps in all"),
        "eta": maybe(number("seconds to go; null before the second step")),
    }
)
PREVIEW = obj({"step": whole(), "total": whole(), **IMAGES}, *IMAGES)
STATE = text("the last four never change again", enum=[state.value for state in JobState])
BRIEF = obj(
    {"id": text(), "state": STATE, "queuePosition": whole("1: the next one; only while it waits", 1)}, "queuePosition"
)
ABOUT: dict[str, Schema] = {
    **BRIEF["properties"],
    "priority": text(enum=list(PRIORITIES)),
    "tries": whole("how often it was begun"),
    "created": whole(_MILLISECONDS),
    "started": whole(_MILLISECONDS),
    "finished": whole(_MILLISECONDS),
    "timings": obj({"queued": whole("milliseconds"), "running": whole("milliseconds")}, "queued", "running"),
}
UNTIL_THEN = ("queuePosition", "started", "finished")
JOB = obj(
    {
        **ABOUT,
        "progress": PROGRESS,
        "preview": PREVIEW,
        "result": ref("Result"),
        "$error": {"$ref": "#/components/schemas/Error/properties/$error"},
    },
    *UNTIL_THEN, "progress", "preview", "result", "$error",
)  # fmt: skip
ERROR = obj(
    {
        "$error": obj(
            {
                "code": text("for programs"),
                "message": text("what was wrong, and what to do about it"),
                "field": text("which field was wrong", examples=["modelInputs.width"]),
                "requested": {"description": "what was asked for, where that says something"},
                "available": {"description": "what could have been asked for"},
                "requestId": text("what the server's log knows the request by"),
                "stack": text("only with LOG_LEVEL=debug"),
            },
            "field", "requested", "available", "stack",
        )
    }
)  # fmt: skip
TRANSFER = obj(
    {
        "model_id": text(),
        "kind": text(enum=["download", "extract", "convert", "upload"]),
        "status": text(enum=["start", "progress", "done"]),
        "done": whole("bytes so far"),
        "total": maybe(whole("bytes in all")),
        "rate": whole("bytes a second"),
        "eta": maybe(number("seconds to go")),
    }
)

EVENT = obj(
    {
        "type": words("download", "extract", "convert", "upload", "loadModel", "inference", "upscale"),
        "status": words("start", "progress", "preview", "done"),
        "container_id": {"type": ["string", "null"]},
        "time": whole("milliseconds since 1970"),
        "t": whole("milliseconds since the request came"),
        "tsl": whole("milliseconds since the phase began, where it is done"),
        "payload": {"type": "object"},
        "progress": number("share of the steps that are done"),
        "step": whole(),
        "total": whole(),
        "eta": maybe(number("seconds to go")),
    },
    "status", "container_id", "time", "t", "tsl", "payload", "progress", "step", "total", "eta",
)  # fmt: skip

SCHEMAS: dict[str, Schema] = {
    "Meta": META,
    "Timings": TIMINGS,
    "Result": RESULT,
    "Job": JOB,
    "JobAccepted": BRIEF,
    "Error": ERROR,
    "Transfer": TRANSFER,
    "StreamEvent": EVENT,
}

PIXEL = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAIAAACQd1PeAAAADElEQVR4nGP4z8AAAAMBAQDJ/pLvAAAAAElFTkSuQmCC"
"""A PNG of one red pixel, for examples."""
RESULT_EXAMPLE: dict[str, Any] = {
    "$meta": {
        "MODEL_ID": "demo/shapes",
        "MODEL_REVISION": "015eddedad3c",
        "MODEL_PRECISION": "fp32",
        "PIPELINE": "AutoPipelineForText2Image",
        "SCHEDULER": "DPMSolverMultistepScheduler",
        "pipeline": "StableDiffusionPipeline",
        "modelInputs": {"prompt": "a red circle", "seed": 7, "num_inference_steps": 4, "width": 64, "height": 64},
    },
    "image_base64": PIXEL,
    "$timings": {"inference": 93, "encode": 1},
    "$mem_usage": 0.0,
}
JOB_EXAMPLE: dict[str, Any] = {
    "id": "15dfccd203f24d9f",
    "state": "IN_PROGRESS",
    "priority": "normal",
    "tries": 1,
    "created": 1795286406268,
    "started": 1795286406270,
    "timings": {"queued": 2},
    "progress": {"step": 3, "total": 20, "eta": 1.9},
}
ERROR_EXAMPLE: dict[str, Any] = {
    "$error": {
        "code": "INVALID_INPUTS",
        "message": "Must be divisible by 8 for this model, e.g. 64.",
        "field": "modelInputs.width",
        "requested": 63,
        "requestId": "3f0c9a1be2d47c55",
    }
}
