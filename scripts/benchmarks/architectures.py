"""Models of real size with random weights, for what depends on bytes and modules and not on pictures.

Their configurations are those that checkpoints are converted with, or in ``configurations.py``; their text encoders
have the keys that published checkpoints have. They are made once and kept in ``BENCH_MODELS``, or a temporary folder.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers

from api.engine.convert.families import lay_out
from api.engine.convert.writing import write
from scripts.benchmarks import configurations

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
_POOL = 2**24
_DONE = "complete"


def root() -> Path:
    """Where the models are kept."""
    named = os.environ.get("BENCH_MODELS")
    folder = Path(named) if named else Path(tempfile.gettempdir()) / "bench-models"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def model(family: str, precision: str, seed: int, size: str = "real") -> Path:
    """The folder of a model, made if it is not there.

    Args:
        family: ``sd1``, ``sdxl`` or another one that checkpoints are converted to; ``flux``.
        precision: of its files: ``fp32``, ``fp16`` or ``bf16``.
        seed: two models of one family and precision differ by it.
        size: ``real``; ``tiny``: of a few hundred KB; for ``flux`` also ``cut``: with a quarter of its blocks.
    """
    folder = root() / f"{family}{'' if size == 'real' else f'-{size}'}-{precision}-{seed}"
    if (folder / _DONE).exists():
        return folder
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    index = configurations.lay_out_flux(folder) if family == "flux" else lay_out(family, folder)
    configurations.resize(family, size, folder)
    (folder / "model_index.json").write_text(json.dumps(index, indent=1))
    pool = _Pool(DTYPES[precision], seed)
    for name, (library, class_name) in (item for item in index.items() if isinstance(item[1], list)):
        config = folder / name / "config.json"
        if config.exists():
            diffusers_own = library == "diffusers"
            file = folder / name / ("diffusion_pytorch_model.safetensors" if diffusers_own else "model.safetensors")
            shapes = _shapes(library, class_name, json.loads(config.read_text()))
            weights: dict[str, torch.Tensor] = {key: pool.weight(key, shape) for key, shape in shapes.items()}
            if class_name.startswith("CLIPText"):
                weights["text_model.embeddings.position_ids"] = torch.arange(77)[None]
            write(file, weights, lambda _: None)
    (folder / _DONE).touch()
    return folder


def _shapes(library: str, class_name: str, config: dict[str, Any]) -> dict[str, torch.Size]:
    own = {key: tensor.shape for key, tensor in on_meta(library, class_name, config).state_dict().items()}
    if not class_name.startswith("CLIPText"):
        # tied to ``shared``, and not in published files
        return {key: shape for key, shape in own.items() if key != "encoder.embed_tokens.weight"}
    own = {key: shape for key, shape in own.items() if not key.endswith("position_ids")}
    return {
        key if key.startswith(("text_model.", "text_projection.")) else f"text_model.{key}": shape
        for key, shape in own.items()
    }


def on_meta(library: str, class_name: str, config: dict[str, Any]) -> torch.nn.Module:
    """A module that has shapes and no memory."""
    with torch.device("meta"):
        if library == "diffusers":
            made: torch.nn.Module = getattr(diffusers, class_name).from_config(config)
            return made
        cls = getattr(transformers, class_name)
        own: torch.nn.Module = cls(cls.config_class.from_dict(config))
        return own


class _Pool:
    """The same random numbers again and again, from another place each time: a billion new ones take minutes."""

    def __init__(self, dtype: torch.dtype, seed: int) -> None:
        self._generator = torch.Generator().manual_seed(seed)
        self._numbers = torch.randn(_POOL, generator=self._generator).mul_(0.02).to(dtype)

    def weight(self, key: str, shape: torch.Size) -> torch.Tensor:
        """Of a norm about 1, as in every trained model: else all that comes after it is next to nothing."""
        drawn = self.draw(shape)
        return drawn + 1 if len(shape) == 1 and key.endswith(".weight") else drawn

    def draw(self, shape: torch.Size) -> torch.Tensor:
        """A tensor over the pool's own numbers where they suffice."""
        count = shape.numel()
        if count > _POOL // 2:
            return self._numbers.repeat(-(-count // _POOL))[:count].reshape(shape)
        begin = int(torch.randint(_POOL - count, (), generator=self._generator))
        return self._numbers[begin : begin + count].reshape(shape)
