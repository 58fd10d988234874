"""Compiled code of one kind of call of one structure of blocks: made, kept in a folder, loaded.

Made of ``torch.export``'s graph, in which the weights are arguments, by ``torch._inductor.standalone_compile``: what is
loaded is a function of tensors. Nothing traces, guards or compiles when it is called, and one serves all blocks of the
structure, of every model. (``torch.compile`` itself would trace each block class in the process that serves, and again
for each change that its guards see.)
"""

from __future__ import annotations

import copy
import hashlib
import importlib
import json
import os
import platform
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from api.engine.compiled.kinds import Leaf, Unsuited, build, look

MOST_ROWS = 64
"""Rows of one call of compiled code: the indices of larger ones may not fit in 32 bits. More are several calls."""
_EXAMPLE_ROWS = 4
_INDEX = 2**31 - 1
_DONE = "done.json"


@dataclass(frozen=True)
class Order:
    """What is to be compiled.

    Attributes:
        block: without weights: on ``meta``.
        structure: of it.
        spec: of the call.
        many: for two rows and more; else for one.
    """

    block: nn.Module
    structure: str
    spec: Leaf
    many: bool

    @property
    def key(self) -> str:
        """Of what comes of it."""
        return hashlib.sha256(repr((self.structure, self.spec, self.many)).encode()).hexdigest()[:32]


@dataclass(frozen=True)
class Code:
    """Loaded code.

    Attributes:
        function: takes the weights and the tensors of the call, gives a list of tensors.
        weights: names of the parameters and buffers that it takes first.
        most: rows that it takes.
        returns: how what the block returns is made of the list: an index, None, or a list of these with its type.
    """

    function: Callable[..., Any]
    weights: tuple[str, ...]
    most: int
    returns: Any


def import_compiler(folder: Path) -> None:
    """Import what code is loaded with, before there are jobs: it takes seconds, which they would share.

    Args:
        folder: where Triton keeps what it builds.
    """
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")  # no processes beside a server's
    os.environ.setdefault("TRITON_CACHE_DIR", str(folder / "triton"))
    for name in (
        "torch._inductor.compile_fx",
        "torch._inductor.standalone_compile",
        "torch._functorch._aot_autograd.autograd_cache",
    ):
        importlib.import_module(name)


def place(device: torch.device, versions: dict[str, str]) -> str:
    """A folder's name for what was compiled for a device by these versions."""
    if device.type == "cuda":
        name, capability = torch.cuda.get_device_name(device), str(torch.cuda.get_device_capability(device))
    else:
        name, capability = platform.machine(), torch.backends.cpu.get_cpu_capability()
    what = [device.type, name, capability, sys.version, torch.version.git_version, sorted(versions.items())]
    return f"{device.type}-{hashlib.sha256(repr(what).encode()).hexdigest()[:16]}"


def is_done(folder: Path) -> bool:
    """Whether there is whole code in a folder."""
    return (folder / _DONE).exists()


def make(order: Order, folder: Path, device: torch.device) -> None:
    """Compile.

    Args:
        order: what.
        folder: for what comes of it; made anew.
        device: to compile for.

    Raises:
        Exception: it cannot be.
    """
    block = filled(order.block, device)
    rows = _EXAMPLE_ROWS if order.many else 1
    arguments = example(order.spec, rows, device)
    shapes = None
    if order.many:
        dim = torch.export.Dim("rows", min=2, max=MOST_ROWS)
        shapes = build(order.spec, lambda name, shape, dtype, has_rows: {0: dim} if has_rows else None)
        shapes = {name: None if isinstance(arguments[name], _PLAIN) else shapes[name] for name in arguments}
    returned = block(**arguments)
    program = torch.export.export(block, (), arguments, dynamic_shapes=shapes, strict=False)
    graph, weights, given = program.graph_module, list[str](), list[Any]()
    for spec in program.graph_signature.input_specs:
        if spec.kind.name in ("PARAMETER", "BUFFER"):
            weights.append(str(spec.target))
            given.append(tensor_of(block, str(spec.target)))
        elif spec.kind.name != "USER_INPUT":
            raise Unsuited(f"its graph has an input that is a {spec.kind.name}")
    tensors = look(type(block).forward, (), arguments).tensors
    places = [node for node in graph.graph.nodes if node.op == "placeholder"][len(weights) :]
    taken = [not isinstance(node.meta.get("val"), torch.Tensor) for node in places]
    for node, plain in zip(places, taken, strict=True):
        if plain and node.users:
            raise Unsuited(f"its graph reads {node.name}, which is no tensor")
        if plain:
            graph.graph.erase_node(node)
    if taken.count(False) != len(tensors):
        raise Unsuited("its graph takes other tensors than the call has")
    graph.recompile()
    compiled = torch._inductor.standalone_compile(graph, [*given, *tensors], dynamic_shapes="from_graph")
    compiled.save(path=str(folder), format="unpacked")
    numbers = iter(range(1 << 20))
    about = {
        "weights": weights,
        "most": _most(graph) if order.many else 1,
        "returns": _returns(returned, numbers),
    }
    (folder / "about.json").write_text(json.dumps(about))


def finish(folder: Path) -> None:
    """Say that what is in a folder is whole and was checked."""
    (folder / "about.json").rename(folder / _DONE)


def load(folder: Path, *, checked: bool = True) -> Code:
    """Load what was compiled. Nothing is compiled anew.

    Raises:
        Exception: it is not there, or of no use here.
    """
    about = json.loads((folder / (_DONE if checked else "about.json")).read_text())
    artifact = torch._inductor.CompiledArtifact.load(path=str(folder), format="unpacked")
    return Code(artifact, tuple(about["weights"]), about["most"], about["returns"])


