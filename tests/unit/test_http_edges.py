"""What the fuzzer of tests/server/test_openapi.py found, each as a request of its own."""

from __future__ import annotations

from collections.abc import Iterator

import httpx
import pytest

from tests.played import Site, playing


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    folder = tmp_path_factory.mktemp("played")
    with playing(folder / "state", MODELS_DIR=str(folder), MAX_BODY="1MiB") as site:
        yield site


@pytest.fixture(scope="module")
def job(site: Site) -> str:
    body = {"modelInputs": {"prompt": "x", "num_inference_steps": 1}}
    job_id: str = site.client.post("/jobs", json=body).json()["id"]
    while site.client.get(f"/jobs/{job_id}").json()["state"] != "COMPLETED":
        pass
    return job_id


def code(answer: httpx.Response) -> tuple[int, str]:
    return answer.status_code, answer.json()["$error"]["code"]


def test_an_error_can_tell_a_header_that_is_no_utf_8(site: Site, job: str) -> None:
    answer = site.client.get(f"/jobs/{job}/events", headers={"Last-Event-ID": b"\x84"})
    assert code(answer) == (400, "INVALID_INPUTS")
    assert answer.json()["$error"]["field"] == "after"
