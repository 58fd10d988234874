"""S3: what lies there, how it is fetched with plain HTTP, and what is said when it cannot be."""

from __future__ import annotations

import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import httpx
import pytest

from api.models.locations import Location, parse_location
from api.models.s3 import Plan, RemoteFile, resolve, urls
from api.models.s3_client import Access
from tests.running import free_port
from tests.s3 import (
    ACCESS,
    KEY,
    MODEL,
    NOBODY,
    SECRET,
    Store,
    answering,
    fetched,
    md5,
    raises,
    sha256,
)

pytest_plugins = ("tests.s3_server",)
pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("only_our_credentials", "one_loader")]


# ---- what lies there


def test_one_archive(store: Store) -> None:
    store.put("d/m.tar.zst", b"archive")
    plan = resolve(store.at("d/m.tar.zst"), ACCESS)
    etag = md5(b"archive")
    assert plan.files == (RemoteFile("m.tar.zst", "d/m.tar.zst", 7, f'"{etag}"', md5=etag),)
    assert (plan.bytes, plan.revision, plan.region) == (7, f'"{etag}"', "us-east-1")


def test_checksums_that_the_store_keeps(store: Store) -> None:
    body = b"weights"
    store.put("a.safetensors", body, ChecksumAlgorithm="SHA256")
    store.put("b.safetensors", body, ChecksumAlgorithm="CRC32")
    store.put("c.safetensors", body, Metadata={"sha256": sha256(body).upper()})
    store.put("d.safetensors", body, Metadata={"sha256": "nonsense"})
    files = {name: resolve(store.at(f"{name}.safetensors"), ACCESS).files[0] for name in "abcd"}
    assert files["a"].sha256 == files["c"].sha256 == sha256(body)
    assert files["b"].crc32 == f"{zlib.crc32(body):08x}"
    assert files["b"].sha256 is files["d"].sha256 is None
    assert resolve(store.at("a.safetensors"), ACCESS).revision == f"sha256:{sha256(body)}"


def test_the_name_comes_from_the_fragment(store: Store) -> None:
    store.put("raw")
    assert resolve(store.at("raw", fragment="#fname=m.safetensors"), ACCESS).files[0].path == "m.safetensors"


def test_a_folder_of_plain_files(store: Store) -> None:
    for name, content in MODEL.items():
        store.put(f"m/{name}", content)
    store.put("m/unet/", b"")  # the mark of a folder
    store.put("m-2/model_index.json")
    plan = resolve(store.at("m"), ACCESS)
    assert {file.path: file.size for file in plan.files} == {name: len(content) for name, content in MODEL.items()}
    assert {file.path: file.md5 for file in plan.files} == {name: md5(content) for name, content in MODEL.items()}
    assert fetched(plan) == MODEL


def test_the_revision_of_a_folder_follows_its_content(store: Store) -> None:
    for name, content in MODEL.items():
        store.put(f"m/{name}", content)
    before = resolve(store.at("m/"), ACCESS).revision
    assert resolve(store.at("m/"), ACCESS).revision == before
    store.put("m/unet/config.json", b"[]")
    assert resolve(store.at("m/"), ACCESS).revision != before


def test_more_than_a_page_of_keys_and_a_selection(store: Store) -> None:
    names = [f"part/{i:04}.json" for i in range(1100)]
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda name: store.put(f"m/{name}"), names))
    store.put("m/model_index.json", b'{"z": 1}')
    seen = []

    def select(found: list[str], index: bytes) -> list[str]:
        seen.append((found, index))
        return ["part/1099.json", "model_index.json", "not there"]

    plan = resolve(store.at("m/"), ACCESS, select=select)
    assert seen == [(["model_index.json", *names], b'{"z": 1}')]
    assert [file.path for file in plan.files] == ["model_index.json", "part/1099.json"]


