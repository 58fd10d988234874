"""What is in deploy/ and .runpod/ is what the platforms take, and agrees with the settings and the image."""

from __future__ import annotations

import importlib.resources
import json
import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import check_jsonschema
import jsonschema
import pytest
import yaml

from api.cli.main import _parser
from api.settings import Settings

ROOT = Path(__file__).resolve().parents[2]
RUNPOD = ROOT / "deploy" / "runpod"
DOCKERFILE = (ROOT / "Dockerfile").read_text()
VARIABLES = {f.metadata["name"]: f.metadata["parse"] for f in fields(Settings)}
SECRET = re.compile(r"\{\{ RUNPOD_SECRET_\w+ \}\}")
"""What RunPod puts a secret of the account for: docs.runpod.io/pods/templates/secrets"""

TEXT, WHOLE, FLAG, TEXTS = str, int, bool, list
TEMPLATE = {
    "name": TEXT, "imageName": TEXT, "category": TEXT, "isServerless": FLAG, "isPublic": FLAG, "readme": TEXT,
    "containerDiskInGb": WHOLE, "volumeInGb": WHOLE, "volumeMountPath": TEXT, "ports": TEXTS, "env": dict,
    "dockerEntrypoint": TEXTS, "dockerStartCmd": TEXTS, "containerRegistryAuthId": TEXT,
}  # fmt: skip
"""Names and types of ``TemplateCreateInput`` in the description of RunPod's REST API, https://rest.runpod.io/v1"""
PLACED = {
    "name": TEXT, "templateId": TEXT, "computeType": TEXT, "gpuCount": WHOLE, "gpuTypeIds": TEXTS,
    "dataCenterIds": TEXTS, "networkVolumeId": TEXT, "allowedCudaVersions": TEXTS,
}  # fmt: skip
ENDPOINT = {
    **PLACED, "workersMin": WHOLE, "workersMax": WHOLE, "idleTimeout": WHOLE, "scalerType": TEXT, "scalerValue": WHOLE,
    "executionTimeoutMs": WHOLE, "flashboot": FLAG, "minCudaVersion": TEXT, "networkVolumeIds": TEXTS,
}  # fmt: skip
"""``EndpointCreateInput`` there"""
POD = {**PLACED, "cloudType": TEXT, "supportPublicIp": FLAG, "interruptible": FLAG}
"""``PodCreateInput`` there"""


class Compose(yaml.SafeLoader):
    """Reads the tags of compose files."""


Compose.add_multi_constructor("!", lambda loader, suffix, node: None)


def read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())


def compose() -> dict[str, Any]:
    return yaml.load((ROOT / "deploy" / "compose.yaml").read_text(), Compose)  # noqa: S506


def parse(name: str, value: str) -> Any:
    assert name in VARIABLES, f"{name} is no setting"
    return VARIABLES[name](value)


@pytest.mark.parametrize(
    ("file", "known"),
    [
        ("pod-template.json", TEMPLATE),
        ("serverless-template.json", TEMPLATE),
        ("serverless-endpoint.json", ENDPOINT),
        ("pod.json", POD),
    ],
)
def test_files_for_runpod_are_what_its_api_takes(file: str, known: dict[str, type]) -> None:
    body = read(RUNPOD / file)
    assert set(body) <= set(known)
    assert [name for name, value in body.items() if type(value) is not known[name]] == []


@pytest.mark.parametrize("file", ["pod-template.json", "serverless-template.json"])
def test_templates_set_what_the_server_reads(file: str) -> None:
    body = read(RUNPOD / file)
    for name, value in body["env"].items():
        assert SECRET.fullmatch(value) or parse(name, value) is not None
    assert body["imageName"] == "docker.io/YOU/diffusers-api:latest", "the guide puts your image for it"
    # the commands go behind the image's ENTRYPOINT
    assert 'ENTRYPOINT ["python", "-m", "api"]' in DOCKERFILE
    assert body["dockerEntrypoint"] == []
    commands = next(action.choices for action in _parser()._actions if action.dest == "command")
    assert body["dockerStartCmd"] and set(body["dockerStartCmd"]) <= set(commands)


def test_the_pods_port_is_the_servers() -> None:
    body = read(RUNPOD / "pod-template.json")
    assert body["ports"] == [f"{parse('PORT', body['env']['PORT'])}/http"]
    assert "EXPOSE 8000" in DOCKERFILE
    assert f"-{body['env']['PORT']}.proxy.runpod.net" in body["readme"]


