"""What is asked of a GPU, read from the table: only where it was one, at real size."""

from __future__ import annotations

from scripts.benchmarks.gpu import compiled, errors, latency, places
from scripts.benchmarks.gpu.rows import Row, Table

SECTION = "verdicts"
_FASTER = {"SDXL": 1.2, "SD 1.5": 1.5}
_P95 = 1.2
_SECOND_START = 10.0


def judge(table: Table) -> list[Row]:
    """A row for each mark that there are figures for, and a line in ``left_out`` for each that there are none for."""
    if not table.real:
        table.left_out.append("verdicts: they are for a GPU at real sizes")
        return []
    found = []
    for name, mark in _FASTER.items():
        rows = [row for row in table.of(latency.SECTION) if row.what.startswith(f"{name},") and not row.lossy]
        rows = [row for row in rows if row.ratio is not None]
        if rows:
            best = max(rows, key=lambda row: row.ratio or 0.0)
            ratio = best.ratio or 0.0
            met = ratio >= mark
            found.append(
                Row(SECTION, f"{name}, best lossless latency", best.ours, "ms", best.baseline, best.what, ratio,
                    f"≥ {mark}×", met)
            )  # fmt: skip
        else:
            table.left_out.append(f"verdict on {name}'s latency: not measured")
    found += _worst(table, errors.SECTION, "worst lossless error of a step, of eager's", invert=True)
    found += _worst(table, places.SECTION, "prediction of memory that is furthest off", invert=False)
    for row in table.of(compiled.SECTION):
        if row.what.endswith(compiled.P95):
            row.mark, row.met = f"p95 ≤ {_P95}×", (row.ratio or 0.0) >= 1 / _P95
            found.append(row)
        elif row.what.endswith(compiled.SECOND):
            row.mark, row.met = f"≤ {_SECOND_START:.0f} s", row.ours <= _SECOND_START
            found.append(row)
    return [_as_verdict(row) for row in found]


def _worst(table: Table, section: str, what: str, *, invert: bool) -> list[Row]:
    rows = [row for row in table.of(section) if row.met is not None and row.ratio]
    if not rows:
        table.left_out.append(f"verdict on the {what}: not measured")
        return []

    def off(row: Row) -> float:
        return 1 / (row.ratio or 1.0) if invert else abs(1 - (row.ratio or 1.0))

    worst = max(rows, key=off)
    met = all(row.met for row in rows)
    return [Row(SECTION, what, worst.ours, worst.unit, worst.baseline, worst.what, worst.ratio, worst.mark, met)]


def _as_verdict(row: Row) -> Row:
    return Row(SECTION, row.what, row.ours, row.unit, row.baseline, row.against, row.ratio, row.mark, row.met)
