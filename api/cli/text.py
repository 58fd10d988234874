"""How the commands write sizes, times and models."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime

from api.models.keys import is_commit

_UNITS = ("B", "kB", "MB", "GB", "TB")


def amount(size: float) -> str:
    """Bytes for people, in powers of 1000 as disks are sold: ``7.5 MB``."""
    index = 0
    while size >= 999.5 and index < len(_UNITS) - 1:
        size, index = size / 1000, index + 1
    return f"{size:.0f} B" if index == 0 else f"{size:.3g} {_UNITS[index]}"


def short(revision: str) -> str:
    """A revision for people: commits and digests by their first digits."""
    digest = revision.removeprefix("sha256:")
    return digest[:12] if is_commit(digest) else revision


def moment(seconds: float | None) -> str:
    """Seconds since 1970 as ``2026-11-20 14:02``, UTC."""
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M") if seconds else "-"


def table(rows: Sequence[tuple[str, ...]]) -> str:
    """Rows in columns, the first being their names."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)
    return "\n".join(line.rstrip() for line in lines)
