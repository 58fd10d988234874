from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import diffusers

from api.schema.catalogue import catalogue, nearest

ROOT = Path(__file__).resolve().parents[2]


def test_the_catalogue_is_that_of_the_installed_diffusers() -> None:
    check = subprocess.run(
        [sys.executable, ROOT / "scripts" / "make-catalogue", "--check"], capture_output=True, text=True, check=False
    )
    assert check.returncode == 0, check.stderr[-300:] + " run scripts/make-catalogue"
    assert catalogue().diffusers == diffusers.__version__


def test_tasks_of_a_model() -> None:
    tasks = catalogue().tasks_of("StableDiffusionPipeline")
    assert tasks["inpaint"] == "StableDiffusionInpaintPipeline"
    assert catalogue().tasks_of("NoSuchPipeline") == {}


def test_nearest_suggests_only_what_is_near() -> None:
    assert nearest("num_inferense_steps", ["num_inference_steps", "prompt"]) == ' Did you mean "num_inference_steps"?'
    assert nearest("zzzz", ["prompt"]) == ""
