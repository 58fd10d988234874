"""``callInputs.refiner`` and ``callInputs.hires``: their names, types and ranges, checked and as JSON Schema."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from api.errors import ApiError
from api.models.refs import PRECISIONS
from api.schema.catalogue import nearest
from api.schema.flows import UPSCALERS

REFINER, HIRES = "callInputs.refiner", "callInputs.hires"
MODEL = ("MODEL_ID", "HF_MODEL_ID", "MODEL_REVISION", "MODEL_PRECISION", "MODEL_URL", "CHECKPOINT_URL",
         "CHECKPOINT_CONFIG_URL")  # fmt: skip
"""What names the refiner's weights, as it names the model's."""
_NAMING = ("MODEL_ID", "MODEL_URL", "CHECKPOINT_URL")
_LONGEST, _LONGEST_URL = 200, 8192
_MOST = 2**53


class _Text(NamedTuple):
    """A string; ``among``: one of these."""

    longest: int = _LONGEST
    among: tuple[str, ...] = ()

    @property
    def words(self) -> str:
        return f"one of {', '.join(self.among)}" if self.among else f"a string of at most {self.longest} characters"

    @property
    def schema(self) -> dict[str, Any]:
        if self.among:
            return {"type": "string", "enum": list(self.among)}
        return {"type": "string", "minLength": 1, "maxLength": self.longest}

    def read(self, value: Any) -> Any:
        fits = isinstance(value, str) and (value in self.among if self.among else 0 < len(value) <= self.longest)
        return value if fits else None


class _Number(NamedTuple):
    """A number within limits; ``open``: these are no part of what it may be."""

    low: float
    high: float
    whole: bool = False
    open: bool = False

    @property
    def words(self) -> str:
        kind = "a whole number" if self.whole else "a number"
        if self.high >= _MOST:
            return f"{kind}, at least {self.low:g}"
        return f"{kind} {'between' if self.open else 'from'} {self.low:g} {'and' if self.open else 'to'} {self.high:g}"

    @property
    def schema(self) -> dict[str, Any]:
        low, high = ("exclusiveMinimum", "exclusiveMaximum") if self.open else ("minimum", "maximum")
        return {"type": "integer" if self.whole else "number", low: self.low, high: self.high}

    def read(self, value: Any) -> Any:
        if not isinstance(value, int | float) or isinstance(value, bool):
            return None
        inside = self.low < value < self.high if self.open else self.low <= value <= self.high
        if not inside or (self.whole and value != int(value)):
            return None
        return int(value) if self.whole else float(value)


class _Object(NamedTuple):
    """An object of any names; they are checked where what they mean is known."""

    words: str = "an object"
    schema: Mapping[str, Any] = {"type": "object"}

    def read(self, value: Any) -> Any:
        return value if isinstance(value, dict) else None


_Value = _Text | _Number | _Object
_STEPS, _GUIDANCE = _Number(1, _MOST, whole=True), _Number(-1000, 1000)
_STRENGTH = _Number(0, 1)
_REFINER: dict[str, _Value] = {
    **{name: _Text(_LONGEST_URL if name.endswith("_URL") else _LONGEST) for name in MODEL},
    "MODEL_PRECISION": _Text(among=PRECISIONS),
    "SCHEDULER": _Text(),
    "scheduler_args": _Object(),
    "switch_at": _Number(0, 1, open=True),
    "strength": _STRENGTH,
    "num_inference_steps": _STEPS,
    "guidance_scale": _GUIDANCE,
    "aesthetic_score": _Number(0, 10),
    "negative_aesthetic_score": _Number(0, 10),
}
_HIRES: dict[str, _Value] = {
    "scale": _Number(1, 8),
    "width": _Number(1, _MOST, whole=True),
    "height": _Number(1, _MOST, whole=True),
    "strength": _STRENGTH,
    "num_inference_steps": _STEPS,
    "guidance_scale": _GUIDANCE,
    "upscaler": _Text(among=UPSCALERS),
}


HIRES_KEYS = tuple(_HIRES)
REFINER_INPUTS = ("strength", "num_inference_steps", "guidance_scale", "aesthetic_score", "negative_aesthetic_score")
"""What is said of the refiner that its pipeline gets as it is."""


def _schema(known: Mapping[str, _Value], **more: Any) -> dict[str, Any]:
    properties = {name: dict(kind.schema) for name, kind in known.items()}
    return {"type": "object", "properties": properties, "additionalProperties": False, **more}


def _without(*names: str) -> dict[str, Any]:
    return {"not": {"anyOf": [{"required": [name]} for name in names]}}


REFINER_SCHEMA = {
    "anyOf": [
        {"type": "string", "minLength": 1, "maxLength": _LONGEST},
        _schema(
            _REFINER, allOf=[{"anyOf": [{"required": [name]} for name in _NAMING]},
                             {"anyOf": [_without("switch_at"), _without("strength")]}],
        ),
    ]
}  # fmt: skip
HIRES_SCHEMA = _schema(
    _HIRES,
    anyOf=[_without("width", "height"), {"required": ["width", "height"], **_without("scale")}],
)


def check_refiner(value: Any, field: str, meaning: str) -> dict[str, Any]:
    """What is said of the refiner; a string is its MODEL_ID.

    Raises:
        ApiError: INVALID_INPUTS.
    """
    if isinstance(value, str):
        value = {"MODEL_ID": value}
    found = _read(value, _REFINER, field, "a model id")
    if not any(name in found for name in _NAMING):
        message = f"It must name the refiner's weights: {', '.join(_NAMING)}."
        raise ApiError("INVALID_INPUTS", message, field=field)
    if "switch_at" in found and "strength" in found:
        message = "The refiner either takes over at switch_at, or paints over what is finished with strength: send one."
        raise ApiError("INVALID_INPUTS", message, field=f"{field}.strength", requested=found["strength"])
    return found


def check_hires(value: Any, field: str, meaning: str) -> dict[str, Any]:
    """What is said of the second pass.

    Raises:
        ApiError: INVALID_INPUTS.
    """
    found = _read(value, _HIRES, field, "")
    sides = [name for name in ("width", "height") if name in found]
    if len(sides) == 1 or (sides and "scale" in found):
        message = "The size of the second pass is a scale, or a width and a height: send one of these."
        raise ApiError("INVALID_INPUTS", message, field=field, requested={name: found[name] for name in sides})
    return found


def _read(value: Any, known: Mapping[str, _Value], field: str, other: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        message = f"Must be {f'{other}, or ' if other else ''}an object of {', '.join(known)}."
        raise ApiError("INVALID_INPUTS", message, field=field, available=list(known))
    out: dict[str, Any] = {}
    for name, sent in value.items():
        if name not in known:
            message = f"There is no such thing to say here.{nearest(str(name), known)}"
            raise ApiError("INVALID_INPUTS", message, field=f"{field}.{str(name)[:100]}", available=list(known))
        if (read := known[name].read(sent)) is None:
            message = f"Must be {known[name].words}."
            among = list(getattr(known[name], "among", ())) or None
            raise ApiError("INVALID_INPUTS", message, field=f"{field}.{name}", requested=sent, available=among)
        out[name] = read
    return out
