"""From the uint8 image on the device to the bytes of a PNG."""

from __future__ import annotations

import io

import torch
from PIL import Image

from api.engine.encode import encode_png
from scripts.benchmarks.gpu.bench import Bench
from scripts.benchmarks.gpu.rows import Row
from scripts.benchmarks.measure import interleaved, median

SECTION = "tail"


def picture(side: int) -> torch.Tensor:
    """uint8 (H, W, 3): smooth structure with grain, as photographs have."""
    generator = torch.Generator().manual_seed(7)
    coarse = torch.randn((1, 3, side // 16, side // 16), generator=generator)
    smooth = torch.nn.functional.interpolate(coarse, (side, side), mode="bicubic")
    grain = torch.randn((1, 1, side, side), generator=generator)
    return (128 + 50 * smooth + 2 * grain).clamp(0, 255).to(torch.uint8)[0].permute(1, 2, 0).contiguous()


def run(bench: Bench) -> None:
    """One size, ours and Pillow's default in turn, both with the copy from the device."""
    side = 64 if bench.size == "tiny" else 1024
    there = picture(side).to(bench.device)

    def ours() -> bytes:
        return encode_png(there.cpu().numpy())

    def pillow() -> bytes:
        out = io.BytesIO()
        Image.fromarray(there.cpu().numpy()).save(out, "PNG")
        return out.getvalue()

    a, b = (median(times) for times in interleaved([ours, pillow], 7))
    sizes = {"bytes": len(ours()), "baseline_bytes": len(pillow())}
    what = f"{side}×{side}, uint8 on the device to PNG"
    bench.add(Row(SECTION, what, a, "ms", b, "Pillow's default PNG", b / a, more=sizes))
