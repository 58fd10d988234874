"""Without a key nothing is answered but health: every route that the app has, and every other address."""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from sanic import Sanic

from api.http.keys import OPEN
from api.logs import Redactor
from api.schema.transfers import Transfer
from api.service.entries import Terms
from tests.inprocess import app_of, service_of, serving

KEY = "right-key-of-alice"
BEARER = {"Authorization": f"Bearer {KEY}"}


@pytest.fixture
async def app(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Sanic:
    service = service_of(
        API_KEYS=f"alice:{KEY},bob:right-key-of-bob", STATE_DIR=str(tmp_path), WRONG_KEYS="0", MAX_BODY="8MiB"
    )
    return app_of(service, monkeypatch)


@pytest.fixture
async def client(app: Sanic) -> AsyncIterator[httpx.AsyncClient]:
    async with serving(app) as client:
        yield client


def routes(app: Sanic) -> list[tuple[str, str]]:
    """Method and path of each, parameters filled in."""
    found = []
    for route in app.router.routes:
        path = re.sub(r"<[^>]*>", "x", "/" + route.path.lstrip("/"))
        found += [(method, path) for method in sorted(route.methods)]
    return found


ELSEWHERE = [
    ("GET", "/nowhere"), ("POST", "/health/live/x"), ("GET", "/ping/"), ("GET", "//ping"), ("GET", "/PING"), ("PATCH", "/"),
    ("GET", "/%70ing"), ("GET", "/health"), ("GET", "/healthcheck/../models"), ("OPTIONS", "/models"), ("TRACE", "/"),
]  # fmt: skip
NO_KEY: list[dict[str, str]] = [
    {}, {"Authorization": ""}, {"Authorization": "Bearer"}, {"Authorization": "Bearer wrong-key"},
    {"Authorization": "wrong-key"}, {"Authorization": "Basic d3Jvbmc6d3Jvbmc="}, {"Authorization": f"Digest {KEY}"},
    {"Authorization": f"Bearer {KEY}x"}, {"X-Api-Key": KEY}, {"Cookie": f"key={KEY}"}, {"X-Forwarded-For": "127.0.0.1"},
]  # fmt: skip


async def test_every_route_but_health_asks_for_a_key(app: Sanic, client: httpx.AsyncClient) -> None:
    asked = 0
    assert {path for _, path in routes(app)} >= OPEN
    for method, path in routes(app) + ELSEWHERE:
        for headers in NO_KEY:
            response = await client.request(method, path, headers=headers, content=b"{}" if method == "POST" else None)
            if path in OPEN and method in ("GET", "HEAD"):
                assert response.status_code != 401, path
                continue
            asked += 1
            assert response.status_code == 401, (method, path, headers)
            assert "Bearer" in response.headers["WWW-Authenticate"]
            if method != "HEAD":
                error = response.json()["$error"]
                assert error["code"] == "UNAUTHORIZED"
                assert error["requestId"] == response.headers["X-Request-Id"]
    assert asked > 200


async def test_a_key_is_taken_in_three_ways(client: httpx.AsyncClient) -> None:
    for headers, auth in ((BEARER, None), ({"Authorization": KEY}, None), ({}, ("anybody", KEY))):
        response = await client.get("/schedulers", headers=headers, auth=auth)
        assert response.status_code == 200
    assert (await client.get("/nowhere", headers=BEARER)).status_code == 404
    assert (await client.delete("/models", headers=BEARER)).status_code == 405


async def test_legacy_status_does_not_hide_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    service = service_of(API_KEYS=KEY, LEGACY_STATUS="1", STATE_DIR=str(tmp_path))
    async with serving(app_of(service, monkeypatch)) as client:
        assert (await client.post("/", content=b"{}")).status_code == 401
        assert (await client.post("/", content=b"{}", headers=BEARER)).status_code == 200  # as it is without keys


async def test_an_answer_does_not_wait_for_the_body(client: httpx.AsyncClient) -> None:
    port = client.base_url.port
    for more in ("", "Expect: 100-continue\r\n"):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        head = f"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 8000000\r\n{more}\r\n"
        writer.write(head.encode() + (b"" if more else b"{"))
        async with asyncio.timeout(20):
            answer = await reader.readuntil(b"\r\n\r\n")
            assert answer.startswith(b"HTTP/1.1 401 ")
            if more:  # nothing was sent, and nothing is waited for
                await reader.read()
        writer.close()


async def test_what_is_no_http_is_answered(client: httpx.AsyncClient, caplog: pytest.LogCaptureFixture) -> None:
    for line in (
        b"GARBAGE",
        b"GET \xff\xff HTTP/1.1",
        b"GET nowhere HTTP/1.1",
        b"GET /\xc3\xa9 HTTP/1.1",
        b"GET  HTTP/1.1",
    ):
        reader, writer = await asyncio.open_connection("127.0.0.1", client.base_url.port)
        writer.write(line + b"\r\nHost: x\r\n\r\n")
        async with asyncio.timeout(20):
            assert (await reader.readline()).startswith(b"HTTP/1.1 400 "), line
        writer.close()
    assert "Traceback" not in caplog.text


async def test_a_client_that_sends_first_sees_the_answer(client: httpx.AsyncClient) -> None:
    for _ in range(2):
        assert (await client.post("/", content=b"x" * 7_000_000)).status_code == 401
    assert (await client.get("/health/live")).status_code == 200


async def test_wrong_keys_are_limited(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    service = service_of(API_KEYS=f"alice:{KEY},bob:right-key-of-bob", WRONG_KEYS="3", STATE_DIR=str(tmp_path))
    async with serving(app_of(service, monkeypatch)) as client:
        assert (await client.get("/schedulers", headers=BEARER)).status_code == 200
        told = []
        for n in range(6):
            # no header makes another address of it
            headers = {
                "Authorization": f"Bearer guess-{n}",
                "X-Forwarded-For": f"192.0.2.{n}",
                "X-Real-IP": f"192.0.2.{n}",
            }
            told.append(await client.get("/schedulers", headers=headers))
        assert [response.status_code for response in told] == [401, 401, 401, 429, 429, 429]
        assert told[-1].json()["$error"]["code"] == "TOO_MANY_WRONG_KEYS"
        assert 0 < int(told[-1].headers["Retry-After"]) <= 20
        assert (await client.get("/schedulers", headers=BEARER)).status_code == 200
        assert (await client.get("/health/live")).status_code == 200


@pytest.mark.parametrize(
    ("environ", "header"), [({"PROXIES_COUNT": "1"}, "X-Forwarded-For"), ({"REAL_IP_HEADER": "X-Real-IP"}, "X-Real-IP")]
)
async def test_the_address_behind_a_proxy(
    environ: dict[str, str], header: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    service = service_of(API_KEYS=KEY, WRONG_KEYS="1", STATE_DIR=str(tmp_path), **environ)
    async with serving(app_of(service, monkeypatch)) as client:

        async def status(address: str) -> int:
            response = await client.get("/schedulers", headers={"Authorization": "guess", header: address})
            return response.status_code

        assert [await status(f"192.0.2.{n}") for n in (1, 1, 2, 2)] == [401, 429, 401, 429]
        if header == "X-Forwarded-For":  # what the client wrote itself stands before what the proxy adds
            assert [await status(f"198.51.100.{n}, 192.0.2.3") for n in (1, 2)] == [401, 429]


async def test_what_a_key_may_do_it_may_do_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    service = service_of(
        API_KEYS=f"alice:{KEY},bob:right-key-of-bob", KEY_RATE_LIMIT="2,bob=0", STATE_DIR=str(tmp_path)
    )
    service.later._recovered.set()
    async with serving(app_of(service, monkeypatch)) as client:
        # begun, and found wrong: that counts too, or looking costs nothing
        wrong = {"modelInputs": {"prompt": "x", "steps": 3}}
        first = [await client.post("/", json=wrong, headers=BEARER) for _ in range(3)]
        assert [response.status_code for response in first] == [400, 400, 429]
        for response in (first[-1], await client.post("/jobs", json=wrong, headers=BEARER)):
            assert (response.status_code, response.json()["$error"]["code"]) == (429, "RATE_LIMITED")
            assert 0 < int(response.headers["Retry-After"]) <= 30
        other = {"Authorization": "Bearer right-key-of-bob"}
        assert (await client.post("/", json=wrong, headers=other)).status_code == 400
        found = (await client.get("/usage", headers=BEARER)).json()["usage"]
        assert [used["limits"] for used in found] == [{"jobsPerMinute": 2, "concurrency": None, "jobs": 0}]


async def test_no_key_is_in_a_log(app: Sanic, client: httpx.AsyncClient, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    loggers = [logging.getLogger(name) for name in ("sanic.root", "sanic.error", "sanic.access", "sanic.server")]
    for logger in loggers:
        logger.addHandler(caplog.handler)
    try:
        for headers in (BEARER, {"Authorization": KEY}, {"Authorization": f"Bearer {KEY}x"}):
            for method, path in (("GET", "/schedulers"), ("POST", "/"), ("GET", "/nowhere"), ("PUT", "/")):
                await client.request(method, path, headers=headers)
    finally:
        for logger in loggers:
            logger.removeHandler(caplog.handler)
    ours = [record.getMessage() for record in caplog.records if not record.name.startswith("http")]
    assert any("GET /schedulers 200" in line for line in ours)
    assert not [line for line in ours if KEY in line]
    assert KEY not in repr(app.ctx.service.settings)
    assert KEY not in Redactor({"API_KEYS": f"alice:{KEY}"})(f"{BEARER} {KEY}")


@pytest.mark.parametrize(
    ("environ", "says"),
    [
        ({}, ["API_KEYS is not set"]),
        ({"KEY_CONCURRENCY": "3"}, ["API_KEYS is not set", "nobody is limited by KEY_CONCURRENCY"]),
        ({"API_KEYS": "alice:short"}, ["alice"]),
        ({"API_KEYS": KEY, "KEY_CONCURRENCY": "3"}, []),
    ],
)
async def test_what_is_said_at_the_start(
    environ: dict[str, str],
    says: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)
    app = app_of(service_of(STATE_DIR=str(tmp_path), **environ), monkeypatch)
    async with serving(app) as client:
        told: list[Any] = [record.getMessage() for record in caplog.records if record.name == "api.http"]
        assert len(told) == len(says), told
        assert all(wanted in line for wanted, line in zip(says, told, strict=True))
        assert "short" not in str(told).replace("short keys", "")
        if not environ:
            assert (await client.get("/schedulers")).status_code == 200


async def test_what_is_fetched_is_told_to_those_who_have_a_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    moving = Transfer("org/secret-project", "download", "progress", 1, 2, 3, 4.0)
    for environ, told in (({"API_KEYS": KEY}, False), ({}, True)):
        service = service_of(STATE_DIR=str(tmp_path), **environ)
        monkeypatch.setattr(service.fetcher, "transfers", lambda: [moving])
        async with serving(app_of(service, monkeypatch)) as client:
            for path in ("/health/ready", "/health/live", "/healthcheck", "/ping"):
                answer = await client.get(path)
                assert ("secret-project" in answer.text) == (told and path == "/health/ready")
            assert "secret-project" in (await client.get("/models", headers=BEARER)).text


SEND_URL = "http://127.0.0.1:9/services/let-in-by-path?token=let-in-by-query"


async def test_webhooks_are_those_of_the_key_that_asks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The server's own receiver is nobody's business but the operator's, and hears of all keys."""
    service = service_of(
        API_KEYS=f"alice:{KEY},bob:right-key-of-bob,root:right-key-of-root", ADMIN_KEYS="root", SEND_URL=SEND_URL,
        STATE_DIR=str(tmp_path),
    )  # fmt: skip
    async with serving(app_of(service, monkeypatch)) as client:
        service.webhooks.start()
        theirs = "https://receiver.invalid/hook?token=of-alice"
        for owner, url in (("alice", SEND_URL), ("alice", theirs), ("bob", SEND_URL), ("", SEND_URL)):
            await service.webhooks.post(url, b"{}", job=f"of-{owner}", kind="native", owner=owner)

        def as_(name: str) -> dict[str, str]:
            return {"Authorization": f"Bearer right-key-of-{name}"}

        told: dict[str, list[dict[str, Any]]] = {}
        for name in ("alice", "bob", "root"):
            answer = await client.get("/webhooks", headers=as_(name))
            assert "let-in-by" not in answer.text and "token" not in answer.text
            told[name] = [one for one in answer.json()["webhooks"] if one["job"].startswith("of-")]
        assert [one["url"] for one in told["alice"]] == ["https://receiver.invalid/hook", "http://127.0.0.1:9"]
        assert [one["job"] for one in told["bob"]] == ["of-bob"]
        assert [one["job"] for one in told["root"]] == ["of-", "of-bob", "of-alice", "of-alice"]
        of_server, of_bob = (one["id"] for one in told["root"][:2])
        for name, id_, status in (("alice", of_bob, 404), ("bob", of_server, 404), ("root", of_bob, 202)):
            answer = await client.post(f"/webhooks/{id_}/redeliver", headers=as_(name))
            assert (answer.status_code, "let-in-by" in answer.text) == (status, False), name
        await service.webhooks.stop()


async def test_a_job_is_there_only_for_the_key_that_it_came_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    service = service_of(API_KEYS=f"alice:{KEY},bob:right-key-of-bob", STATE_DIR=str(tmp_path))
    service.later.open()
    service.later._recovered.set()
    terms = Terms(owner="alice", endpoint="e")
    service.later._store.accept("a", "r", b"{}", priority=1, now=0.0, ttl=1e12, events=[], terms=terms)
    bob = {"Authorization": "Bearer right-key-of-bob"}
    async with serving(app_of(service, monkeypatch)) as client:
        for method, path in (
            ("GET", "/v2/e/status/a"), ("GET", "/v2/e/status-sync/a"), ("GET", "/v2/e/stream/a"), ("POST", "/v2/e/retry/a"),
            ("POST", "/v2/e/cancel/a"), ("GET", "/jobs/a"), ("GET", "/jobs/a/events"), ("GET", "/jobs/a/images/0"),
            ("GET", "/jobs/a/previews/0"), ("DELETE", "/jobs/a"),
        ):  # fmt: skip
            assert (await client.request(method, path, headers=bob)).status_code == 404, path
        assert (await client.post("/v2/e/purge-queue", headers=bob)).json()["removed"] == 0
        for headers, count in ((bob, 0), (BEARER, 1)):
            assert len((await client.get("/jobs", headers=headers)).json()["jobs"]) == count
            assert (await client.get("/v2/e/health", headers=headers)).json()["jobs"]["inQueue"] == count
        assert (await client.get("/v2/e/status/a", headers=BEARER)).json()["status"] == "IN_QUEUE"
        assert (await client.post("/v2/e/purge-queue", headers=BEARER)).json()["removed"] == 1
    await service.later.ledger.close()
