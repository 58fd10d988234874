"""The options that make it faster, each as whoever runs a container or sends a request would switch it on.

An option that this version does not have, or that lacks a library here, is left out, and the table says so.
"""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from api.engine.device import Device
from api.engine.generate import Engine
from api.schema import generation
from api.schema.generation import GenerationRequest, ModelRef
from api.settings import Settings
from scripts.benchmarks.gpu.bench import Bench, Case, heard_by


@dataclass(frozen=True)
class Made:
    """A value of a request that is an object of ``api.schema.generation``."""

    name: str
    values: tuple[Any, ...]

    def make(self) -> Any:
        """The object."""
        return getattr(generation, self.name)(*self.values)


@dataclass(frozen=True)
class Variant:
    """One option, or several at once.

    Attributes:
        name: for the table and ``--variants``.
        environ: environment variables.
        request: fields of the request.
        ref: fields of the model's name.
        lossy: it changes what is computed by more than rounding.
        compiled: it has to be prepared before it is used; its word in ``$meta.numerics`` says when.
        needs: modules that must be installed.
        cpu: it can be tried on a CPU.
        says: a word of ``$meta.numerics`` without which it was not in use.
        families: of ``architectures`` that have it.
    """

    name: str
    environ: Mapping[str, str] = field(default_factory=dict)
    request: Mapping[str, Any] = field(default_factory=dict)
    ref: Mapping[str, Any] = field(default_factory=dict)
    lossy: bool = False
    compiled: bool = False
    needs: tuple[str, ...] = ()
    cpu: bool = False
    says: str = ""
    families: tuple[str, ...] = ("sd1", "sdxl")


AS_IT_IS = Variant("as it is", cpu=True)
VARIANTS = (
    Variant("CHANNELS_LAST=0", {"CHANNELS_LAST": "0"}, cpu=True),
    Variant("ATTENTION=flash", {"ATTENTION": "flash"}, {"attention": "flash"}, needs=("flash_attn",), says="flash"),
    Variant("ATTENTION=xformers", {"ATTENTION": "xformers"}, {"attention": "xformers"}, needs=("xformers",),
            says="xformers"),
    Variant("ATTENTION=sage", {"ATTENTION": "sage"}, {"attention": "sage"}, lossy=True, needs=("sageattention",),
            says="sage"),
    Variant("COMPILE=blocks", {"COMPILE": "blocks"}, compiled=True, cpu=True),
    Variant("COMPILE=graphs", {"COMPILE": "graphs"}),
    Variant("COMPILE=both", {"COMPILE": "both"}, compiled=True),
    Variant("QUANTIZE=fp8", ref={"quantize": "fp8"}, lossy=True, needs=("torchao",), says="fp8"),
    Variant("QUANTIZE=int8", ref={"quantize": "int8"}, lossy=True, needs=("torchao",), says="int8"),
    Variant("QUANTIZE=nf4", ref={"quantize": "nf4"}, lossy=True, needs=("bitsandbytes",), says="nf4"),
    Variant(
        "step_cache=first_block@0.1", request={"step_cache": Made("StepCache", ("first_block", 0.1))}, lossy=True,
        cpu=True, says="step_cache:first_block@0.1", families=("flux",),
    ),
)  # fmt: skip


def missing(variant: Variant, on_cuda: bool) -> str:
    """Why a variant cannot be measured here; empty: it can."""
    settings = {each.name for each in dataclasses.fields(Settings)}
    heard = {*variant.request, *variant.ref, *(heard_by(Engine)), *(heard_by(Device))}
    for name in variant.environ:
        if name.lower() not in settings:
            return f"this version has no {name}"
        if name.lower() not in heard:
            return f"{name} is no argument of the engine or the device"
    for names, struct in ((variant.request, GenerationRequest), (variant.ref, ModelRef)):
        for name in names:
            if name not in struct.__struct_fields__:
                return f"this version's {struct.__name__} has no {name}"
    for module in variant.needs:
        if importlib.util.find_spec(module) is None:
            return f"{module} is not installed"
    if not on_cuda and not variant.cpu:
        return "it needs a GPU"
    return ""


def usable(bench: Bench, family: str) -> list[Variant]:
    """Those that can be measured here with a family; of them that have it, the others are said to be left out."""
    found = []
    for variant in VARIANTS:
        if family not in variant.families:
            continue
        if why := missing(variant, bench.is_cuda):
            bench.leave_out(f"{variant.name}: {why}")
        else:
            found.append(variant)
    return found


def ask(variant: Variant, case: Case, seed: int = 1, **more: Any) -> GenerationRequest:
    """A request with the variant on."""
    fields = {name: value.make() if isinstance(value, Made) else value for name, value in variant.request.items()}
    return case.request(seed, case.ref(**variant.ref), **{**fields, **more})


def is_prepared(variant: Variant, meta: Mapping[str, Any]) -> bool:
    """Whether what made an image had everything that the variant prepares."""
    return not variant.compiled or "/eager" not in meta["numerics"]


def is_in_use(bench: Bench, variant: Variant, case: Case, meta: Mapping[str, Any]) -> bool:
    """Whether an image was made with the variant; said to be left out where it was not: it could not be had."""
    if not variant.says or variant.says in meta["numerics"].split("/"):
        return True
    bench.leave_out(f"{variant.name}, {case.name}: it was asked for, and was not in use ({meta['numerics']})")
    return False
