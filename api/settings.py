"""Every environment variable, typed and documented once.

``.env.example`` is checked against this file by a test.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

ROOT = Path(__file__).resolve().parents[1]
BUNDLED_MODELS = ROOT / "models"
"""Models that come with this repository: ``demo/shapes``."""


class SettingsError(ValueError):
    """One or more environment variables cannot be used; the message names each."""


def _text(value: str) -> str:
    return value


def _flag(value: str) -> bool:
    lowered = value.strip().lower()
    if lowered in ("1", "true", "yes", "on"):
        return True
    if lowered in ("0", "false", "no", "off", ""):
        return False
    raise ValueError("must be 0 or 1")


def _whole(low: int, high: int) -> Callable[[str], int]:
    def parse(value: str) -> int:
        try:
            number = int(value)
        except ValueError:
            raise ValueError("must be a whole number") from None
        if not low <= number <= high:
            raise ValueError(f"must be between {low} and {high}")
        return number

    return parse


_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "ki": 2**10, "mi": 2**20, "gi": 2**30}


def _bytes(value: str) -> int:
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmg]i?)?b?\s*", value.lower())
    if not match:
        raise ValueError("must be a size such as 20MiB or 500000")
    return int(float(match[1]) * _UNITS[match[2] or ""])


def _seconds(value: str) -> float:
    try:
        number = float(value)
    except ValueError:
        raise ValueError("must be a number of seconds") from None
    if not 0 < number < 1e7:
        raise ValueError("must be more than 0 and less than 10000000")
    return number


def _seconds_or_never(value: str) -> float:
    return 0.0 if value.strip() in ("", "0") else _seconds(value)


def _one_of(*allowed: str) -> Callable[[str], str]:
    def parse(value: str) -> str:
        if value not in allowed:
            raise ValueError(f"must be one of {', '.join(allowed)}")
        return value

    return parse


def _list(value: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in value.split(",") if part.strip())


def _per_key(value: str) -> dict[str, int]:
    """``60,alice=600``: what holds for every key, under ``""``, and for single ones; 0 is no limit."""
    found = {}
    for part in _list(value):
        name, _, number = part.rpartition("=")
        found[name.strip()] = _whole(0, 10**9)(number)
    return found


def _folders(value: str) -> tuple[Path, ...]:
    return tuple(Path(part).expanduser() for part in _list(value))


def _budget(value: str) -> int | float | None:
    if not value.strip():
        return None
    if match := re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*%\s*", value):
        if not 0 < float(match[1]) <= 100:
            raise ValueError("must be more than 0% and at most 100%")
        return float(match[1]) / 100
    return _bytes(value)


def _web_address(value: str) -> str:
    parts = urlsplit(value)
    if value and not (
        value.isascii() and parts.scheme in ("http", "https") and parts.hostname and "@" not in parts.netloc
    ):
        raise ValueError("must be an http or https URL, in ASCII, without a password")
    return value


def _models_dir(value: str) -> Path:
    if value:
        return Path(value).expanduser()
    for mounted in ("/runpod-volume", "/workspace"):
        if os.path.ismount(mounted):
            return Path(mounted) / "diffusers-api" / "models"
    return Path("~/.cache/diffusers-api/models").expanduser()


def _state_dir(value: str) -> Path:
    try:
        return Path(value).expanduser().absolute()
    except RuntimeError:
        raise ValueError("there is no home folder; set STATE_DIR to an absolute path") from None


def _variable(name: str, default: str, parse: Callable[[str], Any], meaning: str, *, secret: bool = False) -> Any:
    metadata = {"name": name, "default": default, "parse": parse, "meaning": meaning}
    return field(default_factory=lambda: parse(default), metadata=metadata, repr=not secret)


@dataclass(frozen=True)
class Settings:
    """The container's settled configuration. Sizes are bytes, durations seconds."""

    host: str = _variable("HOST", "0.0.0.0", _text, "address to listen on")
    port: int = _variable("PORT", "8000", _whole(0, 65535), "port to listen on; 0 picks a free one")
    port_health: int = _variable(
        "PORT_HEALTH", "0", _whole(0, 65535), "port that answers /ping as well, for RunPod's load balancer; 0: none"
    )
    model_id: str = _variable("MODEL_ID", "demo/shapes", _text, "the default model")
    model_revision: str = _variable("MODEL_REVISION", "", _text, "revision of the default model")
    hf_model_id: str = _variable("HF_MODEL_ID", "", _text, "the default model's id on the hub, where it is another")
    model_url: str = _variable(
        "MODEL_URL", "", _text, "where the default model lies, or is to be kept: s3://… or https://…"
    )
    checkpoint_url: str = _variable("CHECKPOINT_URL", "", _text, "single file that the default model is made from")
    checkpoint_config_url: str = _variable(
        "CHECKPOINT_CONFIG_URL", "", _text, "how that file is built: a family such as sdxl, a model id, or a URL"
    )
    model_precision: str = _variable(
        "MODEL_PRECISION",
        "",
        _one_of("", "fp32", "fp16", "bf16"),
        "precision where a request names none; empty: fp32; a CPU computes in fp32 always",
    )
    pipeline: str = _variable("PIPELINE", "AutoPipelineForText2Image", _text, "the default pipeline, or ALL")
    scheduler: str = _variable(
        "SCHEDULER",
        "DPMSolverMultistepScheduler",
        _text,
        "the default scheduler, a class or a name like Euler a; gives way to the model's own where it does not suit",
    )
    models_dir: Path = _variable(
        "MODELS_DIR", "", _models_dir, "folder of installed models; empty: on the mounted volume, else ~/.cache"
    )
    volume_limit: int | float | None = _variable(
        "VOLUME_LIMIT", "", _budget, "what models may take on the volume: 200GiB, 80%; empty: what the disk has"
    )
    runtime_downloads: bool = _variable(
        "RUNTIME_DOWNLOADS", "1", _flag, "0: only what is on the volume or in the image is served"
    )
    state_dir: Path = _variable(
        "STATE_DIR",
        "~/.local/state/diffusers-api",
        _state_dir,
        "folder of the jobs for later and their results: on a local disk, one for each container",
    )
    persist_inputs: bool = _variable(
        "PERSIST_INPUTS", "1", _flag, "0: prompts and pictures of jobs for later stay in memory, and end with it"
    )
    job_ttl: float = _variable("JOB_TTL", "86400", _seconds, "seconds that a job for later may wait for its turn")
    result_ttl: float = _variable("RESULT_TTL", "1800", _seconds, "seconds that the result of a job for later is kept")
    baked_models_dir: Path = _variable(
        "BAKED_MODELS_DIR", "/opt/diffusers-api/models", Path, "folder of the models inside the image; only read"
    )
    local_models: tuple[Path, ...] = _variable(
        "LOCAL_MODELS", "", _folders, "folders that hold diffusers models as org/name or org--name; only read"
    )
    hub_caches: tuple[Path, ...] = _variable(
        "HUB_CACHES",
        "/runpod-volume/huggingface-cache/hub",
        _folders,
        "hub caches that others fill, such as the platform; only read",
    )
    hf_auth_token: str = _variable("HF_AUTH_TOKEN", "", _text, "token for the hub", secret=True)
    hf_token: str = _variable("HF_TOKEN", "", _text, "the same, as the hub's own tools call it", secret=True)
    hf_endpoint: str = _variable("HF_ENDPOINT", "", _text, "address of the hub; empty: huggingface.co")
    aws_access_key_id: str = _variable(
        "AWS_ACCESS_KEY_ID", "", _text, "for S3; empty: the usual chain of profile and instance role", secret=True
    )
    aws_secret_access_key: str = _variable("AWS_SECRET_ACCESS_KEY", "", _text, "its secret", secret=True)
    aws_session_token: str = _variable("AWS_SESSION_TOKEN", "", _text, "of temporary credentials", secret=True)
    aws_default_region: str = _variable(
        "AWS_DEFAULT_REGION", "", _text, "region of the buckets, where there are regions"
    )
    aws_s3_endpoint_url: str = _variable("AWS_S3_ENDPOINT_URL", "", _text, "S3-compatible service; empty: AWS")
    aws_s3_default_bucket: str = _variable("AWS_S3_DEFAULT_BUCKET", "", _text, "bucket of s3:// URLs that name none")
    aws_s3_addressing_style: str = _variable(
        "AWS_S3_ADDRESSING_STYLE", "auto", _one_of("auto", "path", "virtual"), "host/bucket or bucket.host"
    )
    allow_remote_code: bool = _variable(
        "ALLOW_REMOTE_CODE",
        "0",
        _flag,
        "1: requests may name community pipelines of diffusers, which are code that is fetched from the hub and run",
    )
    allow_pickle: str = _variable(
        "ALLOW_PICKLE",
        "weights",
        _one_of("weights", "0"),
        "weights: .bin and .ckpt are converted by torch's weights-only loader, in a process of its own; 0: never",
    )
    warm_models: tuple[str, ...] = _variable(
        "WARM_MODELS", "", _list, "models to load at start beside MODEL_ID, comma-separated"
    )
    vram_limit: int | float | None = _variable(
        "VRAM_LIMIT", "", _budget, "what models may take on a device: 20GiB, 80%; empty: three quarters of what is free"
    )
    ram_limit: int | float | None = _variable(
        "RAM_LIMIT", "", _budget, "what models may take in RAM, all devices together: 40GiB, 60%; empty: half of it"
    )
    model_idle_timeout: float = _variable(
        "MODEL_IDLE_TIMEOUT", "0", _seconds_or_never, "seconds after which an unused model leaves the device; 0: never"
    )
    max_switch_wait: float = _variable(
        "MAX_SWITCH_WAIT", "10", _seconds_or_never, "seconds that a job is passed by jobs whose model is in memory"
    )
    devices: tuple[str, ...] = _variable(
        "DEVICES", "", _list, "a worker for each: cuda:0,cuda:1 or cpu; empty: all GPUs, else the CPU"
    )
    safety_checker: str = _variable(
        "SAFETY_CHECKER",
        "auto",
        _one_of("auto", "required", "off"),
        "auto: a model's safety checker runs unless a request says otherwise; required: always, models without one are "
        "refused; off: only where a request asks for it",
    )
    attention: str = _variable(
        "ATTENTION",
        "auto",
        _one_of(
            "auto",
            "native",
            "sdpa",
            "xformers",
            "flash",
            "sage",
            "_native_cudnn",
            "_native_flash",
            "_native_efficient",
            "_native_math",
        ),
        "attention kernels; auto: the fastest lossless ones of this GPU, measured once; sdpa, native: torch's choice; "
        "sage is lossy; what is not installed falls back to sdpa",
    )
    channels_last: str = _variable(
        "CHANNELS_LAST",
        "auto",
        _one_of("auto", "0", "1"),
        "weights of convolutions as GPUs compute them; auto: in fp16 and bf16 on a GPU; 1: in fp32 too",
    )
    tf32: bool = _variable(
        "TF32", "0", _flag, "1: products in fp32 on a GPU are computed in TF32: 10 bits of 23, and faster"
    )
    offload: str = _variable(
        "OFFLOAD",
        "auto",
        _one_of("auto", "none", "model", "sequential"),
        "auto: what does not fit is decoded in slices, then tiles, then weights stay in RAM; none: it is a 507; model, "
        "sequential: weights stay in RAM from the start, one part or block at a time on the GPU",
    )
    quantize: str = _variable(
        "QUANTIZE",
        "",
        _one_of("", "none", "fp8", "int8", "nf4"),
        "what large linear layers are quantized to, lossily, for less memory (pip install '.[quantize]'); empty: none",
    )
    compile: str = _variable(
        "COMPILE",
        "off",
        _one_of("off", "blocks", "graphs", "both"),
        "blocks: a denoiser's repeated blocks are compiled beside the jobs, which changes pixels a little; graphs: its "
        "short calls are recorded as CUDA graphs, which changes none; both; off: neither",
    )
    compile_cache: str = _variable(
        "COMPILE_CACHE", "", _text, "folder of compiled code, which only this server may write to; empty: in STATE_DIR"
    )
    adapters_limit: int = _variable(
        "ADAPTERS_LIMIT", "1GiB", _bytes, "what LoRAs that no running job uses may take on a device, beside the models"
    )
    embeddings_limit: int = _variable(
        "EMBEDDINGS_LIMIT",
        "64MiB",
        _bytes,
        "what embeddings of prompts may take on a device, for prompts that come again; 0: none are kept",
    )
    api_keys: tuple[str, ...] = _variable(
        "API_KEYS",
        "",
        _list,
        "keys that requests need: KEY, name:KEY or name:sha256:HEX, comma-separated; empty: none, all is open",
        secret=True,
    )
    admin_keys: tuple[str, ...] = _variable(
        "ADMIN_KEYS", "", _list, "names of the keys that see what is of others: GET /usage, /webhooks, /metrics"
    )
    key_rate_limit: Mapping[str, int] = _variable(
        "KEY_RATE_LIMIT",
        "0",
        _per_key,
        "jobs a minute that each key may begin: 60, or 60,alice=600; 0: no limit",
    )
    key_concurrency: Mapping[str, int] = _variable(
        "KEY_CONCURRENCY", "0", _per_key, "jobs of each key that may wait or run, such as 8 or 8,alice=0; 0: no limit"
    )
    wrong_keys: int = _variable(
        "WRONG_KEYS", "10", _whole(0, 100_000), "wrong keys a minute that are looked at from one address; 0: no limit"
    )
    proxies_count: int = _variable(
        "PROXIES_COUNT",
        "0",
        _whole(0, 100),
        "proxies in front that add to X-Forwarded-For, to know the address of a client; 0: it is not believed",
    )
    real_ip_header: str = _variable(
        "REAL_IP_HEADER", "", _text, "header in which the proxy in front sends the client's address, such as X-Real-IP"
    )
    cors_origins: tuple[str, ...] = _variable(
        "CORS_ORIGINS",
        "",
        _list,
        "origins whose pages may use the server: https://app.example, *, none; empty: all without API_KEYS, else none",
    )
    max_connections: int = _variable(
        "MAX_CONNECTIONS", "800", _whole(1, 1_000_000), "connections of clients at once; the next one is a 503"
    )
    max_queue: int = _variable("MAX_QUEUE", "100", _whole(1, 100_000), "requests that may wait; the next one is a 429")
    max_concurrency: int = _variable(
        "MAX_CONCURRENCY", "16", _whole(1, 256), "requests that share a device step by step; 1: one after the other"
    )
    max_pixels: int = _variable("MAX_PIXELS", "4194304", _whole(64, 2**30), "pixels of one image, in or out")
    max_upscaled_pixels: int = _variable(
        "MAX_UPSCALED_PIXELS", "16777216", _whole(64, 2**30), "pixels of one image that an upscaler makes"
    )
    max_steps: int = _variable("MAX_STEPS", "500", _whole(1, 100_000), "num_inference_steps of one request")
    max_images: int = _variable("MAX_IMAGES", "16", _whole(1, 1024), "images of one request")
    max_frames: int = _variable("MAX_FRAMES", "257", _whole(1, 100_000), "frames of all videos of one request together")
    max_body: int = _variable("MAX_BODY", "64MiB", _bytes, "size of a request body, and of an image fetched from a URL")
    request_timeout: float = _variable(
        "REQUEST_TIMEOUT",
        "600",
        _seconds,
        "seconds a request may take, waiting included; for jobs for later, running alone counts",
    )
    fetch_timeout: float = _variable(
        "FETCH_TIMEOUT", "20", _seconds, "seconds an image URL may take, to read or to upload to"
    )
    watchdog_timeout: float = _variable(
        "WATCHDOG_TIMEOUT",
        "900",
        _seconds,
        "seconds after which a worker that makes no progress (one module call, one model, its start) is taken for hung",
    )
    refresh_worker: bool = _variable(
        "REFRESH_WORKER", "0", _flag, "1: on RunPod serverless, one job at a time, and a new worker after each"
    )
    drain_timeout: float = _variable("DRAIN_TIMEOUT", "30", _seconds, "seconds that running jobs get at SIGTERM")
    allow_private_urls: bool = _variable(
        "ALLOW_PRIVATE_URLS", "0", _flag, "1: URLs in requests may lead into private networks"
    )
    allowed_urls: tuple[str, ...] = _variable(
        "ALLOWED_URLS",
        "",
        _list,
        "private hosts and networks that URLs in requests may lead to all the same: minio.local:9000,10.0.0.0/8",
    )
    send_url: str = _variable(
        "SEND_URL", "", _web_address, "receiver of webhooks, where a request names none; may be in a private network"
    )
    sign_key: str = _variable(
        "SIGN_KEY", "", _text, "what webhooks are signed with, where a request brings no key", secret=True
    )
    container_id: str = _variable("CONTAINER_ID", "", _text, "what events and webhooks call this container")
    webhook_tries: int = _variable(
        "WEBHOOK_TRIES", "30", _whole(1, 1000), "how often a webhook is sent until it is given up: for about an hour"
    )
    webhook_timeout: float = _variable(
        "WEBHOOK_TIMEOUT", "20", _seconds, "seconds that the receiver of a webhook may take to answer"
    )
    webhook_ttl: float = _variable(
        "WEBHOOK_TTL", "86400", _seconds, "seconds after which a webhook that has not arrived is given up"
    )
    legacy_status: bool = _variable("LEGACY_STATUS", "0", _flag, "1: errors come with HTTP 200, for old clients")
    log_format: str = _variable(
        "LOG_FORMAT", "", _one_of("", "text", "json"), "text or json; empty: text on a terminal"
    )
    log_level: str = _variable("LOG_LEVEL", "info", _one_of("debug", "info", "warning", "error"), "least level to log")

    @classmethod
    def from_env(cls, environ: Mapping[str, str] | None = None, **overrides: Any) -> Settings:
        """Read the settings.

        Args:
            environ: where to read from; the process environment by default.
            overrides: fields that win over the environment, already parsed.

        Raises:
            SettingsError: a variable has a value that cannot be used; all of them are named.
        """
        environ = os.environ if environ is None else environ
        values: dict[str, Any] = {}
        faults = []
        for f in fields(cls):
            meta = f.metadata
            try:
                values[f.name] = meta["parse"](environ.get(meta["name"], meta["default"]))
            except ValueError as fault:
                value = repr(environ.get(meta["name"])) if f.repr else "…"
                faults.append(f"{meta['name']}={value}: {fault}")
        if faults:
            raise SettingsError("; ".join(faults))
        return cls(**{**values, **overrides})
