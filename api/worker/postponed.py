"""Modules that the libraries import and hardly ever use: they are imported when somebody looks into them.

transformers imports ``scipy.optimize`` for the losses of detectors, and diffusers' schedulers import ``scipy.stats``
for beta sigmas and ``scipy.integrate`` for LMS: together a fifth of the time in which a worker imports its libraries.

What imports a submodule by its own name, as in ``import scipy.stats.distributions``, before the module was used, may
find it half imported. None of the libraries does.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
import threading
from collections.abc import Iterable
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

_swapping = threading.Lock()
"""Never held while a module is imported: that waits for other threads that import, which may wait for this lock."""


class _Postponed(ModuleType):
    """A module that is imported when an attribute of it is looked up.

    ``importlib.util.LazyLoader`` does this too, but before Python 3.11.9 not for two threads at once, and what is
    imported from it by name it imports at once.
    """

    def __init__(self, spec: ModuleSpec, functions: Iterable[str]) -> None:
        super().__init__(spec.name)
        # what is asked of every module that is imported, and of all that there are by ``inspect``
        self.__spec__, self.__loader__, self.__file__ = spec, spec.loader, spec.origin
        self.__path__ = spec.submodule_search_locations or []
        for function in functions:
            setattr(self, function, _calling(self, function))

    def __getattr__(self, name: str) -> Any:
        return getattr(self.real(), name)

    def real(self) -> ModuleType:
        """The module itself, which takes this one's place for all who import it from now on."""
        name = self.__name__
        with _swapping:
            is_first = sys.modules.get(name) is self
            if is_first:
                del sys.modules[name]
        try:
            module = importlib.import_module(name)  # where another thread is at it, this waits for that one
        except BaseException:
            if is_first:
                sys.modules.setdefault(name, self)
            raise
        if is_first:
            self.__dict__.update(module.__dict__)
        return module


def _calling(module: _Postponed, name: str) -> Any:
    def function(*args: Any, **kwargs: Any) -> Any:
        return getattr(module.real(), name)(*args, **kwargs)

    return function


def postpone(name: str, functions: Iterable[str] = ()) -> None:
    """Have a module imported no sooner than it is used.

    Args:
        name: of the module; nothing is done where it was imported already, or where there is none.
        functions: that others import from it by name: they get one that imports it when it is called.
    """
    if name not in sys.modules and (spec := importlib.util.find_spec(name)) is not None:
        sys.modules[name] = _Postponed(spec, functions)
