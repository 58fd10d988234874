"""Linear layers whose weights are quantized, over plain tensors.

What quantizes and multiplies is torchao's and bitsandbytes'; what is held are plain tensors, and never tensors of a
class of theirs: these lie in one buffer with the rest of their part, are pinned, copied, taken over and brought for a
call like any others, and are counted to the byte before they are read.

They are all of whole numbers, scales too (the bits of a float32): a module is asked what it computes in by the first of
its floating parameters.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from api.engine.quantization import BLOCK, computes_fp8, steers
from api.errors import ApiError
from api.schema.generation import QUANTIZED_BY

_SCALE = torch.int32
_NOISY = ("torchao", "bitsandbytes", "torch.utils._pytree")


class QuantizedLinear(nn.Linear):
    """``nn.Linear`` over quantized weights.

    Args:
        kind: ``int8``, ``fp8`` or ``nf4``.
        like: what it takes the place of; its bias is kept.
        dtype: that the model computes in.
        path: where that is in its component.

    Attributes:
        qdata: int8, (out, in), of nf4 (out, in / 2): the weights, whatever they are the bits of.
        scale: int32, (out, 1), of nf4 (out, in / 64): the bits of float32 scales.
        weight: the weights as they would be without: what reads them instead of calling the layer gets what it expects.
    """

    def __init__(self, kind: str, like: nn.Linear, dtype: torch.dtype, path: str = "") -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = like.in_features, like.out_features
        self.kind, self.steers = kind, steers(path)
        self.computed_in = dtype
        for name, (shape, held_in) in stored(kind, self.out_features, self.in_features).items():
            self.register_parameter(name, nn.Parameter(torch.empty(shape, dtype=held_in, device="meta"), False))
        self.register_parameter("bias", like.bias)
        self.training = like.training

    @property
    def weight(self) -> Any:
        """(out, in), in what the model computes in: torchao's own kind of tensor, or a plain one."""
        return _KINDS[self.kind].weight(self)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """As ``nn.Linear``."""
        return _KINDS[self.kind].apply(self, x)

    def extra_repr(self) -> str:
        """As ``nn.Linear``, and the kind."""
        return f"{super().extra_repr()}, kind={self.kind}"


def has_quantized(module: nn.Module) -> bool:
    """Whether any layer of a module is quantized."""
    return any(isinstance(part, QuantizedLinear) for part in module.modules())


def computes_in(layer: nn.Module) -> torch.dtype:
    """What a linear layer or a convolution computes in; a quantized weight is not made whole to be asked."""
    return layer.computed_in if isinstance(layer, QuantizedLinear) else layer.weight.dtype  # type: ignore[return-value,union-attr]


