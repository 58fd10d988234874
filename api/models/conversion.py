"""Checkpoints and pickled weights become safetensors folders, in a process of their own.

The process is started by module name, so that this one never imports torch, and what a file from
anywhere does to its reader (memory, a crash, a loop) happens there. It gets no secrets, writes only
below the folder it is given, and dies with this process or when the caller stops.
"""

from __future__ import annotations

import contextlib
import os
import selectors
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import msgspec

from api.errors import ApiError
from api.models.manifest import OnProgress, walk
from api.models.safetensors_check import MAX_HEADER, safetensors_problem

FAMILIES = ("sd1", "sd2", "sd2-v", "sdxl", "sdxl-refiner")
"""Bundled configurations: Stable Diffusion 1.x; 2.x for noise (512) and for velocity (768); SDXL, and its refiner."""

UNFINISHED = ".converting"
"""Suffix of weights that ``convert_pickles`` has not put in place yet."""

_FIELD = "callInputs.CHECKPOINT_URL"
_HEARTBEAT = 0.25
"""Seconds between two calls of ``on_progress`` while the process says nothing: how soon a caller can stop it."""
_ROOT = Path(__file__).resolve().parents[2]
_ZIP, _PICKLE = b"PK\x03\x04", b"\x80"
_PASSED_ON = ("PATH", "LANG", "LC_ALL", "LD_LIBRARY_PATH", "OMP_NUM_THREADS", "SYSTEMROOT")


class _Line(msgspec.Struct):
    """What the process says, one JSON object a line."""

    done: int = 0
    total: int | None = None
    finished: bool = False
    error: dict[str, Any] | None = None


def convert_checkpoint(
    checkpoint: Path,
    folder: Path,
    on_progress: OnProgress,
    *,
    config: Path | str | None = None,
    allow_pickle: bool = True,
) -> None:
    """Make a diffusers folder of a single-file checkpoint, its weights in the precision they are stored in.

    Every weight of every component must be in the checkpoint, in its shape; nothing is made up. A safety
    checker is not part of such a file: the folder is written without one. ``model_index.json`` is
    written last.

    Args:
        checkpoint: ``.safetensors``, or what ``torch.save`` writes; told apart by content, not by name.
        folder: where to; must be empty or missing.
        on_progress: called with ``convert``, bytes of weights written, and bytes of all once they are known;
            a few times a second, also while nothing moves. What it raises stops the conversion.
        config: a folder with a diffusers model whose configuration is used, and none of its weights; an
            original configuration (``.yaml``); one of ``FAMILIES``; or None to recognise the family.
        allow_pickle: whether a file that is a pickle may be read, which is only done by torch's weights-only
            loader: it builds tensors and containers, and calls nothing else.

    Raises:
        ApiError: MODEL_BROKEN, PICKLE_NOT_ALLOWED, DISK_FULL, INVALID_INPUTS for a configuration that is not
            there. The folder is gone then, or empty if it was there.
        ValueError: a folder that is not empty.
        OSError: the checkpoint cannot be read.
    """
    existed = folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.iterdir()):
        raise ValueError(f"{folder} is not empty")
    try:
        _check_readable(checkpoint, checkpoint.name, allow_pickle, _FIELD)
        where = _configuration(config)
        _run(["checkpoint", str(checkpoint.resolve()), str(folder.resolve()), where], on_progress, _FIELD)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        if existed:
            folder.mkdir(exist_ok=True)
        raise


def convert_pickles(folder: Path, on_progress: OnProgress, *, allow_pickle: bool = True) -> None:
    """Turn the ``.bin`` weights of a diffusers folder into safetensors; the ``.bin`` files go.

    Those that are there as safetensors too are not converted, and go as well. The originals stay until
    everything is written, so that a conversion that was killed can be done again; a folder without such
    weights is left alone.

    Args:
        folder: a diffusers folder, as downloaded.
        on_progress: as in ``convert_checkpoint``.
        allow_pickle: as in ``convert_checkpoint``.

    Raises:
        ApiError: MODEL_BROKEN, PICKLE_NOT_ALLOWED, DISK_FULL. The folder is as it was then.
        OSError: the folder cannot be read.
    """
    try:
        if not allow_pickle:
            for path in sorted(folder.rglob("*.bin")):
                _check_readable(path, path.relative_to(folder).as_posix(), allow_pickle, None)
        _run(["pickles", str(folder.resolve())], on_progress, None)
    except BaseException:
        for name, _ in walk(folder):
            if name.endswith(UNFINISHED):
                (folder / name).unlink(missing_ok=True)
        raise


