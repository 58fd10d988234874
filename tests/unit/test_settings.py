from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path

import pytest

from api.settings import Settings, SettingsError

ROOT = Path(__file__).resolve().parents[2]


def test_defaults_come_without_an_environment() -> None:
    assert Settings.from_env({}).model_id == "demo/shapes"


def test_values_are_typed() -> None:
    settings = Settings.from_env(
        {"PORT": "81", "MAX_BODY": "1.5MiB", "LEGACY_STATUS": "true", "WARM_MODELS": "a/b, c/d,"}
    )
    assert (settings.port, settings.max_body, settings.legacy_status) == (81, 1572864, True)
    assert settings.warm_models == ("a/b", "c/d")


def test_every_fault_is_named_at_once() -> None:
    with pytest.raises(SettingsError) as fault:
        Settings.from_env({"PORT": "eighty", "MAX_STEPS": "0", "LOG_FORMAT": "xml"})
    for name in ("PORT", "MAX_STEPS", "LOG_FORMAT"):
        assert name in str(fault.value)


def test_env_example_lists_every_variable_with_its_default_and_meaning() -> None:
    lines = [line for line in (ROOT / ".env.example").read_text().splitlines() if line and not line.startswith("# ---")]
    listed = dict(zip(lines[1::2], lines[0::2], strict=True))
    expected = {
        f"# {f.metadata['name']}={f.metadata['default']}": f"# {f.metadata['meaning']}" for f in fields(Settings)
    }
    assert listed == expected


def test_every_variable_is_used_somewhere() -> None:
    sources = "\n".join(p.read_text() for p in (ROOT / "api").rglob("*.py") if p.name != "settings.py")
    unused = [f.name for f in fields(Settings) if f"settings.{f.name}" not in sources]
    assert unused == []


def test_the_image_has_the_same_defaults() -> None:
    """An image's ENV hides the default here; an empty RUNTIME_DOWNLOADS would even mean another thing."""
    defaults = {f.metadata["name"]: f.metadata["default"] for f in fields(Settings)}
    text = (ROOT / "Dockerfile").read_text()
    arguments = [
        found
        for found in re.findall(r"^ARG (\w+)=(.*)$", text, re.M)
        if found[0] not in ("PYTHON_IMAGE", "RUN_AS", "COMPILER")
    ]
    assert len(arguments) > 20
    assert [found for found in arguments if defaults[found[0]] != found[1]] == []
    baked = set(re.findall(r"(\w+)=\$\{\1\}", text))
    assert baked == {name for name, _ in arguments} - {"HF_ENDPOINT"}
