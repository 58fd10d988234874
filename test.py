#!/usr/bin/env python3
"""Sends example requests to a running server and saves the pictures to tests/output/.

    python test.py                      what there is
    python test.py txt2img img2img      some of it
    python test.py all                  all that the bundled model can do, against TEST_URL (default
                                        http://localhost:8000/)
    python test.py --runpod txt2img     against a RunPod endpoint: RUNPOD_API_KEY is your key, RUNPOD_MODEL_KEY
                                        the endpoint's id; RUNPOD_API_URL=http://localhost:8000/v2 is this server
    python test.py --stream txt2img     watch it; nothing cuts a connection on which something comes
    python test.py --repeat 20 --concurrency 4 txt2img
                                        how fast it is: p50, p95, requests and images a second

Needs nothing but Python. Exits non-zero when a request fails; Ctrl-C cancels what runs.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import http.client
import json
import math
import os
import random
import secrets
import signal
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
FIXTURES = HERE / "tests" / "fixtures"

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


class Failed(Exception):
    """A request that did not end in an answer: a code, what happened, and what to do about it."""

    def __init__(self, code: str, message: str, hint: str = "", answer: Json | None = None) -> None:
        super().__init__(message)
        self.code = code
        self.hint = hint
        self.answer = answer

    @property
    def status(self) -> int:
        """Of the HTTP answer; 0: there was none, or it is not about that."""
        return int((self.answer or {}).get("httpStatus", 0))


class Stopped(Exception):
    """``stop`` was set: Ctrl-C, or SIGTERM."""


# --- HTTP ---------------------------------------------------------------------------------------------


class Where(urllib.request.HTTPRedirectHandler):
    """Follows no redirect: the key would go along, to whoever is named there."""

    def redirect_request(self, *_: Any) -> None:
        """Leave it as the error that it is."""
        return


class Http:
    """Sends JSON to one server.

    Args:
        url: its address, with whatever path it is below.
        key: of the server; empty: none.
    """

    def __init__(self, url: str, key: str) -> None:
        self.url = url.rstrip("/")
        # Cloudflare, which is before RunPod's pods, refuses the name that urllib gives itself
        self.headers = {"Content-Type": "application/json", "User-Agent": "diffusers-api-test"}
        if key:
            self.headers["Authorization"] = f"Bearer {key}"
        self._opener = urllib.request.build_opener(Where)

    def open(self, method: str, path: str, body: Json | None, timeout: float, headers: dict[str, str]) -> Any:
        """The answer, to be read; raises ``HTTPError`` where its status is none of success."""
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, {**self.headers, **headers}, method=method)
        return self._opener.open(request, timeout=timeout)

    def call(
        self,
        method: str,
        path: str,
        body: Json | None = None,
        timeout: float = 30,
        headers: dict[str, str] | None = None,
    ) -> Json:
        """Send, and read the answer.

        Raises:
            Failed: it is no success.
        """
        with self.faults(path), self.open(method, path, body, timeout, headers or {}) as response:
            return parse(response.read())

    @contextlib.contextmanager
    def faults(self, path: str) -> Iterator[None]:
        """Turn what goes wrong into ``Failed``."""
        try:
            yield
        except urllib.error.HTTPError as error:
            raise refused(error, self.url + path) from error
        except (ValueError, http.client.InvalidURL) as fault:
            raise Failed(
                "BAD_URL", f"{self.url!r} is no address: {fault}.", "It begins with http:// or https://."
            ) from fault
        except http.client.HTTPException as fault:
            raise Failed("BROKEN_OFF", f"The answer of {self.url} broke off: {fault!r}.", LATER_HINT) from fault
        except OSError as fault:
            why = getattr(fault, "reason", fault)
            if isinstance(why, TimeoutError):
                raise Failed("TIMED_OUT", f"{self.url} did not answer in time.", LATER_HINT) from fault
            hint = "Is the server running? Start it with scripts/serve; --url or TEST_URL says where it is."
            raise Failed("NO_ANSWER", f"{self.url} does not answer: {why}.", hint) from fault

    def patiently(self, method: str, path: str, stop: threading.Event) -> Json:
        """The same, tried again for a minute where it may pass: the job runs, whoever looks at it.

        Raises:
            Failed, Stopped: it does not pass.
        """
        end = time.monotonic() + PATIENCE
        while True:
            try:
                return self.call(method, path)
            except Failed as fault:
                if (fault.status not in PASSING and fault.code not in PASSING) or time.monotonic() > end:
                    raise
            if stop.wait(1):
                raise Stopped


LATER_HINT = "A proxy may cut connections that last: --stream or --async keeps clear of that."
PATIENCE = 60.0
"""Seconds for which a job that runs is asked for in vain."""
PASSING = ("NO_ANSWER", "BROKEN_OFF", "TIMED_OUT", 429, 500, 502, 503, 504, 524)
HINTS = {
    401: "The key is missing or wrong: --key, or API_KEY (with --runpod: RUNPOD_API_KEY).",
    403: "The key may not do this, or something before the server refused the request.",
    413: "Send less: smaller pictures, or URLs with callInputs.is_url.",
    429: "The server, or the platform, has too much to do: try again later, or with a lower --concurrency.",
    502: "Nobody listens behind the proxy yet: the container may still be starting.",
    504: LATER_HINT,
    524: "The proxy waited 100 seconds for an answer: --stream or --async keeps clear of that.",
}


def refused(error: urllib.error.HTTPError, url: str) -> Failed:
    """What an answer that is no success says."""
    if error.code in (301, 302, 303, 307, 308):
        to = error.headers.get("Location", "")
        return Failed(str(error.code), f"{url} leads to {to}.", "Name that address itself: keys are not sent on.")
    try:
        answer = parse(error.read())
    except (OSError, http.client.HTTPException):
        answer = {}
    told = answer.get("$error") or answer.get("error") or answer.get("message") or answer.get("detail") or error.reason
    own = isinstance(told, dict) and "$error" in answer and told.get("code") != "NOT_JSON"
    message = str(told.get("message", told)) if isinstance(told, dict) else str(told)
    hint = HINTS.get(error.code, "") if not own or error.code in (401, 429) else ""
    code = str(told.get("code")) if own and isinstance(told, dict) else str(error.code)
    return Failed(code, message, hint, {**answer, "httpStatus": error.code})


def parse(data: bytes) -> Json:
    """An answer as an object; what is none becomes an error that shows it."""
    with contextlib.suppress(ValueError):
        answer = json.loads(data)
        if isinstance(answer, dict):
            return answer
    return {"$error": {"code": "NOT_JSON", "message": data[:500].decode(errors="replace")}}


# --- the two kinds of server --------------------------------------------------------------------------


class Way:
    """A way to have a request run.

    Args:
        http: to be sent through.
        how: ``plain``, ``stream`` or ``async``.
        limit: seconds that a request may take.
        stop: set when everything is to end.
    """

    def __init__(self, http: Http, how: str, limit: float, stop: threading.Event) -> None:
        self.http, self.how, self.limit, self.stop = http, how, limit, stop


class Native(Way):
    """A server of this project, through its own dialect."""

    def run(self, body: Json, tell: Callable[[str], None]) -> Json:
        """The answer to one request.

        Raises:
            Failed, Stopped: there is none.
        """
        if self.how == "stream":
            return self._stream(body, tell)
        answer = self._later(body, tell) if self.how == "async" else self.http.call("POST", "/", body, self.limit)
        return succeeded(answer)

    def _stream(self, body: Json, tell: Callable[[str], None]) -> Json:
        body = {**body, "callInputs": {**body["callInputs"], "streamEvents": True}}
        with self.http.faults("/"), self.http.open("POST", "/", body, self.limit, {}) as response:
            for line in response:
                if self.stop.is_set():
                    raise Stopped  # the connection goes with it, and the server ends what nobody waits for
                event = parse(line)
                if "$timings" in event or "$error" in event:
                    return succeeded(event)
                tell(progress(event))
        raise Failed("BROKEN_OFF", "The stream ended without an answer.", "The log of the server says why.")

    def _later(self, body: Json, tell: Callable[[str], None]) -> Json:
        # the key makes it safe to send it twice
        job = self.http.call("POST", "/jobs", body, headers={"Idempotency-Key": secrets.token_hex(16)})
        path = f"/jobs/{job['id']}"
        wait = Wait(self.limit, self.stop)
        while job["state"] in ("IN_QUEUE", "IN_PROGRESS"):
            tell(f"{job['state']} {progress(job.get('progress'))}".rstrip())
            try:
                wait.wait()
                job = self.http.patiently("GET", path, self.stop)
            except (Stopped, Failed):
                cancel(lambda: self.http.call("DELETE", path))
                raise
        if job["state"] != "COMPLETED":
            error = job.get("$error", {})
            raise Failed(error.get("code", job["state"]), error.get("message", f"It is {job['state']}."), answer=job)
        return {**job["result"], "job": {key: job.get("timings", {}).get(key) for key in ("queued", "running")}}


class RunPod(Way):
    """An endpoint of RunPod, or this server under ``/v2``; without ``stream``, ``/status`` is polled."""

    def run(self, body: Json, tell: Callable[[str], None]) -> Json:
        """The output of one job.

        Raises:
            Failed, Stopped: there is none.
        """
        if self.how == "stream":  # without it, a worker tells its progress to /status alone
            body = {**body, "callInputs": {**body["callInputs"], "streamEvents": True}}
        try:
            job = self.http.call("POST", "/run", {"input": body})
        except Failed as fault:
            if fault.code == "404":
                fault.hint = f"There is no endpoint {self.http.url}: RUNPOD_MODEL_KEY is the id below its name."
            raise
        if "id" not in job:
            raise Failed("NOT_RUNPOD", f"{self.http.url}/run gave no job id.", "Check RUNPOD_API_URL.", job)
        tell(f"{job.get('status')} (job {job['id']})")
        wait, id, last = Wait(self.limit, self.stop), job["id"], None
        try:
            while job.get("status") in ("IN_QUEUE", "IN_PROGRESS"):
                wait.wait()
                route = "stream" if self.how == "stream" else "status"
                job = self.http.patiently("GET", f"/{route}/{id}", self.stop)
                chunks = [chunk.get("output") for chunk in job.get("stream", [])] or [job.get("output")]
                for chunk in chunks:
                    tell(f"{job.get('status')} {progress(chunk)}".rstrip())
                last = next((chunk for chunk in chunks if isinstance(chunk, dict) and has_images(chunk)), last)
            if self.how == "stream":
                job = self.http.patiently("GET", f"/status/{id}", self.stop)
        except (Stopped, Failed) as fault:
            if isinstance(fault, Failed) and fault.code in ("404", "NO_SUCH_JOB"):
                fault.hint = "The job is not known any more: results are kept for 30 minutes at most."
            else:
                cancel(lambda: self.http.call("POST", f"/cancel/{id}"))
            raise
        return self._output(job, last)

    def _output(self, job: Json, streamed: Json | None) -> Json:
        status, output = job.get("status"), job.get("output")
        if isinstance(output, list):  # what a worker streamed, collected
            output = next((one for one in reversed(output) if isinstance(one, dict) and has_images(one)), streamed)
        if status != "COMPLETED":
            raise Failed(str(status or "FAILED"), reason(job.get("error") or output), RUNPOD_HINTS.get(str(status), ""))
        output = output or streamed
        if not isinstance(output, dict):
            raise Failed("NO_OUTPUT", f"The job is COMPLETED without an output: {shorten(job)}", RUNPOD_HINTS["FAILED"])
        if output.get("error"):
            raise Failed("FAILED", reason(output["error"]), RUNPOD_HINTS["FAILED"], output)
        return {**succeeded(output), "job": {"queued": job.get("delayTime"), "running": job.get("executionTime")}}


RUNPOD_HINTS = {
    "FAILED": "The logs of the endpoint's workers say more.",
    "TIMED_OUT": "It waited longer than its ttl, or ran longer than the endpoint's execution timeout.",
    "CANCELLED": "Somebody else cancelled it, or purged the queue.",
}


def succeeded(answer: Json) -> Json:
    """An answer that is no error.

    Raises:
        Failed: it is one; with ``LEGACY_STATUS`` also one of status 200.
    """
    if error := answer.get("$error"):
        raise Failed(str(error.get("code", "FAILED")), str(error.get("message", error)), answer=answer)
    return answer


def reason(error: Any) -> str:
    """Why a job failed, in the words of the worker: a text, or what its SDK makes of an exception."""
    with contextlib.suppress(ValueError, TypeError):
        error = json.loads(error)
    if isinstance(error, dict):
        inner = error.get("$error") or error.get("error_message") or error.get("message") or error.get("error")
        return reason(inner) if inner else json.dumps(error)
    return str(error) if error else "It says nothing about why."


@contextlib.contextmanager
def understood() -> Iterator[None]:
    """Turn what is wrong with an answer, or with the folder for its images, into ``Failed``."""
    try:
        yield
    except OSError as fault:
        hint = "--output says where pictures are saved."
        raise Failed("NOT_SAVED", f"{fault.filename}: {fault.strerror}.", hint) from fault
    except (LookupError, TypeError, ValueError, AttributeError) as fault:
        told = f"The answer is not what this server's would be ({type(fault).__name__}: {fault})."
        raise Failed("NOT_UNDERSTOOD", told, "Is it the right address, and a server of this project?") from fault


def cancel(how: Callable[[], Json]) -> None:
    """Cancel a job that nobody waits for any more, if that is still possible."""
    with contextlib.suppress(Failed):
        how()


class Wait:
    """Waits between two looks at a job, longer and longer: a tenth of the time so far, a fifth of a second to five."""

    def __init__(self, limit: float, stop: threading.Event) -> None:
        self._began, self._limit, self._stop = time.monotonic(), limit, stop

    def wait(self) -> None:
        """Wait.

        Raises:
            Stopped: it is over.
            Failed: TIMED_OUT.
        """
        passed = time.monotonic() - self._began
        if passed > self._limit:
            hint = "--timeout says how long is waited; the job was cancelled."
            raise Failed("TIMED_OUT", f"It was not done in {self._limit:.0f} s.", hint)
        if self._stop.wait(min(5.0, max(0.2, passed / 10)) * random.uniform(0.9, 1.1)):  # noqa: S311
            raise Stopped


def progress(event: Any) -> str:
    """How far a job is, as people read it."""
    if not isinstance(event, dict):
        return event if isinstance(event, str) and len(event) < 200 else ""
    if isinstance(event.get("progress"), dict):
        event = event["progress"]
    if event.get("total"):
        eta = f", {event['eta']:.1f}s to go" if event.get("eta") is not None else ""
        return f"step {event.get('step')} of {event['total']}{eta}"
    return " ".join(str(event[key]) for key in ("type", "status") if event.get(key))


# --- what is shown ------------------------------------------------------------------------------------


def describe_image(data: bytes) -> str:
    """What to print in an image's place."""
    if data[:8] == b"\x89PNG\r\n\x1a\n":
        width, height = int.from_bytes(data[16:20], "big"), int.from_bytes(data[20:24], "big")
        return f"[{width}x{height} PNG image, {len(data) / 1024:.1f}KiB bytes]"
    return f"[{'video' if data[4:8] == b'ftyp' else 'image'}, {len(data) / 1024:.1f}KiB bytes]"


