"""What a job holds in place of the modules that it shares with others.

A module's view is a tree of its own over the same parameters and buffers: a node is copied when it is first looked at.
Calls of the view go to the executor, and from there to the shared module, together with those of other jobs. When the
job changed something in its tree, such as attention processors or tiling, they go to that tree instead, alone: what a
job switches is on for itself and for nobody else.
"""

from __future__ import annotations

import contextlib
import functools
import weakref
from collections.abc import Callable
from typing import Any

import torch
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from diffusers.utils import BaseOutput
from torch import nn

from api.engine.calls import Ticket
from api.engine.embeddings import Embeddings
from api.engine.executor import Executor
from api.engine.noise import Seeded

METHODS = ("forward", "encode", "decode", "get_text_features", "get_image_features")
"""What pipelines call on modules and what computes on the device."""

_CODECS = ("encode", "decode")
"""Methods of an autoencoder, which may be held in another precision than the rest."""

_TREE = "_view_tree"
_ABSENT = object()


def view(part: Any, executor: Executor, ticket: Ticket, seed: int = 0, embeddings: Embeddings | None = None) -> Any:
    """The view of one component for one job; what is no module is given as it is.

    Args:
        part: a component of a model, shared by jobs.
        executor: runs its calls.
        ticket: the job.
        seed: for what draws from torch's global random numbers, as ``generate`` of a language model does.
        embeddings: answers calls of text encoders that were made before.
    """
    return _Tree(part, executor, ticket, seed, embeddings).plant() if isinstance(part, nn.Module) else part


class _Children(dict[str, Any]):
    """A module's submodules, copied into the tree one by one when they are looked at."""

    def __init__(self, tree: _Tree, shared: dict[str, nn.Module | None]) -> None:
        super().__init__(shared)
        self._tree = weakref.ref(tree)
        self._shared = set(shared)
        self.changed = False

    def _take(self, name: str) -> Any:
        if name in self._shared:
            self._shared.discard(name)
            super().__setitem__(name, self._tree().copy(super().__getitem__(name)))  # type: ignore[union-attr]
        return super().__getitem__(name)

    def _take_all(self) -> None:
        for name in list(self._shared):
            self._take(name)

    def __getitem__(self, name: str) -> Any:
        return self._take(name)

    def get(self, name: str, default: Any = None) -> Any:
        return self._take(name) if name in self else default

    def values(self) -> Any:
        self._take_all()
        return super().values()

    def items(self) -> Any:
        self._take_all()
        return super().items()

    def __setitem__(self, name: str, value: Any) -> None:
        self._shared.discard(name)
        self.changed = True
        super().__setitem__(name, value)

    def __delitem__(self, name: str) -> None:
        self._shared.discard(name)
        self.changed = True
        super().__delitem__(name)

    def update(self, *args: Any, **kwargs: Any) -> None:
        for name, value in dict(*args, **kwargs).items():
            self[name] = value

    def pop(self, name: str, *default: Any) -> Any:
        if name not in self:
            return super().pop(name, *default)
        value = self._take(name)
        del self[name]
        return value


_Seen = tuple[weakref.ref[nn.Module], dict[str, Any], dict[str, dict[Any, Any]]]
"""A node, and what was in it and in its registries (parameters, hooks, ...) when it was copied."""


class _Tree:
    """A job's own tree of modules over one shared module.

    Held by its root, and refers to it weakly, as all that points upward does: where objects hold each other in a ring,
    they and the weights stay until the garbage collector comes by.
    """

    def __init__(
        self, part: nn.Module, executor: Executor, ticket: Ticket, seed: int, embeddings: Embeddings | None
    ) -> None:
        self.part = part
        self.executor = executor
        self.ticket = ticket
        self.embeddings = embeddings
        self.noise = Seeded(seed)
        self.inside = False
        """Whether a call of the job's own tree is being made: what it calls on itself is part of it."""
        self._diverged = False
        self._copies: dict[int, nn.Module] = {}
        self._seen: list[_Seen] = []

    def plant(self) -> nn.Module:
        """The root of the tree: what the job's pipeline is given."""
        root = self._copy(self.part, _class_of_views(type(self.part)))  # type: ignore[arg-type]
        vars(root)[_TREE] = self
        self._root = weakref.ref(root)
        return root

    def copy(self, module: nn.Module | None) -> Any:
        """A module of the tree for a shared one; the same for the same one."""
        if module is None:
            return None
        if id(module) not in self._copies:
            self._copies[id(module)] = self._copy(module, type(module))
        return self._copies[id(module)]

    def _copy(self, module: nn.Module, cls: type[nn.Module]) -> nn.Module:
        own = object.__new__(cls)
        itself = weakref.ref(own)
        # pipelines cast their VAE up and back around a call; weights that others use stay what they are
        state = {**vars(module), "_apply": lambda *args, **kwargs: itself()}
        registries = {name: value for name, value in state.items() if isinstance(value, dict) and name[0] == "_"}
        registries.pop("_internal_dict", None)  # the configuration, which is replaced and not written to
        children = registries.pop("_modules")
        state |= {name: value.copy() for name, value in registries.items()}
        state["_modules"] = _Children(self, children)
        own.__dict__.update(state)
        self._seen.append((itself, state, {name: state[name].copy() for name in registries}))
        return own

    def diverge(self) -> None:
        """From now on the job's calls are those of its own tree."""
        self._diverged = True

    def _is_changed(self) -> bool:
        return self._diverged or any(map(_differs, self._seen))

    def method(self, name: str) -> Callable[..., Any]:
        """What is to be called: the shared module's method, or that of the job's own tree."""
        if not self._is_changed():
            shared = getattr(self.part, name)
            return _alone(shared, name) if _caches(self.part) else shared  # type: ignore[no-any-return]

        def own(*args: Any, **kwargs: Any) -> Any:
            self.inside = True
            try:
                return getattr(type(self.part), name)(self._root(), *args, **kwargs)
            finally:
                self.inside = False

        own.__name__ = name
        own.runs_alone = True  # type: ignore[attr-defined]
        return own

    @functools.cached_property
    def dtype(self) -> torch.dtype | None:
        """As the shared module says."""
        return getattr(self.part, "dtype", None)

    @functools.cached_property
    def device(self) -> torch.device:
        """As the shared module says."""
        return self.part.device  # type: ignore[return-value]


