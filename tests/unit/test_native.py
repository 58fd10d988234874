from __future__ import annotations

import pytest

from api.engine.parameters import parameters
from api.errors import ApiError
from api.http.native import wanted_type


@pytest.mark.parametrize(
    ("accept", "wanted"),
    [
        (None, "application/json"),
        ("*/*", "application/json"),
        ("image/*", "image/png"),
        ("IMAGE/PNG", "image/png"),
        ("image/webp", "image/webp"),
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


@pytest.mark.parametrize("accept", ["text/html", "image/png;q=0", "video/*", "image/gif", ";;;"])
def test_what_cannot_be_answered(accept: str) -> None:
    with pytest.raises(ApiError) as error:
        wanted_type(accept)
    assert error.value.code == "NOT_ACCEPTABLE"


def test_each_image_carries_its_own_parameters() -> None:
    inputs = {"prompt": ["a", "b"], "negative_prompt": ["c", "d"], "seed": [1, 2, 3, 4], "num_inference_steps": 5}
    meta = {"modelInputs": inputs, "SCHEDULER": "S", "MODEL_ID": "m", "MODEL_REVISION": "r"}
    texts = [parameters(meta, index, 4) for index in range(4)]
    assert [text.splitlines()[0] for text in texts] == ["a", "a", "b", "b"]
    assert "Negative prompt: d" in texts[3]
    assert [f"Seed: {seed}," in text for seed, text in zip((1, 2, 3, 4), texts, strict=True)] == [True] * 4
