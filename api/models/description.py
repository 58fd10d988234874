"""What a model's configuration files say of it, read before any of its weights."""

from __future__ import annotations

import contextlib
import hashlib
import json
from pathlib import Path
from typing import Any

import msgspec

from api.errors import ApiError
from api.models.parts import class_of, configuration, marker

_WHOLE_FILE = 16 * 2**20
_SAMPLES, _SAMPLE = 16, 64 * 2**10
_LARGEST_FACTOR, _LARGEST_SAMPLE = 256, 2**16
_WEIGHTS = (".safetensors", ".bin")
_CODECS = ("vae", "movq", "vqvae", "vqgan")
_EVEN = ("UNet2DConditionModel", "FluxTransformer2DModel", "CogView4Transformer2DModel")


class InstalledModel(msgspec.Struct, frozen=True):
    """A model that can be served.

    Attributes:
        model_id: its name.
        folder: where it lies.
        revision: the commit, ETag or digest it was installed from, or a fingerprint of its files.
        class_name: the pipeline class it was saved as.
        components: names of the parts that are there.
        scheduler: class name of the model's own scheduler; empty for a model that has several, by other names.
        size_multiple: widths and heights must be divisible by this.
        text_layers: hidden layers of its (first) text encoder, 0 without one.
        default_size: side length in pixels it makes when none is asked for, where known.
        bytes: size of its weights on disk.
        key: its name on the volume; empty for a folder that was put there by hand.
        source: where it was fetched from, without credentials; empty for such a folder.
        predicts: what its denoiser computes: ``epsilon``, ``sample``, ``v_prediction`` or ``flow_prediction``.
        parts: every part that its index names, with its class; an empty one where there is none.
        takes_picture: its denoiser takes a picture beside the latents, as those for inpainting and instructions do.
        learns_variance: its denoiser gives a variance as well, which few schedulers can do anything with.
        part: empty: a whole pipeline. Else what of one it is (``parts``), and ``class_name`` is that part's.
    """

    model_id: str
    folder: Path
    revision: str
    class_name: str
    components: frozenset[str]
    scheduler: str
    size_multiple: int
    text_layers: int
    default_size: int | None
    bytes: int
    key: str = ""
    source: str = ""
    predicts: str = "epsilon"
    parts: dict[str, str] = {}
    takes_picture: bool = False
    learns_variance: bool = False
    part: str = ""

    @property
    def marker(self) -> Path:
        """The file without which it is not there."""
        return marker(self.folder, self.part) if self.part else self.folder / "model_index.json"


def is_model(folder: Path) -> bool:
    """Whether a folder is one of a model; one that may not be looked into is none."""
    try:
        return (folder / "model_index.json").is_file()
    except OSError:
        return False


def describe(
    model_id: str, folder: Path, *, revision: str = "", key: str = "", source: str = "", part: str = ""
) -> InstalledModel:
    """Read a diffusers folder's configuration.

    Args:
        model_id: the name it is asked for by.
        folder: its weights need not be there yet.
        revision: empty: a fingerprint is made of its files.
        key: its name on the volume.
        source: where it came from.
        part: what of a pipeline it is; empty: all of it.

    Raises:
        ApiError: MODEL_BROKEN.
    """
    try:
        if part:
            return _read_part(model_id, folder, revision, key, source, part)
        return _read(model_id, folder, revision, key, source)
    except Exception as fault:  # whatever the files of a stranger make of it: endless numbers, bottomless lists
        raise ApiError(
            "MODEL_BROKEN",
            f'The folder of "{model_id}" is no complete diffusers model ({type(fault).__name__}: {str(fault)[:300]}).',
            field="callInputs.MODEL_ID",
            requested=model_id,
        ) from fault


