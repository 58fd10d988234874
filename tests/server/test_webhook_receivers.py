"""The receivers of docs/webhooks.md, as they are there, against what the sender really sends."""

from __future__ import annotations

import asyncio
import contextlib
import json
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest

from api.schema.messages import Phase
from api.service.webhooks import Webhooks
from api.service.webhooks_signing import headers, native_body
from api.settings import Settings
from tests.running import ROOT, free_port

KEY = "geheim-🔑-and-long"
NODE = shutil.which("node")
COMMANDS = {"py": [sys.executable], "mjs": [NODE or "node"]}
BODY = native_body({"type": "inference", "payload": {"startRequestId": "Grüße 🌞"}}, KEY)


class Example:
    """One of the receivers, running."""

    def __init__(self, language: str, out: Path, script: Path | None = None) -> None:
        self.port, self.out = free_port(), out
        self.url = f"http://127.0.0.1:{self.port}/hook"
        script = script or ROOT / "docs" / "examples" / f"receiver.{language}"
        self.process = subprocess.Popen(
            [*COMMANDS[language], str(script), str(self.port)],
            env={"SIGN_KEY": KEY, "PYTHONIOENCODING": "utf-8", "PATH": ""}, stdout=out.open("w"), stderr=subprocess.STDOUT,
        )  # fmt: skip
        while True:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port)):
                return
            assert self.process.poll() is None, out.read_text()
            time.sleep(0.02)

    @property
    def events(self) -> list[dict]:
        return [json.loads(line) for line in self.out.read_text().split("\n")[:-1]]


@pytest.fixture(params=["py", "mjs"], scope="module")
def example(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Example]:
    if request.param == "mjs" and NODE is None:
        pytest.skip("node is not installed")
    running = Example(request.param, tmp_path_factory.mktemp("receiver") / "out")
    yield running
    running.process.kill()
    running.process.wait()


def send(example: Example, body: bytes, told: dict[str, str]) -> tuple[int, str]:
    answer = httpx.post(example.url, content=body, headers=told)
    return answer.status_code, answer.text


def signed(webhook_id: str, body: bytes = BODY, key: str = KEY, ago: float = 0.0) -> dict[str, str]:
    return dict(headers(webhook_id, body, key, time.time() - ago))


async def test_events_of_the_sender_are_taken_in_order(example: Example, tmp_path: Path) -> None:
    settings = Settings.from_env({"STATE_DIR": str(tmp_path), "SEND_URL": example.url, "SIGN_KEY": KEY})
    webhooks = Webhooks(settings)
    webhooks.start()
    before = len(example.events)
    hook = webhooks.hook({"startRequestId": 'Grüße 🌞 \\ " \u2028 赤'})
    assert hook is not None
    for kind in ("loadModel", "inference"):
        hook(Phase("a", kind, "start"))
        hook(Phase("a", kind, "done"))
    async with asyncio.timeout(20):
        while len(example.events) < before + 4:
            await asyncio.sleep(0.02)
    await webhooks.stop()
    got = example.events[before:]
    assert [(one["type"], one["status"]) for one in got] == [
        ("loadModel", "start"), ("loadModel", "done"), ("inference", "start"), ("inference", "done"),
    ]  # fmt: skip
    assert {one["payload"]["startRequestId"] for one in got} == {'Grüße 🌞 \\ " \u2028 赤'}


def test_one_that_comes_twice_is_handled_once(example: Example) -> None:
    before = len(example.events)
    told = signed("msg_twice")
    assert [send(example, BODY, told)[0] for _ in range(2)] == [200, 200]
    assert len(example.events) == before + 1


FAILS = {
    "py": (
        "    print(json.dumps(event)",
        "    handle.times = getattr(handle, 'times', 0) + 1\n    assert handle.times > 1\n",
    ),
    "mjs": ("  console.log(JSON.stringify(event)", "  if ((globalThis.once = !globalThis.once)) throw 1;\n"),
}
"""Of each language: a line of ``handle``, and what ahead of it has it fail for the first time."""


@pytest.mark.parametrize("language", ["py", "mjs"])
def test_one_that_could_not_be_handled_is_handled_when_it_comes_again(language: str, tmp_path: Path) -> None:
    if language == "mjs" and NODE is None:
        pytest.skip("node is not installed")
    text = (ROOT / "docs" / "examples" / f"receiver.{language}").read_text()
    line, fails = FAILS[language]
    assert text.count(line) == 1
    script = tmp_path / f"receiver.{language}"
    script.write_text(text.replace(line, fails + line))
    example = Example(language, tmp_path / "out", script)
    try:
        told = signed("msg_again")
        assert [send(example, BODY, told)[0] for _ in range(3)] == [500, 200, 200]
        assert example.out.read_text().count('"type"') == 1
    finally:
        example.process.kill()
        example.process.wait()


@pytest.mark.parametrize("language", ["py", "mjs"])
def test_a_request_that_is_cut_off_does_not_end_the_receiver(language: str, tmp_path: Path) -> None:
    if language == "mjs" and NODE is None:
        pytest.skip("node is not installed")
    example = Example(language, tmp_path / "out")
    try:
        for _ in range(3):
            with socket.create_connection(("127.0.0.1", example.port)) as cut:
                cut.sendall(b"POST /hook HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\nhalf")
            time.sleep(0.1)
        assert send(example, BODY, signed("msg_after"))[0] == 200
    finally:
        example.process.kill()
        example.process.wait()


@pytest.mark.parametrize(
    "tamper",
    [
        lambda told: (BODY.replace(b"inference", b"inferencE"), told),
        lambda told: (BODY, {**told, "X-Webhook-Id": "msg_other"}),
        lambda told: (BODY, {**told, "X-Signature": told["X-Signature"].replace("t=1", "t=2")}),
        lambda told: (BODY, {**told, "X-Signature": told["X-Signature"].partition(",")[0]}),
        lambda told: (BODY, {**told, "X-Signature": "nonsense"}),
        lambda told: (BODY, {name: value for name, value in told.items() if name != "X-Signature"}),
        lambda told: (BODY, signed("msg_key", key="another key")),
        lambda told: (json.dumps(json.loads(BODY), ensure_ascii=False).encode(), told),
    ],
    ids=["body", "id", "timestamp", "no signature", "nonsense", "no header", "key", "written again"],
)
def test_what_is_not_as_it_was_signed_is_refused(
    example: Example, tamper: Callable[[dict[str, str]], tuple[bytes, dict[str, str]]]
) -> None:
    before = len(example.events)
    assert send(example, *tamper(signed("msg_tampered"))) == (401, "wrong signature")
    assert len(example.events) == before


@pytest.mark.parametrize("ago", [301, 86400, -600])
def test_an_old_one_is_refused(example: Example, ago: float) -> None:
    assert send(example, BODY, signed("msg_old", ago=ago)) == (401, "too old")
    assert send(example, BODY, signed("msg_fresh", ago=250))[0] == 200


def test_the_page_shows_them_as_they_are() -> None:
    page = (ROOT / "docs" / "webhooks.md").read_text()
    for language in ("py", "mjs"):
        assert (ROOT / "docs" / "examples" / f"receiver.{language}").read_text() in page
