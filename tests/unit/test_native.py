from __future__ import annotations

import asyncio
import json
from types import SimpleNamespace
from typing import Any

import pytest

from api.engine.parameters import parameters
from api.errors import ApiError
from api.http import native
from api.http.native import wanted_type
from api.schema.messages import Phase, Preview, Progress
from api.service import native_events


@pytest.mark.parametrize(
    ("accept", "wanted"),
    [
        (None, "application/json"),
        ("*/*", "application/json"),
        ("image/*", "image/png"),
        ("IMAGE/PNG", "image/png"),
        ("image/webp", "image/webp"),
        ("video/*", "video/mp4"),
        ("image/gif, image/*;q=0.5", "image/gif"),
        ("image/png;q=0.5, image/jpeg", "image/jpeg"),
        ("image/png;q=0, */*", "application/json"),
        ("application/json;q=0.2, image/png;q=0.3", "image/png"),
        ("application/json;q=0, */*;q=0.1", "image/png"),
        ("text/html, */*;q=0.8", "application/json"),
        ("application/x-ndjson", "application/x-ndjson"),
    ],
)
def test_the_type_that_the_client_likes_best(accept: str | None, wanted: str) -> None:
    assert wanted_type(accept) == wanted


@pytest.mark.parametrize("accept", ["text/html", "image/png;q=0", "audio/*", "image/tiff", ";;;"])
def test_what_cannot_be_answered(accept: str) -> None:
    with pytest.raises(ApiError) as error:
        wanted_type(accept)
    assert error.value.code == "NOT_ACCEPTABLE"


def test_a_body_for_runpods_routes_is_sent_there() -> None:
    with pytest.raises(ApiError) as error:
        native.parse_body(b'{"input": {"prompt": "a red circle"}}')
    assert (error.value.code, error.value.field) == ("UNKNOWN_INPUT", "input")
    assert "/v2/" in error.value.message


def test_each_image_carries_its_own_parameters() -> None:
    inputs = {"prompt": ["a", "b"], "negative_prompt": ["c", "d"], "seed": [1, 2, 3, 4], "num_inference_steps": 5}
    meta = {"modelInputs": inputs, "SCHEDULER": "S", "MODEL_ID": "m", "MODEL_REVISION": "r"}
    texts = [parameters(meta, index, 4) for index in range(4)]
    assert [text.splitlines()[0] for text in texts] == ["a", "a", "b", "b"]
    assert "Negative prompt: d" in texts[3]
    assert [f"Seed: {seed}," in text for seed, text in zip((1, 2, 3, 4), texts, strict=True)] == [True] * 4


def lines_of(stream: native._Lines) -> list[dict]:
    return [stream.queue.get_nowait() for _ in range(stream.queue.qsize())]


def test_the_lines_of_a_stream() -> None:
    stream = native._Lines("mine", "")
    events = stream.events
    events.callback_steps = 2
    assert events.progress is None
    events(Phase("a", "inference", "start"))
    assert events.progress == {"type": "inference", "progress": 0.0}
    for step in (1, 2, 3, 4):
        events(Progress("a", step, 4))
        if step % 2 == 0:
            events(Preview("a", step, 4, [b"x"] * (step // 2)))
    assert events.progress == {"type": "inference", "progress": 1.0, "step": 4, "total": 4, "eta": 0.0}
    events(Phase("a", "inference", "done"))
    assert events.progress is None
    lines = lines_of(stream)
    assert [(line["status"], line["payload"].get("step")) for line in lines] == [
        ("start", None), ("progress", 0), ("preview", 2), ("progress", 2), ("preview", 4), ("done", None),
    ]  # fmt: skip
    assert lines[1]["payload"] == {"startRequestId": "mine", "step": 0, "total": 4, "eta": None}
    assert lines[2]["payload"] == {"startRequestId": "mine", "step": 2, "total": 4, "image_base64": "eA=="}
    assert lines[4]["payload"]["images_base64"] == ["eA==", "eA=="]
    assert lines[3]["payload"]["eta"] >= 0
    assert [list(line) for line in lines] == [list(lines[0])] * 6


async def test_a_stream_in_which_nothing_happens_is_not_silent(monkeypatch: pytest.MonkeyPatch) -> None:
    """A request that waits for its turn; a proxy would cut it."""
    monkeypatch.setattr(native, "_QUIET", 0.5)
    sent: list[dict[str, Any]] = []
    enough = asyncio.Event()

    class Service:
        settings, watch = SimpleNamespace(container_id=""), SimpleNamespace(error=lambda code: None)

        async def admit(self, *_: Any) -> Any:
            return SimpleNamespace(options={})

        def submit(self, *_: Any) -> None:
            pass

        async def finish(self, _: None) -> Any:
            await enough.wait()
            raise ApiError("TIMED_OUT", "It was never its turn.")

    async def send(line: bytes) -> None:
        sent.append(json.loads(line))
        enough.set()

    async def respond(**_: Any) -> Any:
        return SimpleNamespace(send=send, eof=lambda: asyncio.sleep(0))

    app, ctx = SimpleNamespace(ctx=SimpleNamespace(service=Service())), SimpleNamespace(id="a")
    request: Any = SimpleNamespace(app=app, ctx=ctx, respond=respond)
    await asyncio.wait_for(native._stream(request, {}, {}, None), 20)
    assert sent[0] == {"type": "inference", "progress": 0.0}
    assert sent[-1]["$error"]["code"] == "TIMED_OUT"


def test_the_time_since_the_start_is_not_that_since_a_preview(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(native_events.time, "time", lambda: now[0])
    stream = native._Lines(None, "")
    events = stream.events
    for seconds, event in (
        (0, Phase("a", "inference", "start")),
        (2, Preview("a", 1, 2, [b""])),
        (1, Phase("a", "inference", "done")),
    ):
        now[0] += seconds
        events(event)
    assert [line["tsl"] for line in lines_of(stream)] == [0, 0, 3000]


def test_a_client_that_does_not_read_gets_no_more_previews_but_every_step() -> None:
    stream = native._Lines(None, "")
    events = stream.events
    events.callback_steps = 1
    for step in range(1, 501):
        events(Progress("a", step, 500))
        events(Preview("a", step, 500, [b"x" * 1000]))
    lines = lines_of(stream)
    assert sum(line["status"] == "preview" for line in lines) <= native._BEHIND
    assert sum(line["status"] == "progress" for line in lines) == 500
    events(Preview("a", 500, 500, [b""]))
    assert len(lines_of(stream)) == 1
