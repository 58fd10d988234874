"""Which jobs run compiled blocks.

The first job of its kind runs as it always would, on a tree of its own that notes how the denoiser's blocks are called.
What it noted is compiled in another process. Once all of it is loaded, jobs of that kind get a tree over the same
weights whose blocks run the code. A job is of one sort from its beginning to its end: one that meets a call for which
there is no code is run again, without.
"""

from __future__ import annotations

import logging
import threading
import weakref
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from api.engine.attempts import Job, Ran
from api.engine.calls import Cancelled, Ticket
from api.engine.cloning import clone, clone_with
from api.engine.compiled.artifacts import Code, Order, assembled, example, filled, import_compiler, place, tensor_of
from api.engine.compiled.graphs import Graphs
from api.engine.compiled.kinds import Leaf, Seen, Unsuited, look, structure
from api.engine.compiled.preparer import LONGEST, Preparer
from api.engine.loader import LoadedModel
from api.engine.placement import size_of, weights_of
from api.engine.tally import Tally
from api.schema.attention import NATIVE

log = logging.getLogger("api.engine")

EAGER, COMPILED = "eager", "compiled"
DENOISERS = ("unet", "transformer", "transformer_2", "prior")
"""Components whose calls are recorded as graphs: they are called once for each step."""
_CODE = "_compiled_code"
_MISSES = 3
"""Calls without code that jobs of a kind may meet; from then on they run as they are."""
_KINDS = 256
"""Kinds of jobs that are known: sizes are the clients' choice."""
_ORDERS = 1024
"""Compilations that are ordered, each of which is kept; beyond that, requests of new kinds run as they are."""
_SPECS = 64
"""Kinds of calls that one job's may be of: 128 compilations."""


class NotPrepared(Exception):
    """A call for which there is no compiled code, in a job that was to run compiled."""


Spec = tuple[str, Leaf]
"""A block's structure, and the kind of its call."""


@dataclass(eq=False)
class _Kind:
    """What is known of jobs of a kind: ``new``, ``noting``, ``preparing``, ``ready`` or ``eager`` for good."""

    state: str = "new"
    specs: frozenset[Spec] = frozenset()
    misses: int = 0


@dataclass(eq=False)
class _Tree:
    """A model's denoisers in trees of their own, ready to be compiled."""

    components: dict[str, nn.Module]
    key: Hashable
    structures: dict[int, str]
    """Of the blocks of the model's own modules, by ``id``."""


