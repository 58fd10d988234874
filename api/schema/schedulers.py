"""What the scheduler classes of the installed diffusers take, read from the generated ``schedulers.json``."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import msgspec


class Argument(msgspec.Struct, frozen=True):
    """One argument of a scheduler class: JSON types it admits, its default, and the words that it may be."""

    types: tuple[str, ...]
    default: Any = None
    choices: tuple[str, ...] = ()


class SchedulerClass(msgspec.Struct, frozen=True):
    """One scheduler class.

    Attributes:
        library: that it needs beyond what this server depends on; mostly none.
        compatibles: the classes whose settings it takes over, and which take over its own.
        fault: why pipelines of models that predict noise cannot run it; mostly nothing.
        args: its arguments.
    """

    library: str
    compatibles: tuple[str, ...]
    fault: str
    args: dict[str, Argument]

    def predictions(self) -> tuple[str, ...] | None:
        """What a model may predict for it: ``epsilon``, ``v_prediction``, …; None where it does not ask."""
        argument = self.args.get("prediction_type")
        return argument.choices if argument else None


@functools.cache
def scheduler_classes() -> dict[str, SchedulerClass]:
    """Every scheduler class by name, read once."""
    data = Path(__file__).with_name("schedulers.json").read_bytes()
    return msgspec.json.decode(data, type=dict[str, SchedulerClass])
