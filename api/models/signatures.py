"""What functions take, read from their text: types as far as their annotations tell them, and defaults."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from typing import Any

from api.schema.catalogue import Build, Input

_SIMPLE = {"str": "string", "int": "integer", "float": "number", "bool": "boolean", "dict": "object", "Dict": "object"}
_UNIONS = ("Optional", "Union")
_LISTS = ("List", "list", "Tuple", "tuple")
_LIST_OF = {"string": "strings", "integer": "integers", "number": "numbers", "image": "images"}
_OURS = re.compile(
    r"generator|output_type|return_dict|callback.*|is_cancelled_callback|_.*|.*ip_adapter.*|.*_embeds|(.*_)?latents|seed"
)
_PICTURES = ("image", "mask_image", "init_image")
_SPARE = ("safety_checker", "feature_extractor", "image_encoder")


def inputs_of(function: ast.FunctionDef) -> dict[str, Input]:
    """The inputs of a generation method that can be sent, by name."""
    found = {}
    for argument, default in _arguments(function):
        types = _kinds(argument.annotation) if argument.annotation else set()
        if argument.arg in _PICTURES:
            types = {"image"}  # annotated as tensors as well, and pictures all the same
        if types and not _OURS.fullmatch(argument.arg):
            value = None if default is None else _literal(default)
            found[argument.arg] = Input(tuple(sorted(types)), value, default is None)
    return found


def component_names(function: ast.FunctionDef) -> Build:
    """The components that a constructor takes."""
    required: dict[str, tuple[str, ...]] = {}
    optional = []
    for argument, default in _arguments(function):
        if argument.annotation is not None and _kinds(argument.annotation):
            continue
        if default is not None or argument.arg in _SPARE:
            optional.append(argument.arg)
        else:
            required[argument.arg] = ()
    return Build(required, optional=tuple(optional))


def _arguments(function: ast.FunctionDef) -> Iterator[tuple[ast.arg, ast.expr | None]]:
    """Each argument but ``self``, with its default."""
    plain = [*function.args.posonlyargs, *function.args.args]
    defaults = [None] * (len(plain) - len(function.args.defaults)) + list(function.args.defaults)
    yield from list(zip(plain, defaults, strict=True))[1:]
    yield from zip(function.args.kwonlyargs, function.args.kw_defaults, strict=True)


def _literal(node: ast.expr) -> Any:
    try:
        value = ast.literal_eval(node)
    except (ValueError, TypeError, SyntaxError, RecursionError):
        return None
    return value if isinstance(value, str | int | float | bool | list) else None


def _kinds(node: ast.expr) -> set[str]:
    """The JSON types that an annotation admits."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        try:
            return _kinds(ast.parse(node.value, mode="eval").body)
        except SyntaxError:
            return set()
    if isinstance(node, ast.BinOp):
        return _kinds(node.left) | _kinds(node.right)
    if isinstance(node, ast.Subscript):
        return _of_many(_named(node.value), node.slice)
    name = _named(node)
    if name == "PipelineImageInput":
        return {"image", "images"}
    return {"image"} if name == "Image" else {_SIMPLE[name]} if name in _SIMPLE else set()


def _of_many(name: str, inner: ast.expr) -> set[str]:
    items = inner.elts if isinstance(inner, ast.Tuple) else [inner]
    if name in _UNIONS:
        return set().union(*map(_kinds, items))
    if name in _LISTS:
        return {_LIST_OF[kind] for kind in _kinds(items[0]) if kind in _LIST_OF}
    return {"object"} if name in ("Dict", "dict") else set()


def _named(node: ast.expr) -> str:
    return node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""
