"""URLs that a client names: what may be reached, and what comes of it."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor

import pytest

from api.errors import ApiError
from api.models.addresses import Reach, is_public
from api.service.fetch import fetch

PRIVATE = [
    "http://127.0.0.1/", "http://127.1/", "http://2130706433/", "http://0x7f000001/", "http://0177.0.0.1/",
    "http://0/", "http://0.0.0.0/", "http://localhost/", "http://localhost.localdomain/", "http://[::1]/",
    "http://[::]/", "http://[::ffff:127.0.0.1]/", "http://[::ffff:7f00:1]/", "http://[64:ff9b::7f00:1]/",
    "http://[2002:7f00:1::]/", "http://[fe80::1]/", "http://[fc00::1]/", "http://[ff02::1]/", "http://10.0.0.1/",
    "http://172.16.0.1/", "http://172.31.255.255/", "http://192.168.1.1/", "http://169.254.169.254/latest/meta-data",
    "http://100.64.0.1/", "http://192.0.0.1/", "http://198.18.0.1/", "http://224.0.0.1/", "http://240.0.0.1/",
    "http://255.255.255.255/", "http://user:pass@127.0.0.1/", "http://127.0.0.1.:80/", "http://[::ffff:10.0.0.1]:81/",
]  # fmt: skip
NO_URL = [
    "file:///etc/passwd", "ftp://example.com/x", "gopher://127.0.0.1/", "//127.0.0.1/", "http://", "http:///x",
    "javascript:alert(1)", "data:image/png;base64,AAAA", "http://exämple.com/", "", "http://[::1", "http://a:99999/",
]  # fmt: skip


async def get(url: str, *, allow_private: bool = False, timeout: float = 2, max_bytes: int = 1000) -> bytes:
    return await fetch(url, "f", timeout=timeout, max_bytes=max_bytes, reach=Reach(allow_private))


async def code_of(awaitable: Awaitable[bytes]) -> str:
    with pytest.raises(ApiError) as error:
        await awaitable
    return error.value.code


@pytest.mark.parametrize("url", PRIVATE)
async def test_private_addresses_are_not_reached(url: str) -> None:
    # a form that the resolver does not understand is unreachable, which is as good
    assert await code_of(get(url)) in ("URL_NOT_ALLOWED", "SOURCE_UNREACHABLE")


@pytest.mark.parametrize("url", NO_URL)
async def test_what_is_no_http_url_is_refused(url: str) -> None:
    assert await code_of(get(url)) == "URL_NOT_ALLOWED"


def test_public_addresses_are_public() -> None:
    assert all(map(is_public, ["93.184.215.14", "2606:2800:21f:cb07::1", "::ffff:93.184.215.14"]))


Handler = Callable[[bytes, asyncio.StreamWriter], Awaitable[None]]


@contextlib.asynccontextmanager
async def serving(handle: Handler) -> AsyncIterator[int]:
    """A bare HTTP server on loopback."""

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            head = await reader.readuntil(b"\r\n\r\n")
            await handle(head, writer)
            writer.close()

    server = await asyncio.start_server(connected, "127.0.0.1", 0)
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        server.close()


def answer(body: bytes, status: str = "200 OK", headers: str = "") -> bytes:
    return f"HTTP/1.1 {status}\r\nContent-Length: {len(body)}\r\n{headers}\r\n".encode() + body


async def test_a_body_arrives() -> None:
    async def handle(head: bytes, writer: asyncio.StreamWriter) -> None:
        writer.write(answer(b"picture"))

    async with serving(handle) as port:
        assert await get(f"http://127.0.0.1:{port}/x", allow_private=True) == b"picture"


async def test_a_body_over_the_limit_is_cut_off() -> None:
    async def handle(head: bytes, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\n\r\n")
        while True:
            writer.write(b"x" * 10_000)
            await writer.drain()

    async with serving(handle) as port:
        assert await code_of(get(f"http://127.0.0.1:{port}/", allow_private=True)) == "IMAGE_TOO_LARGE"


async def test_a_server_that_never_ends_times_out() -> None:
    async def handle(head: bytes, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n")
        while True:
            await asyncio.sleep(0.05)
            writer.write(b"x")
            await writer.drain()

    async with serving(handle) as port:
        assert await code_of(get(f"http://127.0.0.1:{port}/", allow_private=True, timeout=0.4)) == "SOURCE_UNREACHABLE"


@pytest.mark.parametrize("status", ["404 Not Found", "500 Oops"])
async def test_an_error_status_is_told(status: str) -> None:
    async def handle(head: bytes, writer: asyncio.StreamWriter) -> None:
        writer.write(answer(b"", status))

    async with serving(handle) as port:
        assert await code_of(get(f"http://127.0.0.1:{port}/", allow_private=True)) == "SOURCE_UNREACHABLE"


def resolve_to(monkeypatch: pytest.MonkeyPatch, table: dict[str, list[str]], asked: list[str]) -> None:
    """Names resolve to what the table says, one answer after the other (DNS rebinding)."""

    async def getaddrinfo(self: object, host: str, port: int, **_: object) -> list[tuple[object, ...]]:
        asked.append(host)
        address = table[host].pop(0) if len(table.get(host, [])) > 1 else table.get(host, [host])[0]
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port))]

    monkeypatch.setattr(asyncio.get_running_loop().__class__, "getaddrinfo", getaddrinfo)


async def test_a_redirect_into_a_private_network_is_not_followed(monkeypatch: pytest.MonkeyPatch) -> None:
    reached = []

    async def handle(head: bytes, writer: asyncio.StreamWriter) -> None:
        reached.append(head.split()[1])
        writer.write(answer(b"", "302 Found", f"Location: http://127.0.0.1:{port}/secret\r\n"))

    async with serving(handle) as port:
        # the first hop is allowed by patching what counts as public for one name only
        monkeypatch.setattr("api.models.addresses.is_public", lambda address: address == "127.0.0.2")
        resolve_to(monkeypatch, {"public.example": ["127.0.0.2"]}, [])
        server = await asyncio.start_server(lambda r, w: _relay(r, w, handle), "127.0.0.2", 0)
        first = server.sockets[0].getsockname()[1]
        assert await code_of(get(f"http://public.example:{first}/start")) == "URL_NOT_ALLOWED"
        server.close()
    assert reached == [b"/start"]


async def _relay(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, handle: Handler) -> None:
    await handle(await reader.readuntil(b"\r\n\r\n"), writer)
    writer.close()


async def test_the_address_that_was_checked_is_the_one_connected_to(monkeypatch: pytest.MonkeyPatch) -> None:
    """A name that answers with a public address first and a private one next is looked up once."""
    asked: list[str] = []
    resolve_to(monkeypatch, {"rebind.example": ["203.0.113.7", "127.0.0.1"]}, asked)
    monkeypatch.setattr("api.models.addresses.is_public", lambda address: address.startswith("203."))
    assert await code_of(get("http://rebind.example/", timeout=0.3)) == "SOURCE_UNREACHABLE"
    assert asked.count("rebind.example") == 1


async def test_the_next_address_of_a_name_is_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    """As of a name with addresses of IPv6 where there is none; all of them were checked."""

    async def handle(head: bytes, writer: asyncio.StreamWriter) -> None:
        writer.write(answer(b"here"))

    async with serving(handle) as port:

        async def getaddrinfo(self: object, host: str, port: int, **_: object) -> list[tuple[object, ...]]:
            found = [("::1", socket.AF_INET6), ("127.0.0.9", socket.AF_INET), ("127.0.0.1", socket.AF_INET)]
            if host != "several.example":  # anyio asks for addresses too
                found = [(host, socket.AF_INET6 if ":" in host else socket.AF_INET)]
            return [(family, socket.SOCK_STREAM, 6, "", (address, port)) for address, family in found]

        monkeypatch.setattr(asyncio.get_running_loop().__class__, "getaddrinfo", getaddrinfo)
        assert await get(f"http://several.example:{port}/", allow_private=True) == b"here"
        monkeypatch.setattr("api.models.addresses.is_public", lambda address: address != "127.0.0.9")
        assert await code_of(get(f"http://several.example:{port}/")) == "URL_NOT_ALLOWED"


async def test_names_that_nobody_knows_leave_threads_for_the_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    loop, answer_now = asyncio.get_running_loop(), threading.Event()
    loop.set_default_executor(ThreadPoolExecutor(32))

    async def getaddrinfo(self: asyncio.AbstractEventLoop, host: str, port: int, **_: object) -> list[object]:
        await self.run_in_executor(None, answer_now.wait)
        raise socket.gaierror

    monkeypatch.setattr(loop.__class__, "getaddrinfo", getaddrinfo)
    try:
        asked = [code_of(get(f"http://{n}.example/", timeout=0.2)) for n in range(60)]
        assert await asyncio.gather(*asked) == ["SOURCE_UNREACHABLE"] * 60
        async with asyncio.timeout(5):
            assert await asyncio.to_thread(lambda: "done") == "done"
    finally:
        answer_now.set()
    async with asyncio.timeout(20):  # and are there again afterwards
        assert await code_of(get("http://another.example/")) == "SOURCE_UNREACHABLE"


async def test_redirects_end() -> None:
    async def handle(head: bytes, writer: asyncio.StreamWriter) -> None:
        writer.write(answer(b"", "302 Found", "Location: /again\r\n"))

    async with serving(handle) as port:
        assert await code_of(get(f"http://127.0.0.1:{port}/", allow_private=True)) == "SOURCE_UNREACHABLE"


async def test_a_redirect_to_a_file_is_refused() -> None:
    async def handle(head: bytes, writer: asyncio.StreamWriter) -> None:
        writer.write(answer(b"", "302 Found", "Location: file:///etc/passwd\r\n"))

    async with serving(handle) as port:
        assert await code_of(get(f"http://127.0.0.1:{port}/", allow_private=True)) == "URL_NOT_ALLOWED"


@pytest.mark.parametrize(
    "url",
    [
        "ftp://me:se-cret@h/x?t=se-cret",
        "http://10.0.0.1/x?t=se-cret",
        "http://me:se-cret@127.0.0.1:1/x?t=se-cret#se-cret",
    ],
)
async def test_an_error_has_nothing_of_an_address_that_may_be_a_secret(url: str) -> None:
    """It is kept with jobs for later, and is seen by more than who sent it."""
    reach = Reach(everywhere="127.0.0.1" in url)
    with pytest.raises(ApiError) as fault:
        await fetch(url, "modelInputs.init_image", timeout=5, max_bytes=10, reach=reach)
    assert "/x" in str(fault.value.requested)
    assert "se-cret" not in str(fault.value.body())
