"""Starts everything in the order in which it takes least time, and ends it.

The engine's worker processes come first: they import torch and read the weights while the SDK is imported here, which
alone takes one to two seconds.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import os
import signal
import stat
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from api.serverless.ahead import read_ahead
from api.serverless.timeline import Timeline
from api.service.host_memory import NAME
from api.service.spawning import devices, spawn
from api.settings import Settings

if TYPE_CHECKING:
    from api.serverless.hosting import Hosted

_LEVELS = {"debug": "DEBUG", "info": "INFO", "warning": "WARN", "error": "ERROR"}
_CHECKED_OTHERWISE = ("RUNPOD_SKIP_GPU_CHECK", "RUNPOD_SKIP_AUTO_SYSTEM_CHECKS")
"""The SDK's own checks import torch into this process, and open the device beside the worker that loads a model to it.

What they find out, the worker has found out when it is ready; ``false`` has them made as well.
"""
_PR_SET_PDEATHSIG = 1


def run(settings: Settings, test_input: str | None = None) -> int:
    """Work for the platform until it ends this process.

    Args:
        settings: the container's configuration.
        test_input: JSON of one job to run here instead, ``{"input": …}``.

    Returns:
        The exit status.

    Raises:
        ApiError: MODEL_ID or one of WARM_MODELS cannot be had.
        SettingsError: STATE_DIR cannot be used.
    """
    timeline = Timeline()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # until the SDK listens
    names = devices(settings)
    spawned = [spawn(name, len(names)) for name in names]
    # what is taken off the platform's queue may wait here for a worker that is started again
    settings = replace(settings, max_queue=max(settings.max_queue, len(names) * settings.max_concurrency))
    from api.serverless.hosting import Hosted
    from api.service.service import Service

    service = Service(settings)
    service.open()
    for worker, process in zip(service.dispatcher.workers, spawned, strict=True):  # a device may be named twice
        worker.spawned = process
    hosted = Hosted(service)
    hosted.start()
    read_ahead([model.folder for model in service.dispatcher.warm_models])
    os.register_at_fork(after_in_child=_alone)
    timeline.note("service", timeline.process_began)
    try:
        return _serve(settings, hosted, timeline, test_input)
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else 0
    finally:
        hosted.stop()


def _serve(settings: Settings, hosted: Hosted, timeline: Timeline, test_input: str | None) -> int:
    os.environ.setdefault("RUNPOD_LOG_LEVEL", _LEVELS[settings.log_level])  # by itself it logs inputs and outputs
    for name in _CHECKED_OTHERWISE:
        os.environ.setdefault(name, "true")
    began = time.perf_counter()
    _name_the_processor()
    from runpod import serverless

    from api.serverless.handler import Handler

    timeline.note("sdk", began)
    handler = Handler(hosted)

    async def engine_is_ready() -> None:
        await handler.engine_is_ready()
        timeline.tell(hosted.service.dispatcher.workers)

    serverless.register_fitness_check(engine_is_ready)
    sys.argv[1:] = ["--test_input", test_input] if test_input is not None else []
    serverless.start(handler.config)
    return handler.drain.status


def _name_the_processor() -> None:
    """While it is imported, the SDK has a process find out the processor's name, for its debugger: a second of work.

    The worker imports its libraries meanwhile, and may need the core.
    """
    with contextlib.suppress(ImportError, OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
        cpuinfo: Any = importlib.import_module("cpuinfo")
        cpuinfo.get_cpu_info = lambda: {"brand_raw": names[0]} if names else {}  # without it, it says that it has none


def _alone() -> None:
    """In a process that the SDK forks from this one, to say that this one lives: it is to end with it, and no sooner.

    A copy of the socket to a worker would keep that worker alive when this process is killed, and one of the memory
    that workers share would keep it when all of them have let go of it.
    """
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    for number in [int(entry.name) for entry in Path("/proc/self/fd").iterdir()]:
        if number > 2 and (_is_socket(number) or _is_memory(number)):
            os.close(number)


def _is_memory(number: int) -> bool:
    try:
        return str(Path(f"/proc/self/fd/{number}").readlink()).startswith(f"/memfd:{NAME}")
    except OSError:
        return False


def _is_socket(number: int) -> bool:
    try:
        return stat.S_ISSOCK(os.fstat(number).st_mode)
    except OSError:
        return False