def test_volumes_are_where_the_server_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    mount = read(RUNPOD / "pod-template.json")["volumeMountPath"]
    for mounted in (mount, "/runpod-volume"):
        monkeypatch.setattr("os.path.ismount", lambda path, mounted=mounted: path == mounted)
        assert Settings.from_env({}).models_dir.is_relative_to(mounted)
    serverless = read(RUNPOD / "serverless-template.json")
    assert (serverless["isServerless"], serverless["volumeInGb"]) == (True, 0)


def test_the_image_runs_as_whoever_is_asked_for_and_as_root_by_no_mistake() -> None:
    assert re.search(r"^ARG RUN_AS=1000\nUSER \$\{RUN_AS\}$", DOCKERFILE, re.M)
    assert re.findall(r"^USER (.+)$", DOCKERFILE, re.M) == ["${RUN_AS}"]
    assert "--build-arg RUN_AS=0" in (ROOT / "docs" / "runpod.md").read_text()


def test_a_pod_is_never_open_to_everybody() -> None:
    """Its address is public, and guessed from its id."""
    env = read(RUNPOD / "pod-template.json")["env"]
    assert SECRET.fullmatch(env["API_KEYS"])


def test_endpoint_and_execution_times_agree() -> None:
    endpoint = read(RUNPOD / "serverless-endpoint.json")
    assert endpoint["executionTimeoutMs"] / 1000 >= Settings.from_env({}).request_timeout
    assert endpoint["workersMin"] <= endpoint["workersMax"]


def test_the_hubs_files_set_what_the_server_reads() -> None:
    """Fields as docs.runpod.io/hub/publishing-guide names them."""
    hub, tests = read(ROOT / ".runpod" / "hub.json"), read(ROOT / ".runpod" / "tests.json")
    assert (hub["type"], hub["category"]) == ("serverless", "image")
    offered = {one["key"]: one["input"] for one in hub["config"]["env"]}
    for key, input in offered.items():
        choices = [option["value"] for option in input.get("options", [])]
        if input["type"] == "boolean":
            choices = [input["trueValue"], input["falseValue"]]
        for value in choices or [input["default"]]:
            parse(key, value)
        assert "options" not in input or input["default"] in choices
    for preset in hub["config"]["presets"]:
        assert set(preset["defaults"]) <= set(offered)
    for variable in tests["config"]["env"]:
        parse(variable["key"], variable["value"])
    assert tests["config"]["allowedCudaVersions"] == hub["config"]["allowedCudaVersions"]
    for one in tests["tests"]:
        assert isinstance(one["input"], dict) and one["timeout"] >= 60_000, "a cold start fits in it"


def test_the_hubs_handler_is_the_worker() -> None:
    command = [sys.executable, ROOT / ".runpod" / "handler.py", "--help"]
    out = subprocess.run(command, cwd="/", capture_output=True, text=True, check=False)
    assert out.returncode == 0, out.stderr
    assert "RunPod" in out.stdout


def test_compose_files_are_compose_files() -> None:
    schema = importlib.resources.files(check_jsonschema) / "builtin_schemas" / "vendor" / "compose-spec.json"
    for file in (ROOT / "deploy").glob("compose*.yaml"):
        body = yaml.load(file.read_text(), Compose)  # noqa: S506
        jsonschema.validate(body, json.loads(schema.read_text()))


def seconds(text: str) -> float:
    return sum(float(n) * {"s": 1, "m": 60, "h": 3600}[unit] for n, unit in re.findall(r"(\d+)([smh])", text))


def test_compose_sets_what_the_server_reads() -> None:
    service = compose()["services"]["api"]
    for name, value in service["environment"].items():
        assert name in VARIABLES, f"{name} is no setting"
        if found := re.fullmatch(r"\$\{(\w+)(:[?-])(.*)\}", value):
            assert found[1] == name
            value = found[3] if found[2] == ":-" else "a-key"
        parse(name, value)
    assert "${API_KEYS:?" in service["environment"]["API_KEYS"], "there is no server without a key by mistake"
    assert all(port.endswith(":" + service["environment"]["PORT"]) for port in service["ports"])
    assert f"127.0.0.1:{service['environment']['PORT']}/" in service["healthcheck"]["test"][-1]


def test_compose_keeps_what_the_server_writes_and_lets_it_end() -> None:
    body = compose()
    service = body["services"]["api"]
    mounts = dict(volume.split(":") for volume in service["volumes"])
    assert set(mounts) == set(body["volumes"])
    environment = service["environment"]
    assert set(mounts.values()) == {environment["MODELS_DIR"], environment["STATE_DIR"]}
    for path in mounts.values():  # a named volume takes over who owns it in the image
        assert path in next(line for line in DOCKERFILE.splitlines() if "install -d -o api" in line)
    assert seconds(service["stop_grace_period"]) >= parse("DRAIN_TIMEOUT", environment["DRAIN_TIMEOUT"]) + 10
