"""The sender of webhooks with a receiver, a clock and a disk of the test's own."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import json
import sqlite3
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest

from api.errors import ApiError
from api.schema.messages import Phase, Preview, Progress
from api.schema.transfers import Transfer
from api.service import webhooks as senders
from api.service.native_events import NativeEvents
from api.service.webhooks import Webhooks
from api.service.webhooks_delivery import Delivery, Outcome, check_receiver
from api.service.webhooks_hook import _BEHIND, _BEHIND_IN_ALL, telling
from api.service.webhooks_outbox import Outbox
from api.service.webhooks_signing import check_key, headers, native_body
from api.settings import Settings, SettingsError

URL = "https://receiver.test/hook?token=not-for-everybody"
WIRE = Path(__file__).resolve().parents[1] / "wire"


class Receiver:
    """Stands in for the network: what it got, and what it does with it."""

    def __init__(self) -> None:
        self.got: list[tuple[str, bytes, dict[str, str]]] = []
        self.answer: Callable[[int], Outcome] = lambda n: Outcome()
        self.tries = 0

    async def __call__(self, url: str, body: bytes, sent: list[tuple[str, str]]) -> Outcome:
        self.tries += 1
        outcome = self.answer(self.tries)
        await asyncio.sleep(0)
        if not outcome.error:
            self.got.append((url, body, dict(sent)))
        return outcome

    @property
    def bodies(self) -> list[Any]:
        return [json.loads(body) for _, body, _ in self.got]


class Clock:
    def __init__(self) -> None:
        self.ahead = 0.0

    def __call__(self) -> float:
        return time.time() + self.ahead


Make = Callable[..., Webhooks]


@pytest.fixture
def receiver() -> Receiver:
    return Receiver()


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
async def make(tmp_path: Path, receiver: Receiver, clock: Clock) -> AsyncIterator[Make]:
    """Senders over one STATE_DIR, one after the other."""
    made: list[Webhooks] = []

    def start(**environ: str) -> Webhooks:
        settings = Settings.from_env({"STATE_DIR": str(tmp_path), **environ})
        webhooks = Webhooks(settings, receiver, clock, lambda low, high: high)
        webhooks.start()
        made.append(webhooks)
        return webhooks

    yield start
    for webhooks in made:
        await webhooks.stop()


async def until(condition: Callable[[], Any]) -> None:
    async with asyncio.timeout(20):
        while not condition():
            await asyncio.sleep(0.005)


async def post(webhooks: Webhooks, number: int, job: str = "j", **more: Any) -> None:
    await webhooks.post(URL, b'{"n": %d}' % number, job=job, kind="runpod", **more)


async def test_what_was_posted_arrives_in_order(make: Make, receiver: Receiver) -> None:
    webhooks = make()
    receiver.answer = lambda n: Outcome("no") if n % 3 == 0 and n < 20 else Outcome()
    webhooks._lines._draw = lambda low, high: 0.0
    for number in range(10):
        await post(webhooks, number, job=f"j{number % 2}")
    await until(lambda: len(receiver.got) == 10)
    for job in (0, 1):
        assert [body["n"] for body in receiver.bodies if body["n"] % 2 == job] == list(range(job, 10, 2))
    assert await webhooks.listed(None, "", 100) == []
    assert webhooks.counts() == {"pending": 0, "failed": 0, "delivered": 10}


async def test_an_id_is_the_same_at_every_try_and_the_timestamp_is_not(
    make: Make, receiver: Receiver, clock: Clock
) -> None:
    seen: list[dict[str, str]] = []
    send = receiver.__call__

    async def watched(url: str, body: bytes, sent: list[tuple[str, str]]) -> Outcome:
        seen.append(dict(sent))
        return await send(url, body, sent)

    webhooks = make(SIGN_KEY="s3cret")
    webhooks._send = watched
    receiver.answer = lambda n: Outcome("it answered 500") if n < 3 else Outcome()
    await post(webhooks, 1)
    for count in (1, 2):
        await until(lambda count=count: len(seen) == count and not webhooks._sending)
        clock.ahead += 100
        webhooks._wake.set()
    await until(lambda: len(receiver.got) == 1)
    assert len({one["X-Webhook-Id"] for one in seen}) == 1
    assert len({one["webhook-timestamp"] for one in seen}) == 3


async def test_one_that_is_given_up_is_listed_and_can_be_sent_again(
    make: Make, receiver: Receiver, clock: Clock
) -> None:
    webhooks = make(WEBHOOK_TRIES="2")
    receiver.answer = lambda n: Outcome("it answered 500")
    await post(webhooks, 1, owner="ann")
    await post(webhooks, 2, owner="ann")
    for tries in (1, 2, 3, 4):
        await until(lambda tries=tries: receiver.tries >= tries and not webhooks._sending)
        clock.ahead += 1000
        webhooks._wake.set()
    failed = await webhooks.listed("failed", "ann", 10)
    assert [(one.tries, one.error) for one in failed] == [(2, "it answered 500")] * 2
    assert webhooks.counts() == {"pending": 0, "failed": 2, "delivered": 0}
    assert await webhooks.listed("waiting", "ann", 10) == []
    assert await webhooks.listed("failed", "bob", 10) == []
    with pytest.raises(ApiError, match="no such webhook"):
        await webhooks.redeliver(failed[0].id, "bob")
    receiver.answer = lambda n: Outcome()
    again = await webhooks.redeliver(failed[0].id, "ann")
    assert again.given_up is None
    await until(lambda: receiver.bodies == [{"n": 2}])
    assert receiver.got[0][2]["X-Webhook-Id"] == failed[0].id
    await until(lambda: not webhooks._sending)
    assert [one.id for one in await webhooks.listed(None, "ann", 10)] == [failed[1].id]
    with pytest.raises(ApiError, match="no such webhook"):
        await webhooks.redeliver("msg_unknown", "ann")


async def test_a_receiver_that_wants_no_more_is_not_asked_again(make: Make, receiver: Receiver) -> None:
    webhooks = make()
    receiver.answer = lambda n: Outcome("it answered 410", final=True)
    await post(webhooks, 1)
    await until(lambda: receiver.tries == 1 and not webhooks._sending)
    assert [one.error for one in await webhooks.listed("failed", "", 10)] == ["it answered 410"]


async def test_one_that_waits_too_long_is_given_up(
    make: Make, receiver: Receiver, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(senders, "_SWEEP", 0.01)
    webhooks = make(WEBHOOK_TTL="3600")
    receiver.answer = lambda n: Outcome("no", at_least=7200)
    await post(webhooks, 1)
    await until(lambda: receiver.tries == 1 and not webhooks._sending)
    assert len(await webhooks.listed("waiting", "", 10)) == 1
    clock.ahead = 3601
    await until(lambda: not list(webhooks._lines))
    failed = await webhooks.listed("failed", "", 10)
    assert failed[0].error == "it did not arrive within WEBHOOK_TTL of 3600 s"
    clock.ahead += 8 * 86400  # and nothing is known of it in the end
    async with asyncio.timeout(20):
        while await webhooks.listed("failed", "", 10):
            await asyncio.sleep(0.01)


async def test_a_start_goes_on_with_what_had_not_arrived(make: Make, receiver: Receiver, tmp_path: Path) -> None:
    first = make(SIGN_KEY="s3cret")
    receiver.answer = lambda n: Outcome("no", at_least=3000)
    await post(first, 1)
    await post(first, 2, sign_key="of the request")
    await post(first, 3, sign_key="s3cret")
    await until(lambda: receiver.tries == 1)
    await first.stop()
    rows = sqlite3.connect(tmp_path / "webhooks" / "webhooks.sqlite3").execute("SELECT sign_key FROM webhooks")
    assert rows.fetchall() == [("",), ("of the request",), ("",)]  # the server's own is not written down
    receiver.answer = lambda n: Outcome()
    second = make(SIGN_KEY="s3cret")
    second._wake.set()
    assert receiver.got == []  # it still waits as long as it was asked to
    for entry in await second.listed("waiting", "", 10):
        await second.redeliver(entry.id, "")
    await until(lambda: receiver.bodies == [{"n": 1}, {"n": 2}, {"n": 3}])
    for (_, body, sent), key in zip(receiver.got, ("s3cret", "of the request", "s3cret"), strict=True):
        assert sent == dict(headers(sent["X-Webhook-Id"], body, key, float(sent["webhook-timestamp"])))


async def test_without_persist_inputs_nothing_is_on_the_disk(make: Make, receiver: Receiver, tmp_path: Path) -> None:
    first = make()
    receiver.answer = lambda n: Outcome("no", at_least=3000)
    await post(first, 1)
    await first.stop()
    receiver.tries = 0
    receiver.answer = lambda n: Outcome("no")
    second = make(PERSIST_INPUTS="0")  # what was there is still sent, but does not stay there
    await second.post(URL, b'{"secret": "words"}', job="j", kind="native", sign_key="k3y-of-the-request")
    assert [one.job for one in await second.listed("waiting", "", 10)] == ["j", "j"]
    found = b"".join(path.read_bytes() for path in (tmp_path / "webhooks").iterdir())
    assert b'"n": 1' not in found
    assert b"words" not in found
    assert b"k3y-of-the-request" not in found
    await second.stop()
    third = make()
    assert await third.listed(None, "", 10) == []


async def test_a_full_disk_loses_nothing(make: Make, receiver: Receiver, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(senders, "_PAUSE", 0.01)
    webhooks = make()
    add, faults = webhooks._outbox.add, iter(range(3))

    def failing(*arguments: Any, **more: Any) -> list[int]:
        if next(faults, None) is not None:
            raise sqlite3.OperationalError("database or disk is full")
        return add(*arguments, **more)

    monkeypatch.setattr(webhooks._outbox, "add", failing)
    await asyncio.gather(*(post(webhooks, number) for number in range(4)))
    await until(lambda: [body["n"] for body in receiver.bodies] == [0, 1, 2, 3])


async def test_too_many_for_one_receiver_are_given_up(
    make: Make, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(senders, "_MOST", 3)
    webhooks = make()
    receiver.answer = lambda n: Outcome("no", at_least=3000)
    for number in range(5):
        await post(webhooks, number, job=f"j{number}")
    refused = await webhooks.listed("failed", "", 10)
    assert [one.job for one in refused] == ["j4", "j3"]
    assert "others wait" in str(refused[0].error)


def test_of_those_that_were_given_up_the_newest_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("api.service.webhooks_outbox._KEPT", 2)
    outbox = Outbox(tmp_path, persist=True)
    outbox.open()
    new = senders.New("", "native", "j", URL, "", b"{}", "", 5.0, refused="many")
    outbox.add([new._replace(id=f"msg_{n}", refused="many" if n else "") for n in range(4)], durable=True)
    outbox.remove_old(6.0)
    assert [one.id for one in outbox.newest(None, None, 10)] == ["msg_3", "msg_2", "msg_0"]
    outbox.close()


async def test_a_request_without_a_receiver_touches_nothing(make: Make) -> None:
    webhooks = make()
    assert webhooks.hook({"startRequestId": "x", "SIGN_KEY": "k"}) is None
    assert webhooks.hook({"SEND_URL": ["no"]}) is None
    async with telling(None):
        pass


def test_the_captured_signatures_come_out() -> None:
    checked = 0
    for file in WIRE.glob("*webhook*.json"):
        pair = json.loads(file.read_text())
        for sent in pair["response"].get("webhooks", []) if isinstance(pair, dict) else []:
            event = json.loads(sent["raw"])
            sig = event.pop("sig", None)
            key = pair["request"]["callInputs"].get("SIGN_KEY", "")
            assert json.loads(native_body(event, key)).get("sig") == sig
            checked += sig is not None
    assert checked == 15


def test_a_signature_is_that_of_standard_webhooks() -> None:
    """The vector that its reference libraries are tested with."""
    sent = dict(
        headers(
            "msg_p5jXN8AQM9LWM0D4loKWxJek",
            b'{"test": 2432232314}',
            "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw",
            1614265330,
        )
    )
    assert sent["webhook-signature"] == "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE="
    assert (sent["webhook-id"], sent["webhook-timestamp"]) == ("msg_p5jXN8AQM9LWM0D4loKWxJek", "1614265330")


def test_the_bytes_that_are_sent_are_signed() -> None:
    body = native_body({"payload": {"startRequestId": "Grüße 🌞", "eta": 2.0, "share": 0.5}}, "schlüssel")
    assert body.isascii()
    assert b'"eta":2,"share":0.5' in body  # as JavaScript would write it
    sent = dict(headers("msg_1", body, "schlüssel", 1700000000.9))
    told = hmac.new("schlüssel".encode(), b"1700000000.msg_1." + body, hashlib.sha256).hexdigest()
    assert sent["X-Signature"] == f"t=1700000000,v1={told}"
    assert {name.lower() for name, _ in headers("msg_1", body, "", 5)} == {
        "x-webhook-id", "webhook-id", "webhook-timestamp",
    }  # fmt: skip


@pytest.mark.parametrize("key", ["whsec_", "whsec_???", "whsec_abcde"])
def test_keys_that_are_none(key: str) -> None:
    with pytest.raises(ValueError, match="base64"):
        check_key(key)
    with pytest.raises(SettingsError) as fault:
        Webhooks(Settings.from_env({"SIGN_KEY": key}))
    assert str(fault.value).startswith("SIGN_KEY: ") and key not in str(fault.value).replace("whsec_ must", "")


async def test_an_event_that_fails_says_in_what(make: Make, receiver: Receiver) -> None:
    hook = make(CONTAINER_ID="cont-1").hook({"SEND_URL": URL, "startRequestId": "r"}, job="job-1")
    assert hook is not None
    hook.fail(ApiError("INVALID_INPUTS", "refused"))  # before anything happened: its client was told
    hook(Transfer("m", "download", "start", 0, 9, 0, None))
    hook(Transfer("m", "download", "done", 9, 9, 9, 0.0))
    hook(Phase("a", "loadModel", "start"))
    hook.fail(ApiError("MODEL_BROKEN", "cut", field="callInputs.MODEL_ID"))
    hook(Phase("a", "loadModel", "done"))  # comes late
    await hook.stored()
    await until(lambda: len(receiver.got) == 4)
    told = receiver.bodies
    assert [(one["type"], one["status"]) for one in told] == [
        ("download", "start"), ("download", "done"), ("loadModel", "start"), ("loadModel", "error"),
    ]  # fmt: skip
    payload = {
        "startRequestId": "r",
        "jobId": "job-1",
        "code": "MODEL_BROKEN",
        "message": "cut",
        "field": "callInputs.MODEL_ID",
    }
    assert told[3]["payload"] == payload
    assert {one["container_id"] for one in told} == {"cont-1"}
    assert [list(one) for one in told] == [["type", "status", "container_id", "time", "t", "tsl", "payload"]] * 4


async def test_a_request_that_is_cancelled_is_told_of(make: Make, receiver: Receiver) -> None:
    hook = make().hook({"SEND_URL": URL})
    assert hook is not None
    hook.begin({})
    with pytest.raises(asyncio.CancelledError):
        async with telling(hook):
            raise asyncio.CancelledError
    with pytest.raises(RuntimeError):
        async with telling(hook):
            raise RuntimeError
    await until(lambda: receiver.got)
    await asyncio.sleep(0.05)
    assert [one["payload"]["code"] for one in receiver.bodies] == ["CANCELLED"]


@pytest.mark.parametrize("fault", [ApiError("OUT_OF_MEMORY", "no"), RuntimeError()])
async def test_that_a_request_has_failed_is_safe_when_its_client_is_told(
    make: Make, receiver: Receiver, fault: Exception
) -> None:
    webhooks = make()
    receiver.answer = lambda n: Outcome("no", at_least=3000)
    hook = webhooks.hook({"SEND_URL": URL})
    assert hook is not None
    hook.begin({})
    with pytest.raises(type(fault)):
        async with telling(hook):
            raise fault
    assert [one.kind for one in await webhooks.listed("waiting", None, 10)] == ["native"]


async def test_previews_that_nobody_takes_are_left_out_but_no_step(make: Make, receiver: Receiver) -> None:
    webhooks = make()
    receiver.answer = lambda n: Outcome("no", at_least=3000)
    hook = webhooks.hook({"SEND_URL": URL}, job="j")
    assert hook is not None
    hook.begin({"callback_steps": 1})
    for step in range(1, 201):
        hook(Progress("a", step, 200))
        hook(Preview("a", step, 200, [b"x"]))
    await hook.stored()
    found = await webhooks.listed("waiting", "", 1000)
    assert 200 < len(found) <= 200 + _BEHIND


async def test_a_receiver_that_is_down_does_not_fill_the_disk_with_previews(make: Make, receiver: Receiver) -> None:
    webhooks = make()
    receiver.answer = lambda n: Outcome("no", at_least=3000)
    jobs = _BEHIND_IN_ALL // 20 * 2
    for job in range(jobs):
        hook = webhooks.hook({"SEND_URL": URL}, job=f"j{job}")
        assert hook is not None
        for step in range(20):
            hook(Preview("a", step, 20, [b"x"]))
        hook(Phase("a", "inference", "done"))
        await hook.stored()
    found = await webhooks.listed("waiting", None, 2000)
    assert jobs + _BEHIND_IN_ALL / 2 < len(found) < jobs + _BEHIND_IN_ALL + 20


def test_phases_that_overlap_fail_in_the_one_that_goes_on() -> None:
    told: list[dict[str, Any]] = []
    events = NativeEvents(told.append, {}, "")
    for kind, status in (("download", "start"), ("extract", "start"), ("extract", "done")):
        events(Transfer("m", kind, status, 0, None, 0, None))
    events.fail(ApiError("MODEL_CORRUPT", "x"))
    events(Phase("a", "download", "done"))
    events.fail(ApiError("CANCELLED", "x"))
    assert [one["type"] for one in told if one["status"] == "error"] == ["download", "inference"]


@pytest.mark.parametrize(
    "url",
    [
        "http://127.0.0.1/",
        "http://[::1]:8/",
        "http://2130706433/",
        "http://0177.0.0.1/",
        "http://[::ffff:10.0.0.1]/",
        "http://169.254.169.254/",
    ],
)
async def test_private_addresses_are_refused_at_the_door_and_on_the_way(url: str) -> None:
    settings = Settings.from_env({})
    with pytest.raises(ApiError) as error:
        await check_receiver(url, "callInputs.SEND_URL", settings)
    assert error.value.code == "URL_NOT_ALLOWED"
    delivery = Delivery(settings)
    outcome = await delivery(url, b"{}", [])
    await delivery.close()
    assert outcome.final
    assert "private network" in outcome.error


async def answering(answer: bytes, work: Callable[[int], Any]) -> tuple[Any, list[bytes]]:
    """What comes of ``work(port)``, beside a server that answers each request so; and the requests."""
    got: list[bytes] = []

    async def one(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        got.append(await reader.readuntil(b"\r\n\r\n"))
        writer.write(answer)
        await writer.drain()
        writer.close()

    async with await asyncio.start_server(one, "127.0.0.1", 0) as server:
        return await work(server.sockets[0].getsockname()[1]), got


@pytest.mark.parametrize(
    ("answer", "outcome"),
    [
        (b"204 No Content", Outcome()),
        (b"202 Accepted\r\nContent-Length: 99", Outcome()),  # and no more: its status has said all
        (
            b"302 Found\r\nLocation: http://127.0.0.1:1/",
            Outcome("it answered 302; redirects are not followed", is_down=False),
        ),
        (b"404 Not Found", Outcome("it answered 404", is_down=False)),
        (b"410 Gone", Outcome("it answered 410: it wants no more of these", final=True, is_down=False)),
        (b"503 Busy\r\nRetry-After: 7", Outcome("it answered 503", 7.0)),
        (b"429 Slow Down\r\nRetry-After: 99999", Outcome("it answered 429", 3600.0)),
    ],
)
async def test_what_becomes_of_an_answer(answer: bytes, outcome: Outcome) -> None:
    delivery = Delivery(Settings.from_env({"ALLOW_PRIVATE_URLS": "1"}))

    async def work(port: int) -> Outcome:
        return await delivery(f"http://127.0.0.1:{port}/hook?a=1", b"{}", [("X-Webhook-Id", "msg_1")])

    length = b"" if b"Content-Length" in answer else b"Content-Length: 0\r\n"
    found, got = await answering(b"HTTP/1.1 " + answer + b"\r\n" + length + b"Connection: close\r\n\r\n", work)
    await delivery.close()
    assert found == outcome
    assert len(got) == 1
    assert got[0].startswith(b"POST /hook?a=1 HTTP/1.1")
    assert b"Content-Type: application/json" in got[0]


async def test_a_receiver_that_does_not_answer_is_not_waited_for() -> None:
    delivery = Delivery(Settings.from_env({"ALLOW_PRIVATE_URLS": "1", "WEBHOOK_TIMEOUT": "0.2"}))

    async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()
        writer.close()

    async with await asyncio.start_server(silent, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        found = await delivery(f"http://127.0.0.1:{port}/", b"{}", [])
        await delivery.close()
    assert found == Outcome("it took longer than 0.2 seconds")


async def test_the_servers_own_receiver_may_be_in_a_private_network() -> None:
    settings = Settings.from_env({"SEND_URL": "http://127.0.0.1:1/hook"})
    await check_receiver("http://127.0.0.1:1/hook", "callInputs.SEND_URL", settings)
    delivery = Delivery(settings)
    outcome = await delivery("http://127.0.0.1:1/hook", b"{}", [])
    await delivery.close()
    assert not outcome.final  # it was tried