SINGLE = ("image_base64", "image", "video_base64", "video")
SEVERAL = ("images_base64", "images", "videos_base64", "videos")
LINKS = ("image_url", "image_urls", "video_url", "video_urls")
"""Names of images and videos in answers: native ones, the output of the simple form of RunPod's input; and where they
are instead."""


def has_images(answer: Json) -> bool:
    """Whether this is an answer, and no progress."""
    return any(key in answer for key in (*SINGLE, *SEVERAL, *LINKS, "$error", "error"))


def save_images(name: str, answer: Json, folder: Path) -> tuple[list[Path], Json]:
    """Save the images of an answer; where, and the answer with the images described instead."""
    shown, paths = dict(answer), []
    suffixes = {"JPEG": "jpg", "WEBP": "webp", "AVIF": "avif", "JXL": "jxl"}
    meta = answer.get("$meta") or answer.get("meta") or {}
    suffix = meta.get("video_format") or suffixes.get(str(meta.get("image_format")), "png")
    folder.mkdir(parents=True, exist_ok=True)
    for key in (*SINGLE, *SEVERAL):
        found = answer.get(key)
        images = [found] if isinstance(found, str) else found or []
        described = []
        for index, image in enumerate(images):
            data = base64.b64decode(image.partition(",")[2] if image.startswith("data:") else image)
            if not data:
                raise ValueError("an image is empty")
            paths.append(folder / (f"{name}.{suffix}" if key in SINGLE else f"{name}_{index}.{suffix}"))
            paths[-1].write_bytes(data)
            described.append(describe_image(data))
        if described:
            shown[key] = described[0] if key in SINGLE else described
    if "latents_base64" in answer:
        paths.append(folder / f"{name}.safetensors")
        paths[-1].write_bytes(base64.b64decode(answer["latents_base64"]))
        shown["latents_base64"] = "[latents]"
    return paths, shown