def test_a_bucket_of_something_else_is_refused(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("api.models.s3._MAX_OBJECTS", 3)
    for name in MODEL:
        store.put(f"m/{name}")
    with raises("INVALID_INPUTS", "more than 3 objects"):
        resolve(store.at("m/"), ACCESS)


def test_what_is_not_there(store: Store) -> None:
    store.put("half/unet/config.json")
    with raises("MODEL_NOT_FOUND", "no such object", "m.tar"):
        resolve(store.at("m.tar"), ACCESS)
    with raises("MODEL_NOT_FOUND", "nothing is there"):
        resolve(store.at("m/"), ACCESS)
    with raises("MODEL_NOT_FOUND", "incomplete upload", "half/"):
        resolve(store.at("half/"), ACCESS)
    with raises("MODEL_NOT_FOUND", '"no-such-bucket" does not exist'):
        resolve(store.at("m/", bucket="no-such-bucket"), ACCESS)
    with raises("MODEL_NOT_FOUND", "bucket"):
        resolve(store.at("m.tar", bucket="no-such-bucket"), ACCESS)


@pytest.mark.parametrize(
    "name", ["../x", "a/../../x", "a//x", "/x", "a/./x", "a\\x", "C:x", "a/\u202ex", "y" * 256, "model_index.json/x"]
)
def test_unsafe_names_are_refused(store: Store, name: str) -> None:
    store.put("m/model_index.json")
    store.put("m/unet/config.json")
    # over the wire as it is: the client would tidy the path up
    target = f"{store.endpoint}/{store.bucket}/m/"
    escaped = "".join(f"%{byte:02X}" for byte in name.encode())
    httpx.put(target + escaped, content=b"x", headers={"Authorization": f"AWS {KEY}:x"}).raise_for_status()
    if f"m/{name}" not in store.names():
        pytest.skip("this server does not keep such a name")
    with raises("ARCHIVE_UNSAFE"):
        resolve(store.at("m/"), ACCESS)


# ---- with and without credentials


def test_without_credentials_private_objects_are_denied_and_public_ones_are_read(store: Store) -> None:
    store.put("private.tar")
    store.put("public.tar", b"0123456789", ACL="public-read")
    with raises("SOURCE_DENIED", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "private.tar"):
        resolve(store.at("private.tar"), NOBODY)
    plan = resolve(store.at("public.tar"), NOBODY)
    (url,) = urls(plan, NOBODY).values()
    assert url == f"{store.endpoint}/{store.bucket}/public.tar"
    assert httpx.get(url).content == b"0123456789"


def test_signed_urls_serve_ranges(store: Store) -> None:
    store.put("d/a b+c#é.tar", b"0123456789")
    plan = resolve(Location("s3", "archive", store.endpoint, store.bucket, "d/a b+c#é.tar"), ACCESS)
    (url,) = urls(plan, ACCESS, expires=60).values()
    query = parse_qs(urlsplit(url).query)
    assert query["X-Amz-Algorithm"] == ["AWS4-HMAC-SHA256"]
    assert query["X-Amz-Expires"] == ["60"]
    assert SECRET not in url
    ranged = httpx.get(url, headers={"Range": "bytes=2-4", "If-Match": plan.files[0].etag})
    assert (ranged.status_code, ranged.content, ranged.headers["ETag"]) == (206, b"234", plan.files[0].etag)


def test_credentials_from_the_environment(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    store.put("m.tar")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", KEY)
    with raises("SOURCE_DENIED", "AWS_SECRET_ACCESS_KEY is set and the other is not"):
        resolve(store.at("m.tar"))
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    assert "X-Amz-Signature" in urls(resolve(store.at("m.tar")))["m.tar"]


def test_credentials_from_a_profile(store: Store, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    store.put("m.tar")
    (tmp_path / "credentials").write_text(f"[here]\naws_access_key_id={KEY}\naws_secret_access_key={SECRET}\n")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    monkeypatch.setenv("AWS_PROFILE", "here")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "")  # set but empty is not set
    assert "X-Amz-Signature" in urls(resolve(store.at("m.tar")))["m.tar"]
    monkeypatch.setenv("AWS_PROFILE", "elsewhere")
    with raises("SOURCE_DENIED", "AWS_PROFILE"):
        resolve(store.at("m.tar"))


def test_secrets_are_not_in_a_repr() -> None:
    access = Access.from_env({"AWS_ACCESS_KEY_ID": KEY, "AWS_SECRET_ACCESS_KEY": SECRET, "AWS_SESSION_TOKEN": "t0k3n"})
    assert (access.access_key, access.secret_key, access.session_token) == (KEY, SECRET, "t0k3n")
    assert not any(secret in repr(access) for secret in (KEY, SECRET, "t0k3n"))


@pytest.mark.parametrize(
    ("where", "style", "region", "starts", "signed_for"),
    [
        ("", "auto", "us-east-1", "https://buck.s3.us-east-1.amazonaws.com/k?", "us-east-1"),
        ("", "auto", "eu-west-3", "https://buck.s3.eu-west-3.amazonaws.com/k?", "eu-west-3"),
        ("", "auto", "cn-north-1", "https://buck.s3.cn-north-1.amazonaws.com.cn/k?", "cn-north-1"),
        ("https://s3.us-west-2.amazonaws.com", "auto", "eu-west-1", "https://s3.us-west-2.amazonaws.com/buck/k?", "us-west-2"),
        ("https://s3.us-west-2.amazonaws.com", "virtual", "", "https://buck.s3.us-west-2.amazonaws.com/k?", "us-west-2"),
        ("https://a.r2.cloudflarestorage.com", "auto", "", "https://a.r2.cloudflarestorage.com/buck/k?", "us-east-1"),
        ("https://a.r2.cloudflarestorage.com", "auto", "auto", "https://a.r2.cloudflarestorage.com/buck/k?", "auto"),
        ("https://rgw.ceph.example", "virtual", "", "https://buck.rgw.ceph.example/k?", "us-east-1"),
        ("https://s3.eu-central-003.backblazeb2.com", "auto", "", "https://s3.eu-central-003.backblazeb2.com/buck/k?", "eu-central-003"),
        ("http://minio:9000", "auto", "", "http://minio:9000/buck/k?", "us-east-1"),
        ("http://127.0.0.1:9000", "auto", "", "http://127.0.0.1:9000/buck/k?", "us-east-1"),
        ("http://[::1]:9000", "path", "", "http://[::1]:9000/buck/k?", "us-east-1"),
        ("https://x.supabase.co/storage/v1/s3", "auto", "", "https://x.supabase.co/storage/v1/s3/buck/k?", "us-east-1"),
    ],
)  # fmt: skip
def test_addresses_of_each_service(where: str, style: str, region: str, starts: str, signed_for: str) -> None:
    env = {"AWS_ACCESS_KEY_ID": KEY, "AWS_SECRET_ACCESS_KEY": SECRET, "AWS_S3_ADDRESSING_STYLE": style}
    access = Access.from_env(env | {"AWS_DEFAULT_REGION": region})
    location = Location("s3", "archive", where or None, "buck", "k")
    (url,) = urls(Plan(location, (RemoteFile("k", "k", 1, '"e"'),), "", region), access).values()
    assert url.startswith(starts)
    assert parse_qs(urlsplit(url).query)["X-Amz-Credential"][0].split("/")[2] == signed_for


def test_a_bucket_with_dots_is_addressed_where_its_certificate_is_valid() -> None:
    location = Location("s3", "archive", None, "bu.ck.et", "k")
    (url,) = urls(Plan(location, (RemoteFile("k", "k", 1, '"e"'),), "", "us-east-1"), ACCESS).values()
    assert url.startswith("https://s3.us-east-1.amazonaws.com/bu.ck.et/k?")


# ---- faults


FAULTS = [
    (403, "AccessDenied", "SOURCE_DENIED", "AWS_SECRET_ACCESS_KEY"),
    (403, "InvalidAccessKeyId", "SOURCE_DENIED", "AWS_ACCESS_KEY_ID"),
    (403, "SignatureDoesNotMatch", "SOURCE_DENIED", "AWS_SECRET_ACCESS_KEY"),
    (400, "ExpiredToken", "SOURCE_DENIED", "AWS_ACCESS_KEY_ID"),
    (401, "Unauthorized", "SOURCE_DENIED", "AWS_ACCESS_KEY_ID"),
    (403, "RequestTimeTooSkewed", "SOURCE_DENIED", "clock"),
    (400, "AuthorizationHeaderMalformed", "SOURCE_DENIED", "AWS_DEFAULT_REGION"),
    (404, "NoSuchBucket", "MODEL_NOT_FOUND", "bucket"),
    (404, "NoSuchKey", "MODEL_NOT_FOUND", "no such object"),
    (500, "InternalError", "SOURCE_UNREACHABLE", "500 InternalError"),
    (503, "SlowDown", "SOURCE_UNREACHABLE", "503"),
    (429, "TooManyRequests", "SOURCE_UNREACHABLE", "429"),
    (200, "html", "SOURCE_UNREACHABLE", "could not be reached"),
    (200, "cut", "SOURCE_UNREACHABLE", "cut"),
    (200, "slow", "SOURCE_UNREACHABLE", "no answer in time"),
]


@pytest.mark.parametrize(("status", "code", "ours", "word"), FAULTS)
def test_faults_have_a_code_a_reason_and_no_secrets(
    impatient: None, status: int, code: str, ours: str, word: str
) -> None:
    with answering(status, code) as endpoint:
        location = parse_location("s3:///bucket/m/", default_endpoint=endpoint)
        with raises(ours, word, f"{endpoint.removeprefix('http://')}/bucket/m/"):
            resolve(location, ACCESS)


def test_nobody_answers(impatient: None) -> None:
    with raises("SOURCE_UNREACHABLE", "no connection"):
        resolve(parse_location("s3:///b/m.tar", default_endpoint=f"http://127.0.0.1:{free_port()}"), ACCESS)


def test_a_bucket_in_the_place_of_the_endpoint_is_explained(impatient: None) -> None:
    with raises("SOURCE_UNREACHABLE", "s3:///bucket/key"):
        resolve(parse_location(f"s3://localhost:{free_port()}/folder/m.tar"), ACCESS)
