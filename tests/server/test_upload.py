"""Images that go to a bucket or to addresses that take them, instead of into the answer."""

from __future__ import annotations

import http.server
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from tests.running import Server, free_port, images_of, pixels, running
from tests.sources import BUCKET, KEY, SECRET, Bucket, moto

ASKED = {"prompt": "a red circle on a blue background", "seed": 5, "num_inference_steps": 4}


class Taker:
    """Takes what is PUT to it, or answers what it is told to, as often as it is told."""

    def __init__(self) -> None:
        self.got: dict[str, tuple[bytes, str]] = {}
        self.answers: dict[str, list[int]] = {}
        self.tries: dict[str, int] = {}
        taker = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_PUT(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                path = self.path.partition("?")[0]
                taker.tries[path] = taker.tries.get(path, 0) + 1
                answers = taker.answers.get(path, [])
                status = answers.pop(0) if answers else 200
                if status == 200:
                    taker.got[path] = (body, self.headers["Content-Type"])
                self.send_response(status)
                if status == 307:
                    self.send_header("Location", "/elsewhere")
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, *args: object) -> None:
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def __enter__(self) -> Taker:
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.server.shutdown()
        self.server.server_close()


@pytest.fixture(scope="module")
def taker() -> Iterator[Taker]:
    with Taker() as taker:
        yield taker


@pytest.fixture(scope="module")
def bucket() -> Iterator[Bucket]:
    with moto() as address:
        yield Bucket(address)


