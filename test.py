#!/usr/bin/env python3
"""Sends example requests to a running server and saves the pictures to tests/output/.

    python test.py                      what there is
    python test.py txt2img img2img      some of it
    python test.py all                  all that the bundled model can do, against TEST_URL (default
                                        http://localhost:8000/)
    python test.py --runpod txt2img     against a RunPod endpoint (RUNPOD_API_KEY, RUNPOD_MODEL_KEY)

Needs nothing but Python. Exits non-zero when a request fails.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import http.client
import json
import os
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
FIXTURES = HERE / "tests" / "fixtures"
POLL = 0.5

Json = dict[str, Any]
TESTS: dict[str, Callable[[], Json]] = {}
ELSEWHERE: dict[str, str] = {}
"""Examples that need more than comes with the server, and what; ``all`` leaves them out."""


def example(name: str, needs: str = "") -> Callable[[Callable[[], Json]], Callable[[], Json]]:
    """Register an example request under a name."""

    def register(make: Callable[[], Json]) -> Callable[[], Json]:
        TESTS[name] = make
        if needs:
            ELSEWHERE[name] = needs
        return make

    return register


def picture(name: str) -> str:
    """A fixture as base64."""
    return base64.b64encode((FIXTURES / name).read_bytes()).decode()


@example("txt2img")
def txt2img() -> Json:
    """One picture from a prompt."""
    inputs = {"prompt": "a red circle on a blue background", "num_inference_steps": 20, "seed": 1}
    return {"modelInputs": inputs, "callInputs": {}}


@example("txt2img-weights")
def txt2img_weights() -> Json:
    """A prompt of which some words count more than others."""
    inputs = {"prompt": "a (red:1.3) circle on a [blue] background", "num_inference_steps": 20, "seed": 1}
    return {"modelInputs": inputs, "callInputs": {"prompt_syntax": "a1111"}}


@example("txt2img-multiple")
def txt2img_multiple() -> Json:
    """Several pictures from one prompt."""
    inputs = {
        "prompt": "two green triangles on white",
        "num_inference_steps": 20,
        "num_images_per_prompt": 2,
        "seed": 2,
    }
    return {"modelInputs": inputs, "callInputs": {}}


@example("txt2img-prompts")
def txt2img_prompts() -> Json:
    """A picture for each of several prompts, each with its own seed."""
    prompts = ["a yellow star on black", "a white ring on green", "a red square and a blue circle on white"]
    return {"modelInputs": {"prompt": prompts, "num_inference_steps": 20, "seed": [1, 2, 3]}, "callInputs": {}}


@example("txt2img-negative")
def txt2img_negative() -> Json:
    """A negative prompt: what must not be there."""
    inputs = {"prompt": "a red circle", "negative_prompt": "a blue background", "num_inference_steps": 20, "seed": 4}
    return {"modelInputs": inputs, "callInputs": {}}


@example("txt2img-scheduler")
def txt2img_scheduler() -> Json:
    """Another scheduler than the default."""
    inputs = {"prompt": "a big yellow square on a purple background", "num_inference_steps": 20, "seed": 5}
    return {"modelInputs": inputs, "callInputs": {"SCHEDULER": "DDIMScheduler"}}


@example("txt2img-lora")
def txt2img_lora() -> Json:
    """Two LoRAs for this request alone: what it asks for is drawn hollow, at night."""
    inputs = {"prompt": "a red star on a white background", "num_inference_steps": 20, "seed": 8}
    adapters = "demo/adapters"
    loras = [f"{adapters}/outlined.safetensors#scale=1", f"{adapters}/night.safetensors"]
    return {"modelInputs": inputs, "callInputs": {"lora_weights": loras}}


@example("txt2img-textual-inversion")
def txt2img_textual_inversion() -> Json:
    """A word that the model was never taught: <sun> is a yellow circle."""
    inputs = {"prompt": "a small <sun> at the top on a black background", "num_inference_steps": 20, "seed": 9}
    words = ["demo/adapters/sun.safetensors#token=<sun>"]
    return {"modelInputs": inputs, "callInputs": {"textual_inversions": words}}


@example("txt2img-scheduler-args")
def txt2img_scheduler_args() -> Json:
    """A scheduler by the name that AUTOMATIC1111 has for it, with an argument besides."""
    inputs = {"prompt": "a white ring on a green background", "num_inference_steps": 20, "seed": 8}
    options = {"SCHEDULER": "DPM++ 2M SDE Karras", "scheduler_args": {"timestep_spacing": "trailing"}}
    return {"modelInputs": inputs, "callInputs": options}


@example("txt2img-avif")
def txt2img_avif() -> Json:
    """AVIF, and the latents that the picture was decoded from."""
    inputs = {"prompt": "an orange star on a black background", "num_inference_steps": 20, "seed": 9}
    return {"modelInputs": inputs, "callInputs": {"image_format": "AVIF", "output": ["images", "latents"]}}


@example("img2img")
def img2img() -> Json:
    """A picture drawn over another: the green circle becomes red, and stays where it is."""
    inputs = {
        "prompt": "a red circle at the left on a white background",
        "image": picture("green-circle-left.png"),
        "strength": 0.8,
        "num_inference_steps": 30,
        "seed": 6,
    }
    return {"modelInputs": inputs, "callInputs": {"PIPELINE": "StableDiffusionImg2ImgPipeline"}}


@example("inpaint-sd")
def inpaint_sd() -> Json:
    """Only what the mask shows white is drawn anew: the right one of two circles becomes a square."""
    inputs = {
        "prompt": "a blue circle and a red square on a white background",
        "image": picture("two-blue-circles.png"),
        "mask_image": picture("mask-right.png"),
        "num_inference_steps": 30,
        "seed": 7,
    }
    return {"modelInputs": inputs, "callInputs": {"PIPELINE": "StableDiffusionInpaintPipeline"}}


@example("controlnet", needs="models of the hub")
def controlnet() -> Json:
    """A picture that follows another one: the edges of a circle become a plate."""
    inputs = {
        "prompt": "a blue plate on a wooden table",
        "control_image": picture("green-circle-left.png"),
        "controlnet_conditioning_scale": 0.8,
        "num_inference_steps": 20,
        "seed": 8,
    }
    model = "stable-diffusion-v1-5/stable-diffusion-v1-5"
    return {
        "modelInputs": inputs,
        "callInputs": {"MODEL_ID": model, "controlnets": "lllyasviel/sd-controlnet-canny", "MODEL_PRECISION": "fp16"},
    }


@example("ip-adapter", needs="models of the hub")
def ip_adapter() -> Json:
    """A picture that is like another one."""
    inputs = {
        "prompt": "a painting",
        "ip_adapter_image": picture("green-circle-left.png"),
        "num_inference_steps": 20,
        "seed": 9,
    }
    model, adapter = "stable-diffusion-v1-5/stable-diffusion-v1-5", "h94/IP-Adapter/models/ip-adapter_sd15.safetensors"
    return {
        "modelInputs": inputs,
        "callInputs": {"MODEL_ID": model, "ip_adapters": f"{adapter}#scale=0.6", "MODEL_PRECISION": "fp16"},
    }


def send(url: str, body: Json, headers: dict[str, str] | None = None) -> tuple[int, Json]:
    """POST (or GET, without a body) JSON; returns the status and the answer, whatever the status is."""
    data = json.dumps(body).encode() if body else None
    request = urllib.request.Request(url, data, {"Content-Type": "application/json", **(headers or {})})
    try:
        with urllib.request.urlopen(request, timeout=900) as response:
            return response.status, parse(response.read())
    except urllib.error.HTTPError as error:
        return error.code, parse(error.read())
    except http.client.HTTPException as fault:
        raise OSError(f"the answer broke off ({fault})") from fault


def parse(data: bytes) -> Json:
    """An answer as an object; what is none becomes an error that shows it."""
    with contextlib.suppress(ValueError):
        answer = json.loads(data)
        if isinstance(answer, dict):
            return answer
    return {"$error": {"code": "NOT_JSON", "message": data[:500].decode(errors="replace")}}


def send_runpod(body: Json) -> tuple[int, Json]:
    """Run a job on a RunPod endpoint and wait for it."""
    base = os.environ.get("RUNPOD_API_URL", "https://api.runpod.ai/v2").rstrip("/")
    base += "/" + os.environ["RUNPOD_MODEL_KEY"]
    headers = {"Authorization": f"Bearer {os.environ['RUNPOD_API_KEY']}"}
    status, job = send(f"{base}/run", {"input": body}, headers)
    print(f"<Response [{status}]>\n{json.dumps(job)}")
    wait = POLL
    while status == 200 and job.get("status") in ("IN_QUEUE", "IN_PROGRESS"):
        time.sleep(wait)
        wait = min(wait * 1.2, 5)
        status, job = send(f"{base}/status/{job['id']}", {}, headers)
    if job.get("status") == "COMPLETED":
        output: Json = job["output"]
        return status, output
    return status, {"$error": {"code": job.get("status", "FAILED"), "message": job.get("error", str(job))}}


def describe_image(data: bytes) -> str:
    """What to print in an image's place."""
    if data[:8] == b"\x89PNG\r\n\x1a\n":
        width, height = int.from_bytes(data[16:20], "big"), int.from_bytes(data[20:24], "big")
        return f"[{width}x{height} PNG image, {len(data) / 1024:.1f}KiB bytes]"
    return f"[image, {len(data) / 1024:.1f}KiB bytes]"


