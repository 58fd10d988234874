"""What the table consists of, and how it is written."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass
class Row:
    """One measurement.

    Attributes:
        section: which question it answers.
        what: was measured.
        ours: our figure.
        unit: of both figures.
        baseline: what it is compared with; None: nothing.
        against: what the baseline is.
        ratio: how many times better ours is; None: nothing is compared.
        mark: what is asked of it; empty: nothing.
        met: whether it is; None: no mark, or not for this device.
        lossy: it changes what is computed by more than rounding.
        more: further figures.
    """

    section: str
    what: str
    ours: float
    unit: str
    baseline: float | None = None
    against: str = ""
    ratio: float | None = None
    mark: str = ""
    met: bool | None = None
    lossy: bool = False
    more: dict[str, Any] = field(default_factory=dict)

    def cells(self) -> list[str]:
        """As the table has it."""
        read = {True: "met", False: "missed", None: ""}[self.met]
        more = ", ".join(f"{name} {_short(value)}" for name, value in self.more.items() if not isinstance(value, list))
        return [
            f"{self.what}{' (lossy)' if self.lossy else ''}",
            f"{_short(self.ours)} {self.unit}",
            "" if self.baseline is None else f"{_short(self.baseline)} {self.unit}",
            "" if self.ratio is None else f"{self.ratio:.2f}",
            " ".join(part for part in (self.mark, read) if part),
            "; ".join(part for part in (self.against, more) if part),
        ]


@dataclass
class Table:
    """All rows, what was left out and why, and what it was measured on."""

    machine: dict[str, str]
    rows: list[Row] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)

    @property
    def real(self) -> bool:
        """Whether these are figures of a GPU and of architectures of real size."""
        return self.machine["device"].startswith("cuda") and self.machine["size"] == "real"

    def of(self, section: str) -> list[Row]:
        """The rows of a section."""
        return [row for row in self.rows if row.section == section]

    def markdown(self) -> str:
        """Ready for ``docs/benchmarks/``."""
        title = "on a GPU" if self.real else "mechanics only: these are NOT figures of a GPU at real sizes"
        lines = [f"# {self.machine['date']}, {self.machine['card']}: {title}", ""]
        lines += [f"- {name}: {value}" for name, value in self.machine.items()] + [""]
        for section in dict.fromkeys(row.section for row in self.rows):
            lines += [f"## {section}", "", "| what | ours | baseline | ratio | mark | against, and more |"]
            lines += ["| --- | ---: | ---: | ---: | --- | --- |"]
            lines += [f"| {' | '.join(row.cells())} |" for row in self.of(section)] + [""]
        for name, found in (("left out", self.left_out), ("failed", self.failed)):
            if found:
                lines += [f"## {name}", "", *(f"- {each}" for each in found), ""]
        return "\n".join(lines)

    def as_json(self) -> dict[str, Any]:
        """Everything."""
        return {**asdict(self), "real": self.real}


def finite(rows: Sequence[Row]) -> bool:
    """Whether every figure is a number."""
    figures = [figure for row in rows for figure in (row.ours, row.baseline, row.ratio) if figure is not None]
    return all(math.isfinite(figure) for figure in figures)


def _short(value: Any) -> str:
    if not isinstance(value, float):
        return str(value)
    return f"{value:.3g}" if abs(value) < 100 else f"{value:.0f}"
