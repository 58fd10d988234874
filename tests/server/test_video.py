"""Videos over HTTP, from a request to a file that plays."""

from __future__ import annotations

import base64
import io
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import av
import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

from tests.running import Server, running
from tests.unit.test_encode_video import read_mp4, read_pictures
from tests.video_families import save_video_family

ASKED = {"prompt": "a film", "width": 32, "height": 16, "num_frames": 5, "num_inference_steps": 2, "seed": 3}
MODEL = {"MODEL_ID": "tiny/wan", "SCHEDULER": "FlowMatchEulerDiscreteScheduler"}

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def films(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Server, Path]]:
    root = tmp_path_factory.mktemp("films")
    save_video_family("wan", root / "tiny--wan")
    environ = {"MODELS_DIR": str(root), "RUNTIME_DOWNLOADS": "0", "MODEL_ID": "tiny/wan"}
    with running(environ, tmp_path_factory.mktemp("log") / "server.log") as server:
        yield server, root / "tiny--wan"


@pytest.fixture(scope="module")
def frames(films: tuple[Server, Path]) -> np.ndarray:
    """What diffusers gives, as bytes."""
    pipe = diffusers.DiffusionPipeline.from_pretrained(films[1])
    arguments = {name: value for name, value in ASKED.items() if name != "seed"}
    found = pipe(**arguments, generator=torch.Generator().manual_seed(3), output_type="np").frames[0]
    return (found * 255).round().astype(np.uint8)


def ask(server: Server, inputs: dict[str, Any] | None = None, **options: Any) -> dict[str, Any]:
    response = server.post(inputs or ASKED, {**MODEL, **options})
    assert response.status_code == 200, response.text[:500]
    answer: dict[str, Any] = response.json()
    return answer


def test_an_mp4_holds_the_frames_of_the_plain_call(films: tuple[Server, Path], frames: np.ndarray) -> None:
    answer = ask(films[0])
    assert not any(name.startswith("image") for name in answer)
    meta = answer["$meta"]
    assert (meta["video_format"], meta["fps"], meta["frames"], meta["size"]) == ("mp4", 16, 5, [32, 16])
    data = base64.b64decode(answer["video_base64"])
    seen, stream = read_mp4(data)
    assert seen.shape == frames.shape and stream.average_rate == 16
    # noise of a model that has learned nothing is the hardest there is: luma is close, colour has a quarter of its pixels
    weights = np.array([0.2126, 0.7152, 0.0722])
    assert np.abs(seen @ weights - frames @ weights).mean() < 6
    assert '"seed": 3' in av.open(io.BytesIO(data)).metadata["comment"]
    assert base64.b64decode(ask(films[0])["video_base64"])[-500:] == data[-500:]


def test_a_lossless_webp_holds_them_exactly(films: tuple[Server, Path], frames: np.ndarray) -> None:
    answer = ask(films[0], video_format="webp", lossless=True, fps=12.5)
    seen, shown, _ = read_pictures(base64.b64decode(answer["video_base64"]))
    assert np.abs(seen.astype(int) - frames).max() <= 1  # floats of merged calls round as they like
    assert shown == [80] * 5


def test_several_videos_and_a_gif(films: tuple[Server, Path]) -> None:
    answer = ask(films[0], {**ASKED, "num_videos_per_prompt": 2, "seed": [3, 4]}, video_format="gif")
    both = [read_pictures(base64.b64decode(video))[0] for video in answer["videos_base64"]]
    assert len(both) == 2 and not np.array_equal(*both)


@pytest.mark.parametrize(("accept", "form"), [("video/mp4", "MP4"), ("image/gif", "GIF"), ("image/webp", "WEBP")])
def test_the_file_itself(films: tuple[Server, Path], accept: str, form: str) -> None:
    more = {"video_format": "webp"} if form == "WEBP" else {}
    response = films[0].post(ASKED, {**MODEL, **more}, headers={"Accept": accept})
    assert (response.status_code, response.headers["content-type"]) == (200, accept)
    if form == "MP4":
        assert len(read_mp4(response.content)[0]) == 5
    else:
        assert Image.open(io.BytesIO(response.content)).format == form


def test_a_format_of_images_is_refused_at_once(films: tuple[Server, Path]) -> None:
    response = films[0].post(ASKED, MODEL, headers={"Accept": "image/png"})
    assert (response.status_code, response.json()["$error"]["field"]) == (400, "callInputs.image_format")


def test_a_stream_ends_in_the_video(films: tuple[Server, Path]) -> None:
    lines = films[0].post(ASKED, {**MODEL, "streamEvents": True}).text.splitlines()
    assert any('"inference"' in line for line in lines[:-1])
    assert '"video_base64"' in lines[-1]


def test_a_job_for_later_keeps_the_file(films: tuple[Server, Path]) -> None:
    client = films[0].client
    job = client.post("/jobs", json={"modelInputs": ASKED, "callInputs": MODEL}).json()["id"]
    due = time.monotonic() + 60
    while (told := client.get(f"/jobs/{job}", params={"images": "url"}).json())["state"] != "COMPLETED":
        assert time.monotonic() < due and told["state"] in ("IN_QUEUE", "IN_PROGRESS"), told
        time.sleep(0.1)
    assert told["result"]["video_urls"] == [f"/jobs/{job}/images/0"]
    file = client.get(told["result"]["video_urls"][0])
    assert file.headers["content-type"] == "video/mp4"
    assert len(read_mp4(file.content)[0]) == 5


def test_runpods_simple_form(films: tuple[Server, Path]) -> None:
    body = {"input": {**ASKED, **MODEL}}
    output = films[0].client.post("/v2/any/runsync", json=body, timeout=90).json()["output"]
    assert len(read_mp4(base64.b64decode(output["video"]))[0]) == 5
