"""The table of bytes is true to the architectures, and docs/speed.md has it as it is printed."""

from __future__ import annotations

import pytest

from scripts.benchmarks.gpu.sizes import Sizes, choice, tables
from tests.running import ROOT


@pytest.mark.slow
def test_the_docs_have_the_table_as_it_is_printed() -> None:
    lines = tables()
    page = (ROOT / "docs" / "speed.md").read_text()
    assert all(line in page for line in lines), [line for line in lines if line not in page]
    # what is published: 0.86 + 0.12 + 0.08, 2.57 + 0.69 + 0.12 + 0.08, 11.90 + 4.76 + 0.12 + 0.08 billion
    for model, parameters in (("SD 1.5", "1.07"), ("SDXL", "3.47"), ("FLUX.1", "16.86")):
        assert any(line.startswith(f"| {model} | 16 bits | {parameters} × 10⁹") for line in lines)


def test_what_fits_on_a_card() -> None:
    exact = Sizes("m", "16 bits", 1, {"full": 20e9, "model": 10e9, "sequential": 1e9})
    half = Sizes("m", "fp8, int8", 1, {"full": 11e9})
    quarter = Sizes("m", "nf4", 1, {"full": 6e9})
    assert choice([exact, half, quarter], 80) == "as it is"
    assert choice([exact, half, quarter], 16) == "`OFFLOAD=model`; or lossily fp8, int8"
    assert choice([exact, half, quarter], 8) == "`OFFLOAD=sequential`; or lossily nf4"
    assert choice([exact, half], 8) == "`OFFLOAD=sequential`"
    assert choice([exact, half, quarter], 1) == "not at all"
