"""The body of RunPod's routes: what is asked for beside the input, and how large an output may be."""

from __future__ import annotations

import contextlib
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from api.errors import ApiError
from api.schema.generation import GenerationResult
from api.service import output_limit
from api.service.output_limit import RUN_LIMIT, SYNC_LIMIT, within_limit
from api.service.policies import Asked, read_body
from api.service.s3_config import check_s3_config, read_s3_config, s3_destinations
from api.settings import Settings

S3 = {
    "accessId": "AKIA1",
    "accessSecret": "hippopotamus",
    "bucketName": "pics",
    "endpointUrl": "https://s3.example.com",
}
INPUT = {"prompt": "x"}


def read(sync: bool = False, **more: Any) -> Asked:
    return read_body({"input": INPUT, **more}, owner="alice", endpoint="e", sync=sync)


def test_what_a_body_says() -> None:
    policy = {"executionTimeout": 5000, "ttl": 10000, "lowPriority": True}
    asked = read(policy=policy, webhook="https://example.com/x", s3Config=S3)
    terms = asked.terms
    assert (terms.owner, terms.endpoint, terms.simple, terms.sync, terms.keep) == ("alice", "e", True, False, None)
    assert (terms.execution_timeout, terms.ttl, terms.webhook) == (5.0, 10.0, "https://example.com/x")
    assert (asked.priority, asked.s3 and asked.s3.bucket_name) == ("low", "pics")
    plain = read(sync=True, policy=None, webhook=None, s3Config=None)
    assert (plain.priority, plain.s3, plain.terms.webhook, plain.terms.keep) == ("normal", None, "", 60.0)
    assert read(webhook="").terms.webhook == ""


@pytest.mark.parametrize(
    ("more", "code", "field"),
    [
        ({"polcy": {}}, "UNKNOWN_INPUT", "polcy"),
        ({"policy": []}, "INVALID_INPUTS", "policy"),
        ({"policy": {"timeout": 1}}, "UNKNOWN_INPUT", "policy.timeout"),
        ({"policy": {"executionTimeout": 4999}}, "INVALID_INPUTS", "policy.executionTimeout"),
        ({"policy": {"executionTimeout": True}}, "INVALID_INPUTS", "policy.executionTimeout"),
        ({"policy": {"executionTimeout": float("nan")}}, "INVALID_INPUTS", "policy.executionTimeout"),
        ({"policy": {"ttl": 9999}}, "INVALID_INPUTS", "policy.ttl"),
        ({"policy": {"ttl": "10000"}}, "INVALID_INPUTS", "policy.ttl"),
        ({"policy": {"ttl": 10**12}}, "INVALID_INPUTS", "policy.ttl"),
        ({"policy": {"lowPriority": 1}}, "INVALID_INPUTS", "policy.lowPriority"),
        ({"webhook": 3}, "INVALID_INPUTS", "webhook"),
        ({"webhook": "ftp://example.com"}, "URL_NOT_ALLOWED", "webhook"),
        ({"webhook": "https://" + "x" * 9000}, "INVALID_INPUTS", "webhook"),
        ({"s3Config": "s3"}, "INVALID_INPUTS", "s3Config"),
        ({"s3Config": {**S3, "accessSecret": ""}}, "MISSING_INPUT", "s3Config.accessSecret"),
        ({"s3Config": {**S3, "region": "x"}}, "UNKNOWN_INPUT", "s3Config.region"),
        ({"s3Config": {**S3, "accessId": 3}}, "INVALID_INPUTS", "s3Config.accessId"),
        ({"s3Config": {**S3, "endpointUrl": "s3.example.com"}}, "URL_NOT_ALLOWED", "s3Config.endpointUrl"),
        ({"s3Config": {**S3, "endpointUrl": "https://u:p@s3.example.com"}}, "INVALID_INPUTS", "s3Config"),
        ({"s3Config": {**S3, "bucketName": "a/b"}}, "INVALID_INPUTS", "s3Config"),
        ({"s3Config": {**S3, "bucketName": "a#fname=b"}}, "INVALID_INPUTS", "s3Config"),
        ({"s3Config": {**S3, "objectPath": "../up"}}, "INVALID_INPUTS", "s3Config"),
        ({"s3Config": {**S3, "objectPath": "a#fname=b"}}, "INVALID_INPUTS", "s3Config"),
        ({"s3Config": {**S3, "objectPath": "a" * 950}}, "INVALID_INPUTS", "s3Config"),  # with what is put behind it
        ({"s3Config": S3, "input": {**INPUT, "output_url": "https://x/y"}}, "INVALID_INPUTS", "s3Config"),
    ],
)
def test_what_a_body_may_not_say(more: dict[str, Any], code: str, field: str) -> None:
    with pytest.raises(ApiError) as caught:
        read(**more)
    assert (caught.value.code, caught.value.field) == (code, field)
    assert "hippopotamus" not in f"{caught.value} {caught.value.body()}"


