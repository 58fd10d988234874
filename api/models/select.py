"""Which files of a repository in diffusers' layout a pipeline needs.

The layout (diffusers, "Model files and layouts"): ``model_index.json`` at the root names the components,
each component lies in a folder of its name. Weights are named ``BASE[.VARIANT][-NNNNN-of-NNNNN].FORMAT``;
sharded ones have an index beside them. Older files carry the variant behind the shard number, or before
``index`` in the name of the index: both are accepted.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import PurePosixPath
from typing import Any, NamedTuple

import msgspec

from api.errors import ApiError
from api.models.manifest import WEIGHTLESS, is_safe_path
from api.models.parts import CONFIG, is_file

MODEL_INDEX = "model_index.json"
PRECISION_FIELD = "callInputs.MODEL_PRECISION"

_SHARD = r"-(?P<shard>\d{5})-of-(?P<shards>\d{5})"
_WEIGHTS = re.compile(
    rf"(?P<base>[^.]+?)(?:\.(?P<variant>[^./]+?))?(?:{_SHARD})?(?:\.(?P<old_variant>[^./-]+))?"
    r"\.(?P<format>safetensors|bin)"
)
_INDEX = re.compile(
    r"(?P<base>[^.]+)\.(?:(?P<before>[^.]+)\.)?(?P<format>safetensors|bin)"
    r"(?:\.(?P<old_variant>[^.]+))?\.index(?:\.(?P<variant>[^.]+))?\.json"
)
# What diffusers and transformers save under; a folder may hold another tool's weights beside them.
_SAVED_AS = ("diffusion_pytorch_model", "model", "pytorch_model")
# A pickle that a trainer or another runtime left behind is not weights.
_NOT_WEIGHTS = re.compile(r"(training_args|optimizer|scheduler|random_states|rng_state|openvino)[^/]*\.bin")
_OTHER_WEIGHTS = """.ckpt .pt .pth .pkl .pickle .msgpack .h5 .onnx .onnx_data .pb .xml .gguf .ggml .tflite .mlmodel
    .mlpackage .npz .npy .engine .plan .ot .mil .data .bin .safetensors"""
# code among them: nothing is run from a repository
_NOT_READ = """.png .jpg .jpeg .webp .gif .svg .bmp .tif .tiff .avif .mp4 .webm .mov .avi .mp3 .wav .md .rst .pdf .html
    .ipynb .zip .tar .zst .7z .py .pyc .sh .lock .log"""
_LEFT_OUT = frozenset(f"{_OTHER_WEIGHTS} {_NOT_READ}".split())
_SHOWN = 50
_OTHER_FRAMEWORKS = (".msgpack", ".onnx", ".xml", ".h5", ".ckpt", ".pt", ".pth", ".gguf", ".mlmodel", ".tflite")


class Selection(msgspec.Struct, frozen=True):
    """The files to fetch.

    Attributes:
        files: paths relative to the root of the repository, sorted.
        variant: ``fp16`` or ``bf16`` when weights of that variant are among them, else empty.
        needs_conversion: some weights are only there as ``.bin`` pickles.
        plain: components whose weights come without the variant that was asked for; they are cast on load.
    """

    files: tuple[str, ...]
    variant: str
    needs_conversion: bool
    plain: tuple[str, ...] = ()


class _Kind(NamedTuple):
    format: str
    variant: str


class _Group:
    """The files of one folder, one base name, one format and one variant."""

    def __init__(self) -> None:
        self.single: str | None = None
        self.shards: dict[int, dict[int, str]] = {}
        self.indexes: list[str] = []

    def files(self) -> list[str] | None:
        """One whole set of weights, or None."""
        if self.single is not None:
            return [self.single]
        for total, found in sorted(self.shards.items()):
            # shards that no index lists cannot be loaded
            if self.indexes and set(found) == set(range(1, total + 1)):
                return [*found.values(), *self.indexes]
        return None


def select_files(names: Iterable[str], model_index: Mapping[str, Any], precision: str) -> Selection:
    """Choose the files of a pipeline.

    For ``fp16`` and ``bf16`` each component's files of that variant are taken where there is a whole set of
    them, else its plain files. ``fp32`` and the empty precision never take a variant. Within that,
    safetensors come before ``.bin``.

    Args:
        names: every file of the repository, relative, with ``/``.
        model_index: the content of ``model_index.json``; empty when there is none.
        precision: ``""``, ``fp32``, ``fp16`` or ``bf16``.

    Raises:
        ApiError: MODEL_BROKEN: not diffusers' layout (``available`` lists the single-file checkpoints), a
            component without weights that can be used (``available`` lists the precisions there are, if
            any), or a name that leads out of the folder.
    """
    listing = sorted(set(names))
    if MODEL_INDEX not in listing or not model_index.get("_class_name"):
        raise _no_layout(listing)
    wanted = precision if precision in ("fp16", "bf16") else ""
    files = {MODEL_INDEX}
    plain: list[str] = []
    got_variant = converts = False
    for component, class_name in components(model_index).items():
        inside = _inside(component, class_name, listing)
        if not inside:
            raise _broken(f'its component "{component}" ({class_name}) is missing')
        for name in inside:
            if not is_safe_path(name):
                raise _broken(f"a file has the unsafe name {name[:200]!r}")
        files.update(name for name in inside if not _left_out(name))
        kinds = _weights(component, str(model_index[component][0]), class_name, inside, wanted, files)
        variants = {kind.variant for kind in kinds}
        got_variant = got_variant or (wanted != "" and wanted in variants)
        if wanted and "" in variants:
            plain.append(component)
        converts = converts or any(kind.format == "bin" for kind in kinds)
    return Selection(tuple(sorted(files)), wanted if got_variant else "", converts, tuple(sorted(plain)))


def select_part(names: Iterable[str], part: str, precision: str) -> Selection:
    """Choose the files of one part of a pipeline, which is saved by itself: its configuration and its weights.

    Args:
        names: as for ``select_files``.
        part: its folder, ``.`` for the root; or a file.
        precision: as for ``select_files``.

    Raises:
        ApiError: MODEL_BROKEN: there is no such part, or it has no weights that can be used.
    """
    listing = sorted(set(names))
    if is_file(part):
        if part not in listing or not is_safe_path(part):
            there = [name for name in listing if is_file(name)]
            raise _broken(f"it has no file {part}", available=there[:_SHOWN])
        return Selection((part,), "", needs_conversion=False)
    before = "" if part == "." else f"{part}/"
    inside = [name for name in listing if name.startswith(before) and "/" not in name[len(before) :]]
    if f"{before}{CONFIG}" not in inside or not all(map(is_safe_path, inside)):
        whole = " it is a whole pipeline, which goes into MODEL_ID" if MODEL_INDEX in listing else ""
        raise _broken(f"there is no {before}{CONFIG}, so it is not one part of a pipeline{whole and ':'}{whole}")
    wanted = precision if precision in ("fp16", "bf16") else ""
    groups = _groups(inside)
    whole_sets = {key: found for key, group in groups.items() if (found := group.files()) is not None}
    kind = _best(whole_sets, wanted)
    if kind is None:
        raise _unusable("it", wanted, groups, {kind for _, kind in whole_sets}, inside)
    files = {name for name in inside if not _left_out(name)}
    for base in _bases(whole_sets, kind):
        files.update(whole_sets[base, kind])
    return Selection(tuple(sorted(files)), wanted if kind.variant else "", kind.format == "bin")


def components(model_index: Mapping[str, Any]) -> dict[str, str]:
    """The parts that a pipeline was saved with: name to class name; those saved as null are left out."""
    return {
        name: str(value[1])
        for name, value in model_index.items()
        if not name.startswith("_") and isinstance(value, list) and len(value) >= 2 and value[0] and value[1]
    }


def _inside(component: str, class_name: str, listing: list[str]) -> list[str]:
    # MultiControlNetModel saves its members as siblings: controlnet, controlnet_1, controlnet_2
    several = r"(?:_\d+)?" if class_name.startswith("Multi") else ""
    folder = re.compile(re.escape(component) + several + "/")
    return [name for name in listing if folder.match(name)]


def _left_out(name: str) -> bool:
    path = PurePosixPath(name)
    hidden = any(part.startswith(".") for part in path.parts)
    # the index of a set of weights goes with the set
    return hidden or path.suffix.lower() in _LEFT_OUT or _INDEX.fullmatch(path.name) is not None


def _weights(
    component: str, library: str, class_name: str, inside: list[str], wanted: str, files: set[str]
) -> set[_Kind]:
    """Add one set of weights for each folder of the component; return what kinds they are."""
    chosen: set[_Kind] = set()
    there: set[_Kind] = set()
    own = False
    folders: dict[str, list[str]] = {}
    for name in inside:
        folders.setdefault(name.rpartition("/")[0], []).append(name)
    for folder, members in folders.items():
        groups = _groups(members)
        whole = {key: found for key, group in groups.items() if (found := group.files()) is not None}
        there.update(kind for _, kind in whole)
        kind = _best(whole, wanted)
        if kind is not None:
            chosen.add(kind)
            own = own or folder == component
            for base in _bases(whole, kind):
                files.update(whole[base, kind])
        elif groups and "/" not in folder:
            raise _unusable(_named(component, class_name), wanted, groups, there)
    # a class from elsewhere that keeps no configuration keeps no weights either
    known = library in ("diffusers", "transformers") or f"{component}/config.json" in inside
    if not own and known and not WEIGHTLESS.search(class_name):
        raise _unusable(_named(component, class_name), wanted, {}, there, inside)
    needed = "scheduler_config.json" if class_name.endswith("Scheduler") else "config.json" if own else None
    if needed and f"{component}/{needed}" not in inside:
        raise _broken(f'its component "{component}" ({class_name}) has no {needed}')
    return chosen


def _groups(members: list[str]) -> dict[tuple[str, _Kind], _Group]:
    groups: dict[tuple[str, _Kind], _Group] = {}
    for name in members:
        file = name.rpartition("/")[2]
        if index := _INDEX.fullmatch(file):
            variant = index["variant"] or index["old_variant"] or index["before"] or ""
            groups.setdefault((index["base"], _Kind(index["format"], variant)), _Group()).indexes.append(name)
        elif (match := _WEIGHTS.fullmatch(file)) and not file.startswith(".") and not _NOT_WEIGHTS.fullmatch(file):
            variant = ".".join(part for part in (match["variant"], match["old_variant"]) if part)
            group = groups.setdefault((match["base"], _Kind(match["format"], variant)), _Group())
            if match["shard"] is None:
                group.single = name
            else:
                group.shards.setdefault(int(match["shards"]), {})[int(match["shard"])] = name
    return {key: group for key, group in groups.items() if group.single or group.shards}


def _best(whole: dict[tuple[str, _Kind], list[str]], wanted: str) -> _Kind | None:
    there = {kind for _, kind in whole}
    for format_ in ("safetensors", "bin"):
        for variant in dict.fromkeys((wanted, "")):
            if _Kind(format_, variant) in there:
                return _Kind(format_, variant)
    return None


def _bases(whole: dict[tuple[str, _Kind], list[str]], kind: _Kind) -> list[str]:
    there = [base for base, found in whole if found and (base, kind) in whole]
    for known in _SAVED_AS:
        if known in there:
            return [known]
    return sorted(set(there))


def _broken(why: str, field: str = "callInputs.MODEL_ID", available: list[str] | None = None) -> ApiError:
    return ApiError("MODEL_BROKEN", f"The repository cannot be used: {why}.", field=field, available=available)


def _no_layout(listing: list[str]) -> ApiError:
    if CONFIG in listing and any(name.startswith("diffusion_pytorch_model.") for name in listing):
        return _broken("it is one part of a pipeline, not a pipeline; a ControlNet goes into callInputs.controlnets")
    single = [n for n in listing if "/" not in n and n.lower().endswith((".safetensors", ".ckpt"))]
    if single:
        return _broken(
            "it has no model_index.json, only single-file checkpoints; name one with CHECKPOINT_URL", available=single
        )
    return _broken("it has no model_index.json, so it is not a diffusers pipeline")


def _named(component: str, class_name: str) -> str:
    return f'its component "{component}" ({class_name})'


def _unusable(
    part: str,
    wanted: str,
    groups: dict[tuple[str, _Kind], _Group],
    whole: set[_Kind],
    inside: list[str] | None = None,
) -> ApiError:
    variants = sorted({kind.variant for kind in whole} & {"fp16", "bf16"})
    if variants:
        asked = wanted or "fp32"
        why = f"{part} has no weights for precision {asked}; set MODEL_PRECISION to one that it has"
        return _broken(why, PRECISION_FIELD, variants)
    if any(kind.variant in ("", wanted) for _, kind in groups):
        return _broken(f"{part} has shards of weights, but not all of them or no index")
    others = sorted({s for n in inside or () if (s := PurePosixPath(n).suffix.lower()) in _OTHER_FRAMEWORKS})
    only = f", only {', '.join(others)}" if others else ""
    return _broken(f"{part} has no safetensors or .bin weights{only}")
