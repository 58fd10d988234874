"""A LoRA, a textual inversion or an upscaler that ``torch.save`` wrote, as safetensors."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from api.engine.convert.reading import read_tensors
from api.engine.convert.writing import bytes_of, write

_NESTED = ("model_state_dict", "state_dict", "params_ema", "params-ema", "params", "model", "net")
"""What the weights of upscalers are saved under; of several the first, as spandrel takes them."""


def convert(source: Path, target: Path, report: Callable[[int, int], None], kind: str = "adapter") -> None:
    """Write its tensors under their names; what the web UI keeps in ``string_to_param`` is called ``emb_params``.

    Args:
        source: the file.
        target: the file to write.
        report: called with bytes done and in all.
        kind: ``adapter`` or ``upscaler``.

    Raises:
        ApiError: MODEL_BROKEN.
        OSError: a file cannot be read or written.
    """
    if kind == "upscaler":
        tensors = read_tensors(source, "The upscaler", nested=_NESTED)
    else:
        tensors = read_tensors(source, "The adapter", inner={"string_to_param": "emb_params"})
    done, total = 0, bytes_of(tensors.values())
    report(done, total)

    def wrote(count: int) -> None:
        nonlocal done
        done += count
        report(done, total)

    write(target, tensors, wrote)
