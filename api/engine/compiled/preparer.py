"""Has code compiled in another process, one kind of call after the other, and loads it here.

What is in the folder from before is only loaded. Loading takes some hundredths of a second in a thread of its own.
"""

from __future__ import annotations

import contextlib
import logging
import os
import pickle
import queue
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import torch

from api.engine.compiled.artifacts import Code, Order, is_done, load
from api.engine.compiled.prepare import NOT_SUITED
from api.engine.tally import Tally

log = logging.getLogger("api.engine")

LONGEST = 900.0
"""Seconds after which a preparation is taken for hung."""
_DEATHS = 2
"""Preparations that may end without a word, one after the other, before none is begun any more: there is no compiler,
say, or no memory for it."""


class Preparer:
    """Gives loaded code for orders, sooner or later.

    Args:
        device: to compile for.
        folder: where it is kept.
        on_done: told of each order's key, and its code; None where there will be none.
        tally: counts what comes of them.
        longest: seconds that one may take.

    Attributes:
        niceness: of the process: the lowest priority there is.
        compiled: orders that were compiled anew.
        loaded: orders whose code was loaded, those included.
        failed: orders that came to nothing, and why.
    """

    def __init__(
        self,
        device: torch.device,
        folder: Path,
        on_done: Callable[[str, Code | None], None],
        tally: Tally,
        longest: float = LONGEST,
    ) -> None:
        self._device = device
        self._folder = folder
        self._on_done = on_done
        self._tally = tally
        self._longest = longest
        self._orders: queue.Queue[Order | None] = queue.Queue()
        self._process: subprocess.Popen[bytes] | None = None
        self._closed = False
        self._deaths = 0
        self.niceness = 19
        self.compiled = self.loaded = 0
        self.failed: dict[str, str] = {}
        self._thread = threading.Thread(target=self._serve, name="prepare", daemon=True)
        self._thread.start()

    @property
    def waiting(self) -> int:
        """Orders that wait, not counting the one that is being prepared."""
        return self._orders.qsize()

    def order(self, order: Order) -> None:
        """Have code made or loaded."""
        self._orders.put(order)

    def close(self) -> None:
        """End; a preparation that runs is killed."""
        self._closed = True
        self._orders.put(None)
        self._kill()
        self._thread.join(10)

    def _serve(self) -> None:
        while (order := self._orders.get()) is not None and not self._closed:
            code = None
            try:
                code = self._prepared(order)
                self.loaded += 1
                self._tally.compiled("loaded")
            except Exception as fault:
                if self._closed:
                    return
                self.failed[order.key] = f"{type(fault).__name__}: {fault}"[:500]
                self._tally.compiled("failed")
                log.warning("a %s is not compiled, and runs as it is: %s", type(order.block).__name__, fault)
            self._on_done(order.key, code)

    def _prepared(self, order: Order) -> Code:
        folder = self._folder / order.key
        began = time.monotonic()
        if is_done(folder):
            try:
                return self._loaded(order, folder, began)
            except Exception as fault:  # half lost, or of another machine after all
                log.warning("compiled code in %s cannot be loaded (%s): it is made anew", folder, fault)
                shutil.rmtree(folder, ignore_errors=True)
        if self._deaths >= _DEATHS:
            raise RuntimeError("preparations have failed before, and are not tried again before the next start")
        self._compile(order, folder)
        self.compiled += 1
        self._tally.compiled("made")
        return self._loaded(order, folder, began)

    def _loaded(self, order: Order, folder: Path, began: float) -> Code:
        code = load(folder)
        rows = "two rows and more" if order.many else "one row"
        log.info("%s for %s is compiled (%.1f s)", type(order.block).__name__, rows, time.monotonic() - began)
        return code

    def _compile(self, order: Order, folder: Path) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory() as own, tempfile.TemporaryFile() as said:
            path = Path(own, "order")
            path.write_bytes(pickle.dumps(order))
            command = [sys.executable, "-m", "api.engine.compiled.prepare", str(path), str(folder), str(self._device)]
            environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": f"{self._folder}/inductor", "OMP_NUM_THREADS": "1"}
            root = str(Path(__file__).resolve().parents[3])
            environment["PYTHONPATH"] = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
            environment.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")  # and is not to take the cores from the jobs
            self._process = process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=said, stderr=said, env=environment, start_new_session=True
            )
            with contextlib.suppress(OSError):
                niceness = max(self.niceness, os.getpriority(os.PRIO_PROCESS, 0))
                os.setpriority(os.PRIO_PROCESS, process.pid, niceness)
            try:
                if self._closed:
                    raise RuntimeError("it is over")
                status = process.wait(self._longest)
            except subprocess.TimeoutExpired:
                self._deaths += 1
                raise TimeoutError(f"it took more than {self._longest:.0f} s") from None
            finally:
                self._kill()
            if status == 0 and is_done(folder):
                self._deaths = 0
                return
            said.seek(0)
            lines = said.read().decode(errors="replace").strip().splitlines() or [f"it ended with {status}"]
            if status != NOT_SUITED:
                self._deaths += 1
                lines[-1] = f"the preparation failed ({status}): {lines[-1]}"
            raise RuntimeError(lines[-1])

    def _kill(self) -> None:
        process, self._process = self._process, None  # once: its number may be another's later on
        if process is None:
            return
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # with the compilers that it started
        process.wait()
        if process.stdin:
            process.stdin.close()
