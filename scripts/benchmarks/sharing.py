"""A part that another worker has read, against reading it: several workers with one host tier.

``ours`` maps what lies in the tier. The baseline shares nothing and reads the file into new memory, as a second worker
of its own would: from the page cache, the best case for it. In turn, in one process, on the CPU's copying path.
"""

from __future__ import annotations

import tempfile

import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel

from api.engine.device import Device
from api.engine.loader import PartLoader
from api.engine.parts import HostPart, PartSpec
from api.schema.generation import ModelRef
from api.service.host_keeper import HostKeeper
from api.worker.host_link import HostLink
from scripts.benchmarks.measure import Figure, interleaved, median

_ROUNDS = 7
_LIMIT = 2**33


class _Apart(Device):
    """A CPU to which everything is copied, as to a GPU."""

    def __init__(self) -> None:
        super().__init__("cpu")
        self.shares_host = False


def run() -> list[Figure]:
    """A part of about 0.45 GB."""
    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(0)
        blocks = ("DownBlock2D",) * 3, ("UpBlock2D",) * 3
        unet = UNet2DModel(
            block_out_channels=(256, 512, 768), down_block_types=blocks[0], up_block_types=blocks[1], sample_size=32
        )
        DDPMPipeline(unet, DDPMScheduler()).save_pretrained(folder)
        keeper = HostKeeper()
        keeper.start()
        try:
            return [_measure(ModelRef("bench/part", "main", "fp32", folder), keeper)]
        finally:
            keeper.stop()


def _measure(ref: ModelRef, keeper: HostKeeper) -> Figure:
    links = [HostLink(keeper.connect()) for _ in range(2)]
    for link in links:
        link.settle(_LIMIT)
    first, second = (PartLoader(_Apart(), tier=link) for link in links)
    (spec,) = first.parts(ref)
    private = PartLoader(_Apart())
    there = _read(first, links[0], spec)
    assert there.read
    shared, alone = interleaved([lambda: _read(second, links[1], spec), lambda: private.read(spec)], _ROUNDS, warm_up=1)
    ours, baseline = median(shared), median(alone)
    more = {"bytes": spec.bytes, "shared_ms": shared, "alone_ms": alone}
    against = "a second worker that reads it for itself from the page cache"
    return Figure("sharing.second_worker", ours, baseline, "ms", against, baseline / ours, more)


def _read(loader: PartLoader, link: HostLink, spec: PartSpec) -> HostPart:
    link.claim({loader.named(spec): spec.bytes}, wait=False, over=lambda: False)
    return loader.read(spec)
