"""The ``.bin`` weights of a diffusers folder, as safetensors."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from api.engine.convert.reading import read_tensors
from api.engine.convert.writing import write
from api.errors import ApiError
from api.models.conversion import UNFINISHED

# What diffusers and transformers save under; any other .bin is not weights.
_BASES = {"diffusion_pytorch_model": "diffusion_pytorch_model", "pytorch_model": "model"}
_WEIGHTS = re.compile(rf"(?P<base>{'|'.join(_BASES)})(?P<rest>[.-][^/]*?)?\.bin")
_INDEX = re.compile(
    rf"(?P<base>{'|'.join(_BASES)})(?P<before>\.[^.]+)?\.bin(?P<after>(?:\.[^.]+)?\.index(?:\.[^.]+)?\.json)"
)


def convert(folder: Path, report: Callable[[int, int], None]) -> None:
    """Write each set of ``.bin`` weights as safetensors beside it, then put all in place and delete the ``.bin``.

    Raises:
        ApiError: MODEL_BROKEN.
        OSError: the folder cannot be read or written.
    """
    found = sorted(path for path in folder.rglob("*.bin") if path.is_file() and _WEIGHTS.fullmatch(path.name))
    listed = sorted(path for path in folder.rglob("*.bin*.json") if _INDEX.fullmatch(path.name))
    # what is there already was downloaded so, or put in place before an earlier conversion was killed
    pickles, indexes = (
        {old: new for old in paths if not (new := old.with_name(renamed(old.name))).exists()}
        for paths in (found, listed)
    )
    total, done = sum(path.stat().st_size for path in pickles), 0
    report(done, total)
    for old, new in pickles.items():
        name = old.relative_to(folder).as_posix()
        tensors = read_tensors(old, name)
        before = done

        def wrote(count: int) -> None:
            nonlocal done
            done += count
            report(min(done, total), total)

        write(_unfinished(new), tensors, wrote)
        del tensors
        done = before + old.stat().st_size
        report(done, total)
    for old, new in indexes.items():
        _unfinished(new).write_bytes(_reindexed(old, {path.name for path in found if path.parent == old.parent}))
    for new in [*pickles.values(), *indexes.values()]:
        _unfinished(new).replace(new)
    for old in [*found, *listed]:
        old.unlink()


def renamed(name: str) -> str:
    """The name that weights or their index have as safetensors."""
    if match := _INDEX.fullmatch(name):
        return f"{_BASES[match['base']]}{match['before'] or ''}.safetensors{match['after']}"
    match = _WEIGHTS.fullmatch(name)
    assert match is not None
    return f"{_BASES[match['base']]}{match['rest'] or ''}.safetensors"


def _unfinished(path: Path) -> Path:
    return path.with_name(path.name + UNFINISHED)


def _reindexed(path: Path, shards: set[str]) -> bytes:
    try:
        index = msgspec.json.decode(path.read_bytes(), type=dict[str, Any])
        where = msgspec.convert(index["weight_map"], dict[str, str])
    except (msgspec.DecodeError, KeyError, UnicodeDecodeError) as fault:
        raise ApiError("MODEL_BROKEN", f"{path.name} cannot be read: {fault}.") from fault
    if missing := sorted(set(where.values()) - shards):
        raise ApiError("MODEL_BROKEN", f"{path.parent.name} lacks {missing[0]}, which {path.name} names.")
    index["weight_map"] = {key: renamed(name) for key, name in where.items()}
    return msgspec.json.format(msgspec.json.encode(index), indent=2)
