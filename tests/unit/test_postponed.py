"""Modules that come when they are used, each in a fresh interpreter."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests.running import ROOT


def run(code: str) -> str:
    out = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert out.returncode == 0, out.stderr[-3000:]
    return out.stdout.strip().splitlines()[-1]


POSTPONE = """
from api.worker.postponed import postpone
postpone("scipy.stats")
postpone("scipy.integrate")
postpone("scipy.optimize", ["linear_sum_assignment"])
import sys
def here(name):
    return type(sys.modules[name]).__name__ == "module"
"""


def test_a_worker_imports_none_of_them_and_they_work_when_they_are_used() -> None:
    code = """
import threading
from api.engine.generate import Engine
import diffusers, transformers, scipy.stats
from transformers.loss.loss_for_object_detection import linear_sum_assignment
assert not any(here(f"scipy.{name}") for name in ("stats", "optimize", "integrate")), "they were imported by somebody"
scheduler = diffusers.EulerDiscreteScheduler(use_beta_sigmas=True)
faults = []
def use():
    try:
        scheduler.set_timesteps(5)
    except BaseException as fault:
        faults.append(fault)
threads = [threading.Thread(target=use) for _ in range(8)]
[thread.start() for thread in threads]
[thread.join() for thread in threads]
assert not faults, faults
assert here("scipy.stats")
lms = diffusers.LMSDiscreteScheduler()
lms.set_timesteps(5)
assert abs(lms.get_lms_coefficient(1, 0, 0)) > 0
assert [list(found) for found in linear_sum_assignment([[4, 1], [2, 3]])] == [[0, 1], [1, 0]]
from scipy.optimize import minimize
assert minimize(lambda x: (x[0] - 2) ** 2, [0.0]).x[0] - 2 < 1e-3
print(scipy.stats.beta.ppf(0.5, 2, 2), here("scipy.optimize"))
"""
    assert run(POSTPONE + code) == "0.5 True"


def test_one_that_is_there_stays_as_it_is_and_one_that_is_not_is_missing_as_ever() -> None:
    code = """
import json
postpone("json")
assert json.loads("1") == 1
postpone("no_such_module_at_all")
try:
    import no_such_module_at_all
except ModuleNotFoundError as fault:
    print(fault)
"""
    assert run(POSTPONE + code) == "No module named 'no_such_module_at_all'"


def test_threads_that_import_what_the_other_one_needs_do_not_wait_for_each_other(tmp_path: Path) -> None:
    """One imports a module that looks into a second postponed one, the other the first of them, which imports that."""
    (tmp_path / "first.py").write_text("import builtins\nbuiltins.inside.set()\nimport between\nvalue = 1\n")
    (tmp_path / "second.py").write_text("value = 2\n")
    waits = "import builtins, time\nbuiltins.inside.wait(20)\ntime.sleep(0.3)\n"
    (tmp_path / "between.py").write_text(f"{waits}from second import value\n")
    code = f"""
import builtins, threading
sys.path.insert(0, {str(tmp_path)!r})
postpone("first")
postpone("second")
import first, second
builtins.inside = threading.Event()
begun = threading.Event()
seen = []
def imports():
    begun.set()
    import between
    seen.append(between.value)
def uses():
    begun.wait()
    seen.append(first.value)
threads = [threading.Thread(target=work, daemon=True) for work in (imports, uses)]
[thread.start() for thread in threads]
[thread.join(20) for thread in threads]
print(sorted(seen))
"""
    assert run(POSTPONE + code) == "[1, 2]"
