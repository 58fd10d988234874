"""What a request names: defaults, overrides, and when two requests mean the same."""

from __future__ import annotations

from typing import Any

import pytest

from api.errors import ApiError
from api.models.refs import SourceRef, read_ref
from api.settings import Settings

DEFAULTS = {
    "MODEL_ID": "org/default",
    "HF_MODEL_ID": "hub/default",
    "MODEL_REVISION": "v1",
    "MODEL_URL": "s3://",
    "MODEL_PRECISION": "fp16",
    "AWS_S3_DEFAULT_BUCKET": "bucket",
    "AWS_S3_ENDPOINT_URL": "https://store.example",
}


def read(environ: dict[str, str] | None = None, **options: Any) -> SourceRef:
    ref = read_ref(options, Settings.from_env(DEFAULTS if environ is None else environ))
    assert ref is not None
    return ref


def test_what_is_left_out_comes_from_the_environment() -> None:
    ref = read()
    assert (ref.model_id, ref.repo, ref.revision, ref.precision) == ("org/default", "hub/default", "v1", "fp16")
    assert str(ref.url) == "s3://store.example/bucket/models--org--default--v1.tar.zst"
    assert ref.trusted
    assert read(MODEL_ID="org/default") == ref


def test_the_environment_says_nothing_about_another_model() -> None:
    ref = read(MODEL_ID="org/other")
    assert (ref.repo, ref.revision, ref.url, ref.trusted) == ("org/other", "", None, False)
    assert ref.precision == "fp16"  # MODEL_PRECISION is of every request that names none


def test_a_configuration_that_a_request_names_is_not_the_operators() -> None:
    environ = {"MODEL_ID": "a/b", "CHECKPOINT_URL": "https://h/x.ckpt", "CHECKPOINT_CONFIG_URL": "https://h/x.yaml"}
    assert read(environ).config_trusted
    named = read(environ, CHECKPOINT_CONFIG_URL="http://127.0.0.1/x.yaml")
    assert (named.trusted, named.config_trusted) == (True, False)


def test_a_request_with_a_source_of_its_own_takes_no_other() -> None:
    ref = read(MODEL_ID="org/default", CHECKPOINT_URL="https://h/x.safetensors")
    assert (ref.url, ref.repo, ref.revision, ref.trusted) == (None, "org/default", "", False)


@pytest.mark.parametrize(
    ("options", "model_id"),
    [
        ({"CHECKPOINT_URL": "https://h/v1-5 pruned.safetensors"}, "v1-5-pruned"),
        ({"MODEL_URL": "s3:///b/models--org--name.tar.zst"}, "org/name"),
        ({"MODEL_URL": "s3:///b/models--org--name/"}, "org/name"),
        ({"MODEL_URL": "https://h/1#fname=anime.tar.gz"}, "anime"),
        ({"MODEL_URL": "https://h/--.tar"}, "model"),
        ({"HF_MODEL_ID": "org/name"}, "org/name"),
        ({"MODEL_ID": "mine", "HF_MODEL_ID": "org/name"}, "mine"),
    ],
)
def test_a_model_without_an_id_is_called_after_its_source(options: dict[str, str], model_id: str) -> None:
    assert read({}, **options).model_id == model_id


def test_no_name_at_all() -> None:
    assert read_ref({}, Settings.from_env({"MODEL_ID": ""})) is None


SAME = [
    ({"MODEL_ID": "a/b"}, {"MODEL_ID": "a/b", "HF_MODEL_ID": "a/b"}),
    ({"MODEL_ID": "a/b"}, {"MODEL_ID": "a/b", "MODEL_PRECISION": "fp32"}),
    ({"MODEL_URL": "https://h/x.tar?X-Amz-Signature=1"}, {"MODEL_URL": "https://h/x.tar?X-Amz-Signature=2"}),
]
OTHER = [
    ({"MODEL_ID": "a/b"}, {"MODEL_ID": "a/c"}),
    # the same files, but what a local folder of that name says is about one of them only
    ({"MODEL_ID": "a/b"}, {"MODEL_ID": "x/y", "HF_MODEL_ID": "a/b"}),
    ({"MODEL_ID": "a/b"}, {"MODEL_ID": "a/b", "MODEL_REVISION": "main"}),
    ({"MODEL_ID": "a/b"}, {"MODEL_ID": "a/b", "MODEL_PRECISION": "fp16"}),
    ({"MODEL_ID": "a/b", "MODEL_PRECISION": "bf16"}, {"MODEL_ID": "a/b", "MODEL_PRECISION": "fp16"}),
    ({"MODEL_ID": "a/b"}, {"MODEL_ID": "a/b", "MODEL_URL": "https://h/x.tar"}),
    ({"MODEL_URL": "https://h/x.tar?v=1"}, {"MODEL_URL": "https://h/x.tar?v=2"}),
    ({"MODEL_URL": "https://h/x.tar"}, {"MODEL_URL": f"https://h/x.tar#sha256={'0' * 64}"}),
    ({"MODEL_URL": "https://h/x.ckpt"}, {"CHECKPOINT_URL": "https://h/x.ckpt"}),
    (
        {"CHECKPOINT_URL": "https://h/x.ckpt", "CHECKPOINT_CONFIG_URL": "sd1"},
        {"CHECKPOINT_URL": "https://h/x.ckpt", "CHECKPOINT_CONFIG_URL": "sd2"},
    ),
]


@pytest.mark.parametrize(("one", "other"), SAME)
def test_one_name_for_what_means_the_same(one: dict[str, str], other: dict[str, str]) -> None:
    assert read({}, **one).name == read({}, **other).name


@pytest.mark.parametrize(("one", "other"), OTHER)
def test_another_name_for_what_means_another(one: dict[str, str], other: dict[str, str]) -> None:
    assert read({}, **one).name != read({}, **other).name


@pytest.mark.parametrize(
    ("field", "options"),
    [
        ("MODEL_ID", {"MODEL_ID": "../x"}),
        ("HF_MODEL_ID", {"HF_MODEL_ID": "a/../b"}),
        ("MODEL_PRECISION", {"MODEL_PRECISION": "fp8"}),
        ("MODEL_REVISION", {"MODEL_ID": "a/b", "MODEL_REVISION": "x/../../../etc"}),
        ("MODEL_REVISION", {"MODEL_ID": "a/b", "MODEL_REVISION": "/etc"}),
        ("MODEL_REVISION", {"MODEL_URL": "https://h/x.tar", "MODEL_REVISION": "../x"}),
        ("MODEL_URL", {"MODEL_URL": "file:///etc/passwd"}),
        ("MODEL_URL", {"MODEL_URL": "https://h/folder/"}),
        ("CHECKPOINT_URL", {"CHECKPOINT_URL": "https://h/x.tar"}),
        ("CHECKPOINT_URL", {"CHECKPOINT_URL": "https://h/x#fname=/etc/x.ckpt"}),
        ("CHECKPOINT_CONFIG_URL", {"MODEL_ID": "a/b", "CHECKPOINT_CONFIG_URL": "sd1"}),
    ],
)
def test_what_cannot_be_meant_is_told_with_its_field(field: str, options: dict[str, str]) -> None:
    with pytest.raises(ApiError) as error:
        read({}, **options)
    assert error.value.code == "INVALID_INPUTS"
    assert error.value.field == f"callInputs.{field}"
