"""``POST /plan``: what a request would take, and that it takes nothing."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.hub import HubStandIn
from tests.running import Server, running
from tests.sources import TOKEN, environ

INPUTS = {"prompt": "a circle", "width": 64, "height": 64, "num_inference_steps": 2}


@pytest.fixture(scope="module")
def planning(models_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server that other files do not use: nothing is known of tiny/a yet."""
    settings = {"MODELS_DIR": str(models_dir), "RUNTIME_DOWNLOADS": "0"}
    with running(settings, tmp_path_factory.mktemp("log") / "server.log") as started:
        yield started


def planned(server: Server, call_inputs: dict[str, Any], **more: Any) -> dict[str, Any]:
    response = server.client.post("/plan", json={"modelInputs": {**INPUTS, **more}, "callInputs": call_inputs})
    assert response.status_code == 200, response.text
    return response.json()


def tier_of(server: Server, model: str) -> str:
    models = server.client.get("/models").json()["models"]
    return next(entry["tier"] for entry in models if entry["MODEL_ID"] == model)


def test_a_plan_before_and_after(planning: Server) -> None:
    options = {"MODEL_ID": "tiny/a"}
    before = planned(planning, options)
    total = before["bytes"]["model"]
    assert total > 100_000
    assert (before["tier"], before["fits"], before["placement"]) == ("disk", None, "full")
    assert before["bytes"] == {"fetch": 0, "read": total, "copy": total, "model": total}
    assert before["seconds"]["fetch"] == before["seconds"]["queue"] == 0
    assert before["seconds"]["read"] > 0  # the default model was read
    assert (before["MODEL_ID"], before["pipeline"]) == ("tiny/a", "StableDiffusionPipeline")
    # nothing was loaded for it
    assert tier_of(planning, "tiny/a") == "disk"
    assert planned(planning, {**options, "low_vram": True})["placement"] is None

    assert planning.client.post("/", json={"modelInputs": INPUTS, "callInputs": options}).status_code == 200
    after = planned(planning, options)
    assert (after["tier"], after["fits"], after["placement"]) == ("device", True, "full")
    assert after["bytes"] == {"fetch": 0, "read": 0, "copy": 0, "model": total}
    assert after["seconds"] == {"fetch": 0, "read": 0, "copy": 0, "queue": 0}
    # what it says comes true
    tiled = {**options, "low_vram": True}
    assert planned(planning, tiled)["placement"] == "tiled"
    made = planning.client.post("/", json={"modelInputs": INPUTS, "callInputs": tiled}).json()["$meta"]
    assert (made["placement"], made["low_vram"]) == ("tiled", True)
    assert made["numerics"].endswith("/tiled")
    # of another size nothing is known
    assert planned(planning, options, width=128)["fits"] is None


@pytest.mark.parametrize(
    "body",
    [
        {"callInputs": {}},
        {"modelInputs": {"prompt": "x", "width": 63}},
        {"modelInputs": {"prompt": "x", "nonsense": 1}},
        {"modelInputs": INPUTS, "callInputs": {"MODEL_ID": "no/such"}},
        {"modelInputs": INPUTS, "callInputs": {"SCHEDULER": "None"}},
        {"modelInputs": INPUTS, "callInputs": {"OFFLOAD": "model"}},
        {"modelInputs": {"prompt": "x", "image": "nothing"}},
    ],
)
def test_errors_are_those_of_the_request_itself(server: Server, body: dict[str, Any]) -> None:
    told = []
    for path in ("/plan", "/"):
        response = server.client.post(path, json=body)
        error = response.json()["$error"]
        error.pop("requestId")
        told.append((response.status_code, error))
    assert told[0] == told[1]
    assert 400 <= told[0][0] < 500


def test_a_model_that_never_fits(planning: Server, models_dir: Path, tmp_path: Path) -> None:
    limit = str(int(planned(planning, {"MODEL_ID": "tiny/a"})["bytes"]["model"] * 1.5))
    settings = {"MODELS_DIR": str(models_dir), "RUNTIME_DOWNLOADS": "0", "MODEL_ID": "tiny/a", "VRAM_LIMIT": limit}
    with running(settings, tmp_path / "server.log") as server:
        assert server.client.post("/models/load", json={"MODEL_ID": "tiny/a", "pin": True}).status_code == 200
        plan = planned(server, {"MODEL_ID": "tiny/b"})
        refused = server.client.post("/", json={"modelInputs": INPUTS, "callInputs": {"MODEL_ID": "tiny/b"}})
    assert plan["fits"] is False
    assert refused.status_code == 507
    assert plan["why"] == refused.json()["$error"]["message"]


@pytest.mark.slow
def test_a_model_that_is_not_here(models_dir: Path, tmp_path: Path) -> None:
    with (
        HubStandIn({"hub/a": {"main": models_dir / "tiny--a"}}, tokens={TOKEN: []}) as hub,
        running(environ(tmp_path / "v", hub), tmp_path / "server.log") as server,
    ):
        plan = planned(server, {"MODEL_ID": "hub/a"})
        size = sum(path.stat().st_size for path in (models_dir / "tiny--a").rglob("*") if path.is_file())
        assert (plan["tier"], plan["fits"], plan["bytes"]["fetch"]) == ("remote", None, size)
        assert "why" not in plan
        plan = planned(server, {"MODEL_ID": "hub/none"})
        assert (plan["tier"], plan["bytes"]["fetch"]) == ("remote", None)
        assert "hub/none" in plan["why"] or "no such model" in plan["why"]
        assert server.client.get("/models").json()["transfers"] == []
        assert not any("safetensors" in path or "cdn" in path for path in hub.requests)
    assert not list(tmp_path.glob("v/**/*.safetensors"))
    with running(environ(tmp_path / "w"), tmp_path / "server.log") as server:
        plan = planned(server, {"MODEL_ID": "hub/a"})  # nobody is there to say it
        assert (plan["tier"], plan["bytes"]["fetch"]) == ("remote", None)
        assert plan["why"]
