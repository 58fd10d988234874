"""Clients that open many connections, or send slowly: what they hold is bounded."""

from __future__ import annotations

import asyncio
import contextlib
from pathlib import Path
from typing import Any

import pytest

from api.http import connections
from tests.inprocess import app_of, service_of, serving

HEAD = b"GET /health/live HTTP/1.1\r\nHost: x\r\n\r\n"


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "_LOOK", 0.05)
    monkeypatch.setattr(connections, "_PATIENCE", 0.5)


async def until_closed(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, drip: bytes) -> None:
    """Send a piece now and then until the server has had enough."""
    with contextlib.suppress(ConnectionError):
        while not reader.at_eof():
            writer.write(drip)
            await writer.drain()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(0.05):
                    await reader.read(1000)


@pytest.mark.parametrize(
    ("begin", "drip"),
    [
        (b"GET / HTTP/1.1\r\nHost: x\r\n", b"X-A: b\r\n"),
        (b"", b"G"),
        (b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 1000000\r\n\r\n", b"x"),
        (b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n", b"1\r\nx\r\n"),
        (HEAD + b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 1000000\r\n\r\n", b"x"),
    ],
    ids=["head", "first line", "body", "chunks", "second request"],
)
@pytest.mark.parametrize("key", ["", "right-key-of-alice"])
async def test_one_who_sends_slowly_is_cut(
    begin: bytes, drip: bytes, key: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also one who has no key, whose body is dropped as it comes."""
    app = app_of(service_of(STATE_DIR=str(tmp_path), API_KEYS=key), monkeypatch)
    async with serving(app) as client:
        reader, writer = await asyncio.open_connection("127.0.0.1", client.base_url.port)
        writer.write(begin)
        async with asyncio.timeout(20):
            await until_closed(reader, writer, drip)
        assert (await client.get("/health/live")).status_code == 200


async def test_one_who_sends_a_lot_is_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes longer than a head may, at a rate that is fine."""
    app = app_of(service_of(STATE_DIR=str(tmp_path)), monkeypatch)
    async with serving(app) as client:

        async def body() -> Any:
            for _ in range(10):
                await asyncio.sleep(0.1)
                yield b" " * 16_384

        response = await client.post("/", content=body())
    assert response.json()["$error"]["code"] == "INVALID_JSON"


async def test_one_who_waits_for_an_answer_is_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    app = app_of(service_of(STATE_DIR=str(tmp_path)), monkeypatch)

    async def slow(request) -> None:
        response = await request.respond()
        for _ in range(8):
            await asyncio.sleep(0.1)
            await response.send(b"x")
        await response.eof()

    app.add_route(slow, "/slow", methods=["GET", "POST"])
    async with serving(app) as client:
        for method, content in (("GET", None), ("GET", b"x"), ("POST", b"x" * 100_000)):
            assert len((await client.request(method, "/slow", content=content)).content) == 8


async def test_connections_are_bounded_and_idle_ones_make_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    app = app_of(service_of(STATE_DIR=str(tmp_path), MAX_CONNECTIONS="3"), monkeypatch)
    going = asyncio.Event()

    async def wait(request) -> None:
        response = await request.respond()
        await response.send(b"begun")
        await going.wait()
        await response.eof()

    app.add_route(wait, "/wait")
    async with serving(app) as client:
        port = client.base_url.port
        idle = []
        for _ in range(10):  # each has had its answer, and keeps its connection
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(HEAD)
            assert b"200 OK" in await reader.readuntil(b'LIVE"}')
            idle.append((reader, writer))
        async with asyncio.timeout(20):
            with contextlib.suppress(ConnectionError):
                assert await idle[0][0].read() == b""  # the oldest had to go
            busy = []
            for _ in range(3):
                reader, writer = await asyncio.open_connection("127.0.0.1", port)
                writer.write(HEAD.replace(b"/health/live", b"/wait"))
                await reader.readuntil(b"begun")
                busy.append((reader, writer))
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            told = await reader.read()
            assert b" 503 " in told
            assert b"TOO_MANY_CONNECTIONS" in told
            going.set()
            for reader, writer in busy:
                assert b"0\r\n\r\n" in await reader.readuntil(b"0\r\n\r\n")
                writer.close()
            for _, writer in idle:
                writer.close()
