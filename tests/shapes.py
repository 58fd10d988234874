"""The demo model in every layout and precision that models come in, and in versions that draw something else."""

from __future__ import annotations

import io
import json
import shutil
import tarfile
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from api.models.archive_pack import pack
from tests.checkpoints import demo_checkpoint
from tests.checkpoints import save as save_checkpoint
from tests.running import ROOT

SHAPES = ROOT / "models" / "shapes"


def plain(folder: Path) -> Path:
    shutil.copytree(SHAPES, folder)
    return folder


def other(folder: Path, number: float = 1) -> Path:
    """Another model: its pictures differ from the demo model's, and from those of another number."""
    path = plain(folder) / "unet" / "diffusion_pytorch_model.safetensors"
    weights = load_file(path)
    weights["conv_out.bias"] = weights["conv_out.bias"] + 0.05 * number
    save_file(weights, path)
    return folder


def half(folder: Path, *, keep_plain: bool) -> Path:
    """With weights of the variant fp16, beside the plain ones or in their place."""
    for path in plain(folder).glob("*/*.safetensors"):
        halves = {k: v.half() if v.is_floating_point() else v for k, v in load_file(path).items()}
        save_file(halves, path.with_suffix(".fp16.safetensors"))
        if not keep_plain:
            path.unlink()
    return folder


def sharded(folder: Path) -> Path:
    """Each component's weights in three files and an index."""
    for path in plain(folder).glob("*/*.safetensors"):
        weights, stem = load_file(path), path.stem
        names = sorted(weights)
        where: dict[str, str] = {}
        for shard in range(3):
            name = f"{stem}-{shard + 1:05}-of-00003.safetensors"
            mine = names[shard::3]
            save_file({k: weights[k] for k in mine}, path.with_name(name), {"format": "pt"})
            where |= dict.fromkeys(mine, name)
        total = sum(v.numel() * v.element_size() for v in weights.values())
        index = {"metadata": {"total_size": total}, "weight_map": where}
        path.with_name(f"{stem}.safetensors.index.json").write_text(json.dumps(index))
        path.unlink()
    return folder


def pickled(folder: Path) -> Path:
    """Only ``.bin`` files, as many older repositories are."""
    for path in plain(folder).glob("*/*.safetensors"):
        name = "pytorch_model.bin" if path.stem == "model" else f"{path.stem}.bin"
        torch.save(load_file(path), path.with_name(name))
        path.unlink()
    return folder


def checkpoint(path: Path, dtype: torch.dtype = torch.float32) -> Path:
    """The demo model as one file in the original layout, ``.safetensors`` or ``.ckpt``."""
    return save_checkpoint(demo_checkpoint(SHAPES, dtype), path)


def zst(folder: Path) -> bytes:
    out = io.BytesIO()
    pack(folder, out, lambda phase, done, total: None)
    return out.getvalue()


def tar(folder: Path, mode: str = "w", top: str = "") -> bytes:
    """``w`` or ``w:gz``; ``top``: the folder inside that holds everything."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode=mode) as archive:
        archive.add(folder, arcname=top or ".")
    return out.getvalue()


def tar_of(*members: tuple[tarfile.TarInfo, bytes]) -> bytes:
    """A tar of exactly these members."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        for info, content in members:
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return out.getvalue()