def seconds(timings: Json) -> str:
    """Timings as people read them: ``inference: 2.4s``."""
    shown = [f"{name}: {ms / 1000:.1f}s" for name, ms in timings.items() if ms and (ms >= 50 or name == "inference")]
    return ", ".join(shown)


def shorten(value: Any) -> Any:
    """The request with its images shortened, for printing."""
    if isinstance(value, dict):
        return {key: shorten(item) for key, item in value.items()}
    return f"{value[:40]}… ({len(value)} characters)" if isinstance(value, str) and len(value) > 400 else value


def percentile(sorted_values: list[float], percent: float) -> float:
    """The smallest value that so many percent of them do not exceed (nearest rank)."""
    return sorted_values[max(0, math.ceil(percent / 100 * len(sorted_values)) - 1)]


@dataclass
class Outcome:
    """How one request ended; ``took`` is what the client waited, in seconds."""

    name: str
    number: int
    took: float = 0.0
    images: int = 0
    files: list[Path] = field(default_factory=list)
    timings: Json = field(default_factory=dict)
    meta: Json = field(default_factory=dict)
    error: Failed | None = None

    def as_json(self) -> Json:
        """For ``--json``."""
        body: Json = {"name": self.name, "run": self.number, "ok": self.error is None, "seconds": round(self.took, 3)}
        if self.error is not None:
            told = {"code": self.error.code, "message": str(self.error), "hint": self.error.hint}
            return {**body, "error": {key: value for key, value in told.items() if value}}
        files = [str(path) for path in self.files]
        return {**body, "images": self.images, "files": files, "timings": self.timings, "meta": self.meta}


