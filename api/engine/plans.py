"""What a model's folder says of its parts, without a weight being read: their keys, sizes, and skeletons."""

from __future__ import annotations

import hashlib
import json
import logging
import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from api.engine.device import Device
from api.engine.headers import broken, file_identity
from api.engine.parts import PartSpec
from api.engine.quantization import RULE, Rule
from api.engine.quantized_skeletons import quantized
from api.engine.skeletons import NotExactError, Skeleton, build
from api.engine.specs import (
    Component,
    Weights,
    added,
    alone,
    components,
    computed_in,
    configuration,
    is_known,
    side_files,
    variant_in,
    variant_of,
    variant_of_part,
    weights,
    weights_identity,
)
from api.engine.twins import Twins
from api.engine.upscalers import spec_of
from api.models.description import is_model
from api.schema.generation import ModelRef

log = logging.getLogger("api.engine")

_SKELETONS = 64
"""Skeletons that are remembered."""


@dataclass(frozen=True)
class Plan:
    """A part, and what it is computed in."""

    component: Component
    config: dict[str, Any]
    weights: Weights
    dtype: torch.dtype


class Plans:
    """Reads them, and remembers skeletons; from any thread.

    Args:
        device: that the parts are for.
        rule: what is quantized where a model is to be.
    """

    def __init__(self, device: Device, rule: Rule = RULE) -> None:
        self._device = device
        self._rule = rule
        self._twins = Twins()
        self._skeletons: OrderedDict[str, Skeleton | None] = OrderedDict()
        self._lock = threading.Lock()

    def parts(self, ref: ModelRef) -> Sequence[PartSpec]:
        """The parts of a model, without reading a weight.

        Raises:
            ApiError: MODEL_BROKEN.
        """
        if ref.is_upscaler:
            return [spec_of(ref, self._device.dtype(ref.precision))]
        folder = Path(ref.folder)
        variant = variant_of(folder, ref.precision)
        dtype = self._device.dtype(ref.precision)
        others = [added(part) for part in ref.additions]
        replaced = {component.name for component in others}
        found = [part for part in components(folder) if part.has_weights and part.name not in replaced]
        plans = [planned(component, dtype, variant) for component in found]
        plans += [planned(part, dtype, variant_of_part(part.folder, ref.precision)) for part in others]
        names = {component.name for component in found}
        return [self._spec(plan, ref.quantize if plan.component.name in names else "") for plan in plans]

    def _spec(self, plan: Plan, quantize: str = "") -> PartSpec:
        component, config, files = plan.component, plan.config, plan.weights.files
        identities = tuple(map(file_identity, files))  # before the content is looked at: what changes later is seen
        what = [component.library, component.class_name, config, str(plan.dtype)]
        shapes = [header.shapes for header in plan.weights.headers]
        architecture = _digest([*what, shapes, plan.weights.sharded, plan.weights.plain])
        identity = weights_identity(component.home or component.folder.parent, files)
        key = _digest([*what, self._twins.content(architecture, files, identity)])
        skeleton = self._built(architecture, plan)
        if skeleton is None:
            key = _digest([key, side_files(component)])
        elif quantize and (smaller := self._quantized(architecture, plan, quantize, skeleton)):
            key, architecture, skeleton = f"{key}:{quantize}", f"{architecture}:{quantize}", smaller
        return PartSpec(
            name=component.name,
            key=key,
            # what a library has loaded is never overwritten: another one is only ever equal to itself
            architecture=architecture if skeleton else f"library:{key}",
            bytes=skeleton.bytes if skeleton else _bytes(plan),
            folder=component.folder,
            library=component.library,
            class_name=component.class_name,
            dtype=plan.dtype,
            files=files,
            by_library=skeleton is None,
            identities=identities,
            quantize=quantize if architecture.endswith(f":{quantize}") else "",
        )

    def _built(self, architecture: str, plan: Plan) -> Skeleton | None:
        with self._lock:
            if architecture in self._skeletons:
                self._skeletons.move_to_end(architecture)
                return self._skeletons[architecture]
        return self._kept(architecture, _build(plan))

    def _quantized(self, architecture: str, plan: Plan, kind: str, skeleton: Skeleton) -> Skeleton | None:
        """The skeleton with quantized layers, if it has any."""
        name = f"{architecture}:{kind}"
        with self._lock:
            known = self._skeletons.get(name)
        return known or self._kept(name, quantized(skeleton, plan.component.name, kind, plan.dtype, self._rule))

    def _kept(self, architecture: str, skeleton: Skeleton | None) -> Skeleton | None:
        with self._lock:
            while len(self._skeletons) >= _SKELETONS:
                self._skeletons.popitem(last=False)
            return self._skeletons.setdefault(architecture, skeleton)

    def skeleton(self, spec: PartSpec) -> Skeleton:
        """The skeleton of a part that our own reader knows.

        Raises:
            ApiError: MODEL_BROKEN: its files have changed.
        """
        with self._lock:
            skeleton = self._skeletons.get(spec.architecture)
        if skeleton is None:
            plan, (plain, _, kind) = self._replanned(spec), spec.architecture.partition(":")
            skeleton = self._built(plain, plan)
            skeleton = self._quantized(plain, plan, kind, skeleton) if skeleton and kind else skeleton
        if skeleton is None:
            raise broken(spec.folder, "has changed")
        return skeleton

    def _replanned(self, spec: PartSpec) -> Plan:
        if not is_model(spec.folder.parent):
            return planned(alone(spec.name, spec.folder), spec.dtype, variant_in(spec.files))
        found = [part for part in components(spec.folder.parent) if part.name == spec.name]
        if not found:
            raise broken(spec.folder, "is gone")
        return planned(found[0], spec.dtype, variant_in(spec.files))


def planned(component: Component, dtype: torch.dtype, variant: str | None) -> Plan:
    """How a component is read."""
    config = configuration(component)
    return Plan(component, config, weights(component, variant), computed_in(component, config, dtype))


def _build(plan: Plan) -> Skeleton | None:
    """The skeleton, or None for what only its library can load."""
    cls = plan.component.cls
    if cls is None or not is_known(cls) or not plan.weights.plain:
        log.info("%s (%s) is left to its library", plan.component.name, plan.component.class_name)
        return None
    stored = {name: entry for header in plan.weights.headers for name, entry in header.tensors.items()}
    try:
        return build(cls, plan.config, stored, plan.dtype, one_file=not plan.weights.sharded)
    except NotExactError as reason:
        log.info("%s (%s) is left to its library: %s", plan.component.name, plan.component.class_name, reason)
        return None


def _bytes(plan: Plan) -> int:
    """What a part will take, from its headers alone."""
    return sum(
        entry.bytes // entry.dtype.itemsize * plan.dtype.itemsize
        if entry.dtype is not None and entry.dtype.is_floating_point
        else entry.bytes
        for header in plan.weights.headers
        for entry in header.tensors.values()
    )


def _digest(what: list[Any]) -> str:
    return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()
