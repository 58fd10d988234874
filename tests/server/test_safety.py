"""SAFETY_CHECKER, and that requests with and without a checker do not see each other's."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from tests.running import Server, images_of, running

ASKED = {"prompt": "a cat", "num_inference_steps": 4, "seed": 1}


@pytest.fixture(scope="module")
def strict(models_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server that requires a safety checker."""
    environ = {
        "MODELS_DIR": str(models_dir), "MODEL_ID": "tiny/nsfw", "RUNTIME_DOWNLOADS": "0", "SAFETY_CHECKER": "required",
    }  # fmt: skip
    with running(environ, tmp_path_factory.mktemp("log") / "strict.log") as started:
        yield started


def refused(response: httpx.Response) -> tuple[int, str, str]:
    error = response.json()["$error"]
    return response.status_code, error["code"], error["field"]


def test_required_means_that_every_image_is_seen(strict: Server) -> None:
    for options in ({}, {"safety_checker": True}):
        answer = strict.post(ASKED, options).json()
        assert answer["nsfw_content_detected"] == [True]
        assert not images_of(answer)[0].any()
        assert answer["$meta"]["safety_checker"] is True
    assert strict.post(ASKED, {"MODEL_ID": "tiny/safe"}).json()["nsfw_content_detected"] == [False]


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"safety_checker": False}, "safety_checker"),
        ({"safety_checker": 0}, "safety_checker"),
        ({"MODEL_ID": "tiny/a"}, "MODEL_ID"),
        ({"preview": True, "streamEvents": True}, "preview"),
        ({"output": ["latents"]}, "output"),
        ({"output": ["intermediate_latents"]}, "output"),
        ({"safety_checker": False, "async": True}, "safety_checker"),
    ],
)
def test_required_refuses_what_would_do_without(strict: Server, options: dict, field: str) -> None:
    assert refused(strict.post(ASKED, options)) == (403, "SAFETY_REQUIRED", f"callInputs.{field}")


def test_jobs_for_later_and_plans_are_told_too(strict: Server) -> None:
    body = {"modelInputs": ASKED, "callInputs": {"safety_checker": False}}
    for route in ("/jobs", "/plan"):
        sent = body | ({"priority": "high"} if route == "/jobs" else {})
        assert refused(strict.client.post(route, json=sent))[1] == "SAFETY_REQUIRED"


def test_off_means_only_where_a_request_asks(models_dir: Path, tmp_path: Path) -> None:
    environ = {
        "MODELS_DIR": str(models_dir),
        "MODEL_ID": "tiny/nsfw",
        "RUNTIME_DOWNLOADS": "0",
        "SAFETY_CHECKER": "off",
    }
    with running(environ, tmp_path / "off.log") as server:
        plain = server.post(ASKED, {}).json()
        assert "nsfw_content_detected" not in plain
        assert images_of(plain)[0].any()
        assert server.post(ASKED, {"safety_checker": True}).json()["nsfw_content_detected"] == [True]
        assert "latents_base64" in server.post(ASKED, {"output": ["latents"]}).json()


def test_requests_with_and_without_differ_rightly_at_once(server: Server) -> None:
    """The same picture, hidden from those that ask for the checker and from nobody else."""
    alone = images_of(server.post(ASKED, {"MODEL_ID": "tiny/nsfw", "safety_checker": False}).json())[0]
    options = [
        {"MODEL_ID": "tiny/nsfw" if number % 3 else "tiny/safe", "safety_checker": bool(number % 2)}
        for number in range(24)
    ]
    with ThreadPoolExecutor(12) as pool:
        answers = list(pool.map(lambda each: server.post(ASKED, each).json(), options))
    for asked, answer in zip(options, answers, strict=True):
        image = images_of(answer)[0]
        nsfw = asked["MODEL_ID"] == "tiny/nsfw"
        assert answer.get("nsfw_content_detected") == ([nsfw] if asked["safety_checker"] else None)
        if nsfw and asked["safety_checker"]:
            assert not image.any()
        else:  # the two models differ in their checkers alone
            assert abs(image.astype(int) - alone).max() <= 1