def stored(kind: str, rows: int, columns: int) -> dict[str, tuple[tuple[int, int], torch.dtype]]:
    """Shape and dtype of what is held in place of a weight of (rows, columns)."""
    if kind == "nf4":
        return {"qdata": ((rows, columns // 2), torch.int8), "scale": ((rows, columns // BLOCK), _SCALE)}
    return {"qdata": ((rows, columns), torch.int8), "scale": ((rows, 1), _SCALE)}


def quantize(kind: str, weight: torch.Tensor) -> dict[str, torch.Tensor]:
    """What is held in place of a weight.

    Args:
        kind: ``int8``, ``fp8`` or ``nf4``.
        weight: (out, in), floating, on any device.

    Raises:
        ApiError: NOT_SUPPORTED: the package is not there, or does not run here.
    """
    qdata, scale = _KINDS[kind].quantize(weight)
    shapes = stored(kind, *weight.shape)
    return {
        "qdata": qdata.view(torch.int8).view(shapes["qdata"][0]),
        "scale": scale.float().contiguous().view(_SCALE).view(shapes["scale"][0]),
    }


class _Int8:
    @staticmethod
    def quantize(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        made = _torchao().Int8Tensor.from_hp(weight, _torchao().PerRow())
        return made.qdata, made.scale

    @staticmethod
    def weight(layer: QuantizedLinear) -> Any:
        block = [1, layer.in_features]
        return _torchao().Int8Tensor(layer.qdata.detach(), _scale(layer), block, layer.computed_in)

    @staticmethod
    def apply(layer: QuantizedLinear, x: torch.Tensor) -> torch.Tensor:
        weight = _Int8.weight(layer)
        # torchao multiplies before it scales: sums of whole numbers up to 127 are more than fp16 can hold
        return F.linear(x, weight.dequantize() if x.dtype == torch.float16 else weight, layer.bias)


class _Fp8:
    @staticmethod
    def quantize(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        # the kernel is said: by itself it would be another where another package happens to be installed
        torchao = _torchao()
        made = torchao.Float8Tensor.from_hp(
            weight, granularity=torchao.PerRow(), kernel_preference=torchao.KernelPreference.TORCH
        )
        return made.qdata, made.scale

    @staticmethod
    def weight(layer: QuantizedLinear) -> Any:
        return _Fp8.tensor(layer, activations=False)

    @staticmethod
    def tensor(layer: QuantizedLinear, activations: bool) -> Any:
        torchao = _torchao()
        return torchao.Float8Tensor(
            layer.qdata.detach().view(torch.float8_e4m3fn),
            _scale(layer),
            block_size=[1, layer.in_features],
            mm_config=torchao.fp8_matmul if activations else None,
            act_quant_kwargs=torchao.fp8_activations if activations else None,
            kernel_preference=torchao.KernelPreference.TORCH,
            dtype=layer.computed_in,
        )

    @staticmethod
    def apply(layer: QuantizedLinear, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, _Fp8.tensor(layer, not layer.steers and computes_fp8(x.device, x.dtype)), layer.bias)


class _Nf4:
    @staticmethod
    def quantize(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        qdata, state = _bitsandbytes().functional.quantize_4bit(weight.contiguous(), blocksize=BLOCK, quant_type="nf4")
        return qdata, state.absmax

    @staticmethod
    def state(layer: QuantizedLinear) -> Any:
        return _bitsandbytes().functional.QuantState(
            absmax=_scale(layer).flatten(),
            shape=torch.Size((layer.out_features, layer.in_features)),
            blocksize=BLOCK,
            quant_type="nf4",
            dtype=layer.computed_in,
        )

    @staticmethod
    def weight(layer: QuantizedLinear) -> Any:
        return _bitsandbytes().functional.dequantize_4bit(_Nf4.packed(layer), _Nf4.state(layer))

    @staticmethod
    def packed(layer: QuantizedLinear) -> torch.Tensor:
        return layer.qdata.detach().view(torch.uint8).view(-1, 1)

    @staticmethod
    def apply(layer: QuantizedLinear, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = _bitsandbytes().matmul_4bit(x, _Nf4.packed(layer), _Nf4.state(layer), bias=layer.bias)
        return found


_KINDS: dict[str, Any] = {"int8": _Int8, "fp8": _Fp8, "nf4": _Nf4}


def _scale(layer: QuantizedLinear) -> torch.Tensor:
    return layer.scale.detach().view(torch.float32)


class _Torchao:
    """What is taken from torchao; it is imported with the first weight that is quantized, which takes a second."""

    def __init__(self) -> None:
        from torchao.float8.inference import Float8MMConfig
        from torchao.quantization.granularity import PerRow
        from torchao.quantization.quantize_.common import KernelPreference
        from torchao.quantization.quantize_.workflows import Float8Tensor, Int8Tensor, QuantizeTensorToFloat8Kwargs

        self.PerRow, self.KernelPreference = PerRow, KernelPreference
        self.Int8Tensor, self.Float8Tensor = Int8Tensor, Float8Tensor
        self.fp8_matmul = Float8MMConfig(use_fast_accum=True)
        self.fp8_activations = QuantizeTensorToFloat8Kwargs(
            granularity=PerRow(), mm_config=self.fp8_matmul, kernel_preference=KernelPreference.TORCH
        )


@functools.cache
def _torchao() -> Any:
    return _imported("torchao", _Torchao)


@functools.cache
def _bitsandbytes() -> Any:
    def found() -> Any:
        import bitsandbytes

        return bitsandbytes

    return _imported("bitsandbytes", found)


def _imported(package: str, found: Callable[[], Any]) -> Any:
    for name in _NOISY:  # of kernels that are for other machines
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        return found()
    except Exception as fault:  # absent, or built for another torch
        raise unusable(package, fault) from fault


def unusable(package: str, fault: Exception | None = None) -> ApiError:
    """What a client is told who asks for a kind whose package cannot be used."""
    kinds = [kind for kind, needed in QUANTIZED_BY.items() if needed == package]
    why = f"cannot be used here ({str(fault).strip()[:200]})" if fault else "is not installed here"
    message = (
        f"QUANTIZE={'|'.join(kinds)} needs {package}, which {why}. Install it with pip install '.[quantize]', or send "
        "QUANTIZE none."
    )
    return ApiError("NOT_SUPPORTED", message, field="callInputs.QUANTIZE")