def figures(outcomes: list[Outcome], wall: float) -> Json:
    """Latency and throughput of some requests."""
    took = sorted(one.took for one in outcomes if one.error is None)
    body: Json = {"runs": len(outcomes), "failed": sum(one.error is not None for one in outcomes)}
    if took:
        named = {"p50": percentile(took, 50), "p95": percentile(took, 95), "min": took[0], "max": took[-1]}
        body |= {f"{name}_s": round(value, 3) for name, value in named.items()}
        body["requests_per_s"] = round(len(took) / wall, 3)
        body["images_per_s"] = round(sum(one.images for one in outcomes) / wall, 3)
    return body


def table(rows: dict[str, Json]) -> str:
    """Figures as people read them."""
    keys = ("runs", "failed", "p50_s", "p95_s", "min_s", "max_s", "requests_per_s", "images_per_s")
    heads = ("runs", "failed", "p50", "p95", "min", "max", "requests/s", "images/s")
    wide = max(len(name) for name in rows)
    lines = [" " * wide + "".join(f"{head:>12}" for head in heads)]
    for name, row in rows.items():
        units = {key: "" if "per" in key or not key.endswith("_s") else "s" for key in keys}
        cells = [f"{round(row[key], 2)}{units[key]}" if key in row else "-" for key in keys]
        lines.append(f"{name:<{wide}}" + "".join(f"{cell:>12}" for cell in cells))
    return "\n".join(lines)


