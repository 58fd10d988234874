"""Requests that mean the same files share a folder, and no others do."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from api.models.keys import HubFiles, LocatedFiles, is_key, model_key
from api.models.locations import Location, parse_location

C1, C2, C64 = "0" * 39 + "1", "0" * 39 + "2", "f" * 64
SHA = "a" * 64


def at(url: str) -> Location:
    return parse_location(url, default_endpoint="http://minio:9000", default_bucket="models", model_id="org/name")


# Folders on volumes have these names: changing one orphans what is installed there.
PINNED = [
    (HubFiles("org/name", C1), "org--name@d82390cfaea88aeff9d7"),
    (HubFiles("org/name", C1, "fp16"), "org--name@59d4e8536f2d4d95202e-fp16"),
    (
        HubFiles("stabilityai/stable-diffusion-xl-base-1.0", C64, "bf16"),
        "stabilityai--stable-diffusion-xl-base-1.0@4b828012f7ec916514df-bf16",
    ),
    (LocatedFiles(at("s3://")), "org--name@1f8a2796a39996bc2065"),
    (LocatedFiles(at("s3:///b/my model/"), variant="fp16"), "my-model@b21d5880bccfd4cc8936-fp16"),
    (LocatedFiles(at("s3:///b/x.tar.zst"), version='"abc-2"'), "x@4d0a23fafd0e696780f2"),
    (LocatedFiles(at("https://h/d/Model%20V1.safetensors")), "model-v1@699d9ecf2460b5794ee6"),
    (LocatedFiles(at("https://h/m.ckpt"), config_version="family:sd1"), "m@cd013136301a387c1a3f"),
]


@pytest.mark.parametrize(("files", "key"), PINNED)
def test_names_stay_what_they_are(files: HubFiles | LocatedFiles, key: str) -> None:
    assert model_key(files) == key


SAME: list[list[HubFiles | LocatedFiles]] = [
    [HubFiles("org/name", C1)],
    [HubFiles("org/name", C1, "fp16")],
    [HubFiles("org/name", C1, "bf16")],
    [HubFiles("org/name", C2)],
    [HubFiles("Org/name", C1)],
    [HubFiles("org-name", C1)],
    # the defaults, credentials and signatures of a request do not count
    [LocatedFiles(at("s3://")), LocatedFiles(at("http+s3://minio:9000/models/models--org--name.tar.zst"))],
    # a variant of an archive or a checkpoint is the same file, cast on load
    [LocatedFiles(at("s3:///b/x.tar")), LocatedFiles(at("s3:///b/x.tar"), variant="fp16")],
    [LocatedFiles(at("s3:///b/x.ckpt")), LocatedFiles(at("s3:///b/x.ckpt"), variant="bf16")],
    [LocatedFiles(at("s3:///b/x/")), LocatedFiles(at("s3:///b/x"))],
    [LocatedFiles(at("s3:///b/x/"), variant="fp16")],
    [LocatedFiles(at("s3:///b/x.tar"), '"e1"'), LocatedFiles(at("s3:///b/x.tar"), "e1"), LocatedFiles(at("s3:///b/x.tar"), 'W/"e1"')],
    [LocatedFiles(at("s3:///b/x.tar"), '"e2"')],
    [
        LocatedFiles(at(f"s3:///b/x.tar#sha256={SHA}")),
        LocatedFiles(at(f"s3:///b/x.tar#sha256={SHA.upper()}"), "e1"),
        LocatedFiles(at("s3:///b/x.tar"), f"sha256:{SHA}"),
    ],
    [LocatedFiles(at("https://h/x.ckpt?Signature=1&Expires=1")), LocatedFiles(at("https://u:p@h/x.ckpt"))],
    [LocatedFiles(at("https://h/x.ckpt"), config_version="family:sd1")],
    [LocatedFiles(at("https://h/x.ckpt"), config_version="family:sd2")],
    [LocatedFiles(at("https://h/x.ckpt?v=2"))],
    # what the file is called here does not count, what it is taken for does
    [LocatedFiles(at("https://h/1#fname=a.ckpt")), LocatedFiles(at("https://h/1#fname=b.safetensors"))],
    [LocatedFiles(at("https://h/1#fname=a.tar"))],
]  # fmt: skip


def test_those_that_mean_the_same_share_a_key_and_no_others() -> None:
    keys = [{model_key(files) for files in group} for group in SAME]
    assert [len(found) for found in keys] == [1] * len(SAME)
    assert len(set.union(*keys)) == len(SAME)


def test_keys_differ_on_a_file_system_that_ignores_case() -> None:
    assert model_key(HubFiles("Org/Name", C1)).lower() != model_key(HubFiles("org/name", C1)).lower()


@pytest.mark.parametrize("commit", ["main", "", C1[:12], C1.upper().replace("0", "A"), C1 + "0", C1 + "\n"])
def test_what_is_not_a_full_commit_has_no_key(commit: str) -> None:
    with pytest.raises(ValueError, match="commit"):
        model_key(HubFiles("org/name", commit))


def test_an_unknown_variant_has_no_key() -> None:
    with pytest.raises(ValueError, match="variant"):
        model_key(HubFiles("org/name", C1, "fp32"))


def test_no_secret_is_in_a_key() -> None:
    assert "hunter" not in model_key(LocatedFiles(at("https://h/hub?token=hunter2")))


@pytest.mark.parametrize(
    "name", ["", "org--name", "org--name@12", "../x@" + "0" * 20, "A@" + "0" * 20, "a@" + "0" * 20 + "\n"]
)
def test_other_folders_are_not_taken_for_keys(name: str) -> None:
    assert not is_key(name)


names = st.text(min_size=1, max_size=300)
hub = st.builds(HubFiles, names, st.from_regex(r"[0-9a-f]{40}", fullmatch=True), st.sampled_from(["", "fp16", "bf16"]))
locations = st.one_of(
    st.builds(Location, st.just("s3"), st.sampled_from(["prefix", "archive", "checkpoint"]), st.just("https://h"), names, names),
    st.builds(Location, st.just("http"), st.sampled_from(["prefix", "archive", "checkpoint"]), url=names.map("https://h/".__add__)),
)  # fmt: skip
versions = st.text(st.characters(exclude_categories=("Cs",), exclude_characters='"'), max_size=40)
located = st.builds(LocatedFiles, locations, versions, st.sampled_from(["", "fp16", "bf16"]), versions)
everything = st.one_of(hub, located)


def meaning(files: HubFiles | LocatedFiles) -> tuple[object, ...]:
    """What a key stands for, written down another way than in the code."""
    if isinstance(files, HubFiles):
        return ("hub", files.repo, files.commit, files.variant)
    where = files.location
    stated = files.version.strip().removeprefix("W/").strip('"')
    config = files.config_version if where.kind == "checkpoint" else None
    return ("url", where.identity, stated, files.variant if where.kind == "prefix" else "", config)


@given(st.lists(everything, min_size=2, max_size=8))
def test_a_key_says_as_much_as_its_meaning(sources: list[HubFiles | LocatedFiles]) -> None:
    for one, other in itertools.combinations(sources, 2):
        assert (model_key(one) == model_key(other)) == (meaning(one) == meaning(other))


@given(everything)
def test_keys_are_safe_names_and_stable(files: HubFiles | LocatedFiles) -> None:
    key = model_key(files)
    assert is_key(key)
    assert key == key.lower() == model_key(files)
    assert key.isascii()
    assert len(key) <= 126
    assert ".." not in key
    assert not key.startswith((".", "-"))


@given(names, names, names, names)
def test_parts_do_not_run_into_each_other(a: str, b: str, c: str, d: str) -> None:
    one = LocatedFiles(Location("s3", "archive", "https://h", a, b))
    other = LocatedFiles(Location("s3", "archive", "https://h", c, d))
    assert (model_key(one) == model_key(other)) == ((a, b) == (c, d))
