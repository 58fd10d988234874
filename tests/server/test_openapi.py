"""The server does what its OpenAPI description says, whatever it is sent."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.fuzzing import KEY, WITH_KEY, closed, fuzz
from tests.played import Played, playing
from tests.running import Server, running

LIMITS = {
    "MAX_STEPS": "4",
    "MAX_PIXELS": "16384",
    "MAX_IMAGES": "2",
    "MAX_BODY": "1MiB",
    "RUNTIME_DOWNLOADS": "0",
    **WITH_KEY,
}
MODEL_INPUTS = {"prompt", "num_inference_steps", "seed", "cross_attention_kwargs"}
CALL_INPUTS = {"MODEL_ID", "SCHEDULER", "output", "lora_weights", "async", "streamEvents", "tier", "pin", "callInputs"}


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Played]:
    with playing(tmp_path_factory.mktemp("played"), **LIMITS) as site:
        site.client.headers["Authorization"] = f"Bearer {KEY}"
        yield site


def fewer_inputs(document: dict[str, Any]) -> dict[str, Any]:
    """Some of two hundred inputs: they do not depend on each other, and every one is tried in every way."""
    schemas = document["components"]["schemas"]
    loads = [document["paths"][f"/models/{verb}"]["post"]["requestBody"] for verb in ("load", "unload")]
    called = [schemas["CallInputs"], *(body["content"]["application/json"]["schema"] for body in loads)]
    simple = schemas["RunpodSimpleInput"], MODEL_INPUTS | CALL_INPUTS
    for schema, kept in ((schemas["ModelInputs"], MODEL_INPUTS), simple, *((one, CALL_INPUTS) for one in called)):
        schema["properties"] = {name: form for name, form in schema["properties"].items() if name in kept}
    return document


def valid_inputs(document: dict[str, Any]) -> dict[str, Any]:
    """Only requests that any pipeline of the demo model takes."""
    prompt = {"type": "string", "minLength": 1, "maxLength": 20}
    properties = {"prompt": prompt, "num_inference_steps": {"type": "integer", "minimum": 1, "maximum": 4}}
    inputs = {"type": "object", "properties": properties, "required": ["prompt"], "additionalProperties": False}
    none = {"type": "object", "maxProperties": 0}
    document["components"]["schemas"] |= {"ModelInputs": inputs, "CallInputs": none, "RunpodSimpleInput": inputs}
    return document


def test_any_request_gets_an_answer_that_is_described(site: Played, tmp_path: Path) -> None:
    document = fewer_inputs(closed(site.client.get("/openapi.json").json()))
    alike = ["--exclude-operation-id-regex", "^(plan|putJob|runpod(RunSync|Put|StatusSync)|.*(Post|Head))$"]
    fuzz(site.url, document, tmp_path, "examples,coverage,fuzzing", 2, "--exclude-deprecated", *alike)
    assert site.client.get("/health/ready").json()["state"] == "READY"


def test_one_request_after_the_other(site: Played, tmp_path: Path) -> None:
    """What one answers is sent with the next: a job is made, looked at, watched, cancelled, its picture fetched."""
    document = valid_inputs(closed(site.client.get("/openapi.json").json()))
    arguments = ("--mode", "positive", "--include-tag", "Jobs for later")
    told = fuzz(site.url, document, tmp_path, "stateful", 25, *arguments)
    covered = re.search(r"API Links: +(\d+) covered", told)
    assert covered and int(covered[1]) >= 4, told


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server with the demo model, whose limits keep valid requests cheap."""
    folder = tmp_path_factory.mktemp("fuzzed")
    with running({"MODELS_DIR": str(folder), **LIMITS}, folder / "server.log") as server:
        server.client.headers["Authorization"] = f"Bearer {KEY}"
        yield server


def answers(server: Server, route: str) -> Counter[int]:
    """How often each status was answered."""
    return Counter(int(status) for status in re.findall(rf'"{route} (\d+) in', server.log.read_text()))


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_every_input_in_every_way(real: Server, tmp_path: Path) -> None:
    document = closed(real.client.get("/openapi.json").json())
    fuzz(real.url, document, tmp_path, "examples,coverage,fuzzing,stateful", 10, deterministic=False)
    assert sum(answers(real, "POST /").values()) > 500
    assert real.worker_pids() and '"restarts":0' in real.client.get("/health/ready").text
    assert real.post({"prompt": "a red circle", "num_inference_steps": 4}).status_code == 200


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_requests_that_the_model_takes_are_run(real: Server, tmp_path: Path) -> None:
    """Of the inputs that the model is said to take, and of the options that change a picture."""
    document = closed(real.client.get("/openapi.json").json())
    schemas = document["components"]["schemas"]
    schemas["ModelInputs"] = real.client.get("/models/demo%2Fshapes/schema").json()["modelInputs"]
    for lists in ("timesteps", "sigmas"):  # of which one goes, and they are as long as there are steps
        del schemas["ModelInputs"]["properties"][lists]
    options = schemas["CallInputs"]["properties"]
    schemas["CallInputs"]["properties"] = {
        name: options[name] for name in ("image_quality", "lossless", "image_metadata")
    }
    arguments = ("--mode", "positive", "--include-operation-id", "generate", "--include-operation-id", "createJob")
    fuzz(real.url, document, tmp_path, "fuzzing", 100, *arguments, deterministic=False)
    statuses = answers(real, "POST /")
    assert statuses[200] > 50, statuses
