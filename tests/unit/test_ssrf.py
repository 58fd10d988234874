"""Addresses that requests must not lead to, at every door: none of them gets a connection.

What counts is where a connection is begun. Names resolve as a table here says, and the one public address of it leads
to a server of the test; a connection to anything else is written down and refused.
"""

from __future__ import annotations

import asyncio
import http.server
import itertools
import socket
import threading
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import httpcore
import pytest
from urllib3.util import connection as urllib3_connection

from api.errors import ApiError
from api.models import http_client, s3_client
from api.models.addresses import Reach, is_public
from api.models.locations import parse_location
from api.models.sources.remote import find
from api.service import upload as uploads
from api.service.destinations import check_destinations, choose_destinations
from api.service.fetch import fetch
from api.service.options import check_options
from api.service.s3_config import check_s3_config, read_s3_config, s3_destinations
from api.service.webhooks_delivery import Delivery, check_receiver
from api.settings import Settings, SettingsError

PUBLIC = "93.184.215.14"
FILE = "/x.safetensors"

NAMES = {
    "public.example": [[PUBLIC]],
    "localhost": [["127.0.0.1", "::1"]],
    "localhost.localdomain": [["127.0.0.1"]],
    "a.localhost": [["127.0.0.1"]],
    "private.example": [["10.0.0.7"]],
    "metadata.google.internal": [["169.254.169.254"]],
    "two.example": [[PUBLIC, "10.0.0.7"]],
    "both.example": [[PUBLIC, "::1"]],
    "mapped.example": [["::ffff:192.168.0.1"]],
    "nat64.example": [["64:ff9b::a9fe:a9fe"]],
    "rebind.example": [[PUBLIC], ["127.0.0.1"]],
}
"""What each look-up of a name gives, the last one for ever."""

REFUSED = [
    # IPv4 that is not public, as RFC 6890 lists it
    "http://127.0.0.1", "http://127.255.255.254", "http://10.0.0.1", "http://10.255.255.255", "http://172.16.0.1",
    "http://172.31.255.255", "http://192.168.0.1", "http://169.254.169.254", "http://169.254.0.1", "http://100.64.0.1",
    "http://100.127.255.254", "http://0.0.0.0", "http://0.1.2.3", "http://255.255.255.255", "http://224.0.0.1",
    "http://239.255.255.250", "http://240.0.0.1", "http://192.0.0.1", "http://192.0.2.1", "http://198.18.0.1",
    "http://198.51.100.1", "http://203.0.113.1", "http://192.88.99.1",
    # the same in other spellings: decimal, octal, hexadecimal, short
    "http://2130706433", "http://017700000001", "http://0x7f000001", "http://0X7F.0.0.1", "http://0177.0.0.1",
    "http://127.1", "http://127.0.1", "http://0", "http://2852039166", "http://0xa9.0xfe.0xa9.0xfe", "http://10.1",
    # IPv6: loopback, unspecified, local, multicast, documentation, and what holds an IPv4 address
    "http://[::1]", "http://[::]", "http://[fc00::1]", "http://[fdff::1]", "http://[fe80::1]", "http://[fec0::1]",
    "http://[ff02::1]", "http://[2001:db8::1]", "http://[100::1]", "http://[3fff::1]", "http://[::ffff:127.0.0.1]",
    "http://[::ffff:a9fe:a9fe]", "http://[::127.0.0.1]", "http://[::7f00:1]", "http://[2002:7f00:1::]",
    "http://[2002:a9fe:a9fe::1]", "http://[2001:0:4136:e378:8000:63bf:80ff:fffe]", "http://[64:ff9b::7f00:1]",
    "http://[64:ff9b::169.254.169.254]", "http://[64:ff9b:1::a00:1]", "http://[0:0:0:0:0:0:0:1]",
    # names, and how they are written
    "http://localhost", "http://LOCALHOST", "http://localhost.", "http://localhost.localdomain", "http://a.localhost",
    "http://private.example", "http://PRIVATE.example.", "http://metadata.google.internal", "http://mapped.example",
    "http://nat64.example", "http://127.0.0.1.", "http://two.example", "http://both.example",
    # ports, and TLS
    "http://127.0.0.1:80", "http://127.0.0.1:22", "http://[::1]:6379", "https://127.0.0.1", "https://localhost:8443",
    # user names that look like hosts
    "http://public.example@127.0.0.1", "http://public.example:80@127.0.0.1", "http://public.example%2f@10.0.0.1",
]  # fmt: skip
NO_URL = [
    "file:///etc/passwd", "gopher://127.0.0.1:6379/_x", "ftp://127.0.0.1/x", "dict://127.0.0.1:11211/", "//127.0.0.1/x",
    "data:image/png;base64,AAAA", "unix:///var/run/docker.sock", "jar:http://127.0.0.1!/x", "http:///127.0.0.1/",
    "http://１２７.０.０.１/x.png", "http://①②⑦.⓪.⓪.①/x.png", "http://127。0。0。1/x.png", "http://ⓛocalhost/x.png", "http://[::1/x.png",
    "http://127.0.0.1:0/x.png", "http://127.0.0.1:99999/x.png",
]  # fmt: skip


