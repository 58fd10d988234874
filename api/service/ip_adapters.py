"""What a request with IP-Adapters gets: their pictures and scales, or what is wrong with them."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from api.errors import ApiError
from api.models.adapter_header import Shapes, read_shapes
from api.models.description import InstalledModel
from api.models.part_refs import PartRef, read_part, repeated
from api.models.parts import config_in
from api.models.refs import SourceRef
from api.schema.catalogue import catalogue
from api.schema.generation import IpAdapter
from api.service.additions import Added, Wanted
from api.service.inputs import MAX_PICTURES
from api.settings import Settings

PICTURE = "ip_adapter_image"
ENCODER = "image_encoder"
_FIELD = "callInputs.ip_adapters"
_PREFIX = "ip_adapter_"
_SAID = ("scale", "encoder")
_MOST_SCALE = 10.0
_HEADER = 2**24


class Adapted(NamedTuple):
    """What there is of the IP-Adapters in a request.

    Attributes:
        inputs: the ``modelInputs`` without the pictures.
        pictures: as they were sent, those of the first adapter first.
        adapters: for the worker.
    """

    inputs: dict[str, Any]
    pictures: list[str]
    adapters: tuple[IpAdapter, ...]


def read(options: dict[str, Any], settings: Settings, ref: SourceRef) -> list[Wanted]:
    """The files that checked ``callInputs`` name, and the image encoder that goes with them.

    Raises:
        ApiError: INVALID_INPUTS.
    """
    found, encoders = list[Wanted](), dict[SourceRef, Wanted]()
    for number, text in enumerate(options.get("ip_adapters", ())):
        field = f"{_FIELD}[{number}]"
        part = read_part(text, field, settings, ref.precision, known=_SAID, single=True)
        _scale(part, field)
        found.append(Wanted(f"{_PREFIX}{number}", field, part))
        encoder = _encoder(part, field, settings, ref.precision)
        encoders.setdefault(encoder.source, Wanted(ENCODER, field, encoder))
    if len(encoders) > 1:
        message = "All IP-Adapters of a request look through one image encoder; name it with #encoder=."
        raise ApiError("INVALID_INPUTS", message, field=_FIELD)
    return [*found, *encoders.values()]


def check(model_inputs: dict[str, Any], model: InstalledModel, pipeline: str, added: Sequence[Added]) -> Adapted | None:
    """The adapters of a request, and their pictures; None where it has none.

    Args:
        model_inputs: as they were sent.
        model: what they are added to.
        pipeline: that was chosen.
        added: all that the request adds.

    Raises:
        ApiError: INVALID_INPUTS, MISSING_INPUT, NOT_SUPPORTED, PIPELINE_NOT_SUPPORTED.
    """
    files = [one for one in added if one.wanted.name.startswith(_PREFIX)]
    if not files:
        return None
    if pipeline not in catalogue().ip_adapters:
        message = f"{pipeline} takes no IP-Adapters; Stable Diffusion and SDXL do."
        raise ApiError("PIPELINE_NOT_SUPPORTED", message, field=_FIELD, requested=pipeline)
    encoder = next(one for one in added if one.wanted.name == ENCODER)
    for one in files:
        _check_fit(one, model, encoder)
    inputs = dict(model_inputs)
    pictures = _pictures(inputs.pop(PICTURE, None), len(files))
    adapters = tuple(
        IpAdapter(
            str(one.model.folder / one.model.part),
            str(one.model.folder),
            one.model.revision,
            _scale(one.wanted.ref, one.wanted.field),
            len(looked_at),
        )
        for one, looked_at in zip(files, pictures, strict=True)
    )
    return Adapted(inputs, list(itertools.chain(*pictures)), adapters)


def again(added: Sequence[Added]) -> dict[str, Any]:
    """What ``$meta`` says of them: names that mean the same versions."""
    files = [one for one in added if one.wanted.name.startswith(_PREFIX)]
    if not files:
        return {}
    encoder = next(one for one in added if one.wanted.name == ENCODER)
    named = [PartRef(one.wanted.ref.source, {**one.wanted.ref.said, "encoder": encoder.again}) for one in files]
    return {
        "ip_adapters": [repeated(ref, one.model.revision) for ref, one in zip(named, files, strict=True)],
        "ip_adapter_versions": [one.model.revision for one in files],
    }


def _scale(part: PartRef, field: str) -> float:
    text = part.said.get("scale", "1")
    try:
        scale = float(text)
    except ValueError:
        scale = math.nan
    if not -_MOST_SCALE <= scale <= _MOST_SCALE:
        message = f"#scale= must be a number from -{_MOST_SCALE:g} to {_MOST_SCALE:g}."
        raise ApiError("INVALID_INPUTS", message, field=field, requested=text[:50])
    return scale


def _encoder(part: PartRef, field: str, settings: Settings, precision: str) -> PartRef:
    """The image encoder that is named with an adapter, or else the one where its repository has it."""
    named, source = part.said.get("encoder"), part.source
    if named:
        return read_part(named, field, settings, precision)
    if source.url is not None:
        message = "A URL leads to one file: name the image encoder with #encoder=owner/repository/folder."
        raise ApiError("INVALID_INPUTS", message, field=field)
    folder, _, name = source.part.rpartition("/")
    # the layout of h94/IP-Adapter: the files of SDXL that look through the encoder of the others say so
    folder = "models" if "vit-h" in name and folder.startswith("sdxl") else folder
    place = f"{folder}/{ENCODER}" if folder else ENCODER
    return PartRef(SourceRef(source.model_id, source.repo, source.revision, precision, part=place), {})


def _check_fit(one: Added, model: InstalledModel, encoder: Added) -> None:
    """Whether a file is an IP-Adapter, and looks through such an encoder into such a model."""
    path = one.model.folder / one.model.part
    if not path.is_file():
        return  # it is not here yet
    shapes, field, name = _shapes(path), one.wanted.field, f"{one.shown}/{one.model.part}"
    image = {key.partition(".")[2]: shape for key, shape in shapes.items() if key.startswith("image_proj.")}
    keys = [shape for key, shape in shapes.items() if key.startswith("ip_adapter.") and key.endswith("to_k_ip.weight")]
    if not image or not keys or not all(keys):
        message = f"{name} is no IP-Adapter: it has no weights called image_proj.… and ip_adapter.…"
        raise ApiError("INVALID_INPUTS", message, field=field, requested=name)
    if _is_of_faces(image):
        message = f"{name} takes the embedding of a face, which is not computed here; use one that takes pictures."
        raise ApiError("NOT_SUPPORTED", message, field=field, requested=name)
    theirs = config_in(model.folder / "unet").get("cross_attention_dim")
    if isinstance(theirs, int) and keys[0][-1] != theirs:
        message = (
            f"{name} was made for another kind of model than {model.model_id}: it has {keys[0][-1]} values for each "
            f"token, the model has {theirs}."
        )
        raise ApiError("INVALID_INPUTS", message, field=field, requested=name)
    config = config_in(encoder.model.folder / encoder.model.part)
    if not config.get("image_size") or not encoder.model.class_name.startswith("CLIPVision"):
        message = f"{encoder.shown}/{encoder.model.part} is no image encoder of CLIP."
        raise ApiError("INVALID_INPUTS", message, field=field, requested=encoder.model.class_name or None)
    entry, value = next(
        (kind for kind in (("proj.weight", "projection_dim"), ("proj.0.weight", "hidden_size"),
                           ("proj_in.weight", "hidden_size")) if kind[0] in image), ("", ""),
    )  # fmt: skip
    if entry and image[entry] and isinstance(config.get(value), int) and image[entry][-1] != config[value]:
        message = (
            f"{name} looks through another image encoder than {encoder.shown}/{encoder.model.part}: it takes "
            f"{image[entry][-1]} values, that gives {config[value]}. Name the right one with #encoder=."
        )
        raise ApiError("INVALID_INPUTS", message, field=field, requested=name)


def _is_of_faces(image: dict[str, Any]) -> bool:
    """Whether an adapter takes a face's embedding, which another library computes; told apart as diffusers does."""
    if any(key.startswith("perceiver_resampler.") for key in image):
        return True
    return "norm.weight" in image and not {"proj.weight", "proj.3.weight"} & image.keys()


