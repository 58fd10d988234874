"""Tells the server's own receiver that it starts, and when it can work: the ``init`` events."""

from __future__ import annotations

import asyncio
import contextlib
import importlib.metadata
import re
import socket
from pathlib import Path
from typing import Any

from api.errors import ApiError
from api.service.dispatch import Dispatcher
from api.service.webhooks import Webhooks
from api.settings import Settings

_LOOK = 0.05
_ABLE = ("READY", "BUSY")


async def tell_start(webhooks: Webhooks, dispatcher: Dispatcher, settings: Settings) -> None:
    """Send ``init`` once for this start, where there is a SEND_URL."""
    hook = webhooks.hook({}, payload={})
    if hook is None:
        return
    hook.begin()
    hook.events.put("init", "start", _about([worker.device for worker in dispatcher.workers], settings))
    while dispatcher.state == "STARTING":
        await asyncio.sleep(_LOOK)
    if dispatcher.state in _ABLE:
        hook.events.put("init", "done", {})
    elif dispatcher.state == "DEFUNCT":
        hook.fail(ApiError("NOT_READY", "The workers do not start; the server's log says why."))


def _about(devices: list[str], settings: Settings) -> dict[str, Any]:
    return {
        "device": _device_names(devices),
        "hostname": socket.gethostname(),
        "model_id": settings.model_id,
        "diffusers": importlib.metadata.version("diffusers"),
    }


def _device_names(devices: list[str], proc: Path = Path("/proc/driver/nvidia/gpus")) -> str:
    """As the NVIDIA driver tells them, who is asked without torch; else as this server calls them."""
    if all(device == "cpu" for device in devices):
        return "CPU only"
    names = []
    for told in sorted(proc.glob("*/information")):
        with contextlib.suppress(OSError):
            if found := re.search(r"^Model:\s*(.+?)\s*$", told.read_text(), re.MULTILINE):
                names.append(found[1])
    return ", ".join(names or devices)