@dataclass(eq=False)
class Noting:
    """What a job's blocks were called with."""

    specs: dict[Spec, nn.Module] = field(default_factory=dict)
    fault: str = ""

    def call(self, block: nn.Module, eager: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Note a call, and make it."""
        if not self.fault:
            try:
                own = vars(block)[_CODE]
                seen = look(type(block).__mro__[1].forward, args, kwargs)  # type: ignore[attr-defined]
                if own.block() is not block:
                    raise Unsuited("the pipeline changes the denoiser")
                self.specs.setdefault((own.structure, seen.spec), block)
            except Unsuited as fault:
                self.fault = str(fault)
        return eager(*args, **kwargs)


@dataclass(eq=False)
class _Own:
    """What a block of a tree knows: who takes its calls, its structure, and itself, to know a copy from it."""

    by: Any
    structure: str
    block: weakref.ref[nn.Module]
    weights: dict[tuple[str, ...], list[torch.Tensor]] = field(default_factory=dict)


class Blocks:
    """Chooses between compiled and other blocks for each job. May be used from any thread.

    Args:
        device: that jobs run on.
        folder: where compiled code is kept.
        versions: of the packages that it depends on.
        on_device: runs something on the device's thread.
        tally: counts what comes of it.
        longest: see ``Preparer``.
    """

    def __init__(
        self,
        device: torch.device,
        folder: Path,
        versions: dict[str, str],
        on_device: Callable[[Callable[[], Any]], Any],
        tally: Tally | None = None,
        longest: float = LONGEST,
    ) -> None:
        self._on_device = on_device
        self._device = device
        self._tally = tally or Tally()
        self._lock = threading.Lock()
        import_compiler(folder)
        self._kinds: dict[Hashable, _Kind] = {}
        self._codes: dict[str, Code | None] = {}
        """By order; None where there is none and will be none."""
        self._calls: dict[tuple[str, Leaf, bool], Code] = {}
        self._orders: dict[str, Order] = {}
        self.preparer = Preparer(device, folder / place(device, versions), self._done, self._tally, longest)

    def close(self) -> None:
        """End what is being prepared."""
        self.preparer.close()

    def counts(self) -> dict[str, int]:
        """How many kinds of jobs are in which state."""
        with self._lock:
            states = [kind.state for kind in self._kinds.values()]
        return {state: states.count(state) for state in ("noting", "preparing", "ready", "eager")}

    def run(
        self,
        run_once: Callable[[LoadedModel, Job, Ticket, str], Ran],
        model: LoadedModel,
        job: Job,
        ticket: Ticket,
        placement: str,
    ) -> Ran:
        """Run a job, once more and without compiled blocks where it meets a call that there is no code for."""
        job.code = None
        try:
            done = run_once(model, job, ticket, placement)
        except NotPrepared as fault:
            log.info("%s: %s; it is run again without compiled blocks", job.request.id, fault)
            self._tally.compiled("missed")
            self._missed(job.code)
        except BaseException:
            self._gave_up_noting(job.code)
            raise
        else:
            self._noted(job.code)
            return done
        job.code, job.eager = None, True
        return run_once(model, job, ticket, placement)

    def chosen(
        self, model: LoadedModel, components: dict[str, Any], attention: str, job: Job
    ) -> tuple[dict[str, Any], str]:
        """A job's components with compiled denoisers where it gets them, and the word for that.

        Args:
            model: that the components are of.
            components: as all else that is asked for has made them.
            attention: its name.
            job: remembers what was chosen; one that ``is_plain``.
        """
        request = job.request
        tree = None if job.eager else self._tree(model, components, attention)
        if tree is None:
            return components, EAGER
        code = request.code.sha256 if request.code else ""
        plain = request.inputs.get("max_sequence_length")
        asked = (tree.key, attention, request.pipeline, code, request.method, size_of(request), plain)
        with self._lock:
            kind = self._kinds.setdefault((asked, bool(request.pictures), request.low_vram), _Kind())
            if len(self._kinds) > _KINDS:
                del self._kinds[next(iter(self._kinds))]
            if kind.state == "ready":
                job.code = kind, None
                return {**components, **tree.components}, COMPILED
            if kind.state != "new" or len(self._orders) >= _ORDERS:
                return components, EAGER
            kind.state = "noting"
        noting = Noting()
        job.code = kind, noting
        return {**components, **self._made(components, tree.structures, noting)}, EAGER

    # --- trees ---

    def _tree(self, model: LoadedModel, components: dict[str, Any], attention: str) -> _Tree | None:
        """A model's denoisers over compiled code; None where a job's are others, or have nothing that repeats."""
        denoisers = {name: part for name, part in components.items() if _repeated(part)}
        name = f"compiled/{attention}/{'/'.join(f'{key}:{id(part)}' for key, part in denoisers.items())}"
        with self._lock:
            if name not in model.variants:
                model.variants[name] = {"tree": self._planted(denoisers)}
            found: _Tree | None = model.variants[name]["tree"]
            return found

    def _planted(self, denoisers: dict[str, Any]) -> _Tree | None:
        structures: dict[int, str] = {}
        try:
            for part in denoisers.values():
                structures |= {id(block): structure(block) for block in _repeated(part)}
        except Unsuited as fault:
            log.info("%s is not compiled: %s", "/".join(denoisers), fault)
            return None
        if not structures:
            return None
        key = tuple((name, type(part).__name__, tuple(structures[id(block)] for block in _repeated(part)))
                    for name, part in denoisers.items())  # fmt: skip
        return _Tree(self._made(denoisers, structures, self), key, structures)

    def _made(self, components: dict[str, Any], structures: dict[int, str], by: Any) -> dict[str, nn.Module]:
        """Copies of the denoisers whose blocks ask somebody first."""
        made = {}
        for name, part in components.items():
            if not (blocks := _repeated(part)):
                continue
            made[name] = clone(part)
            for block, own in zip(blocks, _repeated(made[name]), strict=True):
                cls: Any = type(own)
                own.__class__ = _asking(cls)
                vars(own)[_CODE] = _Own(by, structures[id(block)], weakref.ref(own))
        return made

    # --- calls, on the device's thread ---

    def call(self, block: nn.Module, eager: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Run a block's code.

        Raises:
            NotPrepared: there is none.
        """
        own: _Own = vars(block)[_CODE]
        if own.block() is not block:
            raise NotPrepared("the pipeline changes the denoiser")
        try:
            seen = look(type(block).__mro__[1].forward, args, kwargs)  # type: ignore[attr-defined]
        except Unsuited as fault:
            raise NotPrepared(str(fault)) from None
        code = self._calls.get((own.structure, seen.spec, seen.rows > 1))
        if code is None:
            raise NotPrepared(f"a {type(block).__name__} is called in another way than was noted")
        weights = own.weights.get(code.weights)
        if weights is None:
            weights = own.weights[code.weights] = [tensor_of(block, name) for name in code.weights]
        if seen.rows <= code.most:
            return assembled(code.returns, code.function(*weights, *seen.tensors))
        return assembled(code.returns, self._in_parts(own, seen, code))

    def _in_parts(self, own: _Own, seen: Seen, code: Code) -> list[Any]:
        """A call of more rows than the code takes."""
        parts = []
        for start in range(0, seen.rows, code.most):
            stop = min(start + code.most, seen.rows)
            one = code if stop - start > 1 else self._calls[own.structure, seen.spec, False]
            weights = [tensor_of(own.block(), name) for name in one.weights]  # type: ignore[arg-type]
            tensors = [t[start:stop] if rows else t for t, rows in zip(seen.tensors, seen.dynamic, strict=True)]
            parts.append(one.function(*weights, *tensors))
        return [torch.cat(list(each)) for each in zip(*parts, strict=True)]

    # --- what comes of jobs and of preparations ---

    def _noted(self, code: Any) -> None:
        """A job ran to its end, and noted what it called."""
        if code is None or code[1] is None:
            return
        kind, noting = code
        if noting.fault or not noting.specs or len(noting.specs) > _SPECS:
            why = noting.fault or f"it makes {len(noting.specs)} kinds of calls"
            log.info("requests like this one are not compiled: %s", why)
            with self._lock:
                kind.state = "eager"
            return
        orders = []
        for (digest, spec), block in noting.specs.items():
            empty = _without_weights(block)
            orders += [Order(empty, digest, spec, many) for many in (False, True)]
        with self._lock:
            kind.specs, kind.state = kind.specs | noting.specs.keys(), "preparing"
            new = [order for order in orders if order.key not in self._orders]
            self._orders |= {order.key: order for order in new}
            self._settle()
        for order in new:
            self.preparer.order(order)

    def _gave_up_noting(self, code: Any) -> None:
        if code is not None and code[1] is not None:
            with self._lock:
                code[0].state = "new"

    def _missed(self, code: Any) -> None:
        if code is None:
            return
        with self._lock:
            kind = code[0]
            kind.misses += 1
            # its calls are noted again: what was missed is prepared as well
            kind.state = "new" if kind.misses < _MISSES else "eager"
            if kind.state == "eager":
                log.warning("requests of a kind are called in ever other ways: they are not compiled any more")

    def _done(self, key: str, code: Code | None) -> None:
        """An order came to its end, in the preparer's thread."""
        with self._lock:
            order = self._orders[key]
        if code is not None:
            try:
                self._on_device(partial(_tried, code, order, self._device))
            except Cancelled:
                return
            except Exception as fault:
                log.warning("compiled code of a %s fails here: %s", type(order.block).__name__, fault)
                code = None
        with self._lock:
            self._codes[key] = code
            if code is not None:
                self._calls[order.structure, order.spec, order.many] = code
            self._settle()

    def _settle(self) -> None:
        """Bring the states up to date; the lock is held."""
        there = {(order.structure, order.spec, order.many): self._codes.get(key, self)
                 for key, order in self._orders.items()}  # fmt: skip
        for kind in self._kinds.values():
            if kind.state == "preparing":
                codes = [there[(*spec, many)] for spec in kind.specs for many in (False, True)]
                if None in codes:
                    kind.state = "eager"
                elif all(isinstance(code, Code) for code in codes):
                    kind.state = "ready"
                    log.info("requests of a kind run compiled from now on")


def choose(
    blocks: Blocks | None,
    graphs: Graphs | None,
    model: LoadedModel,
    components: dict[str, Any],
    attention: str,
    job: Job,
    placement: str,
) -> tuple[dict[str, Any], str]:
    """A job's components and the word for them, as ``Blocks.chosen``; what may be recorded is told to the graphs."""
    if not is_plain(job, placement):
        return components, EAGER
    code = EAGER
    if blocks and attention == NATIVE:  # what an export keeps of another kernel's choice is torch's own
        components, code = blocks.chosen(model, components, attention, job)
    if graphs and not (job.code and job.code[1]):  # trees that note calls are gone when their job ends
        for name in DENOISERS:
            if isinstance(part := components.get(name), nn.Module):
                graphs.allow(part)
    return components, code


def is_plain(job: Job, placement: str) -> bool:
    """Whether a job's denoisers are the model's own, with their weights on the device."""
    request = job.request
    changed = request.loras or request.ip_adapters or request.step_cache or request.model.quantize
    return request.compile and not changed and weights_of(placement) == "full"


@cache
def _asking(cls: type[nn.Module]) -> type[nn.Module]:
    """A class over a class of blocks whose calls go to whoever stands in ``_CODE``; of the same name."""

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        eager = cls.forward.__get__(self)
        return vars(self)[_CODE].by.call(self, eager, args, kwargs)

    names = {"__module__": cls.__module__, "__qualname__": cls.__qualname__, "__doc__": cls.__doc__}
    return type(cls.__name__, (cls,), {**names, "forward": forward})


def _repeated(part: Any) -> list[nn.Module]:
    """The blocks of a denoiser that diffusers says repeat in it, those within others left out."""
    names = getattr(part, "_repeated_blocks", None) or () if isinstance(part, nn.Module) else ()
    return [module for module in part.modules() if type(module).__name__ in names] if names else []


def _without_weights(block: nn.Module) -> nn.Module:
    """A copy of a block on ``meta``, of its own class."""
    memo: dict[int, Any] = {}
    for tensor in (*block.parameters(), *block.buffers()):
        empty = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")
        memo[id(tensor)] = nn.Parameter(empty, False) if isinstance(tensor, nn.Parameter) else empty
    own = vars(block)[_CODE]
    memo[id(own)] = own
    copied = _with_tensors(clone_with(block, memo), memo)
    copied.__class__ = type(block).__mro__[1]
    del vars(copied)[_CODE]
    return copied


def _with_tensors(block: nn.Module, memo: dict[int, Any]) -> nn.Module:
    for module in block.modules():
        for registry in (module._parameters, module._buffers):
            for name, tensor in registry.items():
                if tensor is not None:
                    registry[name] = memo[id(tensor)]
    return block


def _tried(code: Code, order: Order, device: torch.device) -> None:
    """Call code once: what is only loaded at a first call is, before a job waits for it."""
    block = filled(order.block, device)
    arguments = example(order.spec, 2 if order.many else 1, device)
    tensors = look(type(block).forward, (), arguments).tensors
    code.function(*(tensor_of(block, name) for name in code.weights), *tensors)
