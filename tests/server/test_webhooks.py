"""Webhooks of a real server: what docker-diffusers-api was captured sending, and what it never did."""

from __future__ import annotations

import json
import sqlite3
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests import shapes
from tests.hub import HubStandIn
from tests.receiver import Got, Receiver, check_headers, check_signatures, receiving
from tests.running import Server, running
from tests.server.test_wire import capture, same_shape
from tests.sources import TOKEN, Bucket, environ, moto

KEYS = ["type", "status", "container_id", "time", "t", "tsl", "payload"]
SMALL = {"prompt": "a cat", "num_inference_steps": 2, "seed": 1}
LONG = {"prompt": "a cat", "num_inference_steps": 500, "seed": 1}


@pytest.fixture(scope="module")
def receiver(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Receiver]:
    with receiving(tmp_path_factory.mktemp("receiver") / "got") as started:
        yield started


@pytest.fixture(scope="module")
def own(receiver: Receiver, models_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server with a receiver of its own, apart from those of requests."""
    settings = {
        "MODELS_DIR": str(models_dir), "ALLOW_PRIVATE_URLS": "1", "CONTAINER_ID": "cont-42", "WEBHOOK_TRIES": "2",
        "SEND_URL": receiver.url.replace("/hook", "/own"), "SIGN_KEY": "k3y-of-the-server", "LOG_LEVEL": "debug",
    }  # fmt: skip
    with running(settings, tmp_path_factory.mktemp("log") / "server.log") as server:
        yield server


def post(server: Server, receiver: Receiver, path: str, inputs: dict[str, Any], **call: Any) -> httpx.Response:
    """A request whose events go to a path of their own."""
    return server.post(inputs, {"SEND_URL": receiver.url.replace("/hook", path), **call})


def names(found: list[Got]) -> list[tuple[str, str]]:
    return [one.name for one in found]


def over(found: list[Got]) -> bool:
    return bool(found) and found[-1].name[1] in ("done", "error") and found[-1].name[0] == "inference"


def check_event(ours: Got, raw: str) -> None:
    """Every captured key, in its order, with its type."""
    theirs, event = json.loads(raw), ours.event
    for unset in ("container_id", "hostname", "model_id"):  # ours is set
        for half, captured in ((event, theirs), (event["payload"], theirs["payload"])):
            if unset in captured and captured[unset] is None:
                captured[unset] = half[unset]
    same_shape(event, theirs)
    assert list(event) == KEYS + ["sig"] * ("sig" in theirs)
    assert event["payload"].items() >= {k: v for k, v in theirs["payload"].items() if k != "eta"}.items()


@pytest.mark.parametrize(
    ("name", "model"),
    [
        ("txt2img_cold_webhook", "tiny/a"),
        ("txt2img_hot_webhook", "tiny/a"),
        ("switch_webhook", "tiny/b"),
        ("callback_steps_webhook", "tiny/b"),
    ],
)
def test_captured_sequences(own: Server, receiver: Receiver, name: str, model: str) -> None:
    pair = capture(name)
    call = {**pair["request"]["callInputs"], "MODEL_ID": model}
    del call["SEND_URL"]
    answer = post(own, receiver, f"/{name}", pair["request"]["modelInputs"], **call)
    theirs = [one["raw"] for one in pair["response"]["webhooks"]]
    found = receiver.wait(over, f"/{name}")
    assert names(found) == [(event["type"], event["status"]) for event in map(json.loads, theirs)]
    for ours, raw in zip(found, theirs, strict=True):
        check_event(ours, raw)
        check_signatures(ours, "s3cret")
    assert "s3cret" not in answer.text
    assert answer.json()["$meta"]["startRequestId"] == "req-1"


def test_init_is_told_once_and_what_names_no_receiver_goes_to_the_servers(own: Server, receiver: Receiver) -> None:
    own.post(SMALL, {"startRequestId": "mine"})
    found = receiver.wait(over, "/own")
    for ours, raw in zip(found, capture("init_webhook"), strict=False):
        theirs = json.loads(raw)
        theirs["payload"].update({k: ours.event["payload"][k] for k, v in theirs["payload"].items() if k != "device"})
        check_event(ours, json.dumps(theirs))
    assert names(found)[:2] == [("init", "start"), ("init", "done")]
    assert names(found).count(("init", "start")) == 1
    assert found[0].event["payload"]["model_id"] == "demo/shapes"
    assert found[-1].event["payload"] == {"startRequestId": "mine"}
    for one in found:
        check_signatures(one, "k3y-of-the-server")


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server without any of its settings, over a hub and a bucket."""
    folder = tmp_path_factory.mktemp("plain")
    with moto() as s3, HubStandIn({"org/name": {"main": shapes.plain(folder / "plain")}}) as hub:
        Bucket(s3)
        hub.tokens = {TOKEN: set()}
        with running(environ(folder / "models", hub, s3), folder / "server.log") as server:
            yield server


def test_without_a_key_nothing_is_signed(plain: Server, receiver: Receiver) -> None:
    pair = capture("webhook_unsigned")
    plain.post(SMALL)
    post(plain, receiver, "/unsigned", pair["request"]["modelInputs"], MODEL_ID="demo/shapes")
    found = receiver.wait(over, "/unsigned")
    assert names(found) == [("inference", "start"), ("inference", "done")]
    for ours, sent in zip(found, pair["response"]["webhooks"], strict=True):
        check_event(ours, sent["raw"])
        assert not {"x-signature", "webhook-signature"} & ours.headers.keys()
    assert found[0].event["container_id"] is None


def test_without_a_receiver_no_database_is_touched(plain: Server) -> None:
    before = kept(plain)
    plain.post(SMALL)
    assert kept(plain) == before


def kept(server: Server) -> list[tuple[str, int, bytes]]:
    state = server.log.with_suffix(".state")
    files = [*state.glob("*.sqlite3*"), *(state / "webhooks").glob("*.sqlite3*")]
    assert len(files) >= 4
    return sorted((file.name, file.stat().st_mtime_ns, file.read_bytes()) for file in files)


def test_a_miss_in_s3(plain: Server, receiver: Receiver) -> None:
    """All that was captured; ours uploads after the answer, and packs while it does."""
    theirs = [json.loads(raw) for raw in capture("s3_miss_upload")["webhooks"]]
    post(plain, receiver, "/s3", SMALL, MODEL_ID="org/name", MODEL_URL="s3://")
    found = receiver.wait(lambda found: ("upload", "done") in names(found), "/s3")
    told = [one for one in found if one.name[1] in ("start", "done")]
    assert set(names(told)) == {(event["type"], event["status"]) for event in theirs}
    before = [name for name in names(told) if name[0] not in ("compress", "upload")]
    assert before == [
        (event["type"], event["status"]) for event in theirs if event["type"] not in ("compress", "upload")
    ]
    assert names(told).index(("upload", "start")) > names(told).index(("inference", "done"))
    for event in theirs:
        ours = next(one for one in told if one.name == (event["type"], event["status"]))
        check_event(ours, json.dumps(event))


def test_a_stream_and_its_webhooks_are_the_same_events(own: Server, receiver: Receiver) -> None:
    inputs = {**SMALL, "callback_steps": 1, "num_inference_steps": 4}
    answer = post(own, receiver, "/both", inputs, streamEvents=True, preview=2, startRequestId="Grüße 🌞")
    lines = [json.loads(line) for line in answer.text.splitlines()]
    streamed = [line for line in lines if "status" in line]
    found = receiver.wait(over, "/both")
    assert [(line["type"], line["status"], line["payload"]) for line in streamed] == [
        (*one.name, one.event["payload"]) for one in found
    ]
    assert ("inference", "preview") in names(found)
    assert {line["container_id"] for line in streamed} == {"cont-42"}
    for one in found:
        check_signatures(one, "k3y-of-the-server")
        assert one.event["payload"]["startRequestId"] == "Grüße 🌞"


def test_what_fails_says_so(own: Server, receiver: Receiver) -> None:
    answer = post(own, receiver, "/broken", {"prompt": "a"}, MODEL_ID="tiny/cut")
    found = receiver.wait(lambda found: found and found[-1].name[1] == "error", "/broken")
    payload = found[-1].event["payload"]
    assert payload["code"] == answer.json()["$error"]["code"] == "MODEL_BROKEN"
    assert payload["message"] == answer.json()["$error"]["message"]
    refused = post(own, receiver, "/refused", {"prompt": "a", "width": -8})
    assert refused.status_code == 400
    time.sleep(0.3)
    assert receiver.got("/refused") == []  # its client knows, and nothing has happened


def later(server: Server, receiver: Receiver, path: str, inputs: dict[str, Any], **call: Any) -> str:
    body = {"modelInputs": inputs, "callInputs": {"SEND_URL": receiver.url.replace("/hook", path), **call}}
    answer = server.client.post("/jobs", json=body)
    assert answer.status_code == 202, answer.text
    return str(answer.json()["id"])


def test_jobs_for_later(own: Server, receiver: Receiver) -> None:
    done = later(own, receiver, "/later", SMALL, startRequestId="r", SIGN_KEY="k3y-of-the-job")
    found = receiver.wait(over, "/later")
    assert names(found)[-2:] == [("inference", "start"), ("inference", "done")]
    assert found[-1].event["payload"] == {"startRequestId": "r", "jobId": done}
    for one in found:
        check_signatures(one, "k3y-of-the-job")
    broken = later(own, receiver, "/later-broken", {"prompt": "a"}, MODEL_ID="tiny/cut")
    found = receiver.wait(lambda found: found and found[-1].name[1] == "error", "/later-broken")
    assert (found[-1].event["payload"]["jobId"], found[-1].event["payload"]["code"]) == (broken, "MODEL_BROKEN")


def test_jobs_for_later_that_are_cancelled(own: Server, receiver: Receiver) -> None:
    running_one = later(own, receiver, "/cancelled", LONG)
    receiver.wait(lambda found: ("inference", "start") in names(found), "/cancelled")
    own.client.delete(f"/jobs/{running_one}")
    found = receiver.wait(over, "/cancelled")
    assert found[-1].event["payload"]["code"] == "CANCELLED"
    crowd = [later(own, receiver, "/crowd", LONG) for _ in range(17)]  # more than run at once
    own.client.delete(f"/jobs/{crowd[-1]}")
    found = receiver.wait(lambda found: any(one.event["payload"].get("jobId") == crowd[-1] for one in found), "/crowd")
    for job in crowd:
        own.client.delete(f"/jobs/{job}")
    (last,) = [one for one in found if one.event["payload"].get("jobId") == crowd[-1]]
    assert (last.name, last.event["payload"]["code"]) == (("inference", "error"), "CANCELLED")


def test_a_job_of_runpods_tells_its_end(own: Server, receiver: Receiver) -> None:
    webhook = receiver.url.replace("/hook", "/runpod")
    sent = {"input": {"modelInputs": SMALL, "callInputs": {}}, "webhook": webhook}
    job = own.client.post("/v2/local/run", json=sent).json()["id"]
    (found,) = receiver.wait(lambda found: found, "/runpod")
    body = json.loads(found.body)
    assert (body["id"], body["status"]) == (job, "COMPLETED")
    assert body["output"]["image_base64"]
    check_headers(found, "k3y-of-the-server")


def test_what_is_given_up_can_be_sent_again(own: Server, receiver: Receiver) -> None:
    """Nobody listens at first; the address is told without what may be a secret of it."""
    secret = "t0ken-of-the-receiver"  # noqa: S105
    nobody = f"http://127.0.0.1:9/gone?key={secret}"
    own.post(SMALL, {"SEND_URL": nobody, "SIGN_KEY": "k3y-of-the-request"})
    deadline = time.monotonic() + 60
    while len(failed := failures(own)) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert {one["url"] for one in failed} == {"http://127.0.0.1:9/gone"}
    assert [one["tries"] for one in failed] == [2, 2]
    assert failed[0]["error"]
    database = sqlite3.connect(own.log.with_suffix(".state") / "webhooks" / "webhooks.sqlite3")
    with database:
        database.execute("UPDATE webhooks SET url = ? WHERE given_up > 0", (receiver.url.replace("/hook", "/again"),))
    database.close()
    for one in reversed(failed):
        answer = own.client.post(f"/webhooks/{one['id']}/redeliver")
        assert (answer.status_code, answer.json()["state"]) == (202, "waiting")
    found = receiver.wait(over, "/again")
    assert [one.id for one in found] == [one["id"] for one in reversed(failed)]
    for one in found:
        check_signatures(one, "k3y-of-the-request")
    assert failures(own) == []
    again = own.client.post(f"/webhooks/{failed[0]['id']}/redeliver")
    assert (again.status_code, again.json()["$error"]["code"]) == (404, "NO_SUCH_WEBHOOK")
    for query in ("state=lost", "limit=0", "limit=x"):
        assert own.client.get(f"/webhooks?{query}").status_code == 400
    log = own.log.read_text()
    for word in (secret, "k3y-of-the-request", "k3y-of-the-server", "k3y-of-the-job"):
        assert word not in log


def failures(server: Server) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = server.client.get("/webhooks?state=failed").json()["webhooks"]
    return found


RUN = [("inference", "start"), ("inference", "progress"), ("inference", "progress"), ("inference", "done")]
JOBS, BOUND = 150, 50


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_every_event_arrives_in_order_whatever_dies(tmp_path: Path, models_dir: Path) -> None:
    """200 jobs; a receiver that fails 30 % and is killed, a server that is killed."""
    with receiving(tmp_path / "got", faults=0.3) as receiver:
        settings = {
            "MODELS_DIR": str(models_dir), "ALLOW_PRIVATE_URLS": "1", "STATE_DIR": str(tmp_path / "state"),
            "SEND_URL": receiver.url, "SIGN_KEY": "k3y-of-the-server", "MAX_QUEUE": "1000", "MAX_CONCURRENCY": "4",
        }  # fmt: skip
        first = Server(settings, tmp_path / "first.log")
        first.wait_ready()
        began = time.monotonic()

        def call_of(number: int) -> dict[str, Any]:
            return {"startRequestId": f"Grüße 🌞 {number}", **({"SIGN_KEY": "schlüssel-🔑"} if number % 2 else {})}

        inputs = {"prompt": "ein roter Kreis 赤", "num_inference_steps": 2, "callback_steps": 1, "seed": 1}
        with ThreadPoolExecutor(4) as threads:
            requests = [threads.submit(first.post, inputs, call_of(number)) for number in range(BOUND)]
            accepted = []
            for number in range(BOUND, BOUND + JOBS):
                answer = first.client.post("/jobs", json={"modelInputs": inputs, "callInputs": call_of(number)})
                assert answer.status_code == 202, answer.text
                accepted.append(answer.json()["id"])
            receiver.wait(lambda found: len(found) > 60, seconds=300)
            receiver.kill()
            time.sleep(2)
            receiver.start()
            receiver.wait(lambda found: len(found) > 250, seconds=600)
            first.process.kill()
            first.process.wait()
            answered = [n for n, request in enumerate(requests) if not request.exception()]
        first.client.close()
        second = Server(settings, tmp_path / "second.log")
        second.wait_ready()
        try:
            with ThreadPoolExecutor(4) as threads:  # those that the kill cut off come again, as others
                others = [n + 1000 for n in range(BOUND) if n not in answered]
                again = [threads.submit(second.post, inputs, call_of(n)) for n in others]
            assert {request.result().status_code for request in again} <= {200}
            deadline = time.monotonic() + 900
            while (
                any(look(second, job) != "COMPLETED" for job in accepted)
                or second.client.get("/webhooks").json()["webhooks"]
            ):
                assert time.monotonic() < deadline
                time.sleep(0.5)
        finally:
            second.stop()
        took = time.monotonic() - began
        found = receiver.got()
        faults = receiver.failed()

    once, repeated = each_once(found)
    ran_twice = 0
    for job in accepted:
        runs = runs_of(once[job])
        assert runs[-1] == RUN, (job, runs)
        assert all(run == RUN[: len(run)] for run in runs), (job, runs)
        ran_twice += len(runs) > 1
    for number in answered + others:
        assert runs_of(once[f"Grüße 🌞 {number}"]) == [RUN], number
    assert 0 < len(answered) < BOUND
    assert sum(one.name[0] == "init" for one in once[None]) == 4  # two starts
    events = sum(map(len, once.values()))
    print(
        f"\n{JOBS} jobs for later and {BOUND} requests, {len(others)} of them cut off and sent again, in {took:.0f} s: "
        f"{events} events arrived in {len(found)} requests, {repeated} of them once more; {faults} requests were "
        f"failed, {ran_twice} jobs ran once more after the kill; all in order, all signatures right"
    )


def each_once(found: list[Got]) -> tuple[dict[Any, list[Got]], int]:
    """The events by job, and how many came again; none may do so after a later one of its job."""
    once: dict[Any, list[Got]] = {}
    repeated = 0
    for one in found:
        payload = one.event["payload"]
        number = int(str(payload.get("startRequestId", "0")).rpartition(" ")[2])
        check_signatures(one, "schlüssel-🔑" if number % 2 else "k3y-of-the-server")
        got = once.setdefault(payload.get("jobId") or payload.get("startRequestId"), [])
        if one.id in {other.id for other in got}:
            assert one.id == got[-1].id, f"{payload}: it came again after a later one"
            repeated += 1
        else:
            got.append(one)
    return once, repeated


def runs_of(got: list[Got]) -> list[list[tuple[str, str]]]:
    """What a job did, each time that it ran."""
    runs: list[list[tuple[str, str]]] = []
    for name in names(got):
        if name == RUN[0]:
            runs.append([])
        if runs:
            runs[-1].append(name)
    return runs


def look(server: Server, job: str) -> str:
    return str(server.client.get(f"/jobs/{job}?images=url").json()["state"])