def _shapes(path: Path) -> Shapes:
    """The shapes in a safetensors file, which is whole; nothing for one that is none."""
    try:
        return read_shapes(path, _HEADER)
    except ValueError:
        return {}


def _pictures(sent: Any, count: int) -> list[list[str]]:
    """For each adapter its pictures: one adapter takes all there are, several take an item each."""
    field = f"modelInputs.{PICTURE}"
    if sent is None or sent == []:
        raise ApiError("MISSING_INPUT", "An IP-Adapter needs a picture to look at.", field=field)
    items = sent if isinstance(sent, list) else [sent]
    flat = all(isinstance(item, str) for item in items)
    found = [items] if count == 1 and flat else [item if isinstance(item, list) else [item] for item in items]
    if not all(item and isinstance(one, str) for item in found for one in item or [None]):
        message = "Must be an image, or a list with an item for each IP-Adapter: an image, or a list of images."
        raise ApiError("INVALID_INPUTS", message, field=field)
    if len(found) != count:
        message = f"There is to be one, or a list of them, for each IP-Adapter: {count}, not {len(found)}."
        raise ApiError("INVALID_INPUTS", message, field=field, requested=len(found))
    if sum(map(len, found)) > MAX_PICTURES:
        raise ApiError("LIMIT_EXCEEDED", f"At most {MAX_PICTURES} pictures for IP-Adapters.", field=field)
    return found
