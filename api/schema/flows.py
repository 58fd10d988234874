"""What one generation of a request gets from the one before it."""

from __future__ import annotations

import msgspec

IMAGES, LATENTS = "images", "latents"
"""What can be handed over."""
UPSCALERS = ("lanczos", "bicubic", "latent")
"""How images are made larger between two passes: the first two are Pillow's, over pixels; ``latent`` is bilinear
interpolation of latents, ``torch.nn.functional.interpolate(mode="bilinear", align_corners=False, antialias=False)``,
which is what AUTOMATIC1111's web UI calls Latent."""


class Handover(msgspec.Struct, frozen=True):
    """How a generation takes over from the one before it.

    Attributes:
        name: what its part of the flow is called: ``hires`` or ``refiner``.
        what: ``images``, uint8 as they would be answered; or ``latents``, as the pipeline gives them for
            ``output_type="latent"``, on the device and in the precision in which it computed them.
        size: width and height in pixels that they are brought to first; None: as they are.
        upscaler: how, of ``UPSCALERS``.
        factor: pixels along a side for each latent.
    """

    name: str
    what: str
    size: tuple[int, int] | None = None
    upscaler: str = ""
    factor: int = 8
