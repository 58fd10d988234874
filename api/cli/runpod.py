"""``python -m api runpod``."""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys

from api import logs
from api.settings import Settings


def runpod(settings: Settings, args: argparse.Namespace) -> int:
    """Be a worker of RunPod's serverless platform until it ends this process."""
    if importlib.util.find_spec("runpod") is None:
        print('The SDK is not installed: pip install "diffusers-api[runpod]".', file=sys.stderr)
        return 2
    if args.test_input is not None:
        try:
            job = json.loads(args.test_input)
        except ValueError as fault:
            print(f"--test_input is not JSON: {fault}.", file=sys.stderr)
            return 2
        if not isinstance(job, dict) or "input" not in job:
            print('--test_input must be a job: {"input": {"prompt": …}}.', file=sys.stderr)
            return 2
    from api.serverless.run import run

    logs.configure(settings.log_format, settings.log_level)
    return run(settings, args.test_input)
