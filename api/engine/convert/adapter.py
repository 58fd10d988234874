"""A LoRA or a textual inversion that ``torch.save`` wrote, as safetensors."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from api.engine.convert.reading import read_tensors
from api.engine.convert.writing import bytes_of, write


def convert(source: Path, target: Path, report: Callable[[int, int], None]) -> None:
    """Write its tensors under their names; what the web UI keeps in ``string_to_param`` is called ``emb_params``.

    Raises:
        ApiError: MODEL_BROKEN.
        OSError: a file cannot be read or written.
    """
    tensors = read_tensors(source, "The adapter", inner={"string_to_param": "emb_params"})
    done, total = 0, bytes_of(tensors.values())
    report(done, total)

    def wrote(count: int) -> None:
        nonlocal done
        done += count
        report(done, total)

    write(target, tensors, wrote)
