"""``python -m api.engine.compiled.prepare ORDER FOLDER DEVICE [check]``: compile one kind of call, and nothing else.

Ends with its parent (its end of the pipe on stdin), and prints why it could not.
Checked in a second process image: what was compiled is loaded as a server loads it, which also leaves in the folder
what is only made at a first call.
"""

from __future__ import annotations

import fcntl
import os
import pickle
import sys
import threading
from pathlib import Path

NOT_SUITED = 3
"""Exit status: it cannot be compiled, now or later."""


def _end_with_parent() -> None:
    while os.read(0, 1):  # not through sys.stdin, whose lock would be held when the interpreter ends
        pass
    os._exit(1)


def main() -> int:
    """Compile, then check what was compiled."""
    order_file, folder, device_name = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
    checks = sys.argv[4:] == ["check"]
    threading.Thread(target=_end_with_parent, daemon=True).start()
    import torch

    from api.engine.compiled.artifacts import check, finish, is_done, make
    from api.engine.compiled.kinds import Unsuited

    torch.set_grad_enabled(False)
    torch.set_num_threads(1)
    device = torch.device(device_name)
    folder.parent.mkdir(parents=True, exist_ok=True)
    try:
        order = pickle.loads(order_file.read_bytes())  # noqa: S301  of our own parent
        if checks:
            check(order, folder, device)
            finish(folder)
            return 0
        # another server may be at the same; the lock ends with the process, and outlives the exec
        lock = os.open(f"{folder}.lock", os.O_CREAT | os.O_WRONLY)
        fcntl.flock(lock, fcntl.LOCK_EX)
        os.set_inheritable(lock, True)
        if is_done(folder):
            return 0
        make(order, folder, device)
    except Unsuited as fault:
        print(fault, file=sys.stderr)
        return NOT_SUITED
    sys.stderr.flush()
    command = [sys.executable, "-m", "api.engine.compiled.prepare", *sys.argv[1:4], "check"]
    return os.execv(sys.executable, command)  # noqa: S606  the same program


if __name__ == "__main__":
    raise SystemExit(main())