def check(order: Order, folder: Path, device: torch.device) -> None:
    """See that compiled code is as near to what is computed in float32 as the block itself is.

    Raises:
        Unsuited: it is not.
    """
    code, block = load(folder, checked=False), filled(order.block, device)
    weights = [tensor_of(block, name) for name in code.weights]
    exact = filled(order.block, device).to(torch.float32)
    for tensor, source in zip(exact.state_dict().values(), block.state_dict().values(), strict=True):
        tensor.copy_(source)
    for rows in sorted({2, 3, 8, code.most} & set(range(2, code.most + 1))) if order.many else [1]:
        arguments = example(order.spec, rows, device)
        tensors = look(type(block).forward, (), arguments).tensors
        own = _flat(block(**arguments))
        reference = _flat(exact(**{name: _exact(value) for name, value in arguments.items()}))
        theirs = [part for part in code.function(*weights, *tensors) if part is not None]
        for one, other, true in zip(own, theirs, reference, strict=True):
            scale = true.norm().clamp_min(1e-12)
            error, usual = (float((each.float() - true).norm() / scale) for each in (other, one))
            if not error <= 1.2 * usual + 1e-5 or other.shape != one.shape or other.dtype != one.dtype:
                raise Unsuited(f"with {rows} rows it is {error:.2g} off float32, the block itself {usual:.2g}")


def example(spec: Leaf, rows: int, device: torch.device) -> dict[str, Any]:
    """Arguments of a call of this kind, with numbers that were drawn."""
    generator = torch.Generator().manual_seed(0)

    def tensor(name: str, shape: tuple[int, ...], dtype: torch.dtype, has_rows: bool) -> torch.Tensor:
        shape = (rows, *shape) if has_rows else shape
        if not dtype.is_floating_point and not dtype.is_complex:
            return torch.ones(shape, dtype=dtype, device=device)
        return torch.randn(shape, generator=generator).to(device, dtype)

    return build(spec, tensor)


def filled(block: nn.Module, device: torch.device) -> nn.Module:
    """A copy of a block with numbers that were drawn as weights."""
    generator, own = torch.Generator().manual_seed(1), _on(block, device)
    with torch.no_grad():
        for tensor in (*own.parameters(), *own.buffers()):
            if tensor.is_floating_point():
                scale = tensor[0].numel() ** -0.5 if tensor.dim() > 1 else 0.1
                drawn = torch.randn(tensor.shape, generator=generator) * scale
                tensor.copy_(drawn + (1.0 if tensor.dim() < 2 else 0.0))
            else:
                tensor.zero_()
    return own.requires_grad_(False)


def assembled(returns: Any, parts: list[Any]) -> Any:
    """What a block returns, of what its code gives; see ``Code.returns``."""
    if returns is None or isinstance(returns, int):
        return None if returns is None else parts[returns]
    kind, items = returns
    made = [assembled(item, parts) for item in items]
    return made if kind == "list" else tuple(made)


_PLAIN = (bool, int, float, str, type(None))


def _on(block: nn.Module, device: torch.device) -> nn.Module:
    return copy.deepcopy(block).to_empty(device=device)


def tensor_of(block: nn.Module, name: str) -> torch.Tensor:
    """A parameter or buffer by its name."""
    owner, _, last = name.rpartition(".")
    return getattr(block.get_submodule(owner), last)  # type: ignore[no-any-return]


def _returns(value: Any, numbers: Any) -> Any:
    if value is None:
        return None
    if isinstance(value, torch.Tensor):
        return next(numbers)
    if type(value) in (list, tuple):
        return [type(value).__name__, [_returns(item, numbers) for item in value]]
    raise Unsuited(f"it returns a {type(value).__name__}")


def _flat(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    return [] if value is None else [part for item in value for part in _flat(item)]


def _exact(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.float() if value.is_floating_point() else value
    if type(value) in (list, tuple):
        return type(value)(_exact(item) for item in value)
    return {key: _exact(item) for key, item in value.items()} if type(value) is dict else value


def _most(graph: torch.fx.GraphModule) -> int:
    """Rows up to which the graph's indices fit in 32 bits, and up to which all holds that was assumed of their number.

    The code that is loaded checks none of this (``unsafe_skip_cache_dynamic_shape_guards``): it is seen to here.
    """
    import sympy  # type: ignore[import-untyped]  # it comes with torch

    largest, environment, symbol = 1.0, None, None
    for node in graph.graph.nodes:
        value = node.meta.get("val")
        for tensor in value if isinstance(value, list | tuple) else [value]:
            if not isinstance(tensor, torch.Tensor):
                continue
            count = sympy.Integer(1)
            for size in tensor.shape:
                count *= size.node.expr if isinstance(size, torch.SymInt) else size
                if isinstance(size, torch.SymInt) and size.node.expr.is_Symbol:
                    environment, symbol = size.node.shape_env, size.node.expr
            free = sorted(count.free_symbols, key=str)
            largest = max(largest, float(count.subs(dict.fromkeys(free, MOST_ROWS))) / MOST_ROWS)
    most = min(MOST_ROWS, int(_INDEX // largest))
    if environment is None or most < 2:
        raise Unsuited("it has no rows that could be more or less")
    for guard in environment.guards:
        for rows in range(2, most + 1):
            holds = guard.expr.subs(dict.fromkeys(guard.expr.free_symbols, rows))
            if holds is not sympy.true:
                raise Unsuited(f"it would only hold where {guard.expr} for {symbol} rows")
    return most
