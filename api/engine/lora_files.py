"""Reads LoRAs: which layers of a pipeline's modules a file changes, whatever format it was saved in.

diffusers knows the formats (its own, PEFT's, kohya's, those of each family's trainers) and brings their names to its
own. The layers are applied by ``adapters.py``: PEFT would put modules of its own into those that jobs share, and
switch them in place.
"""

from __future__ import annotations

import inspect
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.utils.state_dict_utils import (
    DIFFUSERS_OLD_TO_PEFT,
    DIFFUSERS_TO_PEFT,
    UNET_TO_DIFFUSERS,
    convert_state_dict,
)
from safetensors import SafetensorError, safe_open
from torch import nn

from api.errors import ApiError
from api.schema.generation import Lora

FIELD = "callInputs.lora_weights"

_KOHYA = re.compile(r"(lora_(?:unet|te|te1|te2|te3)_[^.]+)\.(.+)")
_MODULE = re.compile(r"[\w.-]+")
_PAIR = frozenset({"lora_down.weight", "lora_up.weight"})
_TEXT_NAMES = {**DIFFUSERS_OLD_TO_PEFT, **DIFFUSERS_TO_PEFT}
_METADATA = "lora_adapter_metadata"


@dataclass(frozen=True)
class Layer:
    """What is added to the output of a linear layer or a convolution: ``up(down(x))``, times a factor.

    Attributes:
        down: to the rank: (rank, in), or (rank, in, height, width).
        up: back from it: (out, rank), or (out, rank, 1, 1).
        bias: of ``up``, where it has one.
        alpha: the trainer's measure of its strength.
        divisor: the rank, or with rank-stabilized LoRA its root.
    """

    down: torch.Tensor
    up: torch.Tensor
    bias: torch.Tensor | None
    alpha: float
    divisor: float

    def factor(self, scale: float) -> float:
        """What its output is multiplied with; as PEFT computes it, so that the images are the same."""
        return scale * self.alpha / self.divisor


@dataclass(frozen=True)
class LoraFile:
    """A file that was read.

    Attributes:
        layers: by the component's name and the module's within it.
        unused: names of tensors that nothing in the model answers to.
    """

    layers: dict[str, dict[str, Layer]]
    unused: tuple[str, ...]


def read_lora(lora: Lora, pipeline: type, components: Mapping[str, Any]) -> LoraFile:
    """Read a file, and find the layers that it is for.

    Args:
        lora: which file.
        pipeline: a diffusers pipeline class: it knows its formats, and which of its components can have LoRAs.
        components: of the model.

    Raises:
        ApiError: NOT_SUPPORTED: the pipeline takes none; INVALID_ADAPTER: nothing in the file fits the model.
    """
    if not hasattr(pipeline, "lora_state_dict"):
        message = f"{pipeline.__name__} takes no LoRAs: diffusers cannot load any for it. Leave lora_weights out."
        raise ApiError("NOT_SUPPORTED", message, field=FIELD)
    tensors, metadata = _read(lora)
    known, unused = _complete(tensors)
    try:
        named, alphas = _named(pipeline, known, components)
    except Exception as fault:  # what converters make of files that they do not know
        problem = f"is in a format that diffusers cannot convert for this model: {str(fault)[:200]}"
        raise _invalid(lora, problem) from fault
    layers: dict[str, dict[str, Layer]] = {}
    for component in getattr(pipeline, "_lora_loadable_modules", ()):
        module = components.get(component)
        own = {key[len(component) + 1 :]: value for key, value in named.items() if key.startswith(f"{component}.")}
        if isinstance(module, nn.Module) and own:
            said = {key[len(component) + 1 :]: value for key, value in metadata.items() if key.startswith(component)}
            strengths = {k[len(component) + 1 :]: v for k, v in alphas.items() if k.startswith(f"{component}.")}
            found, left = _layers(lora, component, module, own, strengths, said)
            unused += [f"{component}.{name}" for name in left]
            if found:
                layers[component] = found
        else:
            unused += [f"{component}.{name}" for name in own]
    prefixes = tuple(f"{component}." for component in getattr(pipeline, "_lora_loadable_modules", ()))
    unused += [key for key in named if not key.startswith(prefixes)]
    if not layers:
        shown = ", ".join(unused[:3])
        raise _invalid(lora, f"has nothing that fits this model: none of its {len(unused)} tensors ({shown}, …)")
    return LoraFile(layers, tuple(unused))


def _read(lora: Lora) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    try:
        with safe_open(lora.path, framework="pt") as file:
            said = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as fault:
        raise _invalid(lora, f"cannot be read: {str(fault)[:200]}") from fault
    try:
        metadata = json.loads(said.get(_METADATA, "{}"))
    except (ValueError, RecursionError):
        metadata = {}
    return tensors, metadata if isinstance(metadata, dict) else {}


def _complete(tensors: dict[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], list[str]]:
    """Of kohya's layers those that are whole: its converters stumble over anything else. And what is left out."""
    groups: dict[str, set[str]] = {}
    for name in tensors:
        if match := _KOHYA.fullmatch(name):
            groups.setdefault(match[1], set()).add(match[2])
    if not groups:
        left = {name: tensor for name, tensor in tensors.items() if "dora_scale" in name}  # as diffusers does itself
        return {name: tensor for name, tensor in tensors.items() if name not in left}, list(left)

    def is_known(name: str) -> bool:
        match = _KOHYA.fullmatch(name)
        return bool(match) and groups[match[1]] >= _PAIR and match[2] in (*_PAIR, "alpha")  # type: ignore[index]

    return {k: v for k, v in tensors.items() if is_known(k)}, [name for name in tensors if not is_known(name)]


