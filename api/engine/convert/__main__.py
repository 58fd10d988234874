"""``python -m api.engine.convert checkpoint FILE FOLDER CONFIG | pickles FOLDER | adapter FILE FILE``: one conversion.

``upscaler`` in the place of ``adapter`` for one of these. Says how far it is in JSON, one line each, on what was its
standard output.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import resource
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from api.errors import ApiError
from api.models.disk import disk_fault

_PR_SET_PDEATHSIG = 1
_EVERY = 0.1
"""Seconds between two reports, at least."""


def _live_and_die_with(parent: int) -> None:
    """End when the parent ends, also when it is killed; yield to others in processor time and in memory."""
    with contextlib.suppress(OSError, AttributeError):  # Linux has it; elsewhere the end of stdin has to do
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)

    def watch() -> None:
        while os.read(0, 1024):
            pass
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    os.nice(10)
    os.umask(0o022)
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000")  # before the server, when memory runs out


def _reporter(out: int) -> tuple[Callable[[dict[str, Any]], None], Callable[[int, int], None]]:
    last = 0.0

    def say(line: dict[str, Any]) -> None:
        os.write(out, json.dumps(line).encode() + b"\n")

    def report(done: int, total: int) -> None:
        nonlocal last
        now = time.monotonic()
        if done in (0, total) or now - last >= _EVERY:
            last = now
            say({"done": done, "total": total})

    return say, report


def _quiet_libraries() -> None:
    import diffusers
    import transformers

    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()


def error_of(fault: BaseException, folder: Path) -> dict[str, Any]:
    """A fault as the parent raises it again."""
    if isinstance(fault, OSError):
        fault = disk_fault(fault, folder)  # type: ignore[assignment]
    if isinstance(fault, MemoryError):
        fault = ApiError("MODEL_BROKEN", "There was not enough memory to convert the weights.")
    if not isinstance(fault, ApiError):
        text = f"The weights cannot be converted ({type(fault).__name__}: {str(fault)[:300]})."
        fault = ApiError("MODEL_BROKEN", text)
    parts = {name: getattr(fault, name) for name in ("code", "message", "field", "requested", "available")}
    return {name: value for name, value in parts.items() if value is not None}


def main(arguments: list[str]) -> int:
    """Convert, and say how it went; the exit code is 0 when it went well."""
    out = os.dup(1)
    os.dup2(2, 1)  # what libraries print is no message
    say, report = _reporter(out)
    folder = Path(arguments[1] if arguments[0] == "pickles" else arguments[2])
    try:
        import torch

        with torch.inference_mode():
            if arguments[0] == "checkpoint":
                _quiet_libraries()
                from api.engine.convert import checkpoint

                checkpoint.convert(Path(arguments[1]), folder, arguments[3], report)
            elif arguments[0] in ("adapter", "upscaler"):
                from api.engine.convert import adapter

                adapter.convert(Path(arguments[1]), folder, report, arguments[0])
            else:
                from api.engine.convert import pickles

                pickles.convert(folder, report)
    except Exception as fault:
        say({"error": error_of(fault, folder)})
        return 1
    say({"finished": True})
    return 0


if __name__ == "__main__":
    _live_and_die_with(int(os.environ.pop("CONVERT_PARENT", os.getppid())))
    sys.exit(main(sys.argv[1:]))