def _read(model_id: str, folder: Path, revision: str, key: str, source: str) -> InstalledModel:
    index = msgspec.json.decode((folder / "model_index.json").read_bytes(), type=dict[str, Any])
    if not isinstance(index["_class_name"], str):
        raise TypeError("its pipeline is code of its own, which is not run here")
    named = {name: value for name, value in index.items() if not name.startswith("_") and isinstance(value, list)}
    components = {name: value for name, value in named.items() if value != [None, None]}
    for name, (_, class_name) in components.items():
        if not isinstance(class_name, str):
            raise TypeError(f"{name} names no class")
        if not (folder / name).is_dir():
            raise ValueError(f"{name} ({class_name}) is missing")
    if not any(name.endswith("scheduler") for name in components):
        raise ValueError("it has no scheduler")
    factor, patch = _factor(folder, components)
    if factor > _LARGEST_FACTOR:
        raise ValueError("its vae shrinks pictures beyond use")
    denoiser = _config(folder, "transformer/config.json") or _config(folder, "unet/config.json")
    sample = denoiser.get("sample_size")
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    return InstalledModel(
        model_id=model_id,
        folder=folder.resolve(),
        revision=revision or _fingerprint(folder, files),
        class_name=index["_class_name"],
        components=frozenset(components),
        scheduler=components["scheduler"][1] if "scheduler" in components else "",
        # a transformer works on 2x2 patches of latents; a UNet pipeline asks for multiples of 8
        size_multiple=factor * patch if "transformer" in components else max(8, factor),
        text_layers=_text_layers(folder),
        default_size=sample * factor if isinstance(sample, int) and 0 < sample < _LARGEST_SAMPLE else None,
        bytes=sum(p.stat().st_size for p in files if p.suffix in _WEIGHTS),
        key=key,
        source=source,
        predicts=_predicts(folder, components.get("scheduler", ("", ""))[1]),
        parts={name: value[1] or "" for name, value in named.items() if len(value) == 2},
        takes_picture=_takes_picture(denoiser),
        learns_variance=_learns_variance(folder / "scheduler" / "scheduler_config.json"),
    )


def _predicts(folder: Path, scheduler: str) -> str:
    path, settings = folder / "scheduler" / "scheduler_config.json", None
    if path.is_file():
        with contextlib.suppress(ValueError):  # what cannot be read is said when the model is loaded
            settings = json.loads(path.read_text(encoding="utf-8"))  # Infinity is not for msgspec
    settings = settings if isinstance(settings, dict) else {}
    if "Flow" in scheduler or settings.get("use_flow_sigmas") is True:
        return "flow_prediction"
    return str(settings.get("prediction_type") or "epsilon")


def _factor(folder: Path, components: dict[str, Any]) -> tuple[int, int]:
    """How many times smaller than its images a model's latents are; side of a transformer's patch of them."""
    codec = next((name for name in _CODECS if name in components), None)
    if codec is None and components.keys() & {"unet", "transformer"}:
        return 1, 2
    config = _config(folder, f"{codec}/config.json") if codec else {}
    if "encoder_block_out_channels" in config:  # the deep compression autoencoder of Sana
        return 2 ** (len(config["encoder_block_out_channels"]) - 1), 1
    return 2 ** (len(config["block_out_channels"]) - 1) if "block_out_channels" in config else 8, 2


def _takes_picture(denoiser: dict[str, Any]) -> bool:
    """Of those families whose denoisers otherwise give as many channels as they take."""
    given, taken = denoiser.get("out_channels"), denoiser.get("in_channels")
    if denoiser.get("_class_name") not in _EVEN or not isinstance(taken, int) or not isinstance(given, int):
        return False
    return taken > given


def _text_layers(folder: Path) -> int:
    """Of its first text encoder; a refiner of SDXL has only the second one."""
    config = _config(folder, "text_encoder/config.json") or _config(folder, "text_encoder_2/config.json")
    return int(config.get("num_hidden_layers", 0))


def _read_part(model_id: str, folder: Path, revision: str, key: str, source: str, part: str) -> InstalledModel:
    files = sorted(p for p in (folder / part).glob("*") if p.is_file()) or [folder / part]
    return InstalledModel(
        model_id=model_id,
        folder=folder.resolve(),
        revision=revision or _fingerprint(folder, files),
        class_name=class_of(configuration(folder, part)),
        components=frozenset(),
        scheduler="",
        size_multiple=1,
        text_layers=0,
        default_size=None,
        bytes=sum(p.stat().st_size for p in files if p.suffix in _WEIGHTS and p.is_file()),
        key=key,
        source=source,
        part=part,
    )


def _learns_variance(path: Path) -> bool:
    try:  # what schedulers are saved with is no strict JSON: it may hold -Infinity
        config = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(config, dict) and "learned" in str(config.get("variance_type"))


def _config(folder: Path, name: str) -> dict[str, Any]:
    path = folder / name
    return msgspec.json.decode(path.read_bytes(), type=dict[str, Any]) if path.is_file() else {}


def _fingerprint(folder: Path, files: list[Path]) -> str:
    """Twelve hex digits of SHA-256 over names, sizes and contents.

    Of large files a MiB is read, in pieces from the front to the end: of two models, one trained on from the other, the
    ends may be equal.
    """
    digest = hashlib.sha256()
    for path in files:
        size = path.stat().st_size
        digest.update(f"{path.relative_to(folder).as_posix()}\0{size}\0".encode())
        with path.open("rb") as file:
            if size <= _WHOLE_FILE:
                digest.update(file.read())
            else:
                for piece in range(_SAMPLES):
                    file.seek((size - _SAMPLE) * piece // (_SAMPLES - 1))
                    digest.update(file.read(_SAMPLE))
    return digest.hexdigest()[:12]