def save_images(name: str, answer: Json, folder: Path) -> Json:
    """Save the images of an answer; returns the answer with the images described instead."""
    shown = dict(answer)
    single = answer.get("image_base64")
    images = [single] if single else answer.get("images_base64", [])
    suffixes = {"JPEG": "jpg", "WEBP": "webp", "AVIF": "avif", "JXL": "jxl"}
    suffix = suffixes.get(answer.get("$meta", {}).get("image_format"), "png")
    described = []
    folder.mkdir(parents=True, exist_ok=True)
    for index, image in enumerate(images):
        data = base64.b64decode(image)
        path = folder / (f"{name}.{suffix}" if single else f"{name}_{index}.{suffix}")
        path.write_bytes(data)
        print(f"Saved {path}")
        described.append(describe_image(data))
    if single:
        shown["image_base64"] = described[0]
    elif described:
        shown["images_base64"] = described
    if "latents_base64" in answer:
        path = folder / f"{name}.safetensors"
        path.write_bytes(base64.b64decode(answer["latents_base64"]))
        print(f"Saved {path}")
        shown["latents_base64"] = "[latents]"
    return shown


def seconds(timings: Json) -> str:
    """Timings as people read them: ``inference: 2.4s``."""
    shown = [f"{name}: {ms / 1000:.1f}s" for name, ms in timings.items() if ms >= 50 or name == "inference"]
    return ", ".join(shown)


