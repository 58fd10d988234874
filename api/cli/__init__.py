"""The command line: ``python -m api serve | download | models``."""

from api.cli.main import main

__all__ = ["main"]
