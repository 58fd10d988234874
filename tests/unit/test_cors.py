"""Which web pages may read the answers."""

from __future__ import annotations

from pathlib import Path

import httpx
import pytest

from tests.inprocess import app_of, service_of, serving

KEY = "right-key-of-alice"
PAGE = {"Origin": "https://app.example"}
ASKS = {**PAGE, "Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization,content-type"}
ALLOWED = "Access-Control-Allow-Origin"


async def answers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *asked: tuple[str, str, dict[str, str]], **environ: str
) -> list[httpx.Response]:
    async with serving(app_of(service_of(STATE_DIR=str(tmp_path), **environ), monkeypatch)) as client:
        return [await client.request(method, path, headers=headers) for method, path, headers in asked]


async def test_a_page_asks_and_then_sends_its_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked, sent, refused, unknown = await answers(
        tmp_path, monkeypatch, ("OPTIONS", "/jobs", ASKS), ("GET", "/schedulers", {**PAGE, "Authorization": KEY}),
        ("GET", "/schedulers", PAGE), ("OPTIONS", "/nowhere", ASKS),
        API_KEYS=KEY, CORS_ORIGINS="https://other.example, https://App.example/",
    )  # fmt: skip
    assert (asked.status_code, asked.content) == (204, b"")
    assert "POST" in asked.headers["Access-Control-Allow-Methods"]
    assert "DELETE" in asked.headers["Access-Control-Allow-Methods"]
    assert "authorization" in asked.headers["Access-Control-Allow-Headers"].lower()
    assert (sent.status_code, refused.status_code, unknown.status_code) == (200, 401, 204)
    for response in (asked, sent, refused):
        assert response.headers[ALLOWED] == "https://app.example"
        assert response.headers["Vary"] == "Origin"
        for name in ("X-Meta", "X-Timings", "X-Request-Id", "Retry-After", "Location"):
            assert name in response.headers["Access-Control-Expose-Headers"]
        assert "Access-Control-Allow-Credentials" not in response.headers


async def test_another_page_gets_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for origin in ("https://evil.example", "http://app.example", "https://app.example.evil.example", "null", ""):
        page = {"Origin": origin}
        asked, sent = await answers(
            tmp_path, monkeypatch, ("OPTIONS", "/jobs", {**ASKS, **page}), ("GET", "/schedulers", {**page, "Authorization": KEY}),
            API_KEYS=KEY, CORS_ORIGINS="https://app.example",
        )  # fmt: skip
        assert asked.status_code == 401
        assert sent.headers["Vary"] == "Origin"
        assert ALLOWED not in asked.headers
        assert ALLOWED not in sent.headers


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({}, "*"),
        ({"API_KEYS": KEY}, None),
        ({"API_KEYS": KEY, "CORS_ORIGINS": "*"}, "*"),
        ({"CORS_ORIGINS": "none"}, None),
    ],
)
async def test_what_holds_by_default(
    environ: dict[str, str], expected: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (sent, wrong, bare) = await answers(
        tmp_path, monkeypatch, ("GET", "/schedulers", {**PAGE, "Authorization": KEY}),
        ("GET", "/nowhere", {**PAGE, "Authorization": KEY}), ("GET", "/schedulers", {"Authorization": KEY}), **environ,
    )  # fmt: skip
    assert (sent.status_code, wrong.status_code) == (200, 404)
    assert sent.headers.get(ALLOWED) == wrong.headers.get(ALLOWED) == expected
    assert ALLOWED not in bare.headers


async def test_streams_and_empty_answers_say_it_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    service = service_of(STATE_DIR=str(tmp_path), CORS_ORIGINS="https://app.example")
    app = app_of(service, monkeypatch)

    async def stream(request) -> None:
        response = await request.respond(content_type="text/event-stream", headers={"Vary": "Accept"})
        await response.send(b"data: 1\n\n")
        await response.eof()

    app.add_route(stream, "/stream")
    async with serving(app) as client:
        response = await client.get("/stream", headers=PAGE)
    assert (response.headers[ALLOWED], response.headers["Vary"]) == ("https://app.example", "Accept, Origin")
