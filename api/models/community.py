"""Community pipelines of diffusers: code in one file, fetched from diffusers' own mirror, in the installed version.

It is only fetched, and later run by a worker, where the operator allows it. What it takes is read from its text; this
process runs none of it.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import re
import secrets
from pathlib import Path

import msgspec

from api.errors import ApiError
from api.models import hub
from api.models.signatures import component_names, inputs_of
from api.models.sources.remote import hub_token
from api.schema.catalogue import Build, Input, catalogue, nearest
from api.schema.generation import Code
from api.settings import Settings

MIRROR = "diffusers/community-pipelines-mirror"
METHODS = ("text2img", "img2img", "inpaint", "text_to_image", "image_to_image", "image_variation")
"""What pipelines call the methods that generate, where they have several."""
FIELD = "callInputs.PIPELINE"
_NAME = re.compile(r"[a-z][a-z0-9_]{0,99}")


class Community(msgspec.Struct, frozen=True):
    """A community pipeline, as its text tells it.

    Attributes:
        name: of its file.
        code: where it lies, and what it is called there.
        build: what it is built from.
        methods: that generate, ``__call__`` among them, to their inputs.
    """

    name: str
    code: Code
    build: Build
    methods: dict[str, dict[str, Input]]


def is_community(name: str) -> bool:
    """Whether a pipeline's name can be that of a community pipeline's file; classes begin with a capital."""
    return _NAME.fullmatch(name) is not None


def community(name: str, settings: Settings) -> Community:
    """Have a community pipeline, from the volume or from the hub.

    Args:
        name: of its file, such as ``lpw_stable_diffusion``.
        settings: whether code may be run, where it is kept, and the hub.

    Raises:
        ApiError: REMOTE_CODE_NOT_ALLOWED, NO_SUCH_PIPELINE, PIPELINE_NOT_SUPPORTED: its file holds no one pipeline,
            SOURCE_UNREACHABLE.
    """
    if not settings.allow_remote_code:
        message = (
            f"diffusers has no pipeline {name}. A community pipeline is code from the hub, and this server runs none: "
            "its operator can set ALLOW_REMOTE_CODE=1."
        )
        raise ApiError("REMOTE_CODE_NOT_ALLOWED", message, field=FIELD, requested=name)
    if not is_community(name):
        raise _missing(name)
    version = f"v{catalogue().diffusers}"
    path = settings.models_dir / ".community" / version / f"{name}.py"
    try:
        text = path.read_bytes()
    except FileNotFoundError:
        text = _fetched(name, version, path, settings)
    return _read(name, path, text)


def _fetched(name: str, version: str, path: Path, settings: Settings) -> bytes:
    if not settings.runtime_downloads:
        message = f"The community pipeline {name} is not here, and this server downloads nothing."
        raise ApiError("NO_SUCH_PIPELINE", message, field=FIELD, requested=name)
    endpoint = settings.hf_endpoint or None
    text = hub.dataset_file(MIRROR, f"{version}/{name}.py", hub_token(settings) or None, endpoint)
    if text is None:
        raise _missing(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{secrets.token_hex(8)}")
    part.write_bytes(text)
    part.replace(path)
    return text


def _missing(name: str) -> ApiError:
    known = catalogue()
    hint = nearest(name, known.pipelines)
    message = f"diffusers {known.diffusers} has neither a pipeline nor a community pipeline of that name.{hint}"
    return ApiError("NO_SUCH_PIPELINE", message, field=FIELD, requested=name)


@functools.lru_cache(maxsize=64)
def _read(name: str, path: Path, text: bytes) -> Community:
    try:
        tree = ast.parse(text)
    except (SyntaxError, ValueError, RecursionError) as fault:
        raise _unfit(name, f"its file is no Python: {str(fault)[:200]}") from fault
    classes = {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}
    bases = {child: [_last(base) for base in node.bases] for child, node in classes.items()}
    derived = [child for child in classes if _is_pipeline(child, bases)]
    pipelines = [child for child in derived if not any(child in bases[other] for other in derived)]
    if len(pipelines) != 1:
        raise _unfit(name, f"its file holds {len(pipelines)} pipelines")
    methods = {}
    for method in ("__call__", *METHODS):
        found = _inherited(pipelines[0], method, classes, bases)
        if isinstance(found, ast.FunctionDef):
            methods[method] = inputs_of(found)
        elif found and method == "__call__":
            methods[method] = catalogue().pipelines[found]
    made = _inherited(pipelines[0], "__init__", classes, bases)
    if not methods or made is None:
        raise _unfit(name, "what it takes cannot be told")
    build = component_names(made) if isinstance(made, ast.FunctionDef) else catalogue().builds[made]
    code = Code(str(path), hashlib.sha256(text).hexdigest(), pipelines[0])
    return Community(name, code, build, methods)


def _unfit(name: str, why: str) -> ApiError:
    message = f"The community pipeline {name} cannot be run: {why}."
    return ApiError("PIPELINE_NOT_SUPPORTED", message, field=FIELD, requested=name)


def _last(node: ast.expr) -> str:
    return node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""


def _is_pipeline(name: str, bases: dict[str, list[str]], depth: int = 8) -> bool:
    """Whether a class of a file is a pipeline: one of its bases is, in the file or in diffusers."""
    return depth > 0 and any(
        _is_pipeline(base, bases, depth - 1) if base in bases else base.endswith("Pipeline")
        for base in bases.get(name, [])
    )


def _inherited(
    name: str, method: str, classes: dict[str, ast.ClassDef], bases: dict[str, list[str]], depth: int = 8
) -> ast.FunctionDef | str | None:
    """A method of a class of the file, or the class of diffusers that it comes from; None: there is none."""
    own = [node for node in classes[name].body if isinstance(node, ast.FunctionDef) and node.name == method]
    if own:
        return own[-1]
    for base in bases[name]:
        if base in classes and depth > 0:
            if (found := _inherited(base, method, classes, bases, depth - 1)) is not None:
                return found
        elif base in catalogue().pipelines:
            return base
    return None
