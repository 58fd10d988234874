"""The models that can be served: those bundled with the repository and those under MODELS_DIR."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import msgspec

from api.errors import ApiError
from api.models.names import check_model_id, folder_name, is_model_id, model_id_of
from api.settings import BUNDLED_MODELS, Settings

BUNDLED_ORG = "demo"
_WHOLE_FILE = 16 * 2**20
_ENDS = 64 * 2**10


class InstalledModel(msgspec.Struct, frozen=True):
    """What a model's configuration files say, read before any of its weights.

    Attributes:
        model_id: its name.
        folder: where it lies.
        revision: fingerprint of its files.
        class_name: the pipeline class it was saved as.
        components: names of the parts that are there.
        scheduler: class name of the model's own scheduler.
        size_multiple: widths and heights must be divisible by this.
        text_layers: hidden layers of its (first) text encoder, 0 without one.
        default_size: side length in pixels it makes when none is asked for, where known.
        bytes: size of its weights on disk.
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


class Library:
    """Finds installed models.

    Args:
        settings: gives MODELS_DIR.
    """

    def __init__(self, settings: Settings) -> None:
        self._models_dir = settings.models_dir
        self._known: set[str] = set()
        self._read: dict[Path, tuple[int, InstalledModel]] = {}

    def find(self, model_id: str, field: str = "callInputs.MODEL_ID") -> InstalledModel:
        """Look a model up by name.

        Raises:
            ApiError: INVALID_INPUTS for an unsafe name, MODEL_NOT_FOUND, MODEL_BROKEN.
        """
        check_model_id(model_id, field)
        org, _, name = model_id.rpartition("/")
        for folder in ([BUNDLED_MODELS / name] if org == BUNDLED_ORG else []) + [
            self._models_dir / folder_name(model_id)
        ]:
            if _is_model(folder):
                return self._inspect(model_id, folder)
        raise ApiError(
            "MODEL_NOT_FOUND",
            f'"{model_id}" is not installed here. Save it with diffusers as {folder_name(model_id)}/ in MODELS_DIR.',
            field=field,
            requested=model_id,
            available=self.names(),
        )

    def has_read(self, model_id: str) -> bool:
        """Whether ``find`` will answer without reading more than two file times."""
        return model_id in self._known

    def names(self) -> list[str]:
        """Every model that can be asked for."""
        bundled = [f"{BUNDLED_ORG}/{folder.name}" for folder in _folders(BUNDLED_MODELS)]
        installed = [model_id_of(folder.name) for folder in _folders(self._models_dir)]
        return sorted({name for name in bundled + installed if is_model_id(name)})

    def all(self) -> list[InstalledModel]:
        """Every model that can be read; broken ones are left out."""
        found = []
        for name in self.names():
            try:
                found.append(self.find(name))
            except ApiError:
                continue
        return found

    def _inspect(self, model_id: str, folder: Path) -> InstalledModel:
        try:
            changed = max(p.stat().st_mtime_ns for p in (folder, folder / "model_index.json"))
            cached = self._read.get(folder)
            if cached and cached[0] == changed:
                return cached[1]
            model = _read_folder(model_id, folder)
        except (OSError, msgspec.DecodeError, LookupError, TypeError, ValueError) as fault:
            raise ApiError(
                "MODEL_BROKEN",
                f'The folder of "{model_id}" is not a complete diffusers model ({type(fault).__name__}: {fault}).',
                field="callInputs.MODEL_ID",
                requested=model_id,
            ) from fault
        self._read[folder] = (changed, model)
        self._known.add(model_id)
        return model


def _is_model(folder: Path) -> bool:
    """Whether a folder is one of a model; one that may not be looked into is none."""
    try:
        return (folder / "model_index.json").is_file()
    except OSError:
        return False


def _folders(root: Path) -> list[Path]:
    try:
        return [folder for folder in root.iterdir() if not folder.name.startswith(".") and _is_model(folder)]
    except OSError:
        return []


def _config(folder: Path, name: str) -> dict[str, Any]:
    path = folder / name
    return msgspec.json.decode(path.read_bytes(), type=dict[str, Any]) if path.is_file() else {}


def _read_folder(model_id: str, folder: Path) -> InstalledModel:
    index = msgspec.json.decode((folder / "model_index.json").read_bytes(), type=dict[str, Any])
    components = {
        name: value
        for name, value in index.items()
        if not name.startswith("_") and isinstance(value, list) and value != [None, None]
    }
    for name, (_, class_name) in components.items():
        if not isinstance(class_name, str):
            raise TypeError(f"{name} names no class")
        if not (folder / name).is_dir():
            raise ValueError(f"{name} ({class_name}) is missing")
    vae = _config(folder, "vae/config.json")
    factor = 2 ** (len(vae["block_out_channels"]) - 1) if "block_out_channels" in vae else 8
    denoiser = _config(folder, "transformer/config.json") or _config(folder, "unet/config.json")
    sample = denoiser.get("sample_size")
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    return InstalledModel(
        model_id=model_id,
        folder=folder.resolve(),
        revision=_fingerprint(folder, files),
        class_name=index["_class_name"],
        components=frozenset(components),
        scheduler=components["scheduler"][1],
        # a transformer works on 2x2 patches of latents; a UNet pipeline asks for multiples of 8
        size_multiple=factor * 2 if "transformer" in components else max(8, factor),
        text_layers=int(_config(folder, "text_encoder/config.json").get("num_hidden_layers", 0)),
        default_size=sample * factor if isinstance(sample, int) else None,
        bytes=sum(p.stat().st_size for p in files if p.suffix in (".safetensors", ".bin")),
    )


def _fingerprint(folder: Path, files: list[Path]) -> str:
    """Twelve hex digits of SHA-256 over names, sizes and contents (the ends of large files)."""
    digest = hashlib.sha256()
    for path in files:
        size = path.stat().st_size
        digest.update(f"{path.relative_to(folder).as_posix()}\0{size}\0".encode())
        with path.open("rb") as file:
            if size <= _WHOLE_FILE:
                digest.update(file.read())
            else:
                digest.update(file.read(_ENDS))
                file.seek(-_ENDS, 2)
                digest.update(file.read(_ENDS))
    return digest.hexdigest()[:12]
