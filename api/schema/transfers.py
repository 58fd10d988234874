"""How far a model is on its way: what the fetcher tells, and whoever watches reads."""

from __future__ import annotations

import msgspec


class Transfer(msgspec.Struct, frozen=True):
    """One phase of bringing a model here, or of taking it elsewhere.

    Attributes:
        model_id: which model.
        kind: ``download``, ``extract``, ``convert`` or ``upload``; the first two run side by side for an archive.
        status: ``start``, ``progress`` or ``done``.
        done: bytes so far.
        total: bytes in all, where that is known.
        rate: bytes a second over the last seconds.
        eta: seconds to go, where ``total`` is known.
    """

    model_id: str
    kind: str
    status: str
    done: int
    total: int | None
    rate: int
    eta: float | None
