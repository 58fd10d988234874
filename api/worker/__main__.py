"""``python -m api.worker FD DEVICE``: start, import torch, tell the service, serve."""

from __future__ import annotations

import argparse
import gc
import signal
import socket
import time
import warnings
from pathlib import Path

from api import logs
from api.schema.messages import Load, Ready
from api.settings import Settings
from api.worker.link import Link
from api.worker.postponed import postpone


def _quiet_libraries() -> None:
    """Progress bars and advice of the libraries do not belong in a server's log."""
    import diffusers
    import transformers

    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()
    warnings.simplefilter("ignore", FutureWarning)


def _without_peft() -> None:
    """LoRAs are applied by ``engine/adapters.py``; diffusers is to do without PEFT.

    Importing it is a third of the time of diffusers' own imports, and the pipelines look for its layers in modules that
    have none. It is said before anything of diffusers but its utilities is imported.
    """
    from diffusers import utils
    from diffusers.utils import constants, import_utils

    import_utils._peft_available = False
    for module in (utils, constants):
        module.USE_PEFT_BACKEND = False


def _without_quantizers() -> None:
    """torchao and bitsandbytes are asked by ``engine/quantized_layers.py``, with the first weight that is quantized.

    diffusers and transformers would import them for models that were saved quantized by them: two seconds, and lines in
    the log about kernels for other machines. It is said before anything of theirs but utilities is imported.
    """
    import transformers.utils
    from diffusers import utils
    from diffusers.utils import import_utils

    import_utils._torchao_available = import_utils._bitsandbytes_available = False
    for name in ("is_torchao_available", "is_bitsandbytes_available"):
        for module in (transformers.utils, transformers.utils.import_utils):
            setattr(module, name, lambda *args: False)
    for module in (utils, import_utils):
        module.is_torchao_available = module.is_bitsandbytes_available = lambda: False


def _postpone_scipy() -> None:
    postpone("scipy.stats")
    postpone("scipy.integrate")
    postpone("scipy.optimize", ["linear_sum_assignment"])


def main() -> None:
    """Run until the service closes the socket."""
    began = time.perf_counter()
    parser = argparse.ArgumentParser()
    parser.add_argument("fd", type=int)
    parser.add_argument("device")
    parser.add_argument("--workers", type=int, default=1, help="how many share the host's memory")
    parser.add_argument("--host-tier", type=int, help="the socket to who keeps it for them; else each has its part")
    args = parser.parse_args()
    settings = Settings.from_env()
    logs.configure(settings.log_format, settings.log_level)
    for number in (signal.SIGINT, signal.SIGTERM):  # Ctrl-C and `docker stop` are the service's to handle
        signal.signal(number, signal.SIG_IGN)
    link = Link(socket.socket(fileno=args.fd))  # listens while torch is imported
    # half a million objects that stay: to look at them takes a quarter of the time of the imports, and 0.2 s later on
    gc.disable()

    import torch  # noqa: F401  first, to know how long the rest takes

    imported = time.perf_counter()
    torch_ms = round((imported - began) * 1000)
    from api.engine.device import Device

    # that there is none is known before diffusers is
    device = Device(args.device, bool(settings.devices), settings.channels_last, settings.tf32)

    _without_peft()
    _without_quantizers()
    _postpone_scipy()
    from api.engine.budgets import budgets, host_memory
    from api.engine.generate import Engine
    from api.engine.settled import settle
    from api.engine.spent import SPANS
    from api.worker.host_link import HostLink
    from api.worker.worker import Worker

    _quiet_libraries()
    tier = HostLink(socket.socket(fileno=args.host_tier)) if args.host_tier is not None else None
    found, measured = device.memory(), host_memory()
    limits = budgets(settings.vram_limit, settings.ram_limit, found, measured, 1 if tier else args.workers)
    if tier:
        limits = budgets(settings.vram_limit, tier.settle(limits.host), found, measured, settled=True)
    engine = Engine(
        device,
        limits,
        longest_wait=settings.max_switch_wait,
        idle_timeout=settings.model_idle_timeout,
        adapters_limit=settings.adapters_limit,
        embeddings_limit=settings.embeddings_limit,
        attention=settle(device, settings.state_dir, compiles=settings.compile in ("blocks", "both")),
        compiled=settings.compile,
        compile_cache=Path(settings.compile_cache or settings.state_dir / "compile").expanduser(),
        tier=tier,
    )
    started = time.perf_counter()
    init_ms = round((started - began) * 1000)
    gc.freeze()
    gc.enable()
    waits = (lambda: tier.waiting > 0 or engine.cache.tiers.paused) if tier else (lambda: False)
    worker = Worker(link, engine, settings.max_concurrency, init_ms, waits)
    worker.tell_alive()
    while not link.inbox.empty():
        first = link.inbox.get()
        assert isinstance(first, Load)  # the service sends nothing else before it hears Ready
        worker.warm(first)
    ready_ms = round((time.perf_counter() - began) * 1000)
    slots = settings.max_concurrency
    phases = {"torch": (began, imported), "diffusers": (imported, started), **SPANS.all()}
    link.send(Ready(str(device.torch), device.name, engine.versions, ready_ms, torch_ms, slots, phases))
    worker.serve()


if __name__ == "__main__":
    main()
