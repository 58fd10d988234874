"""Previews for every reader: streams, server-sent events, lines of JSON, polling."""

from __future__ import annotations

import json
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest

from tests.running import Server, images_of, pixels
from tests.server.test_jobs import LONG, look, own, send, sse, wait_for

__all__ = ["own"]
CIRCLE = {"prompt": "a red circle on a blue background", "num_inference_steps": 20, "seed": 5}
TOLERANCE = 1
"""Levels of 255 by which an image may differ from the one made alone; float32 on one CPU."""


def stream(server: Server, inputs: dict[str, Any], **options: Any) -> list[dict[str, Any]]:
    answer = server.post(inputs, {"streamEvents": True, **options})
    assert answer.status_code == 200, answer.text
    return [json.loads(line) for line in answer.text.splitlines()]


def previews_of(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [line["payload"] for line in lines if line.get("status") == "preview"]


def small(image: np.ndarray) -> np.ndarray:
    return image.reshape(16, 4, 16, 4, 3).mean((1, 3))


def test_a_stream_shows_the_picture_becoming_itself(server: Server) -> None:
    lines = stream(server, CIRCLE, preview=5, startRequestId="mine")
    shown = previews_of(lines)
    assert [(p["step"], p["total"], p["startRequestId"]) for p in shown] == [(n, 20, "mine") for n in (5, 10, 15, 20)]
    pictures = [pixels(p["image_base64"]).astype(int) for p in shown]
    assert [picture.shape for picture in pictures] == [(16, 16, 3)] * 4
    final = small(images_of(lines[-1])[0])
    wrong = [np.abs(picture - final).mean() for picture in pictures]
    assert wrong[-1] < 40
    assert wrong[0] > wrong[-1]
    kinds = [line.get("status") for line in lines if "progress" not in line]
    assert kinds == ["start", *["preview"] * 4, "done", None]
    assert "image_base64" in lines[-1]


def test_previews_and_callback_steps_keep_their_order(server: Server) -> None:
    lines = stream(server, {**CIRCLE, "num_inference_steps": 6, "callback_steps": 1}, preview=2)
    told = [(line["status"], line["payload"].get("step")) for line in lines if line.get("payload")]
    assert told == [
        ("start", None), ("progress", 0), ("progress", 1), ("preview", 2), ("progress", 2), ("progress", 3),
        ("preview", 4), ("progress", 4), ("progress", 5), ("preview", 6), ("done", None),
    ]  # fmt: skip
    etas = [line["payload"]["eta"] for line in lines if line.get("status") == "progress"]
    assert etas[0] is None
    assert etas[-1] == 0
    assert all(eta > 0 for eta in etas[1:-1])


@pytest.mark.parametrize("options", [{"preview": False}, {"preview": None}, {}])
def test_who_does_not_ask_gets_none(server: Server, options: dict[str, Any]) -> None:
    assert previews_of(stream(server, {**CIRCLE, "num_inference_steps": 2}, **options)) == []


def test_true_means_about_four_and_several_images_come_together(server: Server) -> None:
    lines = stream(server, {**CIRCLE, "num_images_per_prompt": 2}, preview=True)
    shown = previews_of(lines)
    assert [p["step"] for p in shown] == [5, 10, 15, 20]
    assert all(len(p["images_base64"]) == 2 and "image_base64" not in p for p in shown)
    assert len(images_of(lines[-1])) == 2


def test_the_image_is_the_same_to_the_byte_with_and_without(server: Server) -> None:
    for inputs in (CIRCLE, {**CIRCLE, "num_images_per_prompt": 2, "seed": 9}):
        without = server.post(inputs).json()
        with_them = stream(server, inputs, preview=1)[-1]
        keys = ("image_base64", "images_base64")
        assert [with_them.get(key) for key in keys] == [without.get(key) for key in keys]
        assert "preview" not in json.dumps(with_them["$meta"])


def test_with_a_safety_checker_switched_off_there_are_previews(server: Server) -> None:
    options = {"MODEL_ID": "tiny/nsfw", "safety_checker": False, "preview": 1}
    assert len(previews_of(stream(server, {"prompt": "a", "num_inference_steps": 3}, **options))) == 3


def test_streams_at_once_show_what_they_show_alone(server: Server) -> None:
    orders = [{**CIRCLE, "seed": seed, "num_inference_steps": 8 + seed} for seed in range(4)]
    alone = [stream(server, order, preview=2) for order in orders]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda order: stream(server, order, preview=2), orders))
    for ours, theirs in zip(together, alone, strict=True):
        assert np.abs(images_of(ours[-1])[0].astype(int) - images_of(theirs[-1])[0]).max() <= TOLERANCE
        one, other = previews_of(ours), previews_of(theirs)
        assert [p["step"] for p in one] == [p["step"] for p in other]
        for a, b in zip(one, other, strict=True):
            # a level more or less may fall on the other side of a step of the JPEG's; another's preview is far away
            assert np.abs(pixels(a["image_base64"]).astype(int) - pixels(b["image_base64"])).mean() <= 2


