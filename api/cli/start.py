"""``python -m api start``: what the image starts."""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping

from api.settings import Settings


def start(settings: Settings, args: argparse.Namespace) -> int:
    """Be a serverless worker where the platform hands out jobs, else the server."""
    if takes_jobs(os.environ):
        from api.cli.runpod import runpod

        return runpod(settings, args)
    from api.cli.serve import serve

    return serve(settings, args)


def takes_jobs(environ: Mapping[str, str]) -> bool:
    """Whether this is a worker of a RunPod endpoint with a queue.

    One behind its load balancer has requests come to PORT instead, and answers at PORT_HEALTH; a pod has neither.
    """
    return bool(environ.get("RUNPOD_WEBHOOK_GET_JOB")) and environ.get("PORT_HEALTH", "0") in ("", "0")
