"""Pieces of a picture for an upscaler, and the picture of what it makes of them.

All pieces of a picture have one shape, so that calls of several jobs are merged. Where two of them meet, each leaves
out what lies nearest to its own edge, and the rest of what they share goes over from the one to the other. A network
that looks no further than ``MARGIN`` pixels around each makes the same of the pieces as of the whole; what any other
makes differently of two pieces is spread over ``BLEND``.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch

MARGIN = 16
"""Pixels along an inner edge of a piece that are left out: they lack what lies beyond."""
BLEND = 16
"""Pixels over which one piece goes over into the next, at least."""
OVERLAP = 2 * MARGIN + BLEND


class Span(NamedTuple):
    """Where pieces lie along one side of a picture.

    Attributes:
        starts: of each piece.
        size: of all of them.
        whole: of the picture.
    """

    starts: tuple[int, ...]
    size: int
    whole: int

    def weights(self, start: int, scale: int) -> torch.Tensor:
        """How much a piece counts at each of its pixels, once it was made larger."""
        size, margin, blend = self.size * scale, MARGIN * scale, BLEND * scale
        at = torch.arange(size, dtype=torch.float32) + 0.5
        weights = torch.ones(size)
        if start > 0:
            weights = weights.minimum(((at - margin) / blend).clamp(0, 1))
        if start + self.size < self.whole:
            weights = weights.minimum(((size - margin - at) / blend).clamp(0, 1))
        return weights


def spread(whole: int, tile: int, step: int = 1, least: int = 0) -> Span:
    """Pieces along one side: as few as there may be, and as small as that allows.

    Args:
        whole: pixels of the picture; a multiple of ``step``.
        tile: of a piece, at most; at least one more than ``OVERLAP``, in steps.
        step: that starts and sizes are multiples of.
        least: pixels of a piece, at least.
    """
    least = -(-least // step) * step
    tile = max(tile // step * step, -(-max(least, OVERLAP + step) // step) * step)
    if whole <= tile:
        return Span((0,), whole, whole)
    count = math.ceil((whole - OVERLAP) / (tile - OVERLAP))
    size = min(tile, max(-(-(whole + (count - 1) * OVERLAP) // count // step) * step + step, least))
    while True:
        last = whole - size
        starts = tuple(last * number // (count - 1) // step * step for number in range(count))
        if all(after - before <= size - OVERLAP for before, after in itertools.pairwise(starts)):
            return Span(starts, size, whole)
        size, count = (size + step, count) if size + step <= tile else (size, count + 1)


def pieces(rows: Span, columns: Span) -> Iterator[tuple[int, int]]:
    """Top and left of each piece, row by row."""
    for top in rows.starts:
        for left in columns.starts:
            yield top, left


def tiled(
    picture: torch.Tensor, rows: Span, columns: Span, scale: int, make: Callable[[torch.Tensor], torch.Tensor]
) -> torch.Tensor:
    """A picture made larger piece by piece.

    Args:
        picture: (1, C, H, W), on the CPU.
        rows: pieces along its height.
        columns: pieces along its width.
        scale: how many times larger pieces come back.
        make: makes a piece larger; float32, on the CPU.

    Returns:
        (1, C, H * scale, W * scale), float32.
    """
    if len(rows.starts) == len(columns.starts) == 1:
        return make(picture)
    shape = (*picture.shape[:2], rows.whole * scale, columns.whole * scale)
    sums, counts = torch.zeros(shape), torch.zeros(shape[2:])
    for top, left in pieces(rows, columns):
        made = make(picture[:, :, top : top + rows.size, left : left + columns.size].contiguous())
        weights = rows.weights(top, scale)[:, None] * columns.weights(left, scale)[None, :]
        place = (
            slice(top * scale, (top + rows.size) * scale),
            slice(left * scale, (left + columns.size) * scale),
        )
        sums[:, :, *place] += made * weights
        counts[place] += weights
    return sums.div_(counts)