def test_images_go_to_signed_addresses_of_the_clients_bucket() -> None:
    config = read_s3_config({**S3, "objectPath": "/a/b/"})
    found = s3_destinations(config, 2, "JPEG", "job")
    assert [urlsplit(each.url).path for each in found] == ["/pics/a/b/job/0.jpg", "/pics/a/b/job/1.jpg"]
    for each in found:
        query = parse_qs(urlsplit(each.url).query)
        assert query["X-Amz-SignedHeaders"] == ["content-type;host"]
        assert query["X-Amz-Credential"][0].startswith("AKIA1/")
        assert urlsplit(each.link).path == urlsplit(each.url).path
        assert "hippopotamus" not in each.url + each.link
        assert "Signature" not in repr(each)
    assert "hippopotamus" not in repr(config) and "AKIA1" not in repr(config)


@pytest.mark.parametrize(
    ("endpoint", "address"),
    [
        ("https://s3.eu-west-1.amazonaws.com", "https://s3.eu-west-1.amazonaws.com/pics/job/0.png"),
        ("https://pics.s3.eu-west-1.amazonaws.com/", "https://s3.eu-west-1.amazonaws.com/pics/job/0.png"),
        ("https://x.supabase.co/storage/v1/s3", "https://x.supabase.co/storage/v1/s3/pics/job/0.png"),
        ("http://localhost:9000", "http://localhost:9000/pics/job/0.png"),
    ],
)
def test_endpoints_as_people_write_them(endpoint: str, address: str) -> None:
    (found,) = s3_destinations(read_s3_config({**S3, "endpointUrl": endpoint}), 1, "PNG", "job")
    assert found.url.partition("?")[0] == address


async def test_an_endpoint_in_a_private_network_is_refused() -> None:
    config = read_s3_config({**S3, "endpointUrl": "http://127.0.0.1:9000"})
    with pytest.raises(ApiError) as caught:
        await check_s3_config(config, Settings.from_env({}))
    assert (caught.value.code, caught.value.field) == ("URL_NOT_ALLOWED", "s3Config.endpointUrl")
    await check_s3_config(config, Settings.from_env({"ALLOW_PRIVATE_URLS": "1"}))


def result_of(size: int, images: int = 2, **more: Any) -> GenerationResult:
    return GenerationResult([bytes(size // images)] * images, {}, {}, 0.0, **more)


async def test_an_output_that_is_too_large_says_what_to_do() -> None:
    configured = Settings.from_env({})
    small = result_of(RUN_LIMIT * 3 // 4 - 3000)
    assert await within_limit(small, "PNG", "job", configured, sync=False) is small
    large = result_of(RUN_LIMIT * 3 // 4 + 3)
    assert await within_limit(large, "PNG", "job", configured, sync=True) is large
    with pytest.raises(ApiError, match=r"10\.0 MB.*run gives 10 MB.*JPEG.*s3Config.*AWS_S3_DEFAULT_BUCKET") as caught:
        await within_limit(large, "PNG", "job", configured, sync=False)
    assert caught.value.code == "LIMIT_EXCEEDED"
    with pytest.raises(ApiError, match="runsync gives 20 MB"):
        await within_limit(result_of(SYNC_LIMIT), "PNG", "job", configured, sync=True)


async def test_it_goes_to_the_servers_bucket_where_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    async def upload(destinations: Any, images: Any, content_type: str, _: Settings) -> list[str]:
        assert (len(images), content_type) == (2, "image/webp")
        return [f"link to {each.location.bucket}/{each.location.key}" for each in destinations]

    monkeypatch.setattr(output_limit, "upload", upload)
    configured = Settings.from_env({"AWS_S3_DEFAULT_BUCKET": "ours"})
    found = await within_limit(result_of(RUN_LIMIT), "WEBP", "job", configured, sync=False)
    assert found.urls == ["link to ours/runpod/job/0.webp", "link to ours/runpod/job/1.webp"]
    assert found.images == []
    with pytest.raises(ApiError, match="no latents"):  # they have no link
        latents = result_of(9, extras={"latents": bytes(RUN_LIMIT)})
        await within_limit(latents, "WEBP", "job", configured, sync=False)


names = st.text(max_size=5) | st.sampled_from(
    ["input", "policy", "webhook", "s3Config", "modelInputs", "callInputs", "prompt", "ttl", "objectPath", *S3]
)
anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9) | st.sampled_from(list(S3.values())),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(names, inner, max_size=4),
    max_leaves=12,
)


@settings(max_examples=100)
@given(st.dictionaries(names, anything, max_size=5), st.booleans())
def test_whatever_is_sent_is_read_or_refused(data: dict[str, Any], sync: bool) -> None:
    with contextlib.suppress(ApiError):
        asked = read_body(data, owner="", endpoint="e", sync=sync)
        assert isinstance(asked.input.model_inputs, dict)
        if asked.s3:
            s3_destinations(asked.s3, 1, "PNG", "job")
