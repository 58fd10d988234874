"""The port that RunPod's load balancer asks."""

from __future__ import annotations

import asyncio
import socket
import types

import httpx
import pytest

from api.http.health_port import listen


@pytest.mark.parametrize(
    ("state", "status"), [("STARTING", 204), ("READY", 200), ("BUSY", 200), ("DRAINING", 503), ("DEFUNCT", 503)]
)
async def test_ping_says_what_the_load_balancer_wants_to_know(state: str, status: int) -> None:
    sock = socket.create_server(("127.0.0.1", 0))
    server = await listen(sock, types.SimpleNamespace(state=state))  # type: ignore[arg-type]
    async with server, httpx.AsyncClient(base_url=f"http://127.0.0.1:{sock.getsockname()[1]}") as client:
        assert (await client.get("/ping")).status_code == status
        assert (await client.get("/ping?x=1")).status_code == status
        assert (await client.get("/")).status_code == 404


async def test_who_says_nothing_or_too_much_is_let_go() -> None:
    sock = socket.create_server(("127.0.0.1", 0))
    server = await listen(sock, types.SimpleNamespace(state="READY"))  # type: ignore[arg-type]
    async with server:
        for sent in (b"", b"x" * 20_000):
            reader, writer = await asyncio.open_connection("127.0.0.1", sock.getsockname()[1])
            writer.write(sent)
            writer.write_eof()
            assert await asyncio.wait_for(reader.read(), 20) == b""
            writer.close()