def _named(
    pipeline: type, tensors: dict[str, torch.Tensor], components: Mapping[str, Any]
) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
    """The tensors by diffusers' names, ``component.module.lora_A.weight``, and alphas by ``component.module``."""
    options: dict[str, Any] = {"unet_config": components["unet"].config} if "unet" in components else {}
    if "return_alphas" in inspect.signature(pipeline.lora_state_dict).parameters:  # type: ignore[attr-defined]
        options["return_alphas"] = True
    if not tensors:
        return {}, {}
    converted = pipeline.lora_state_dict(dict(tensors), **options)  # type: ignore[attr-defined]
    state, alphas = converted if isinstance(converted, tuple) else (converted, None)
    named = {_peft_name(key): value for key, value in state.items()}
    return named, {_module_name(key): float(value) for key, value in (alphas or {}).items()}


def _peft_name(key: str) -> str:
    mapping = _TEXT_NAMES if key.startswith("text_encoder") else UNET_TO_DIFFUSERS
    ((name, _),) = convert_state_dict({key: None}, mapping).items()
    return str(name)


def _module_name(key: str) -> str:
    """Of an alpha's key, which may hold the name of the tensor that it goes with."""
    return re.sub(r"\.lora(?:_[AB])?(?:\.weight)?$", "", _peft_name(key.removesuffix(".alpha")))


def _layers(
    lora: Lora,
    component: str,
    module: nn.Module,
    tensors: dict[str, torch.Tensor],
    alphas: dict[str, float],
    config: dict[str, Any],
) -> tuple[dict[str, Layer], list[str]]:
    modules = dict(module.named_modules())
    found: dict[str, Layer] = {}
    used: set[str] = set()
    for key, down in tensors.items():
        name, _, rest = key.rpartition(".lora_A")
        if rest != ".weight" or not name:
            continue
        up = tensors.get(f"{name}.lora_B.weight")
        # transformers 5 moved the parts of CLIP's text encoders up a level
        own = name if name in modules else name.removeprefix("text_model.")
        target = modules.get(own)
        is_plain = isinstance(target, nn.Linear) or (isinstance(target, nn.Conv2d) and target.groups == 1)
        if up is None or not is_plain:
            continue
        bias = tensors.get(f"{name}.lora_B.bias")
        down, up = _shaped(lora, f"{component}.{own}", target, down, up)
        rank = down.shape[0]
        alpha = alphas[name] if name in alphas else _alpha(lora, config, own, rank)
        divisor = math.sqrt(rank) if config.get("use_rslora") else rank
        found[own] = Layer(down, up, bias, alpha, divisor)
        used |= {key, f"{name}.lora_B.weight", f"{name}.lora_B.bias"}
    return found, [key for key in tensors if key not in used]


def _alpha(lora: Lora, config: dict[str, Any], name: str, rank: int) -> float:
    """What a configuration of PEFT says of a module, by the end of its name.

    PEFT takes what it says for regular expressions. Those of a stranger may never end: names are read, and no others.
    """
    patterns, said = config.get("alpha_pattern") or {}, config.get("lora_alpha", rank)
    for pattern, value in patterns.items() if isinstance(patterns, dict) else ():
        literal = pattern.removeprefix("^").removesuffix("$").replace("\\.", ".")
        if not _MODULE.fullmatch(literal):
            raise _invalid(lora, f'gives the alpha of its layers by the pattern "{pattern[:100]}", which is no name')
        if name == literal or (pattern[0] != "^" and name.endswith(f".{literal}")):
            said = value
            break
    try:
        alpha = float(said)
    except (TypeError, ValueError, OverflowError):
        alpha = math.nan
    if not math.isfinite(alpha):
        raise _invalid(lora, "gives an alpha that is no number")
    return alpha


def _shaped(
    lora: Lora, name: str, target: nn.Linear | nn.Conv2d, down: torch.Tensor, up: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The two halves as the layer takes them; a convolution of 1 x 1 is a linear layer, and saved as either."""
    if isinstance(target, nn.Linear):
        down, up = (part[..., 0, 0] if part.shape[2:] == (1, 1) else part for part in (down, up))
        takes, gives, kernel = target.in_features, target.out_features, torch.Size()
    else:
        down, up = (part[..., None, None] if part.dim() == 2 else part for part in (down, up))
        takes, gives, kernel = target.in_channels, target.out_channels, torch.Size(target.kernel_size)
    if (
        not down.numel()
        or down.shape[1:] != (takes, *kernel)
        or up.shape[:2] != (gives, down.shape[0])
        or down.dim() != up.dim()
    ):
        shown = " x ".join(f"{tuple(part.shape)}" for part in (up, down))
        problem = f"is for another architecture: {name} is {gives} x {takes} in this model, and {shown} in the file"
        raise _invalid(lora, problem)
    return down, up


def _invalid(lora: Lora, problem: str) -> ApiError:
    message = f"{lora.name} {problem}. Use a LoRA that was trained for this model's family."
    return ApiError("INVALID_ADAPTER", message, field=FIELD, requested=lora.name)
