"""What the fuzzer of tests/server/test_openapi.py found, each as a request of its own."""

from __future__ import annotations

from collections.abc import Iterator

import httpx
import pytest

from tests.played import Played, playing


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Played]:
    with playing(tmp_path_factory.mktemp("played"), MAX_BODY="1MiB") as site:
        yield site


@pytest.fixture(scope="module")
def job(site: Played) -> str:
    body = {"modelInputs": {"prompt": "x", "num_inference_steps": 1}}
    job_id: str = site.client.post("/jobs", json=body).json()["id"]
    while site.client.get(f"/jobs/{job_id}").json()["state"] != "COMPLETED":
        pass
    return job_id


def code(answer: httpx.Response) -> tuple[int, str]:
    return answer.status_code, answer.json()["$error"]["code"]


def test_an_error_can_tell_a_header_that_is_no_utf_8(site: Played, job: str) -> None:
    answer = site.client.get(f"/jobs/{job}/events", headers={"Last-Event-ID": b"\x84"})
    assert code(answer) == (400, "INVALID_INPUTS")
    assert answer.json()["$error"]["field"] == "Last-Event-ID"


def test_where_to_go_on_is_checked_in_both_places(site: Played, job: str) -> None:
    answer = site.client.get(f"/jobs/{job}/events?after=x", headers={"Last-Event-ID": "1"})
    assert code(answer) == (400, "INVALID_INPUTS")
    assert answer.json()["$error"]["field"] == "after"
    both = site.client.get(f"/jobs/{job}/events?after=1", headers={"Last-Event-ID": "2"})
    assert both.text.startswith("id: 3\n")


def test_an_image_that_a_job_does_not_have(site: Played, job: str) -> None:
    assert code(site.client.get(f"/jobs/{job}/images/1")) == (404, "NOT_FOUND")
    assert code(site.client.get(f"/jobs/{job}/images/x")) == (400, "INVALID_INPUTS")
    assert site.client.get(f"/jobs/{job}/images/0").status_code == 200


def test_an_address_that_is_too_long_is_not_a_body_that_is(site: Played) -> None:
    for answer in (
        site.client.get("/schedulers", params={"MODEL_URL": "x" * 9000}),
        site.client.get("/models", headers={"X-Long": "x" * 9000}),
    ):
        assert code(answer) == (431, "HEADERS_TOO_LARGE")
    assert code(site.client.post("/plan", content=b"x" * (2**20 + 1))) == (413, "BODY_TOO_LARGE")


def test_a_key_that_cannot_be_one_is_told_where_it_is_not_used_too(site: Played) -> None:
    body = {"modelInputs": {"prompt": "x", "num_inference_steps": 1}}
    assert code(site.client.post("/", json=body, headers={"Idempotency-Key": "x" * 201})) == (400, "INVALID_INPUTS")
    assert site.client.post("/", json=body, headers={"Idempotency-Key": "x"}).status_code == 200


@pytest.mark.parametrize(
    ("method", "path"), [("PATCH", "/v1/x/run"), ("GET", "/v1/x/status/none"), ("GET", "/v2/x/none")]
)
def test_clients_of_runpod_are_told_in_their_key_before_there_is_a_route_too(
    site: Played, method: str, path: str
) -> None:
    told = site.client.request(method, path).json()
    assert told["error"].startswith(told["$error"]["code"])
    assert "error" not in site.client.request(method, "/jobs/none").json()
