"""Where images go: names, numbers, and what is not allowed."""

from __future__ import annotations

from typing import Any

import pytest

from api.errors import ApiError
from api.service.destinations import Destination, choose_destinations
from api.service.options import check_options
from api.settings import Settings

BUCKET = Settings.from_env({"AWS_S3_DEFAULT_BUCKET": "pictures", "AWS_S3_ENDPOINT_URL": "https://s3.example"})


def where(url: Any, images: int = 1, image_format: str = "PNG", settings: Settings = BUCKET) -> list[str]:
    options = check_options({"output_url": url})
    found = choose_destinations(options, images, image_format, "id", settings)
    return [each.location.key if each.location else each.url for each in found]


@pytest.mark.parametrize(
    ("url", "images", "expected"),
    [
        ("s3:///pictures/a/b.png", 1, ["a/b.png"]),
        ("s3:////b.png", 1, ["b.png"]),
        ("s3://s3.example/pictures/b.png", 1, ["b.png"]),
        ("https+s3://s3.example/pictures/b.png", 1, ["b.png"]),
        ("s3:///pictures/b.png", 3, ["b-0.png", "b-1.png", "b-2.png"]),
        ("s3:///pictures/v1.2/b", 2, ["v1.2/b-0.png", "v1.2/b-1.png"]),
        ("s3:///pictures/{n}/b.png", 2, ["0/b.png", "1/b.png"]),
        ("s3:///pictures/b-{n}.png", 1, ["b-0.png"]),
        ("s3:///pictures/folder/", 2, ["folder/id-0.png", "folder/id-1.png"]),
        ("s3:///pictures/models--a--b.tar.zst", 1, ["models--a--b.tar.zst.png"]),
        (["s3:///pictures/a.png", "https://host/b?X=1"], 2, ["a.png", "https://host/b?X=1"]),
        ("https://host/b/{n}.png?X=1", 2, ["https://host/b/0.png?X=1", "https://host/b/1.png?X=1"]),
    ],
)  # fmt: skip
def test_names(url: Any, images: int, expected: list[str]) -> None:
    assert where(url, images) == expected


def test_a_key_has_the_extension_of_its_format() -> None:
    assert where("s3:///pictures/a.png", image_format="JPEG") == ["a.png.jpg"]
    assert where("s3:///pictures/a.JPEG", image_format="JPEG") == ["a.JPEG"]
    assert where("s3:///pictures/a.safetensors", image_format="AVIF") == ["a.safetensors.avif"]


@pytest.mark.parametrize(
    ("url", "images", "code", "says"),
    [
        ("https://host/b.png", 2, "INVALID_INPUTS", "a list of URLs"),
        (["https://host/b.png"] * 3, 2, "INVALID_INPUTS", "makes 2 images"),
        (["https://host/b.png"] * 2, 2, "INVALID_INPUTS", "the same address"),
        ("s3:///other/b.png", 1, "URL_NOT_ALLOWED", "own bucket"),
        ("s3://elsewhere.example/pictures/b.png", 1, "URL_NOT_ALLOWED", "own bucket"),
        ("http+s3://s3.example/pictures/b.png", 1, "URL_NOT_ALLOWED", "own bucket"),
        ("s3:///pictures/../b.png", 1, "INVALID_INPUTS", ".."),
        ("s3:///pictures/b.png#fname=x", 1, "INVALID_INPUTS", "#"),
        ("s3://", 1, "INVALID_INPUTS", "names no object"),
        ("ftp://host/b.png", 1, "URL_NOT_ALLOWED", "http"),
        ("ftp://me:secret@host/b.png?sig=secret", 1, "URL_NOT_ALLOWED", "http"),
        ("https://me:secret@host/b.png?sig=secret", 1, "INVALID_INPUTS", "user name"),
        ("file:///etc/passwd", 1, "URL_NOT_ALLOWED", "http"),
        ([], 1, "INVALID_INPUTS", "a URL"),
        (3, 1, "INVALID_INPUTS", "a URL"),
    ],
)  # fmt: skip
def test_what_is_not_a_place_for_images(url: Any, images: int, code: str, says: str) -> None:
    with pytest.raises(ApiError) as caught:
        where(url, images)
    assert (caught.value.code, caught.value.field) == (code, "callInputs.output_url")
    assert says in caught.value.message
    assert "secret" not in f"{caught.value.message} {caught.value.requested}"


def test_without_a_bucket_nothing_goes_to_s3() -> None:
    with pytest.raises(ApiError, match="AWS_S3_DEFAULT_BUCKET") as caught:
        where("s3:///pictures/b.png", settings=Settings.from_env({}))
    assert caught.value.code == "URL_NOT_ALLOWED"


def test_dest_url_is_another_name() -> None:
    assert check_options({"dest_url": "https://host/a"}) == check_options({"output_url": "https://host/a"})
    with pytest.raises(ApiError, match="one of them"):
        check_options({"dest_url": "https://host/a", "output_url": "https://host/b"})


def test_nothing_shows_a_signature() -> None:
    assert "secret" not in repr(Destination("https://user:secret@host/a?X-Amz-Signature=secret"))