class Screen:
    """Where things are printed: answers to stdout, progress to stderr, nothing but one object with ``--json``."""

    def __init__(self, args: argparse.Namespace) -> None:
        self._quiet = args.json
        self._live = sys.stderr.isatty()
        self._lock = threading.Lock()
        self._last = ("", 0.0)

    def say(self, text: str) -> None:
        """Print something that stays."""
        if self._quiet:
            return
        with self._lock:
            if self._live:
                print("\r\033[K", end="", file=sys.stderr, flush=True)
            print(text, flush=True)

    def tell(self, name: str, text: str) -> None:
        """Show how far something is: in place on a terminal, else what is new, each two seconds at most."""
        with self._lock:
            if self._live:
                print(f"\r\033[K{name}: {text}"[:150], end="", file=sys.stderr, flush=True)
                return
            state, now = f"{name}: {text.partition(' ')[0]}", time.monotonic()
            if not self._quiet and text and (state != self._last[0] or now > self._last[1] + 2):
                self._last = (state, now)
                print(f"{name}: {text}", file=sys.stderr, flush=True)


# --- the command line ---------------------------------------------------------------------------------


class Runs:
    """All requests of one call of this script, some at a time."""

    def __init__(self, names: list[str], client: Native | RunPod, args: argparse.Namespace) -> None:
        self.args, self.client, self.screen = args, client, Screen(args)
        self.outcomes: list[Outcome] = []
        self.wall = 0.0
        self.brief = args.repeat > 1 or args.concurrency > 1
        self._left = iter([Outcome(name, number) for number in range(1, args.repeat + 1) for name in names])
        self._lock = threading.Lock()

    def all(self) -> None:
        """Run them; when ``stop`` is set, cancel what runs."""
        began = time.monotonic()
        # daemons: what reads an answer cannot be woken, and ends with the process, which the server notices
        threads = [threading.Thread(target=self._work, daemon=True) for _ in range(self.args.concurrency)]
        for thread in threads:
            thread.start()
        # asked again and again: a join that a signal interrupts takes its thread for ended
        while any(thread.is_alive() for thread in threads) and not self.client.stop.is_set():
            time.sleep(0.02)
        if self.client.stop.is_set():
            self.screen.say("\nStopped: what runs is cancelled.")
            end = time.monotonic() + (10 if self.client.how == "async" or self.args.runpod else 0)
            while any(thread.is_alive() for thread in threads) and time.monotonic() < end:
                time.sleep(0.02)
        self.wall = time.monotonic() - began

    def _work(self) -> None:
        while not self.client.stop.is_set():
            with self._lock:
                outcome = next(self._left, None)
            if outcome is None:
                return
            try:
                self._one(outcome)
            except Stopped:
                return
            with self._lock:
                self.outcomes.append(outcome)

    def _one(self, outcome: Outcome) -> None:
        name, label = outcome.name, f"{outcome.name} {outcome.number}" if self.brief else outcome.name
        began = time.monotonic()
        try:
            body = request(name, self.args)
            if not self.brief:
                self.screen.say(f"Running test: {name}\n{json.dumps(shorten(body), indent=4)}")
            began = time.monotonic()
            with understood():
                answer = self.client.run(body, lambda text: self.screen.tell(label, text))
                outcome.took = time.monotonic() - began
                self._succeeded(outcome, answer, label)
        except Failed as fault:
            outcome.took, outcome.error = time.monotonic() - began, fault
            told = f"FAILED: {label}: {fault.code}: {fault}" + (f"\n{fault.hint}" if fault.hint else "")
            if fault.answer and not self.brief:
                told += f"\n{json.dumps(shorten(fault.answer), indent=4)}\n"
            self.screen.say(told)

    def _succeeded(self, outcome: Outcome, answer: Json, label: str) -> None:
        job = {key: ms for key, ms in answer.pop("job", {}).items() if ms is not None}
        outcome.timings, outcome.meta = {**job, **answer.get("$timings", {})}, answer.get("$meta", {})
        found = [answer[key] for key in (*SINGLE, *SEVERAL, *LINKS) if key in answer]
        outcome.images = sum(len(one) if isinstance(one, list) else 1 for one in found)
        if not outcome.images:
            raise Failed("NO_IMAGES", "The answer holds no image.", answer=answer)
        if outcome.number == 1:  # of many, the first is enough to look at
            outcome.files, answer = save_images(outcome.name, answer, self.args.output)
        if self.brief:
            self.screen.say(f"{label}: {outcome.took:.2f}s ({seconds(outcome.timings)})")
            return
        saved = "".join(f"Saved {path}\n" for path in outcome.files)
        told = f"Request took {outcome.took:.1f}s ({seconds(outcome.timings)})\n{saved}"
        self.screen.say(f"{told}{json.dumps(answer, indent=4)}\n")

    def report(self, names: list[str]) -> int:
        """Say how it went; the exit status."""
        stopped = self.client.stop.is_set()
        failed = [one for one in self.outcomes if one.error is not None]
        good = len(self.outcomes) - len(failed) == len(names) * self.args.repeat
        rows = {name: figures([one for one in self.outcomes if one.name == name], self.wall) for name in names}
        total = figures(self.outcomes, self.wall)
        if self.args.json:
            how = {"url": self.client.http.url, "mode": self.client.how, "runpod": self.args.runpod}
            load = {"concurrency": self.args.concurrency, "repeat": self.args.repeat, "seconds": round(self.wall, 3)}
            runs = [one.as_json() for one in self.outcomes]
            told = {"ok": good, **how, **load, "stopped": stopped, "total": total, "tests": rows}
            print(json.dumps({**told, "runs": runs}))
        else:
            if self.brief and self.outcomes:
                self.screen.say("\n" + table(rows if len(names) == 1 else {**rows, "all": total}))
            which = ", ".join(dict.fromkeys(one.name for one in failed))
            passed = f"{len(self.outcomes) - len(failed)} of {len(names) * self.args.repeat} passed"
            self.screen.say(passed + (f"; failed: {which}" if failed else ""))
        return 130 if stopped else 0 if good else 1


