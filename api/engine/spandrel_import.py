"""Imports spandrel, also where there is no torchvision.

It names torchvision as a dependency and takes three names of it, for two of its 42 architectures: LaMa, which fills
holes, and RestoreFormer, which restores cut-out faces. Neither is run here. torchvision has to be built for the very
torch that is installed, and changes which image processors transformers takes, and with them pixels: so there is none.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import sys
import threading
from types import ModuleType
from typing import Any

_WANTED = "torchvision.transforms.functional"
_NAMES = ("InterpolationMode", "normalize", "rotate")
_importing = threading.Lock()


@functools.cache
def import_spandrel() -> Any:
    """The package.

    Where torchvision is missing, a module with these names stands for the one that is wanted of it while spandrel is
    imported, and for nothing else: whoever asks meanwhile whether there is a torchvision is told that there is none.
    """
    with _importing:
        if importlib.util.find_spec("torchvision") is not None or "spandrel" in sys.modules:
            return importlib.import_module("spandrel")
        stand_in = ModuleType(_WANTED)
        for name in _NAMES:
            setattr(stand_in, name, _Missing)
        sys.modules[_WANTED] = stand_in
        try:
            return importlib.import_module("spandrel")
        finally:
            del sys.modules[_WANTED]


class _Missing:
    """Stands for what torchvision would have had."""

    def __init__(self, *_: Any, **__: Any) -> None:
        raise ImportError("torchvision is not installed, which this architecture needs")
