"""The command line: ``python -m api serve | runpod | start | download | models``."""

from api.cli.main import main

__all__ = ["main"]
