"""The OpenAPI description names every route, is valid, and its examples are what it says; the page needs nobody else."""

from __future__ import annotations

import gzip
import re
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from jsonschema import Draft202012Validator
from openapi_spec_validator import validate

from api.errors import CODES
from api.http.app import build_app
from api.http.keys import OPEN
from api.http.openapi.document import TAGS, document, operations, routes
from api.service.service import Service
from api.settings import Settings
from tests.played import Played, playing

SETTINGS = Settings.from_env({})
SERVED = routes(build_app(Service(SETTINGS), "openapi-test"))
DOCUMENT = document(SETTINGS, SERVED)


def each_operation() -> Iterator[tuple[str, dict[str, Any]]]:
    for path, methods in DOCUMENT["paths"].items():
        for method, operation in methods.items():
            yield f"{method.upper()} {path}", operation


def each_content() -> Iterator[tuple[str, dict[str, Any]]]:
    """Every schema of a body with its examples."""
    for route, operation in each_operation():
        bodies = {"request": operation.get("requestBody", {}), **operation["responses"]}
        for where, body in bodies.items():
            for media_type, content in body.get("content", {}).items():
                yield f"{route} {where} {media_type}", content


def test_every_route_is_described_and_nothing_else() -> None:
    described = operations(SETTINGS, SERVED).keys()
    assert (SERVED - described, described - SERVED) == (set(), set())
    assert {route for route, _ in each_operation()} == SERVED


def test_it_is_valid() -> None:
    validate(DOCUMENT)
    ids = [operation["operationId"] for _, operation in each_operation()]
    assert len(set(ids)) == len(ids)
    assert {tag for _, operation in each_operation() for tag in operation["tags"]} == {*TAGS}
    links = [link for _, o in each_operation() for r in o["responses"].values() for link in r.get("links", {}).values()]
    assert len(links) > 2
    assert {link["operationId"] for link in links} <= set(ids)


def test_every_example_is_what_its_schema_says() -> None:
    checked = 0
    for where, content in each_content():
        validator = Draft202012Validator({**content.get("schema", {}), "components": DOCUMENT["components"]})
        examples = [example["value"] for example in content.get("examples", {}).values()]
        for example in [*examples, *([content["example"]] if "example" in content else [])]:
            assert [error.message for error in validator.iter_errors(example)] == [], where
            checked += 1
    assert checked > 80
    for _, operation in each_operation():
        for parameter in operation.get("parameters", []):
            if parameter["in"] == "path":
                assert Draft202012Validator(parameter["schema"]).is_valid(parameter["example"])


def test_whoever_sends_a_body_is_shown_how_and_whoever_gets_json_what() -> None:
    for where, content in each_content():
        if " 4" not in where and " 5" not in where and "json" in where.split()[-1].split("/")[1].split("-")[0]:
            assert content["schema"], where
        if " request " in where:
            assert content["examples"], where


def test_errors_are_told_with_the_status_that_they_have() -> None:
    for route, operation in operations(SETTINGS).items():
        described = DOCUMENT["paths"][route.split()[1]][route.split()[0].lower()]["responses"]
        for code in operation.errors:
            assert code in described[str(CODES[code][0])]["description"], (route, code)


def test_keys_are_needed_where_there_are_keys() -> None:
    assert {} in DOCUMENT["security"]
    keyed = document(Settings.from_env({"API_KEYS": "alice:a-key-of-some-length"}), SERVED)
    assert keyed["security"] == [{"bearer": []}, {"basic": []}]
    for path, methods in keyed["paths"].items():
        for operation in methods.values():
            is_open = operation.get("security") == []
            assert is_open == (path in OPEN), path
            assert ("401" in operation["responses"]) != is_open, path
    assert "RATE_LIMITED" in keyed["paths"]["/jobs"]["post"]["responses"]["429"]["description"]
    assert "401" not in DOCUMENT["paths"]["/jobs"]["post"]["responses"]


def test_limits_are_those_of_the_server() -> None:
    low = document(Settings.from_env({"MAX_STEPS": "7"}), SERVED)["components"]["schemas"]["ModelInputs"]
    assert low["properties"]["num_inference_steps"]["anyOf"][0]["maximum"] == 7


def test_with_legacy_status_an_error_may_be_a_200() -> None:
    legacy = document(Settings.from_env({"LEGACY_STATUS": "1"}), SERVED)
    schema = legacy["paths"]["/"]["post"]["responses"]["200"]["content"]["application/json"]["schema"]
    told = {**schema, "components": legacy["components"]}
    error = {"$error": {"code": "INVALID_JSON", "message": "x", "requestId": "y"}}
    assert Draft202012Validator(told).is_valid(error)
    plain = DOCUMENT["paths"]["/"]["post"]["responses"]["200"]["content"]["application/json"]["schema"]
    assert not Draft202012Validator({**plain, "components": DOCUMENT["components"]}).is_valid(error)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Played]:
    with playing(tmp_path_factory.mktemp("played")) as site:
        yield site


def raw(site: Played, path: str, **headers: str) -> tuple[httpx.Response, bytes]:
    """An answer, and its body as it came."""
    with site.client.stream("GET", path, headers={"Accept-Encoding": "identity", **headers}) as answer:
        return answer, b"".join(answer.iter_raw())


def test_it_is_served(site: Played) -> None:
    assert site.client.get("/openapi.json").json() == DOCUMENT


def test_the_page_loads_nothing_from_anywhere_else(site: Played) -> None:
    page, body = raw(site, "/docs")
    policy = dict(rule.split(" ", 1) for rule in page.headers["content-security-policy"].split("; "))
    assert policy["default-src"] == "'none'"
    assert {policy["script-src"], policy["connect-src"]} == {"'self'"}
    assert "http" not in page.headers["content-security-policy"]
    links = re.findall(r'(?:src|href)="([^"]+)"', body.decode())
    parts = [link for link in links if link.startswith("docs/")]
    assert len(parts) == 3 and set(links) - {*parts} == {"openapi.json", "data:,"}
    for part in parts:
        answer, _ = raw(site, f"/{part}")
        assert answer.status_code == 200
        assert answer.headers["content-type"].startswith("text/")
        assert answer.headers["x-content-type-options"] == "nosniff"
    start = raw(site, "/docs/start.js")[1].decode()
    assert "validatorUrl: null" in start and 'url: "openapi.json"' in start


@pytest.mark.parametrize("path", ["/openapi.json", "/docs/swagger-ui-bundle.js"])
def test_large_files_come_compressed_and_once(site: Played, path: str) -> None:
    _, plain = raw(site, path)
    answer, packed = raw(site, path, **{"Accept-Encoding": "gzip, br"})
    assert answer.headers["content-encoding"] == "gzip"
    assert gzip.decompress(packed) == plain
    assert len(packed) < len(plain) / 3
    again, nothing = raw(site, path, **{"If-None-Match": answer.headers["etag"]})
    assert (again.status_code, nothing) == (304, b"")


@pytest.mark.parametrize("name", ["no.js", "LICENSE", "..%2Fdocs.py", "%2Fetc%2Fpasswd"])
def test_nothing_else_is_served(site: Played, name: str) -> None:
    answer = site.client.get(f"/docs/{name}")
    assert answer.status_code == 404
    assert answer.json()["$error"]["code"] == "NOT_FOUND"