def convert_adapter(
    path: Path, target: Path, name: str, on_progress: OnProgress, *, allow_pickle: bool, field: str, kind: str
) -> bool:
    """Put a downloaded LoRA, textual inversion or upscaler in place; a pickle becomes safetensors.

    Args:
        path: the file, on the same file system; safetensors are moved.
        target: where to.
        name: for messages.
        on_progress: as in ``convert_checkpoint``.
        allow_pickle: as in ``convert_checkpoint``.
        field: for errors.
        kind: ``adapter`` or ``upscaler``.

    Returns:
        Whether it is the same file.

    Raises:
        ApiError: MODEL_BROKEN, PICKLE_NOT_ALLOWED, DISK_FULL.
        OSError: the file cannot be read.
    """
    _check_readable(path, name, allow_pickle, field)
    with path.open("rb") as file:
        is_safe = not file.read(4).startswith((_ZIP, _PICKLE))
    if is_safe:
        path.replace(target)
        return True
    fresh = target.with_name(target.name + UNFINISHED)
    _run([kind, str(path.resolve()), str(fresh.resolve())], on_progress, field)
    fresh.replace(target)
    return False


def _configuration(config: Path | str | None) -> str:
    """A family's name, a path, or nothing, as the process takes it."""
    if config is None or config in FAMILIES:
        return str(config or "")
    if not Path(config).exists():
        raise ApiError(
            "INVALID_INPUTS",
            f'"{config}" is no configuration: name one of {", ".join(FAMILIES)}, a diffusers model, or a .yaml file.',
            field="callInputs.CHECKPOINT_CONFIG_URL",
            requested=str(config),
            available=list(FAMILIES),
        )
    return str(Path(config).resolve())


def _check_readable(path: Path, name: str, allow_pickle: bool, field: str | None) -> None:
    """What can be said of a file of weights without torch: its kind, and whether a safetensors file is whole."""
    with path.open("rb") as file:
        start = file.read(9)
    if start.startswith((_ZIP, _PICKLE)):
        if not allow_pickle:
            raise ApiError(
                "PICKLE_NOT_ALLOWED",
                f"{name} is a pickle, and this server reads only safetensors; name a .safetensors file.",
                field=field,
            )
    elif start[8:] == b"{" and int.from_bytes(start[:8], "little") <= MAX_HEADER:
        if problem := safetensors_problem(path):
            raise ApiError("MODEL_BROKEN", f"{name} {problem}.", field=field)
    else:
        raise ApiError(
            "MODEL_BROKEN",
            f"{name} is neither safetensors nor written by torch.save; is the address that of the file itself?",
            field=field,
        )


def _run(arguments: list[str], on_progress: OnProgress, field: str | None) -> None:
    with tempfile.TemporaryDirectory(prefix="convert-") as home, _started(arguments, home) as process:
        assert process.stdout is not None
        finished = False
        for line in _lines(process.stdout):
            if line.error is not None:
                raise _error(line.error)
            finished = line.finished
            if not finished:
                on_progress("convert", line.done, line.total)
        code = process.wait()
        if finished and code == 0:
            return
        how = f"was killed ({signal.Signals(-code).name})" if code < 0 else f"ended with exit code {code}"
        why = "; most likely there was not enough memory for it" if code == -signal.SIGKILL else ""
        raise ApiError("MODEL_BROKEN", f"The conversion {how}{why}.", field=field)


@contextlib.contextmanager
def _started(arguments: list[str], home: str) -> Iterator[subprocess.Popen[bytes]]:
    environ = {name: os.environ[name] for name in _PASSED_ON if name in os.environ}
    environ.setdefault("OMP_NUM_THREADS", "2")
    environ |= {
        "HOME": home,
        "TMPDIR": home,
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "CONVERT_PARENT": str(os.getpid()),
    }
    # its stdin stays open as long as this process lives: that is how it learns of a death
    with subprocess.Popen(
        [sys.executable, "-m", "api.engine.convert", *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=environ,
        cwd=_ROOT,
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def _lines(stdout: IO[bytes]) -> Iterator[_Line]:
    """The lines as they come, and the last one again whenever there is none for a while."""
    line, rest = _Line(), b""
    with selectors.DefaultSelector() as selector:
        selector.register(stdout, selectors.EVENT_READ)
        while True:
            if not selector.select(_HEARTBEAT):
                yield line
                continue
            chunk = os.read(stdout.fileno(), 2**16)
            if not chunk:
                return
            *whole, rest = (rest + chunk).split(b"\n")
            for text in whole:
                line = msgspec.json.decode(text, type=_Line)
                yield line


def _error(parts: dict[str, Any]) -> ApiError:
    code, message = parts.pop("code"), parts.pop("message")
    return ApiError(code, message, **parts)
