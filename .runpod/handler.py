"""The worker under the name that RunPod's Hub looks for; the image itself starts ``python -m api start``."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from api.cli import main

if __name__ == "__main__":
    sys.exit(main(["runpod", *sys.argv[1:]]))