def test_a_job_for_later_shows_its_newest_preview_until_it_is_over(own: Server) -> None:
    job_id = send(own, {**LONG, "num_images_per_prompt": 2}, callInputs={"preview": 1})
    told = sse(own, job_id, stop_at=10)
    shown = [body for _, body in told if body.get("status") == "preview"]
    assert shown
    links = [f"/jobs/{job_id}/previews/{number}" for number in (0, 1)]
    assert all(body["image_urls"] == links and body["total"] == 500 for body in shown)
    seen: list[int] = []
    while len(seen) < 3:
        answer = own.client.get(links[1])
        assert answer.status_code == 200, answer.text
        assert (answer.headers["content-type"], answer.headers["cache-control"]) == ("image/jpeg", "no-store")
        assert pixels(answer.content).shape == (16, 16, 3)
        if (step := int(answer.headers["x-step"])) not in seen:
            seen.append(step)
    assert seen == sorted(seen)
    assert seen[0] >= shown[-1]["step"]
    polled = look(own, job_id)
    assert len(polled["preview"]["images_base64"]) == 2
    assert pixels(polled["preview"]["images_base64"][0]).shape == (16, 16, 3)
    assert polled["preview"]["step"] <= polled["progress"]["step"]
    assert polled["progress"]["eta"] > 0
    linked = look(own, job_id, "?images=url")["preview"]
    assert linked == {"step": linked["step"], "total": 500, "image_urls": links}
    assert own.client.get(f"/jobs/{job_id}/previews/2").json()["$error"]["code"] == "NOT_FOUND"
    assert own.client.delete(f"/jobs/{job_id}").json()["state"] == "CANCELLED"
    events = [body for _, body in sse(own, job_id)]
    assert events[-1]["state"] == "CANCELLED"
    assert {"preview", "progress"}.isdisjoint(look(own, job_id))
    gone = own.client.get(links[0])
    assert (gone.status_code, gone.json()["$error"]["code"]) == (404, "NOT_FOUND")
    assert "CANCELLED" in gone.json()["$error"]["message"]


def test_every_reader_of_a_job_gets_the_same_previews(server: Server) -> None:
    inputs = {**CIRCLE, "num_inference_steps": 60}
    job_id = send(server, inputs, callInputs={"preview": 2})
    told = [body for _, body in sse(server, job_id)]
    wait_for(server, job_id)
    with server.client.stream("GET", f"/jobs/{job_id}/events", headers={"Accept": "application/x-ndjson"}) as answer:
        lines = [json.loads(line) for line in answer.iter_lines()]
    polled = server.client.get(f"/jobs/{job_id}/events", headers={"Accept": "application/json"}).json()["events"]
    assert told == lines == polled
    steps = [body["step"] for body in told if body.get("status") == "preview"]
    assert steps
    assert steps == sorted(set(steps))
    assert steps[-1] == 60
    in_order = [body["step"] for body in told if "step" in body]
    assert in_order == sorted(in_order)
    assert told[-1]["state"] == "COMPLETED"
    alone = images_of(server.post(inputs).json())[0]
    assert np.abs(images_of(look(server, job_id)["result"])[0].astype(int) - alone).max() <= TOLERANCE


def test_previews_stay_out_of_the_store(own: Server) -> None:
    job_id = send(own, LONG, callInputs={"preview": 1})
    sse(own, job_id, stop_at=8)
    newest = own.client.get(f"/jobs/{job_id}/previews/0").content
    assert newest.startswith(b"\xff\xd8")
    state = own.log.with_suffix(".state")
    files = [path for path in state.rglob("*") if path.is_file()]
    assert files
    for path in files:
        data = path.read_bytes()
        assert b"\xff\xd8\xff" not in data, path
        assert b"/9j/" not in data, path  # the same in base64
    assert not (state / "results").exists() or not list((state / "results").iterdir())
    assert own.client.delete(f"/jobs/{job_id}").json()["state"] == "CANCELLED"


def test_a_stream_that_is_left_in_the_midst_ends_its_job(own: Server) -> None:
    body = {"modelInputs": LONG, "callInputs": {"streamEvents": True, "preview": 1}}
    with own.client.stream("POST", "/", json=body) as answer:
        shown = 0
        for line in answer.iter_lines():
            shown += json.loads(line).get("status") == "preview"
            if shown == 5:
                break
    again = stream(own, CIRCLE, preview=10)  # the one slot of it is free again, and it shows nothing of the other
    assert [p["step"] for p in previews_of(again)] == [10, 20]
    deadline = time.monotonic() + 10
    while any(worker["busy"] for worker in own.client.get("/health/ready").json()["workers"]):
        assert time.monotonic() < deadline, "the job that nobody reads still runs"
        time.sleep(0.02)