def _differs(seen: _Seen) -> bool:
    reference, state, registries = seen
    own = reference()
    if own is None:
        return False
    now: dict[str, Any] = vars(own)
    if not _same(now, state) or now["_modules"].changed:
        return True
    return not all(_same(now[name], content) for name, content in registries.items())


def _same(now: dict[Any, Any], then: dict[Any, Any]) -> bool:
    return len(now) - (_TREE in now) == len(then) and all(
        now.get(name, _ABSENT) is value for name, value in then.items()
    )


@functools.cache
def _class_of_views(cls: type[nn.Module]) -> type[nn.Module]:
    """The class of the views of a class of modules: of the same name, pipelines compare and save names."""
    body: dict[str, Any] = {"__module__": cls.__module__, "__qualname__": cls.__qualname__, "to": _stay}
    for name in METHODS:
        if callable(getattr(cls, name, None)):
            body[name] = _handed_over(cls, name)
    if hasattr(cls, "generate"):
        body["generate"] = _generating(cls)
    for name in ("dtype", "device"):
        if hasattr(cls, name):  # without a walk through the tree, which would copy all of it
            body[name] = property(functools.partial(_of_part, name))
    if hasattr(cls, "cache_context"):
        # where no cache between steps is on (``step_cache``), these would look for one in the whole tree
        body["cache_context"] = _cache_context
        body["_reset_stateful_cache"] = lambda self, *args, **kwargs: None
    return type(cls.__name__, (cls,), body)


def _caches(part: nn.Module) -> bool:
    """Whether a module keeps something from one step to the next: it is this job's own."""
    return getattr(part, "is_cache_enabled", False) is True


def _cache_context(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
    part: Any = vars(self)[_TREE].part
    return part.cache_context(*args, **kwargs) if _caches(part) else contextlib.nullcontext()


def _alone(method: Callable[..., Any], name: str) -> Callable[..., Any]:
    """The same, but never in one call with others, nor in halves."""

    def alone(*args: Any, **kwargs: Any) -> Any:
        return method(*args, **kwargs)

    alone.__name__ = name
    alone.runs_alone = True  # type: ignore[attr-defined]
    return alone


def _of_part(name: str, own: nn.Module) -> Any:
    return getattr(vars(own)[_TREE], name)


def _stay(self: nn.Module, *args: Any, **kwargs: Any) -> nn.Module:
    return self


def _handed_over(cls: type[nn.Module], name: str) -> Callable[..., Any]:
    method = getattr(cls, name)

    @functools.wraps(method)
    def call(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        tree: _Tree = vars(self)[_TREE]
        if tree.inside:
            return method(self, *args, **kwargs)
        theirs = next((value.dtype for value in (*args, *kwargs.values()) if _is_floating(value)), None)
        if name in _CODECS and tree.dtype is not None:
            args = tuple(_cast(value, tree.dtype) for value in args)
            kwargs = {key: _cast(value, tree.dtype) for key, value in kwargs.items()}
        function = tree.method(name)

        def run() -> Any:
            return tree.executor.run(tree.ticket, function, args, kwargs)

        result = tree.embeddings.called(function, args, kwargs, run) if tree.embeddings else run()
        if name != "encode":
            return result
        # latents in the autoencoder's precision would be refused by a denoiser that is held in another
        result = _cast(result, theirs) if theirs not in (None, tree.dtype) else result
        return _drawing(result, tree.noise)

    return call


def _generating(cls: type[nn.Module]) -> Callable[..., Any]:
    method = cls.generate  # type: ignore[attr-defined]

    @functools.wraps(method)
    def call(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        tree: _Tree = vars(self)[_TREE]
        tree.diverge()  # language models keep positions from one token to the next
        with tree.noise:
            return method(self, *args, **kwargs)

    return call


def _is_floating(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.is_floating_point()


def _cast(value: Any, dtype: torch.dtype) -> Any:
    """The floating tensors of what an autoencoder takes and gives in another precision."""
    if isinstance(value, torch.Tensor):
        return value.to(dtype) if value.is_floating_point() else value
    if isinstance(value, DiagonalGaussianDistribution):
        return DiagonalGaussianDistribution(value.parameters.to(dtype), value.deterministic)
    if isinstance(value, BaseOutput):
        return type(value)(**{name: _cast(item, dtype) for name, item in value.items()})
    if type(value) in (tuple, list):
        return type(value)(_cast(item, dtype) for item in value)
    return value


class _Drawn(DiagonalGaussianDistribution):
    """What ``encode`` gives, for pipelines that draw from it without a generator (SD3's ControlNets, CogView4's)."""

    noise: torch.Generator

    def sample(self, generator: Any = None) -> torch.Tensor:
        return super().sample(self.noise if generator is None else generator)


def _drawing(value: Any, noise: Seeded) -> Any:
    """The same, each distribution in it with the job's random numbers."""
    for item in value.values() if isinstance(value, BaseOutput) else value if isinstance(value, tuple) else ():
        if type(item) is DiagonalGaussianDistribution:
            item.__class__ = _Drawn
            item.noise = noise.generator(torch.device("cpu"))
    return value
