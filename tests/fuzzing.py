"""Runs Schemathesis against a server: requests made of its OpenAPI description, answers checked against it."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.running import ROOT

KEY = "a-key-of-the-fuzzer-alone"
WITH_KEY = {"API_KEYS": f"fuzzer:{KEY}", "WRONG_KEYS": "0"}
"""How a server is started that is to be fuzzed."""
CONFIG = """
hooks = "tests.fuzz_hooks"
continue-on-failure = true

[auth.openapi]
bearer = {{ bearer = "{key}" }}

[generation]
deterministic = {deterministic}
database = "none"

[checks]
# DELETE cancels a job, which is still there then
use_after_free.enabled = false
# 431: a long value of a query; 413: one of a body
negative_data_rejection.expected-statuses = [{refused}]
positive_data_acceptance.expected-statuses = [{accepted}, "431"]

# The job is there, its pictures are not yet
[[operations]]
include-operation-id = ["getJobImage", "getJobPreview"]
checks.ensure_resource_availability.enabled = false

# Which inputs go together depends on the model and its pipeline
[[operations]]
include-operation-id = [{free}]
checks.positive_data_acceptance.expected-statuses = [{accepted}, "431", "400", "422"]
"""
_ACCEPTED = '"2xx", "401", "403", "404", "429"'
_REFUSED = '"400", "401", "403", "404", "405", "406", "413", "422", "429", "431"'
_FREE = (
    "generate", "plan", "createJob", "putJob", "loadModel", "unloadModel", "getModelSchema", "listSchedulers",
    *(f"runpod{name}{version}" for name in ("Run", "RunSync", "Put", "Retry") for version in ("", "V1")),
)  # fmt: skip


def closed(document: dict[str, Any]) -> dict[str, Any]:
    """The same description, but that answers hold nothing that it does not name."""
    document = copy.deepcopy(document)
    schemas = document["components"]["schemas"]
    for schema in (schemas[name] for name in schemas if name not in ("ModelInputs", "CallInputs")):
        _close(schema)
    for content in _answers(document):
        if "allOf" not in content.get("schema", {}):
            _close(content.get("schema", {}))
    return document


def _answers(document: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for methods in document["paths"].values():
        for operation in methods.values():
            for answer in operation["responses"].values():
                # an event is read with fields of the protocol's own
                yield from (c for kind, c in answer.get("content", {}).items() if kind != "text/event-stream")


def _close(schema: Any) -> None:
    if isinstance(schema, list):
        for item in schema:
            _close(item)
    elif isinstance(schema, dict):
        if isinstance(schema.get("properties"), dict):
            schema.setdefault("additionalProperties", False)
        for key, value in schema.items():
            if key not in ("examples", "example", "enum", "default"):
                _close(value)


def fuzz(
    url: str, document: dict[str, Any], folder: Path, phases: str, examples: int, *more: str, deterministic: bool = True
) -> str:
    """Fuzz a server.

    Args:
        url: where it is.
        document: its description.
        folder: for files.
        phases: of Schemathesis, with commas between.
        examples: how many requests for each operation, beside those that try every limit.
        more: arguments of ``schemathesis run``.
        deterministic: the same requests each time.

    Returns:
        What it printed.

    Raises:
        AssertionError: a check failed; the message says which, with the request as a curl.
    """
    described, config = folder / "openapi.json", folder / "schemathesis.toml"
    described.write_text(json.dumps(document))
    free = ", ".join(f'"{name}"' for name in _FREE)
    said = CONFIG.format(
        deterministic=str(deterministic).lower(), accepted=_ACCEPTED, refused=_REFUSED, free=free, key=KEY
    )
    config.write_text(said)
    command = [
        Path(sys.executable).with_name("schemathesis"), "--config-file", config, "run", described, "--url", url,
        "--phases", phases, "--max-examples", str(examples), "--no-color", *more,
    ]  # fmt: skip
    environ = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=folder, env=environ, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-20_000:] + done.stderr[-3000:]
    return done.stdout