class Site:
    """Stands at the public address: answers what a path is told to, else 404."""

    def __init__(self) -> None:
        self.moved: dict[str, str] = {}
        self.asked: list[str] = []
        site = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def answer(self) -> None:
                site.asked.append(self.path)
                self.rfile.read(int(self.headers.get("Content-Length", 0)))
                target = site.moved.get(self.path.partition("?")[0])
                self.send_response(302 if target else 404)
                if target:
                    self.send_header("Location", target)
                self.send_header("Content-Length", "0")
                self.end_headers()

            do_GET = do_HEAD = do_PUT = do_POST = answer

            def log_message(self, *args: object) -> None:
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()


class Net:
    """Resolves names, and writes down where connections were begun."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, site: Site) -> None:
        self.begun: list[str] = []
        self.looked_up: list[str] = []
        self._answers = {name: itertools.chain(found, itertools.repeat(found[-1])) for name, found in NAMES.items()}
        resolve, connect = socket.getaddrinfo, socket.create_connection
        anyio_connect = httpcore.AnyIOBackend.connect_tcp
        port = site.server.server_port

        def getaddrinfo(host: Any, number: Any, *args: Any, **more: Any) -> list[Any]:
            name = str(host).lower().rstrip(".")
            if name not in self._answers:
                flags = {"flags": socket.AI_NUMERICHOST, "type": socket.SOCK_STREAM}
                return resolve(host, number, **flags)
            self.looked_up.append(name)
            found = next(self._answers[name])
            return [
                (socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, number))
                for address in found
            ]

        def create(address: tuple[str, int], *args: Any, **more: Any) -> socket.socket:
            self.begun.append(address[0])
            if address[0] != PUBLIC:
                raise ConnectionRefusedError
            return connect(("127.0.0.1", port), 5)

        async def connect_tcp(backend: Any, host: str, number: int, *args: Any, **more: Any) -> Any:
            self.begun.append(host)
            if host != PUBLIC:
                raise httpcore.ConnectError("refused")
            monkeypatch.setattr(socket, "getaddrinfo", resolve)  # its own look-up, of an address
            try:
                return await anyio_connect(backend, "127.0.0.1", port, *args, **more)
            finally:
                monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)

        monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
        monkeypatch.setattr(http_client.socket, "create_connection", create)
        monkeypatch.setattr(urllib3_connection, "create_connection", create)
        monkeypatch.setattr(httpcore.AnyIOBackend, "connect_tcp", connect_tcp)

    @property
    def leaks(self) -> list[str]:
        return [address for address in self.begun if address != PUBLIC]


@pytest.fixture(scope="module")
def site() -> Iterator[Site]:
    site = Site()
    yield site
    site.server.shutdown()
    site.server.server_close()


@pytest.fixture
def net(monkeypatch: pytest.MonkeyPatch, site: Site) -> Net:
    monkeypatch.setattr(uploads, "_PAUSE", 0)
    monkeypatch.setattr(http_client.Source, "pause", lambda *_: None)
    monkeypatch.setattr(s3_client, "_ATTEMPTS", 1)
    site.moved.clear()
    site.asked.clear()
    return Net(monkeypatch, site)


def settings(**environ: str) -> Settings:
    keys = {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret", "FETCH_TIMEOUT": "5"}
    return Settings.from_env({**keys, **environ})


async def image(url: str, known: Settings) -> None:
    await fetch(url, "f", timeout=5, max_bytes=1000, reach=Reach.of(known))


async def output(url: str, known: Settings) -> None:
    found = choose_destinations(check_options({"output_url": url}), 1, "PNG", "id", known)
    await check_destinations(found, known)
    await uploads.upload(found, [b"x"], "image/png", known)


async def model(url: str, known: Settings) -> None:
    location = parse_location(url, default_endpoint="", default_bucket="b", model_id="a/b", field="f")
    await asyncio.to_thread(find, location, known, False)


async def endpoint(url: str, known: Settings) -> None:
    scheme, _, rest = url.partition("://")
    if scheme in ("http", "https"):
        host, _, path = rest.partition("/")
        url = f"{scheme}+s3://{host}/bucket/{path}" if host else "http:///"  # without one, it would mean AWS
    await model(url, known)


async def webhook(url: str, known: Settings) -> None:
    await check_receiver(url, "f", known)
    delivery = Delivery(known)
    outcome = await delivery(url, b"{}", [])
    await delivery.close()
    if outcome.error:
        raise ApiError("SOURCE_UNREACHABLE", outcome.error)


async def s3_config(url: str, known: Settings) -> None:
    keys = {"accessId": "key", "accessSecret": "secret", "bucketName": "bucket"}
    config = read_s3_config({**keys, "endpointUrl": url.removesuffix(FILE)})
    await check_s3_config(config, known)
    found = await asyncio.to_thread(s3_destinations, config, 1, "PNG", "id")
    await uploads.upload(found, [b"x"], "image/png", known)


Door = Callable[[str, Settings], Awaitable[None]]
DOORS: dict[str, Door] = {
    "image": image,
    "output_url": output,
    "MODEL_URL": model,
    "MODEL_URL of S3": endpoint,
    "SEND_URL": webhook,
    "s3Config": s3_config,
}


async def code_of(door: Door, url: str, known: Settings | None = None) -> str:
    try:
        await door(url, known or settings())
    except ApiError as error:
        return error.code
    return "through"


@pytest.mark.parametrize("name", DOORS)
async def test_no_private_address_is_reached(name: str, net: Net, capsys: pytest.CaptureFixture[str]) -> None:
    through = {}
    for url in [each + FILE for each in REFUSED] + NO_URL:
        net.begun.clear()
        code = await code_of(DOORS[name], url)
        # what the resolver does not understand has no address, which is as good
        if net.begun or code not in ("URL_NOT_ALLOWED", "INVALID_INPUTS", "SOURCE_UNREACHABLE"):
            through[url] = code, net.begun[:]
    with capsys.disabled():
        print(f"\n{name}: {len(through)} of {len(REFUSED) + len(NO_URL)} addresses got through", end="")
    assert through == {}


@pytest.mark.parametrize("name", DOORS)
async def test_a_public_address_is_reached(name: str, net: Net) -> None:
    """The same way in: what is refused above is refused for where it leads."""
    await code_of(DOORS[name], f"http://public.example{FILE}")
    assert set(net.begun) == {PUBLIC}


@pytest.mark.parametrize("name", DOORS)
@pytest.mark.parametrize("target", ["http://127.0.0.1/", "http://2130706433/", "http://[::1]/", "http://localhost:22/",
                                    "https://169.254.169.254/", "http://private.example/", "file:///etc/passwd", "//10.0.0.1/"])  # fmt: skip
async def test_a_redirect_to_one_is_not_followed(name: str, target: str, net: Net, site: Site) -> None:
    site.moved.update({FILE: target, f"/bucket{FILE}": target, "/bucket/id/0.png": target})
    assert await code_of(DOORS[name], f"http://public.example{FILE}") != "through"
    assert site.asked
    assert net.leaks == []


@pytest.mark.parametrize("name", DOORS)
async def test_a_name_that_changes_its_mind_leads_nowhere_else(name: str, net: Net) -> None:
    """DNS rebinding: public when it is looked at first, private from then on."""
    assert await code_of(DOORS[name], f"http://rebind.example{FILE}") != "through"
    assert net.looked_up
    assert net.leaks == []


async def test_the_address_that_was_checked_is_connected_to(net: Net, site: Site) -> None:
    await code_of(image, f"http://rebind.example{FILE}")
    assert (net.looked_up, net.begun, site.asked) == (["rebind.example"], [PUBLIC], [FILE])


@pytest.mark.parametrize("name", DOORS)
@pytest.mark.parametrize(
    ("allowed", "url", "may"),
    [
        ("10.0.0.0/8", "http://10.1.2.3", True),
        ("10.0.0.0/8", "http://private.example", True),
        ("10.0.0.0/8", "http://192.168.0.1", False),
        ("10.0.0.0/8", "http://[::ffff:10.0.0.1]", True),
        ("10.0.0.5", "http://10.0.0.5:81", True),
        ("10.0.0.5", "http://10.0.0.6", False),
        ("10.0.0.5:9000", "http://10.0.0.5:9000", True),
        ("10.0.0.5:9000", "http://10.0.0.5:9001", False),
        ("private.example:9000", "http://private.example:9000", True),
        ("private.example:9000", "http://Private.Example.:9000", True),
        ("private.example:9000", "http://private.example:22", False),
        ("private.example:9000", "http://10.0.0.7:9000", False),
        ("private.example", "https://private.example", True),
        ("private.example", "http://a.private.example", False),
        ("[fc00::/7]:9000", "http://[fd00::1]:9000", True),
        ("::1", "http://[::1]", True),
        ("fd00::/8, 192.168.0.0/16", "http://192.168.7.7", True),
        ("two.example", "http://two.example", True),
        ("10.0.0.0/8", "http://two.example", True),
        ("192.168.0.0/16", "http://two.example", False),
    ],
)
async def test_what_is_allowed_although_private(name: str, allowed: str, url: str, may: bool, net: Net) -> None:
    code = await code_of(DOORS[name], url + FILE, settings(ALLOWED_URLS=allowed))
    assert bool(net.begun) == may, code


@pytest.mark.parametrize("wrong", ["http://minio.local", "10.0.0.1/8", "a b", "minio:x", "10.0.0", "minio:0", "10.0.0.1:0", "-a", "x:70000"])  # fmt: skip
def test_an_entry_that_means_nothing_is_named(wrong: str) -> None:
    with pytest.raises(SettingsError, match="ALLOWED_URLS"):
        Reach.of(settings(ALLOWED_URLS=f"10.0.0.0/8,{wrong}"))


def test_everything_may_be_allowed() -> None:
    assert Reach.of(settings(ALLOW_PRIVATE_URLS="1")).permits("x", 80, ["127.0.0.1", "::1"])
    assert is_public(PUBLIC)


def test_every_door_has_the_guard() -> None:
    """No other place of the HTTP side connects to addresses that requests name."""
    root = Path(__file__).resolve().parents[2] / "api"
    opening = ("create_connection(", "AsyncConnectionPool(", "open_connection(", "urlopen(", "httpx.", "requests.get")
    found = {
        str(path.relative_to(root))
        for room in ("http", "service", "models")
        for path in (root / room).rglob("*.py")
        if any(each in path.read_text() for each in opening)
    }
    doors = {"models/http_client.py", "service/fetch.py", "service/upload.py", "service/webhooks_delivery.py"}
    assert found == doors | {"service/workers.py"}