def request(name: str, args: argparse.Namespace) -> Json:
    """The body of an example, with what the command line says.

    Raises:
        Failed: it needs files that are not beside this script.
    """
    try:
        body = TESTS[name]()
    except OSError as fault:
        hint = "This example sends pictures of the repository: run test.py in a clone of it."
        raise Failed("NO_PICTURE", f"{fault.filename} is not there.", hint) from fault
    body["modelInputs"].update(args.model_arg)
    body["callInputs"].update(args.call_arg)
    if args.scheduler:
        body["callInputs"]["SCHEDULER"] = args.scheduler
    if args.xmfe is not None:
        body["callInputs"]["xformers_memory_efficient_attention"] = args.xmfe
    return body


def pair(text: str) -> tuple[str, Any]:
    """``K=V`` with V as JSON where it is JSON."""
    key, equals, value = text.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form KEY=VALUE")
    try:
        return key, json.loads(value)
    except ValueError:
        return key, value


def count(text: str) -> int:
    """A whole number from 1."""
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1")
    return int(text)


def parser() -> argparse.ArgumentParser:
    """What the command line may hold."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("names", nargs="*", metavar="NAME", help=f"{', '.join(TESTS)}, or all")
    made.add_argument("--url", default=os.environ.get("TEST_URL") or "http://localhost:8000/")
    made.add_argument("--key", default="", help="API key; else API_KEY, or with --runpod RUNPOD_API_KEY")
    made.add_argument("--output", type=Path, default=HERE / "tests" / "output", help="where to save the pictures")
    made.add_argument("--runpod", action="store_true", help="send to a RunPod endpoint instead")
    how = made.add_mutually_exclusive_group()
    how.add_argument("--stream", action="store_true", help="show events as they come (streamEvents, /stream)")
    how.add_argument("--async", action="store_true", dest="later", help="send a job for later, and poll (/jobs)")
    made.add_argument("--repeat", type=count, default=1, metavar="N", help="each so often; the first is saved")
    made.add_argument("--concurrency", type=count, default=1, metavar="N", help="so many at a time")
    made.add_argument("--timeout", type=float, default=900, metavar="S", help="seconds for each request, 900")
    made.add_argument("--json", action="store_true", help="print one JSON object, and nothing else")
    made.add_argument("--call-arg", type=pair, action="append", default=[], metavar="K=V", help="set a callInput")
    made.add_argument("--model-arg", type=pair, action="append", default=[], metavar="K=V", help="set a modelInput")
    made.add_argument("--scheduler", help="set callInputs.SCHEDULER")
    made.add_argument("--xmfe", type=lambda v: bool(int(v)), metavar="0|1", help="memory-efficient attention or not")
    return made


def main() -> int:
    """Run what the command line names."""
    options = parser()
    args = options.parse_args()
    names = [name for name in TESTS if name not in ELSEWHERE] if args.names == ["all"] else args.names
    environ, stop = os.environ, threading.Event()
    key = args.key or environ.get("RUNPOD_API_KEY" if args.runpod else "API_KEY", "")
    if unknown := [name for name in names if name not in TESTS]:
        options.error(f"unknown test {', '.join(unknown)}; there are {', '.join(TESTS)}, and all")
    missing = ["RUNPOD_API_KEY"] * (not key) + ["RUNPOD_MODEL_KEY"] * (not environ.get("RUNPOD_MODEL_KEY"))
    if args.runpod and missing:
        options.error(f"--runpod needs {' and '.join(missing)} in the environment")
    if not names:
        options.print_help()
        return 0
    client: Native | RunPod
    if args.runpod:
        base = (environ.get("RUNPOD_API_URL") or "https://api.runpod.ai/v2").rstrip("/")
        http_client = Http(f"{base}/{environ['RUNPOD_MODEL_KEY']}", key)
        client = RunPod(http_client, "stream" if args.stream else "async", args.timeout, stop)
    else:
        how = "stream" if args.stream else "async" if args.later else "plain"
        client = Native(Http(args.url, key), how, args.timeout, stop)
    for ending in (signal.SIGINT, signal.SIGTERM):
        signal.signal(ending, lambda *_: stop.set())
    runs = Runs(names, client, args)
    runs.all()
    for ending in (signal.SIGINT, signal.SIGTERM):  # it ends by itself now, and says how it went
        signal.signal(ending, signal.SIG_IGN)
    return runs.report(names)


if __name__ == "__main__":
    sys.exit(main())
