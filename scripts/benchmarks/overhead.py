"""What the server adds to a generation: a request's whole time less the bare pipeline call's.

The baseline is plain diffusers in a process of its own: same model, prompt, seed, scheduler and
thread count, one step at 64x64, its pipeline built once. The two are asked in turn over the same
kind of pipe, so both wait for the same machine.
"""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

from scripts.benchmarks.measure import Figure, interleaved, median
from scripts.benchmarks.serving import ROOT, serving

ROUNDS = 300
INPUTS = {"prompt": "a red circle on a blue background", "num_inference_steps": 1, "guidance_scale": 7.5}

_BARE = """
import json, sys, time, torch, diffusers
diffusers.utils.logging.disable_progress_bar()
pipe = diffusers.StableDiffusionPipeline.from_pretrained("models/shapes", dtype=torch.float32)
pipe.set_progress_bar_config(disable=True)
inputs = json.loads(sys.argv[1])
for line in sys.stdin:
    began = time.perf_counter()
    pipe(**inputs, generator=torch.Generator().manual_seed(1))
    print((time.perf_counter() - began) * 1000, flush=True)
"""


def run() -> list[Figure]:
    """Measure."""
    bare = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", _BARE, json.dumps(INPUTS)],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert bare.stdin
    assert bare.stdout
    body = json.dumps({"modelInputs": {**INPUTS, "seed": 1}, "callInputs": {}})
    inside: list[float] = []
    timings: list[dict[str, Any]] = []

    def ask_bare() -> None:
        assert bare.stdin
        assert bare.stdout
        bare.stdin.write("\n")
        bare.stdin.flush()
        inside.append(float(bare.stdout.readline()))

    with serving() as connection:

        def ask_server() -> None:
            connection.request("POST", "/", body, {"Content-Type": "application/json"})
            response = connection.getresponse()
            answer = json.loads(response.read())
            assert response.status == 200, answer
            timings.append(answer["$timings"])

        served, _ = interleaved([ask_server, ask_bare], ROUNDS, warm_up=20)
    bare.stdin.close()
    bare.wait()
    inside = inside[-ROUNDS:]
    beyond = median(served) - median(inside)
    pairs = sorted(a - b for a, b in zip(served, inside, strict=True))
    more = {"beyond_p50_ms": f"{beyond:.2f}", "paired_p50_ms": f"{median(pairs):.2f}"}
    bare_call = "the bare pipeline call in a process of its own"
    ratio = median(inside) / median(served)
    return [Figure("overhead", median(served), median(inside), "ms", bare_call, ratio, more)]