def shorten(value: Any) -> Any:
    """The request with its images shortened, for printing."""
    if isinstance(value, dict):
        return {key: shorten(item) for key, item in value.items()}
    return f"{value[:40]}… ({len(value)} characters)" if isinstance(value, str) and len(value) > 400 else value


def run(name: str, args: argparse.Namespace) -> bool:
    """Run one example; whether it succeeded."""
    body = TESTS[name]()
    body["modelInputs"].update(args.model_arg)
    body["callInputs"].update(args.call_arg)
    if args.scheduler:
        body["callInputs"]["SCHEDULER"] = args.scheduler
    if args.xmfe is not None:
        body["callInputs"]["xformers_memory_efficient_attention"] = args.xmfe
    print(f"Running test: {name}\n{json.dumps(shorten(body), indent=4)}")
    began = time.monotonic()
    try:
        status, answer = send_runpod(body) if args.runpod else send(args.url, body)
    except OSError as fault:
        print(f"{args.url} does not answer: {fault}. Is the server running? Start it with scripts/serve.\n")
        return False
    took = time.monotonic() - began
    if not args.runpod:
        print(f"<Response [{status}]>")
    if status != 200 or "$error" in answer:
        print(f"FAILED: {name}\n{json.dumps(answer, indent=4)}\n")
        return False
    print(f"Request took {took:.1f}s ({seconds(answer.get('$timings', {}))})")
    print(json.dumps(save_images(name, answer, args.output), indent=4), end="\n\n")
    return True


def pair(text: str) -> tuple[str, Any]:
    """``K=V`` with V as JSON where it is JSON."""
    key, equals, value = text.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form KEY=VALUE")
    try:
        return key, json.loads(value)
    except ValueError:
        return key, value


def main() -> int:
    """Run what the command line names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"{', '.join(TESTS)}, or all")
    parser.add_argument("--url", default=os.environ.get("TEST_URL", "http://localhost:8000/"))
    parser.add_argument("--output", type=Path, default=HERE / "tests" / "output", help="where to save the pictures")
    parser.add_argument("--runpod", action="store_true", help="send to a RunPod endpoint instead")
    parser.add_argument("--call-arg", type=pair, action="append", default=[], metavar="K=V", help="set a callInput")
    parser.add_argument("--model-arg", type=pair, action="append", default=[], metavar="K=V", help="set a modelInput")
    parser.add_argument("--scheduler", help="set callInputs.SCHEDULER")
    parser.add_argument("--xmfe", type=lambda v: bool(int(v)), metavar="0|1", help="memory-efficient attention or not")
    args = parser.parse_args()
    missing = [name for name in ("RUNPOD_API_KEY", "RUNPOD_MODEL_KEY") if args.runpod and not os.environ.get(name)]
    names = [name for name in TESTS if name not in ELSEWHERE] if args.names == ["all"] else args.names
    unknown = [name for name in names if name not in TESTS]
    if unknown or missing:
        parser.error(f"unknown test {', '.join(unknown)}" if unknown else f"--runpod needs {' and '.join(missing)}")
    if not names:
        parser.print_help()
        return 0
    failed = [name for name in names if not run(name, args)]
    print(f"{len(names) - len(failed)} of {len(names)} passed" + (f"; failed: {', '.join(failed)}" if failed else ""))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
