"""Every form of MODEL_URL and CHECKPOINT_URL, what falls back to what, and what never shows."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from api.errors import ApiError
from api.models.locations import Location, is_safe_name, normalized_model_id, parse_location

DEFAULT = {"default_endpoint": "http://minio:9000", "default_bucket": "models", "model_id": "org/name"}
SHA = "0123456789abcdef" * 4


def parse(url: str, **more: str) -> Location:
    return parse_location(url, **{**DEFAULT, **more})


def refused(url: str, **more: str) -> ApiError:
    with pytest.raises(ApiError) as error:
        parse(url, **more)
    assert error.value.code == "INVALID_INPUTS"
    assert error.value.field == "callInputs.MODEL_URL"
    return error.value


S3 = [
    # url, endpoint, bucket, key
    ("s3://", "http://minio:9000", "models", "models--org--name.tar.zst"),
    ("s3:///", "http://minio:9000", "models", "models--org--name.tar.zst"),
    ("http+s3://", "http://minio:9000", "models", "models--org--name.tar.zst"),
    ("s3:///b", "http://minio:9000", "b", "models--org--name.tar.zst"),
    ("s3:///b/", "http://minio:9000", "b", "models--org--name.tar.zst"),
    ("s3:////k.tar", "http://minio:9000", "models", "k.tar"),
    ("s3:///b/k.tar", "http://minio:9000", "b", "k.tar"),
    ("s3:///b/deep/er/k.tar.gz", "http://minio:9000", "b", "deep/er/k.tar.gz"),
    ("s3://host:9000", "https://host:9000", "models", "models--org--name.tar.zst"),
    ("s3://host//k.tar", "https://host", "models", "k.tar"),
    ("s3://host/b/k.tar", "https://host", "b", "k.tar"),
    ("http+s3://host:9000/b/k.tar", "http://host:9000", "b", "k.tar"),
    ("https+s3://host:9000/b/k.tar", "https://host:9000", "b", "k.tar"),
    ("HTTPS+S3://Host.Example.:443/b/K.tar", "https://host.example", "b", "K.tar"),
    ("http+s3://host:80/b/k.tar", "http://host", "b", "k.tar"),
    ("http+s3://[::1]:9000/b/k.tar", "http://[::1]:9000", "b", "k.tar"),
    ("s3:///b/with space+%20é.tar", "http://minio:9000", "b", "with space+%20é.tar"),
    ("s3:///b/folder", "http://minio:9000", "b", "folder/"),
    ("s3:///b/folder/", "http://minio:9000", "b", "folder/"),
]


@pytest.mark.parametrize(("url", "endpoint", "bucket", "key"), S3)
def test_s3_forms(url: str, endpoint: str, bucket: str, key: str) -> None:
    found = parse(url)
    assert (found.source, found.endpoint, found.bucket, found.key) == ("s3", endpoint, bucket, key)


def test_the_revision_is_part_of_the_default_key_and_the_precision_is_not() -> None:
    assert parse("s3://", revision="fp16").key == "models--org--name--fp16.tar.zst"
    assert normalized_model_id("Linaqruf/anything-v3.0", "fp16") == "models--Linaqruf--anything-v3.0--fp16"
    assert normalized_model_id("single") == "models--single"


@pytest.mark.parametrize(
    ("configured", "endpoint"),
    [
        ("", None),
        ("https://account.r2.cloudflarestorage.com", "https://account.r2.cloudflarestorage.com"),
        ("host:9000", "https://host:9000"),
        ("https://x.supabase.co/storage/v1/s3/", "https://x.supabase.co/storage/v1/s3"),
    ],
)
def test_configured_endpoints(configured: str, endpoint: str | None) -> None:
    found = parse("s3:///b/k.tar", default_endpoint=configured)
    assert found.endpoint == endpoint
    assert found.endpoint_is_default


def test_an_endpoint_that_a_request_chose_is_told_from_the_operators() -> None:
    assert parse("http+s3://minio:9000/b/k.tar").endpoint_is_default
    assert parse("s3://s3.eu-west-1.amazonaws.com/b/k.tar").endpoint_is_default
    assert not parse("https+s3://minio:9000/b/k.tar").endpoint_is_default
    assert not parse("http+s3://169.254.169.254/b/k.tar").endpoint_is_default
    assert not parse("s3://s3.eu-west-1.amazonaws.com.evil.example/b/k.tar").endpoint_is_default


@pytest.mark.parametrize(
    ("url", "kind", "archive", "filename"),
    [
        ("s3:///b/m.tar.zst", "archive", "tar.zst", "m.tar.zst"),
        ("s3:///b/m.tar.zstd", "archive", "tar.zst", "m.tar.zstd"),
        ("s3:///b/d/m.tar", "archive", "tar", "m.tar"),
        ("s3:///b/m.tar.gz", "archive", "tar.gz", "m.tar.gz"),
        ("s3:///b/M.TGZ", "archive", "tar.gz", "M.TGZ"),
        ("s3:///b/m.safetensors", "checkpoint", "", "m.safetensors"),
        ("s3:///b/m.ckpt", "checkpoint", "", "m.ckpt"),
        ("s3:///b/model-v1.5", "prefix", "", "model"),
        ("s3:///b/m.safetensors/", "prefix", "", "model"),
        ("s3:///b/raw#fname=m.tar", "archive", "tar", "m.tar"),
        ("https://h/m.tar.zst?x=1", "archive", "tar.zst", "m.tar.zst"),
        ("https://h/a%20b.safetensors", "checkpoint", "", "a b.safetensors"),
        ("https://h/a%2Fb.safetensors", "checkpoint", "", "b.safetensors"),
        ("https://h/.%3Cx%3E.ckpt", "checkpoint", "", "model.ckpt"),
        ("https://civitai.com/api/download/models/1", "prefix", "", "1"),
        ("https://civitai.com/api/download/models/1#fname=x.safetensors", "checkpoint", "", "x.safetensors"),
        ("https://h/?f=m.safetensors", "prefix", "", "model"),
    ],
)
def test_the_end_of_the_name_says_what_it_is(url: str, kind: str, archive: str, filename: str) -> None:
    found = parse(url)
    assert (found.kind, found.archive_kind, found.filename) == (kind, archive, filename)


def test_fragments() -> None:
    found = parse(f"https://h/x#fname=my%20model.safetensors&sha256={SHA.upper()}")
    assert (found.fname, found.sha256, found.url) == ("my model.safetensors", SHA, "https://h/x")
    assert parse(f"s3:///b/k.tar#sha256={SHA}").sha256 == SHA
    assert parse("https://h/x.tar#").fname is None


UNSAFE = [
    "",
    ".",
    "..",
    "../x",
    "a/b.tar",
    "/etc/passwd",
    "a\\b",
    "C:x",
    ".hidden",
    "~root",
    "a%00b",
    "a%0ab",
    "x" * 201,
]
UNSAFE += ["%2e%2e%2fx", "a%2fb", "é" * 101]


@pytest.mark.parametrize("fname", UNSAFE)
def test_unsafe_file_names_are_refused(fname: str) -> None:
    assert "fname" in refused(f"https://h/x.tar#fname={fname}").message


@pytest.mark.parametrize(
    "fragment",
    ["sha256=12", f"sha265={SHA}", "model", f"sha256={SHA}&sha256={SHA}", "fname=a.tar&fname=b.tar", "=", "&"],
)
def test_a_fragment_that_is_not_understood_is_refused(fragment: str) -> None:
    refused(f"https://h/x.tar#{fragment}")


@pytest.mark.parametrize(
    "url",
    [
        "", "s3", "s3:/b/k", "file:///etc/passwd", "ftp://h/x.tar", "//h/x.tar", "C:\\x", "org/name", "gs://b/k",
        "s3+http://h/b/k", "https://", "https:///x.tar", "http://h:0/x", "http://h:99999/x", "http://exämple.com/x",
        "http://h_ost!/x", "http://[::1/x.tar", "https://h/a/../b.tar", "https://h/%2e%2e/b.tar", "https://h/./b.tar",
        "s3://h:x/b/k.tar", "s3://h!/b/k.tar", "s3:///b b/k.tar", "s3:///../k.tar", "s3:///b/../k.tar", "s3:///b/./k.tar",
        "s3:///b/k.tar?versionId=1", "s3:///b/" + "k" * 1025, "s3:///b/a\nb.tar", "s3:///b/a\x00b.tar", "https://h/\ud800",
        "https://h/" + "x" * 9000, f"s3:///b/folder/#sha256={SHA}", "s3:///b/folder/#fname=folder",
    ],
)  # fmt: skip
def test_what_is_no_such_url_is_refused(url: str) -> None:
    error = refused(url)
    assert "s3:///bucket/key" in error.available


def test_missing_defaults_are_named() -> None:
    assert "AWS_S3_DEFAULT_BUCKET" in refused("s3://", default_bucket="").message
    assert "model id" in refused("s3://", model_id="").message
    assert "AWS_S3_ENDPOINT_URL" in refused("s3://", default_endpoint="ftp://x").message


SECRETS = [
    "https://user:hunter2@h/x.tar?X-Amz-Signature=hunter2",
    "https://hunter2@h/x.tar",
    "https://h/x.tar?token=hunter2#fname=a.tar",
]
BAD_SECRETS = [
    "s3://AKIA:hunter2@host/b/k.tar", "http+s3://AKIA:hun/ter2@host/b/k.tar", "https://user:hunter2@/x.tar",
    "https://user:abc/hunter2@h!/x.tar", "ftp://user:hunter2@h/x", "s3:///b/k.tar?X-Amz-Signature=hunter2",
    "https://u:hunter2@h:x/", "https://h!/x.tar?token=hunter2", "user:hunter2@h/x", "https://h/x.tar#token=hunter2",
    "https://u:hunter2@h/a/../b", "https://u:\nhunter2@h/",
]  # fmt: skip


@pytest.mark.parametrize("url", SECRETS)
def test_secrets_do_not_show(url: str) -> None:
    found = parse(url)
    assert "hunter2" not in f"{found} {found!r} {[found]}"
    assert str(found).startswith("https://h/x.tar")


@pytest.mark.parametrize("url", BAD_SECRETS)
def test_secrets_do_not_show_in_errors(url: str) -> None:
    error = refused(url)
    assert "hunter2" not in f"{error} {error.body()} {error.__cause__}"
    assert "ter2" not in f"{error.body()}"


def test_user_and_password_become_a_header() -> None:
    found = parse("https://Aladdin:open%20sesame@h/x.tar")
    assert found.authorization == "Basic QWxhZGRpbjpvcGVuIHNlc2FtZQ=="  # RFC 7617 §2
    assert found.url == "https://h/x.tar"
    assert parse("https://h/x.tar").authorization is None


SAME = [
    ["s3://", "s3:///models", "s3:////models--org--name.tar.zst", "http+s3://minio:9000/models/models--org--name.tar.zst"],
    ["s3://h/b/k.tar", "https+s3://H:443/b/k.tar", "s3://h./b/k.tar"],
    ["s3:///b/folder", "s3:///b/folder/"],
    ["https://h/a%7eb.tar", "https://h/a~b.tar", "HTTPS://H:443/a~b.tar", "https://u:p@h/a~b.tar", "https://h/a~b.tar#fname=c.tar"],
    ["https://h/a b.tar", "https://h/a%20b.tar"],
    ["https://h/a%2fb.tar", "https://h/a%2Fb.tar"],
    ["https://h/x.tar?v=1", "https://h/x.tar?v=1&X-Amz-Date=1&X-Amz-Signature=2", "https://h/x.tar?X-Amz-Signature=3&v=1"],
    ["https://h/x.tar?Signature=1&Expires=2&AWSAccessKeyId=3", "https://h/x.tar", "https://h/x.tar?"],
    ["https://h/y.tar?sv=1&se=2&sp=r&sig=3", "https://h/y.tar?sv=1&se=9&sp=r&sig=8"],
    ["s3://s3.amazonaws.com/b/k.tar", "s3://s3.us-west-2.amazonaws.com/b/k.tar", "s3://s3.dualstack.eu-west-1.amazonaws.com/b/k.tar"],
    ["https://huggingface.co/o/n/blob/main/a/x.ckpt", "https://huggingface.co/o/n/resolve/main/a/x.ckpt"],
    # each of these alone: different from all others
    ["https://h/a%2Fb/c.tar"], ["https://h/a/b/c.tar"], ["http://h/x.tar"], ["https://h/x.tar?v=2"], ["https://h/x.tar?expires=1"],
    ["https://h/x.tar?sp=r"], ["https://h/X.tar"], ["https://h:8443/x.tar"], ["s3://h/b/K.tar"], ["http+s3://h/b/k.tar"],
    ["s3://h/B/k.tar"], ["s3://h/b/folder.tar/"], ["s3://h/b/folder.tar"], ["s3:///b/folder2/"], ["https://h/a%252Fb.tar"],
]  # fmt: skip


def test_identity_is_shared_by_those_that_mean_the_same_and_by_no_others() -> None:
    identities = [{parse(url).identity for url in urls} for urls in SAME]
    assert [len(found) for found in identities] == [1] * len(SAME)
    assert len(set.union(*identities)) == len(SAME)


def test_without_an_endpoint_it_is_aws() -> None:
    assert (
        parse("s3:///b/k.tar", default_endpoint="").identity
        == parse("s3://s3.eu-west-3.amazonaws.com/b/k.tar").identity
    )


hosts = st.from_regex(r"[a-z0-9]([a-z0-9-]{0,20}[a-z0-9])?(\.[a-z]{2,5})?(:[1-9][0-9]{3})?", fullmatch=True)
buckets = st.from_regex(r"[a-z0-9][a-z0-9-]{2,30}", fullmatch=True)
part = st.text(
    st.characters(codec="utf-8", exclude_categories=("Cc", "Cs"), exclude_characters="/#?"), min_size=1, max_size=30
)
keys = (
    st.lists(part.filter(lambda p: p.strip() == p and p not in (".", "..")), min_size=1, max_size=4).map("/".join)
    .flatmap(lambda key: st.sampled_from(["", "/", ".tar.zst", ".tar", ".tgz", ".safetensors", ".ckpt"]).map(key.__add__))
)  # fmt: skip


@given(st.sampled_from(["s3", "http+s3", "https+s3"]), hosts, buckets, keys)
def test_what_is_shown_reads_back_as_the_same(scheme: str, host: str, bucket: str, key: str) -> None:
    found = parse(f"{scheme}://{host}/{bucket}/{key}")
    assert found.bucket == bucket
    assert found.key in (key, key + "/")
    assert parse(str(found)) == found
    assert parse(str(found)).identity == found.identity


@given(hosts, keys)
def test_http_urls_are_ascii_and_normal_forms_are_stable(host: str, key: str) -> None:
    found = parse(f"https://{host}/{key}")
    assert found.url.isascii()
    assert " " not in found.url
    assert parse(found.url) == found
    assert is_safe_name(found.filename)


@given(st.text(max_size=60))
def test_any_text_is_a_location_or_a_refusal(text: str) -> None:
    for url in (text, "s3://" + text, "https://" + text, "https://h/x#" + text):
        try:
            found = parse(url)
        except ApiError as error:
            assert error.code == "INVALID_INPUTS"
        else:
            assert is_safe_name(found.filename)
            assert ".." not in found.key.split("/")


@given(st.text(st.characters(min_codepoint=97, max_codepoint=122), min_size=12, max_size=20), st.text(max_size=20))
def test_no_password_shows_wherever_the_url_breaks(password: str, rest: str) -> None:
    for url in (f"https://u:{password}@{rest}", f"s3://u:{password}@{rest}", f"u:{password}@{rest}"):
        try:
            shown = f"{parse(url)!r}"
        except ApiError as error:
            shown = f"{error} {error.body()}"
        assert password not in shown.replace(rest, "")
