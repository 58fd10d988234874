"""Names of parts, and which files of a repository they mean."""

from __future__ import annotations

import pytest

from api.errors import ApiError
from api.models.keys import HubFiles, model_key
from api.models.part_refs import read_part, repeated
from api.models.refs import SourceRef
from api.models.select import select_part
from api.settings import Settings

SETTINGS = Settings.from_env({"AWS_S3_DEFAULT_BUCKET": "mine"})
SHA = "a" * 64
NET = ("config.json", "diffusion_pytorch_model.safetensors")
HALF = "diffusion_pytorch_model.fp16.safetensors"


@pytest.mark.parametrize(
    ("text", "repo", "part", "revision", "again"),
    [
        ("org/net", "org/net", ".", "", "org/net#revision=r"),
        (" org/net#revision=refs/pr/1 ", "org/net", ".", "refs/pr/1", "org/net#revision=r"),
        ("org/net/a/b/", "org/net", "a/b", "", "org/net/a/b#revision=r"),
        ("net", "net", ".", "", "net#revision=r"),
        ("s3:///bucket/net", "net", ".", "", "s3:///bucket/net/"),
        ("s3:////net/", "net", ".", "", "s3:///mine/net/"),
        (
            f"https://host/x/net.tar.zst?sig=1#sha256={SHA}",
            "net",
            ".",
            "",
            f"https://host/x/net.tar.zst?…#sha256={SHA}",
        ),
        ("https://host/get#fname=net.tar", "net", ".", "", "https://host/get#fname=net.tar"),
    ],
)
def test_folders(text: str, repo: str, part: str, revision: str, again: str) -> None:
    ref = read_part(text, "f", SETTINGS, "fp16")
    source = ref.source
    assert (source.repo, source.part, source.revision, source.precision) == (repo, part, revision, "fp16")
    assert repeated(ref, "r") == again
    assert not source.trusted


def test_files_and_what_is_said_of_them() -> None:
    ref = read_part("o/r/models/a.safetensors#scale=0.5&revision=v1", "f", SETTINGS, "", known=("scale",), single=True)
    assert (ref.source.part, ref.source.revision, ref.said) == ("models/a.safetensors", "v1", {"scale": "0.5"})
    assert repeated(ref, "r") == "o/r/models/a.safetensors#revision=r&scale=0.5"
    ref = read_part("https://h/get?id=1#fname=a.safetensors&scale=2", "f", SETTINGS, "", known=("scale",), single=True)
    assert (ref.source.part, ref.said) == ("a.safetensors", {"scale": "2"})
    assert read_part(repeated(ref, "r").replace("…", "id=1"), "f", SETTINGS, "", known=("scale",), single=True) == ref


@pytest.mark.parametrize(
    ("text", "single", "said"),
    [
        ("", False, "model id"),
        ("../net", False, "model id"),
        ("org/net/../../x", False, "path"),
        ("org/net/a\\b", False, "path"),
        ("org/net#", False, None),
        ("org/net#scale=1", False, "revision="),
        ("org/net#revision=a&revision=b", False, "once"),
        ("org/net#revision=a..b", False, "branch"),
        ("org/net/a.safetensors", False, "folder"),
        ("org/net/a", True, ".safetensors"),
        ("https://host/a.safetensors", False, "archive"),
        ("https://host/folder/", False, "archive"),
        ("https://host/a.ckpt", True, ".safetensors"),
        ("ftp://host/a.tar", False, "forms"),
        ("s3:////a.safetensors#revision=1", True, "fname="),
    ],
)
def test_what_is_no_name(text: str, single: bool, said: str | None) -> None:
    if said is None:
        assert read_part(text, "f", SETTINGS, "", single=single).source.part == "."
        return
    with pytest.raises(ApiError, match=said) as caught:
        read_part(text, "f", SETTINGS, "", single=single)
    assert (caught.value.code, caught.value.field) == ("INVALID_INPUTS", "f")


def test_more_than_there_are_names() -> None:
    with pytest.raises(ApiError, match="each once"):
        read_part("o/r#" + "&".join("abcdefghij"), "f", SETTINGS, "")


def test_credentials_are_not_told() -> None:
    with pytest.raises(ApiError) as caught:
        read_part("https://me:pa55word@host/folder/?token=s3cr3t", "f", SETTINGS, "")
    assert "pa55word" not in str(caught.value.body()) and "s3cr3t" not in str(caught.value.body())


def test_a_part_is_another_thing_than_the_pipeline_of_that_name() -> None:
    """In records and on the volume; refs to pipelines are called as ever."""
    whole = SourceRef("o/r", "o/r")
    parts = [SourceRef("o/r", "o/r", part=part) for part in (".", "a", "a.safetensors")]
    assert len({whole.name, *(part.name for part in parts)}) == 4
    keys = {model_key(HubFiles("o/r", "0" * 40, "", part)) for part in ("", ".", "a")}
    assert len(keys) == 3


@pytest.mark.parametrize(
    ("names", "part", "precision", "files", "variant"),
    [
        (NET, ".", "", NET, ""),
        ((*NET, HALF, "README.md", "a.png", "diffusion_pytorch_model.bin"), ".", "", NET, ""),
        ((*NET, HALF), ".", "fp16", ("config.json", HALF), "fp16"),
        ((*NET, HALF), ".", "bf16", NET, ""),
        (NET, ".", "fp16", NET, ""),
        ((*NET, *(f"in/{name}" for name in NET)), "in", "", tuple(f"in/{name}" for name in NET), ""),
        (("a.safetensors", "b.safetensors"), "b.safetensors", "fp16", ("b.safetensors",), ""),
    ],
)  # fmt: skip
def test_the_files_of_a_part(
    names: tuple[str, ...], part: str, precision: str, files: tuple[str, ...], variant: str
) -> None:
    chosen = select_part(names, part, precision)
    assert (chosen.files, chosen.variant, chosen.needs_conversion) == (tuple(sorted(files)), variant, False)


def test_pickles_are_converted() -> None:
    assert select_part(["config.json", "diffusion_pytorch_model.bin"], ".", "").needs_conversion


@pytest.mark.parametrize(
    ("names", "part", "said"),
    [
        (["model_index.json", "unet/config.json"], ".", "MODEL_ID"),
        (NET, "in", "in/config.json"),
        (["config.json"], ".", "no safetensors"),
        (["config.json", "model.onnx"], ".", "only .onnx"),
        (["config.json", "model-00001-of-00002.safetensors"], ".", "not all of them"),
        (["a.safetensors"], "b.safetensors", "no file b.safetensors"),
    ],
)
def test_what_is_no_part(names: tuple[str, ...], part: str, said: str) -> None:
    with pytest.raises(ApiError, match=said) as caught:
        select_part(names, part, "")
    assert caught.value.code == "MODEL_BROKEN"


def test_a_precision_that_there_is_not_is_told_with_those_that_there_are() -> None:
    with pytest.raises(ApiError) as caught:
        select_part(["config.json", HALF], ".", "")
    assert caught.value.available == ["fp16"]
