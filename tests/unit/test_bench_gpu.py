"""``scripts/bench gpu``: the same code at tiny size on a CPU, and what it makes of its rows."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

from scripts.benchmarks.gpu import latency, verdicts
from scripts.benchmarks.gpu.bench import Bench
from scripts.benchmarks.gpu.rows import Row, Table, finite
from scripts.benchmarks.gpu.variants import VARIANTS, Variant, is_in_use, missing, usable
from tests.running import ROOT

GPU = {"date": "today", "device": "cuda:0", "size": "real", "card": "a card", "driver": "1", "versions": "2"}


def row(what: str, ratio: float, *, lossy: bool = False) -> Row:
    return Row(latency.SECTION, what, 1.0, "ms", ratio, "plain", ratio, lossy=lossy)


def test_a_verdict_is_that_of_the_best_lossless_row() -> None:
    rows = [row("SDXL, as it is", 1.1), row("SDXL, COMPILE", 1.3), row("SDXL, QUANTIZE", 2.0, lossy=True)]
    table = Table(GPU, [*rows, row("SD 1.5, as it is", 1.4)])
    found = {each.what.partition(",")[0]: each for each in verdicts.judge(table)}
    assert (found["SDXL"].ratio, found["SDXL"].met) == (1.3, True)
    assert (found["SD 1.5"].ratio, found["SD 1.5"].met) == (1.4, False)
    assert any("memory" in each for each in table.left_out)


@pytest.mark.parametrize("changed", [{"device": "cpu"}, {"size": "tiny"}])
def test_there_are_no_verdicts_but_on_a_gpu_at_real_sizes(changed: dict[str, str]) -> None:
    table = Table({**GPU, **changed}, [row("SDXL, as it is", 9.0), row("SD 1.5, as it is", 9.0)])
    assert verdicts.judge(table) == []
    assert "NOT figures of a GPU" in table.markdown()
    assert "NOT figures" not in Table(GPU).markdown()


def test_what_is_no_number_is_noticed() -> None:
    assert finite([row("a", 1.0)])
    assert not finite([row("a", 1.0), row("b", math.nan)])


def test_an_option_that_this_version_does_not_have_is_left_out() -> None:
    assert "no BREW" in missing(Variant("BREW=tea", {"BREW": "tea"}, cpu=True), on_cuda=True)
    assert "no brew" in missing(Variant("brew", request={"brew": "tea"}, cpu=True), on_cuda=True)
    assert "not installed" in missing(Variant("a", needs=("no_such_module",), cpu=True), on_cuda=True)
    assert "needs a GPU" in missing(Variant("a"), on_cuda=False)
    assert missing(Variant("a", cpu=True), on_cuda=False) == ""
    assert len({each.name for each in VARIANTS}) == len(VARIANTS)


def test_an_option_is_measured_where_it_can_be_had_and_was_in_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("scripts.benchmarks.gpu.variants.missing", lambda variant, on_cuda: "")
    bench, lossy = Bench("cpu", "tiny", 1.0, Table({})), {}
    for family in ("sd1", "sdxl", "flux"):
        lossy[family] = [each for each in usable(bench, family) if "step_cache" in each.request]
    assert [family for family, found in lossy.items() if found] == ["flux"]  # UNets refuse it
    case = bench.case("sd1")
    flash = next(each for each in VARIANTS if each.name == "ATTENTION=flash")
    assert is_in_use(bench, flash, case, {"numerics": "cuda/float16/flash/eager"})
    assert not is_in_use(bench, flash, case, {"numerics": "cuda/float16/sdpa/eager"})
    assert any("flash, tiny SD 1.5" in line for line in bench.table.left_out)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_whole_of_it_at_tiny_size(tmp_path: Path) -> None:
    out, figures = tmp_path / "table.md", tmp_path / "table.json"
    command = [sys.executable, "-m", "scripts.benchmarks", "gpu", "--device", "cpu", "--size", "tiny", "--rounds", "1"]
    env = {**os.environ, "BENCH_MODELS": str(tmp_path / "models")}
    done = subprocess.run(
        [*command, "--limit", "1700", "--out", str(out), "--json", str(figures)], cwd=ROOT, env=env, timeout=1750,
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    found = json.loads(figures.read_text())
    assert (done.returncode, found["failed"]) == (0, []), done.stderr[-2000:]
    sections = {each["section"] for each in found["rows"]}
    expected = {
        "latency",
        "placements",
        "batching",
        "load and switch",
        "error of a denoiser step",
        "FLUX-schnell",
        "tail",
    }
    assert expected <= sections
    for each in found["rows"]:
        assert all(math.isfinite(each[name]) for name in ("ours", "baseline", "ratio") if each[name] is not None), each
        assert each["ours"] >= 0
        if (
            each["section"] == "placements"
            or "step, as it is" in f"{each['section']}, {each['what'].partition(', ')[2]}"
        ):
            assert each["met"], each
    assert "NOT figures of a GPU" in out.read_text()
    assert not found["real"]
