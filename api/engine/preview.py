"""Small pictures of a generation on its way, without its autoencoder's decoder.

A pixel of the latents becomes one RGB pixel: a weighted sum over the 3 x 3 latents around it and products of its own
channels, a decoder of one layer. Tables of such weights are known for a few autoencoders; here they are fitted by least
squares (ridge), once for each model in memory, so that any autoencoder has them.

They are fitted on drawn pictures (rectangles and ellipses), encoded by the model's own encoder, against the same
pictures made small. Measured on latents of ``demo/shapes`` after the last step against its images made small, mean
difference in levels of 255, and R²:

                                    random smooth      drawn pictures,   the very images that
                                    latents, decoded   encoded           are judged (the bound)
    one pixel, linear               44.1   0.70        36.7   0.75       25.9   0.86
    3 x 3 pixels, linear            36.5   0.78        31.4   0.81       20.3   0.90
    3 x 3 pixels and products       35.2   0.80        26.7   0.86       15.1   0.95

Random latents are none that a picture has, and the decoder makes of them what no picture shows.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch.nn import functional

from api.engine.calls import Cancelled
from api.engine.loader import LoadedModel

log = logging.getLogger("api.engine")

ABOUT = 4
"""Previews of a request that leaves it to us how many."""
_PICTURES, _AT_ONCE = 32, 8
_SIDE = 16
"""Latents along a side of the pictures that are fitted on."""
_FIGURES = 5
_RIDGE = 1e-4
_MOST_PRODUCTS = 16
"""Channels beyond which products are left out: there would be more of them than pixels to fit on."""
_SPREAD = 1.25
"""Latents of pictures may be so much wider than the widest that were fitted on; noisier ones are made as wide."""

OnPreview = Callable[[int, int, np.ndarray], None]
"""Called with step (from 1), total and uint8 (N, h, w, 3): one small picture for each image, in their order."""


class LatentMap:
    """Turns latents into RGB.

    Args:
        latents: (N, C, h, w) of pictures, as the denoiser has them.
        colours: (N, 3, h, w), the same pictures in [0, 1].

    Attributes:
        channels: C.
    """

    def __init__(self, latents: torch.Tensor, colours: torch.Tensor) -> None:
        self.channels = latents.shape[1]
        self._mean = latents.mean((0, 2, 3), keepdim=True)
        self._std = latents.std((0, 2, 3), keepdim=True).clamp(min=1e-12)
        alike = (latents - self._mean) / self._std
        self._widest = _SPREAD * float(_width(alike).max())
        rows = _features(alike).flatten(2).transpose(1, 2).flatten(0, 1).double()
        wanted = colours.flatten(2).transpose(1, 2).flatten(0, 1).double()
        squares = rows.T @ rows
        # the ridge keeps what the pictures do not tell apart from growing; it is as small as they are many
        squares += _RIDGE * len(rows) * torch.eye(len(squares), dtype=torch.float64)
        self._weights = torch.linalg.solve(squares, rows.T @ wanted).T.float()

    def __call__(self, latents: torch.Tensor) -> np.ndarray:
        """uint8 (N, h, w, 3) of latents (N, C, h, w) in any precision, on any device."""
        alike = (latents.detach().to("cpu", torch.float32) - self._mean) / self._std
        # some schedulers hold noise that is many times as wide as any picture's latents
        alike = alike * (self._widest / _width(alike)).clamp(max=1)
        rgb = torch.einsum("kf,nfhw->nhwk", self._weights, _features(alike))
        return rgb.nan_to_num(0).mul(255).round_().clamp_(0, 255).to(torch.uint8).numpy()


class Previews:
    """Makes the previews of one job, after the steps that it asked for.

    Nothing here can fail the job, or change what it makes: where a model's latents are not known to be a picture's
    (several frames, no autoencoder, another way of packing) there are none, and the log says so once.

    Args:
        model: keeps the map once it is fitted.
        pipe: the job's own, of which the autoencoder is called.
        size: width and height of the images, where they are known.
        every: a preview after so many steps; 0: about four in all.
        tell: called with each.
    """

    def __init__(
        self, model: LoadedModel, pipe: Any, size: tuple[int | None, int | None], every: int, tell: OnPreview
    ) -> None:
        self._model, self._pipe, self._size, self._every, self._tell = model, pipe, size, every, tell
        self._off = False

    def prepare(self) -> None:
        """Fit the map if that was not done yet. Ahead of the first step, so that steps stay as long as they are.

        Raises:
            Cancelled: the job is to stop.
        """
        if "vae" in self._model.latent_maps:
            return
        try:
            found = fit(self._pipe.vae, int(self._pipe.vae_scale_factor))
        except Cancelled:
            raise
        except torch.OutOfMemoryError:
            log.warning("no memory for previews of %s at the moment", self._model.ref.model_id)
        except Exception as fault:  # any kind of autoencoder, or none
            log.info("%s gives no previews (%s: %s)", self._model.ref.model_id, type(fault).__name__, str(fault)[:200])
            self._model.latent_maps["vae"] = None
        else:
            # of two jobs that fit at once, the first one's stays: they are the same
            self._model.latent_maps.setdefault("vae", found)

    def after(self, step: int, total: int, latents: Any) -> None:
        """Tell a preview, if it is time for one. ``step`` counts from 1."""
        found = self._model.latent_maps.get("vae")
        every = self._every or max(1, -(-total // ABOUT))
        if found is None or self._off or step % every:
            return
        try:
            pictures = found(self._unpacked(latents, found.channels))
        except (AttributeError, TypeError, ValueError, RuntimeError) as fault:  # latents are as each pipeline likes
            log.info("a job has no previews (%s: %s)", type(fault).__name__, str(fault)[:200])
            self._off = True
        else:
            self._tell(step, total, pictures)

    def _unpacked(self, latents: Any, channels: int) -> torch.Tensor:
        """Latents as (N, C, h, w).

        Raises:
            Exception: they are something else.
        """
        if latents.ndim == 3:  # FLUX and its like hold 2 x 2 latents as one token
            width, height = self._size
            latents = self._pipe._unpack_latents(latents, height, width, self._pipe.vae_scale_factor)
        if latents.ndim != 4 or latents.shape[1] != channels:
            raise ValueError(f"latents of shape {tuple(latents.shape)}")
        return latents


def fit(vae: Any, factor: int) -> LatentMap:
    """The map for an autoencoder; the same each time.

    Args:
        vae: called through ``encode``.
        factor: pixels along a side for each latent.

    Raises:
        Exception: it is none that makes latents (N, C, h, w) of RGB pictures.
    """
    generator = torch.Generator().manual_seed(0)
    pictures = torch.cat([_picture(_SIDE * factor, generator) for _ in range(_PICTURES)])
    parts = []
    for some in pictures.split(_AT_ONCE):
        coded = vae.encode((some * 2 - 1).to(vae.device, vae.dtype))
        parts.append(_mode(coded).detach().to("cpu", torch.float32))
    latents = _as_denoised(torch.cat(parts), vae.config)
    if latents.ndim != 4 or latents.shape[2:] != (_SIDE, _SIDE):
        raise ValueError(f"latents of shape {tuple(latents.shape)} for pictures of {tuple(pictures.shape)}")
    if not latents.isfinite().all():
        raise ValueError("latents that are not finite")
    return LatentMap(latents, functional.avg_pool2d(pictures, factor))


def _mode(coded: Any) -> Any:
    """What the different autoencoders of diffusers give."""
    if hasattr(coded, "latent_dist"):
        return coded.latent_dist.mode()
    return coded.latents if hasattr(coded, "latents") else coded.latent


def _as_denoised(latents: torch.Tensor, config: Any) -> torch.Tensor:
    """The autoencoder's latents at the denoiser's scale: the inverse of what pipelines do before they decode."""
    mean, std = config.get("latents_mean"), config.get("latents_std")
    scale, shift = config.get("scaling_factor") or 1.0, config.get("shift_factor") or 0.0
    if mean is not None and std is not None:
        return (latents - _per_channel(mean)) * scale / _per_channel(std)
    return (latents - shift) * scale


def _per_channel(values: Any) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float32).flatten().view(1, -1, 1, 1)


def _width(latents: torch.Tensor) -> torch.Tensor:
    """(N, 1, 1, 1): how far the latents of each picture are spread."""
    return latents.flatten(1).std(1).clamp(min=1e-6).view(-1, 1, 1, 1)


def _features(latents: torch.Tensor) -> torch.Tensor:
    """(N, F, h, w): the 3 x 3 latents around each, the products of its channels, and one."""
    count, channels, height, width = latents.shape
    around = functional.unfold(functional.pad(latents, (1, 1, 1, 1), mode="replicate"), 3)
    parts = [around.view(count, -1, height, width)]
    if channels <= _MOST_PRODUCTS:
        first, second = torch.triu_indices(channels, channels)
        parts.append(latents[:, first] * latents[:, second])
    return torch.cat([*parts, torch.ones_like(latents[:, :1])], 1)


def _picture(side: int, generator: torch.Generator) -> torch.Tensor:
    """(1, 3, side, side) in [0, 1]: rectangles and ellipses over each other, each of one colour."""

    def drawn(*shape: int) -> torch.Tensor:
        return torch.rand(*shape, generator=generator)

    def colour() -> torch.Tensor:
        return (drawn(1, 3, 1, 1) * 1.6 - 0.3).clamp(0, 1)  # full colours as often as those between

    along = (torch.arange(side) + 0.5) / side
    y, x = along[:, None], along[None, :]
    picture = colour().expand(1, 3, side, side)
    for number in range(_FIGURES):
        across, down = drawn(2)
        wide, high = 0.08 + 0.3 * drawn(2)
        dx, dy = (x - across).abs() / wide, (y - down).abs() / high
        inside = torch.maximum(dx, dy) < 1 if number % 2 else dx**2 + dy**2 < 1
        picture = torch.where(inside, colour(), picture)
    return picture