@pytest.fixture(scope="module")
def sender(bucket: Bucket, models_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server with a bucket, which may reach 127.0.0.1."""
    environ = {
        "MODELS_DIR": str(models_dir), "RUNTIME_DOWNLOADS": "0", "ALLOW_PRIVATE_URLS": "1", "FETCH_TIMEOUT": "3",
        "AWS_S3_ENDPOINT_URL": f"http://{bucket.address}", "AWS_S3_DEFAULT_BUCKET": BUCKET,
        "AWS_ACCESS_KEY_ID": KEY, "AWS_SECRET_ACCESS_KEY": SECRET, "AWS_EC2_METADATA_DISABLED": "true",
    }  # fmt: skip
    with running(environ, tmp_path_factory.mktemp("log") / "sender.log") as started:
        yield started


@pytest.fixture(scope="module")
def plain(sender: Server) -> np.ndarray:
    return images_of(sender.post(ASKED).json())[0]


def names(bucket: Bucket) -> set[str]:
    return {entry["Key"] for entry in bucket.client.list_objects_v2(Bucket=bucket.name).get("Contents", ())}


def sent(server: Server, options: dict[str, Any], **more: Any) -> dict[str, Any]:
    response = server.post({**ASKED, **more}, options)
    assert response.status_code == 200, response.text[:500]
    answer: dict[str, Any] = response.json()
    assert not {"image_base64", "images_base64"} & set(answer)
    assert answer["$timings"]["upload"] >= 0
    return answer


def failed(response: httpx.Response) -> str:
    error = response.json()["$error"]
    assert (response.status_code, error["code"]) == (502, "UPLOAD_FAILED"), response.text
    assert SECRET not in response.text and "Signature" not in response.text
    return str(error["message"])


def test_into_the_own_bucket(sender: Server, bucket: Bucket, plain: np.ndarray) -> None:
    answer = sent(sender, {"output_url": f"s3:///{BUCKET}/out/one.png"})
    found = bucket.client.get_object(Bucket=BUCKET, Key="out/one.png")
    assert found["ContentType"] == "image/png"
    assert np.array_equal(pixels(found["Body"].read()), plain)
    assert np.array_equal(pixels(httpx.get(answer["image_url"]).content), plain)
    assert "output_url" not in str(answer["$meta"])


def test_several_get_numbers(sender: Server, bucket: Bucket) -> None:
    answer = sent(
        sender, {"output_url": f"s3:///{BUCKET}/many/a.webp", "image_format": "WEBP"}, num_images_per_prompt=3
    )
    assert {f"many/a-{number}.webp" for number in range(3)} <= names(bucket)
    assert len(answer["image_urls"]) == 3
    assert len({httpx.get(url).content for url in answer["image_urls"]}) == 3


def test_to_a_presigned_address(sender: Server, bucket: Bucket, plain: np.ndarray) -> None:
    where = {"Bucket": BUCKET, "Key": "presigned.png"}
    url = bucket.client.generate_presigned_url("put_object", Params={**where, "ContentType": "image/png"})
    answer = sent(sender, {"dest_url": url})
    assert answer["image_url"] == url.partition("?")[0]
    assert np.array_equal(pixels(bucket.client.get_object(**where)["Body"].read()), plain)


def test_to_a_list_of_addresses(sender: Server, taker: Taker) -> None:
    urls = [f"{taker.url}/list/{name}?sig=1" for name in "ab"]
    answer = sent(sender, {"output_url": urls, "image_format": "JPEG"}, num_images_per_prompt=2)
    assert answer["image_urls"] == [f"{taker.url}/list/a", f"{taker.url}/list/b"]
    assert [taker.got[f"/list/{name}"][1] for name in "ab"] == ["image/jpeg"] * 2


def test_what_may_pass_is_tried_again(sender: Server, taker: Taker) -> None:
    taker.answers["/again"] = [503, 500]
    sent(sender, {"output_url": f"{taker.url}/again"})
    assert taker.tries["/again"] == 3


@pytest.mark.parametrize(
    ("answers", "tries", "says"),
    [([403], 1, "answered 403"), ([307], 1, "answered 307"), ([500] * 9, 3, "answered 500")],
)
def test_an_address_that_does_not_take_it(sender: Server, taker: Taker, answers: list, tries: int, says: str) -> None:
    path = f"/refused-{answers[0]}"
    taker.answers[path] = list(answers)
    assert says in failed(sender.post(ASKED, {"output_url": f"{taker.url}{path}?X-Amz-Signature=1"}))
    assert taker.tries[path] == tries
    assert "/elsewhere" not in taker.tries


def test_half_of_it_is_a_failure_and_the_bucket_is_left_clean(sender: Server, bucket: Bucket, taker: Taker) -> None:
    taker.answers["/half"] = [403]
    before = names(bucket)
    urls = [f"s3:///{BUCKET}/half.png", f"{taker.url}/half"]
    failed(sender.post({**ASKED, "num_images_per_prompt": 2}, {"output_url": urls}))
    assert names(bucket) == before
    taker.answers["/half"] = [403]
    urls = [f"{taker.url}/whole", f"{taker.url}/half"]
    said = failed(sender.post({**ASKED, "num_images_per_prompt": 2}, {"output_url": urls}))
    assert "1 of 2" in said and "/whole" in taker.got


def test_nobody_listens(sender: Server) -> None:
    failed(sender.post(ASKED, {"output_url": f"http://127.0.0.1:{free_port()}/x"}))


def test_a_bucket_that_is_not_there(models_dir: Path, bucket: Bucket, tmp_path: Path) -> None:
    environ = {
        "MODELS_DIR": str(models_dir), "RUNTIME_DOWNLOADS": "0", "AWS_S3_ENDPOINT_URL": f"http://{bucket.address}",
        "AWS_S3_DEFAULT_BUCKET": "missing", "AWS_ACCESS_KEY_ID": KEY, "AWS_SECRET_ACCESS_KEY": SECRET,
    }  # fmt: skip
    with running(environ, tmp_path / "log") as server:
        assert "missing" in failed(server.post(ASKED, {"output_url": "s3:///missing/x.png"}))


@pytest.mark.parametrize("url", ["http://127.0.0.1:1/x", "http://localhost/x", "https://169.254.169.254/x"])
def test_private_addresses_are_refused_before_anything_is_generated(server: Server, url: str) -> None:
    response = server.post(ASKED, {"output_url": url})
    error = response.json()["$error"]
    assert (response.status_code, error["code"], error["field"]) == (400, "URL_NOT_ALLOWED", "callInputs.output_url")


def test_streams_and_jobs_for_later_tell_links_too(sender: Server, bucket: Bucket) -> None:
    response = sender.post(ASKED, {"output_url": f"s3:///{BUCKET}/stream.png", "streamEvents": True})
    assert '"image_url"' in response.text.splitlines()[-1]
    accepted = sender.post(ASKED, {"output_url": f"s3:///{BUCKET}/later/", "async": True}).json()
    while (job := sender.client.get(f"/jobs/{accepted['id']}").json())["state"] not in ("COMPLETED", "FAILED"):
        time.sleep(0.05)
    assert httpx.get(job["result"]["image_url"]).status_code == 200
    assert any(name.startswith("later/") for name in names(bucket))
    assert sender.client.get(f"/jobs/{accepted['id']}/images/0").status_code == 404
    linked = sender.client.get(f"/jobs/{accepted['id']}", params={"images": "url"}).json()
    assert linked["result"]["image_url"] == job["result"]["image_url"]


def test_an_image_by_accept_has_no_room_for_a_link(sender: Server) -> None:
    response = sender.post(ASKED, {"output_url": f"s3:///{BUCKET}/x.png"}, headers={"Accept": "image/png"})
    assert response.status_code == 406
