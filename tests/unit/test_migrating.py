"""docs/migrating.md says what the code does."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path

from api.errors import CODES
from api.service.options import LATER, OPTIONS
from api.settings import Settings

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "docs" / "migrating.md").read_text()
SETTINGS = {f.metadata["name"] for f in fields(Settings)}
THEIRS = {
    "MODEL_ID", "HF_MODEL_ID", "MODEL_REVISION", "MODEL_PRECISION", "MODEL_URL", "CHECKPOINT_URL",
    "CHECKPOINT_CONFIG_URL", "PIPELINE", "SCHEDULER", "safety_checker", "is_url", "custom_pipeline_method",
    "compel_prompts", "textual_inversions", "lora_weights", "xformers_memory_efficient_attention", "image_format",
    "streamEvents", "startRequestId", "SEND_URL", "SIGN_KEY", "use_extra", "FILL_MODE", "train", "dest_url",
}  # fmt: skip
"""Every ``callInputs`` that docker-diffusers-api 1.x reads (api/app.py, api/train_dreambooth.py)."""


def rows(heading: str) -> list[tuple[list[str], str]]:
    """Names in the first cell of each row of a section's table, and the second cell."""
    section = TEXT.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    cells = [re.split(r"(?<!\\)\|", line)[1:-1] for line in section.splitlines() if line.startswith("| ")]
    return [(re.findall(r"`([^`]+)`", first), rest[0].strip()) for first, *rest in cells[2:]]


def test_variables_that_stay_are_settings_and_those_that_are_gone_are_not() -> None:
    found = rows("Environment")
    assert len(found) > 6
    for names, now in found:
        if now.startswith("gone"):
            assert not SETTINGS & set(names)
        elif now.startswith("the same"):
            assert set(names) <= SETTINGS
        else:
            assert not SETTINGS & set(names)
    named = {name for _, now in found for name in re.findall(r"`([A-Z_]+)`", now)}
    assert named <= SETTINGS


def test_every_option_of_theirs_is_taken_or_said_to_be_refused() -> None:
    assert set(OPTIONS) | set(LATER) >= THEIRS
    refused = {name for names, now in rows("What requests may say") if "`NOT_SUPPORTED`" in now for name in names}
    assert {name for name in LATER if name in THEIRS} <= refused


def test_codes_have_the_statuses_that_are_said() -> None:
    told = re.findall(r"(\d{3}) `([A-Z_]+)`", TEXT)
    assert len(told) > 6
    assert [(status, code) for status, code in told if CODES.get(code, (0,))[0] != int(status)] == []
