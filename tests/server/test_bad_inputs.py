"""Every bad input is a 4xx with a code and a field, and the next good request gets its right image."""

from __future__ import annotations

import json
import statistics
import threading
import time
from typing import Any

import numpy as np
import pytest

from tests.running import Server, as_base64, images_of

GREY = as_base64(np.full((64, 64, 3), 128, np.uint8))
DEEP = json.loads("[" * 900 + "]" * 900)
FLOATS = as_base64(np.zeros((64, 64), np.float32), "TIFF")
WIDE = as_base64(np.zeros((8, 400, 3), np.uint8))
P = {"prompt": "a red circle"}
I2I = {"PIPELINE": "StableDiffusionImg2ImgPipeline"}
INPAINT = {"PIPELINE": "StableDiffusionInpaintPipeline"}

# (what is wrong, modelInputs, callInputs, status, code, field)
BAD: list[tuple[str, dict[str, Any], dict[str, Any], int, str, str]] = [
    ("unknown quantization", P, {"QUANTIZE": "int2"}, 400, "INVALID_INPUTS", "callInputs.QUANTIZE"),
    ("nothing to quantize", P, {"QUANTIZE": "int8"}, 422, "NOT_SUPPORTED", "callInputs.QUANTIZE"),
    ("unknown step cache", P, {"step_cache": {"kind": "x"}}, 400, "INVALID_INPUTS", "callInputs.step_cache.kind"),
    ("step cache of a UNet", P, {"step_cache": True}, 422, "NOT_SUPPORTED", "callInputs.step_cache"),
    ("no prompt", {}, {}, 400, "MISSING_INPUT", "modelInputs.prompt"),
    ("null prompt", {"prompt": None}, {}, 400, "MISSING_INPUT", "modelInputs.prompt"),
    ("number as prompt", {"prompt": 7}, {}, 400, "INVALID_INPUTS", "modelInputs.prompt"),
    ("empty list of prompts", {"prompt": []}, {}, 400, "INVALID_INPUTS", "modelInputs.prompt"),
    ("mixed list of prompts", {"prompt": ["a", 1]}, {}, 400, "INVALID_INPUTS", "modelInputs.prompt"),
    ("object as prompt", {"prompt": {"a": 1}}, {}, 400, "INVALID_INPUTS", "modelInputs.prompt"),
    ("endless second prompt", {**P, "prompt_2": "a" * 20_001}, {"MODEL_ID": "not/here"}, 400, "LIMIT_EXCEEDED", "modelInputs.prompt_2"),
    ("endless prompt", {"prompt": "a" * 20_001}, {}, 400, "LIMIT_EXCEEDED", "modelInputs.prompt"),
    ("misspelt input", {**P, "num_inference_step": 2}, {}, 400, "UNKNOWN_INPUT", "modelInputs.num_inference_step"),
    ("input of another pipeline", {**P, "strength": 0.5}, {}, 400, "UNKNOWN_INPUT", "modelInputs.strength"),
    ("tensor input", {**P, "prompt_embeds": [1.0]}, {}, 400, "UNKNOWN_INPUT", "modelInputs.prompt_embeds"),
    ("callable input", {**P, "callback_on_step_end": "x"}, {}, 400, "UNKNOWN_INPUT", "modelInputs.callback_on_step_end"),
    ("our input", {**P, "output_type": "latent"}, {}, 400, "UNKNOWN_INPUT", "modelInputs.output_type"),
    ("generator", {**P, "generator": 1}, {}, 400, "UNKNOWN_INPUT", "modelInputs.generator"),
    ("steps as text", {**P, "num_inference_steps": "20"}, {}, 400, "INVALID_INPUTS", "modelInputs.num_inference_steps"),
    ("half a step", {**P, "num_inference_steps": 1.5}, {}, 400, "INVALID_INPUTS", "modelInputs.num_inference_steps"),
    ("no steps", {**P, "num_inference_steps": 0}, {}, 400, "INVALID_INPUTS", "modelInputs.num_inference_steps"),
    ("negative steps", {**P, "num_inference_steps": -3}, {}, 400, "INVALID_INPUTS", "modelInputs.num_inference_steps"),
    ("a billion steps", {**P, "num_inference_steps": 10**9}, {}, 400, "LIMIT_EXCEEDED", "modelInputs.num_inference_steps"),
    ("true as steps", {**P, "num_inference_steps": True}, {}, 400, "INVALID_INPUTS", "modelInputs.num_inference_steps"),
    ("endless timesteps", {**P, "timesteps": [1] * 1000}, {}, 400, "LIMIT_EXCEEDED", "modelInputs.num_inference_steps"),
    ("guidance as text", {**P, "guidance_scale": "high"}, {}, 400, "INVALID_INPUTS", "modelInputs.guidance_scale"),
    ("guidance out of range", {**P, "guidance_scale": 1e9}, {}, 400, "INVALID_INPUTS", "modelInputs.guidance_scale"),
    ("odd width", {**P, "width": 63}, {}, 400, "INVALID_INPUTS", "modelInputs.width"),
    ("no height", {**P, "height": 0}, {}, 400, "INVALID_INPUTS", "modelInputs.height"),
    ("negative height", {**P, "height": -64}, {}, 400, "INVALID_INPUTS", "modelInputs.height"),
    ("huge", {**P, "width": 8192, "height": 8192}, {}, 400, "LIMIT_EXCEEDED", "modelInputs.width"),
    ("thin", {**P, "width": 8, "height": 4096}, {}, 400, "INVALID_INPUTS", "modelInputs.width"),
    ("too many images", {**P, "num_images_per_prompt": 1000}, {}, 400, "LIMIT_EXCEEDED", "modelInputs.num_images_per_prompt"),
    ("no images", {**P, "num_images_per_prompt": 0}, {}, 400, "INVALID_INPUTS", "modelInputs.num_images_per_prompt"),
    ("too many prompts", {"prompt": ["a"] * 100}, {}, 400, "LIMIT_EXCEEDED", "modelInputs.num_images_per_prompt"),
    ("seed as text", {**P, "seed": "x"}, {}, 400, "INVALID_INPUTS", "modelInputs.seed"),
    ("negative seed", {**P, "seed": -1}, {}, 400, "INVALID_INPUTS", "modelInputs.seed"),
    ("half a seed", {**P, "seed": 0.5}, {}, 400, "INVALID_INPUTS", "modelInputs.seed"),
    ("seeds for other images", {**P, "seed": [1, 2]}, {}, 400, "INVALID_INPUTS", "modelInputs.seed"),
    ("eta out of range", {**P, "eta": 2}, {}, 400, "INVALID_INPUTS", "modelInputs.eta"),
    ("clip_skip as text", {**P, "clip_skip": "1"}, {}, 400, "INVALID_INPUTS", "modelInputs.clip_skip"),
    ("negatives without prompts", {**P, "negative_prompt": ["a"]}, {}, 400, "INVALID_INPUTS", "modelInputs.negative_prompt"),
    ("cross_attention_kwargs as number", {**P, "cross_attention_kwargs": 1}, {}, 400, "INVALID_CROSS_ATTENTION_KWARGS", "modelInputs.cross_attention_kwargs"),
    ("cross_attention_kwargs broken", {**P, "cross_attention_kwargs": "{"}, {}, 400, "INVALID_CROSS_ATTENTION_KWARGS", "modelInputs.cross_attention_kwargs"),
    ("cross_attention_kwargs with half a character", {**P, "cross_attention_kwargs": '{"a":"\\ud800"}'}, {}, 400, "INVALID_CROSS_ATTENTION_KWARGS", "modelInputs.cross_attention_kwargs"),
    ("cross_attention_kwargs without a bottom", {**P, "cross_attention_kwargs": {"a": DEEP}}, {}, 400, "INVALID_INPUTS", "modelInputs.cross_attention_kwargs"),
    ("cross_attention_kwargs without a bottom, as text", {**P, "cross_attention_kwargs": '{"a":' * 100_000}, {}, 400, "INVALID_CROSS_ATTENTION_KWARGS", "modelInputs.cross_attention_kwargs"),
    ("cross_attention_kwargs that break the pipeline", {**P, "num_inference_steps": 1, "cross_attention_kwargs": {"gligen": 5}}, {}, 422, "PIPELINE_ERROR", "modelInputs"),
    ("width beyond numbers", {**P, "width": 1e300}, {}, 400, "INVALID_INPUTS", "modelInputs.width"),
    ("width beyond 64 bits", {**P, "width": 1e20}, {}, 400, "INVALID_INPUTS", "modelInputs.width"),
    ("height far below", {**P, "height": -1e30}, {}, 400, "INVALID_INPUTS", "modelInputs.height"),
    ("steps beyond numbers", {**P, "num_inference_steps": 1e300}, {}, 400, "INVALID_INPUTS", "modelInputs.num_inference_steps"),
    ("clip_skip past the text encoder", {**P, "clip_skip": 3}, {}, 400, "INVALID_INPUTS", "modelInputs.clip_skip"),
    ("timesteps that strength leaves nothing of", {**P, "image": GREY, "timesteps": [900], "strength": 0.5}, I2I, 400, "INVALID_INPUTS", "modelInputs.strength"),
    ("floating-point image", {**P, "image": FLOATS}, I2I, 400, "INVALID_IMAGE", "modelInputs.image"),
    ("endless request id", P, {"startRequestId": "x" * 100_000}, 400, "INVALID_INPUTS", "callInputs.startRequestId"),
    ("callback_steps of nothing", {**P, "callback_steps": 0}, {}, 400, "INVALID_INPUTS", "modelInputs.callback_steps"),
    ("previews that nobody reads", P, {"preview": 1}, 400, "INVALID_INPUTS", "callInputs.preview"),
    ("previews every 0 steps", P, {"preview": 0, "streamEvents": True}, 400, "INVALID_INPUTS", "callInputs.preview"),
    ("previews every -1 steps", P, {"preview": -1, "streamEvents": True}, 400, "INVALID_INPUTS", "callInputs.preview"),
    ("previews every half a step", P, {"preview": 0.5, "streamEvents": True}, 400, "INVALID_INPUTS", "callInputs.preview"),
    ("previews beyond numbers", P, {"preview": 10**18, "streamEvents": True}, 400, "INVALID_INPUTS", "callInputs.preview"),
    ("previews as text", P, {"preview": "all", "streamEvents": True}, 400, "INVALID_INPUTS", "callInputs.preview"),
    ("previews as a list", P, {"preview": [1], "streamEvents": True}, 400, "INVALID_INPUTS", "callInputs.preview"),
    ("previews of what a safety checker may hide", P, {"preview": 1, "streamEvents": True, "MODEL_ID": "tiny/nsfw"}, 400, "INVALID_INPUTS", "callInputs.preview"),
    ("img2img without an image", P, I2I, 400, "MISSING_INPUT", "modelInputs.image"),
    ("inpainting without a mask", {**P, "image": GREY}, INPAINT, 400, "MISSING_INPUT", "modelInputs.mask_image"),
    ("image that is no base64", {**P, "image": "%%%"}, I2I, 400, "INVALID_IMAGE", "modelInputs.image"),
    ("image that is no image", {**P, "image": "AAAA"}, I2I, 400, "INVALID_IMAGE", "modelInputs.image"),
    ("image as number", {**P, "image": 3}, I2I, 400, "INVALID_INPUTS", "modelInputs.image"),
    ("image cut short", {**P, "image": GREY[:80]}, I2I, 400, "INVALID_IMAGE", "modelInputs.image"),
    ("image too thin", {**P, "image": WIDE}, I2I, 400, "INVALID_IMAGE", "modelInputs.image"),
    ("mask that is no image", {**P, "image": GREY, "mask_image": "AAAA"}, INPAINT, 400, "INVALID_IMAGE", "modelInputs.mask_image"),
    ("URL without is_url", {**P, "image": "http://x/y.png"}, I2I, 400, "INVALID_IMAGE", "modelInputs.image"),
    ("image under two names", {**P, "image": GREY, "init_image": GREY}, I2I, 400, "INVALID_INPUTS", "modelInputs.init_image"),
    ("strength over 1", {**P, "image": GREY, "strength": 1.5}, I2I, 400, "INVALID_INPUTS", "modelInputs.strength"),
    ("too little strength", {**P, "image": GREY, "strength": 0.01}, I2I, 400, "INVALID_INPUTS", "modelInputs.strength"),
    ("private URL", {**P, "image": "http://127.0.0.1/"}, {**I2I, "is_url": True}, 400, "URL_NOT_ALLOWED", "modelInputs.image"),
    ("file URL", {**P, "image": "file:///etc/passwd"}, {**I2I, "is_url": True}, 400, "URL_NOT_ALLOWED", "modelInputs.image"),
    ("misspelt option", P, {"MODELID": "x"}, 400, "UNKNOWN_INPUT", "callInputs.MODELID"),
    ("option as number", P, {"SCHEDULER": 5}, 400, "INVALID_INPUTS", "callInputs.SCHEDULER"),
    ("flag as text", P, {"is_url": "maybe"}, 400, "INVALID_INPUTS", "callInputs.is_url"),
    ("unknown model", P, {"MODEL_ID": "no/such"}, 404, "MODEL_MISMATCH", "callInputs.MODEL_ID"),
    ("model outside", P, {"MODEL_ID": "../../etc"}, 400, "INVALID_INPUTS", "callInputs.MODEL_ID"),
    ("model with shell", P, {"MODEL_ID": "a/b;touch x"}, 400, "INVALID_INPUTS", "callInputs.MODEL_ID"),
    ("other revision", P, {"MODEL_REVISION": "fp16"}, 404, "MODEL_NOT_FOUND", "callInputs.MODEL_REVISION"),
    ("odd precision", P, {"MODEL_PRECISION": "fp8"}, 400, "INVALID_INPUTS", "callInputs.MODEL_PRECISION"),
    ("model without its UNet", P, {"MODEL_ID": "tiny/partless"}, 422, "MODEL_BROKEN", "callInputs.MODEL_ID"),
    ("unknown pipeline", P, {"PIPELINE": "StableDifusionPipeline"}, 404, "NO_SUCH_PIPELINE", "callInputs.PIPELINE"),
    ("pipeline of another family", P, {"PIPELINE": "FluxPipeline"}, 422, "PIPELINE_NOT_SUPPORTED", "callInputs.PIPELINE"),
    ("method as pipeline", P, {"PIPELINE": "__init__"}, 404, "NO_SUCH_PIPELINE", "callInputs.PIPELINE"),
    ("pipeline method", P, {"custom_pipeline_method": "save_pretrained"}, 400, "INVALID_INPUTS", "callInputs.custom_pipeline_method"),
    ("community pipeline", P, {"PIPELINE": "lpw_stable_diffusion"}, 403, "REMOTE_CODE_NOT_ALLOWED", "callInputs.PIPELINE"),
    ("video pipeline", P, {"PIPELINE": "WanPipeline"}, 422, "PIPELINE_NOT_SUPPORTED", "callInputs.PIPELINE"),
    ("unknown scheduler", P, {"SCHEDULER": "EulerScheduler"}, 404, "NO_SUCH_SCHEDULER", "callInputs.SCHEDULER"),
    ("scheduler of another kind", P, {"SCHEDULER": "FlowMatchEulerDiscreteScheduler"}, 422, "INVALID_SCHEDULER", "callInputs.SCHEDULER"),
    ("scheduler without its library", P, {"SCHEDULER": "DPMSolverSDEScheduler"}, 422, "INVALID_SCHEDULER", "callInputs.SCHEDULER"),
    ("unknown scheduler argument", P, {"scheduler_args": {"x": 1}}, 400, "UNKNOWN_INPUT", "callInputs.scheduler_args.x"),
    ("scheduler argument of another type", P, {"scheduler_args": {"solver_order": "2"}}, 400, "INVALID_INPUTS", "callInputs.scheduler_args.solver_order"),
    ("scheduler arguments as list", P, {"scheduler_args": []}, 400, "INVALID_INPUTS", "callInputs.scheduler_args"),
    ("upload to nowhere", P, {"output_url": "nowhere"}, 400, "URL_NOT_ALLOWED", "callInputs.output_url"),
    ("output as text", P, {"output": "mask"}, 400, "INVALID_INPUTS", "callInputs.output"),
    ("odd image format", P, {"image_format": "PSD"}, 400, "INVALID_INPUTS", "callInputs.image_format"),
    ("odd quality", P, {"image_quality": 0}, 400, "INVALID_INPUTS", "callInputs.image_quality"),
    ("weights of another syntax", P, {"prompt_syntax": "comfy"}, 400, "INVALID_INPUTS", "callInputs.prompt_syntax"),
    ("open bracket", {"prompt": ["a", "a (red"]}, {"prompt_syntax": "a1111"}, 400, "INVALID_INPUTS", "modelInputs.prompt[1]"),
    ("prompt editing", {**P, "negative_prompt": "[a:b:3]"}, {"prompt_syntax": "a1111"}, 400, "INVALID_INPUTS", "modelInputs.negative_prompt"),
    ("open quote", {"prompt": 'a "red'}, {"compel_prompts": True}, 400, "INVALID_INPUTS", "modelInputs.prompt"),
    ("open bracket for a model that is not here", {"prompt": "(a"}, {"MODEL_ID": "no/such", "compel_prompts": 1}, 400, "INVALID_INPUTS", "modelInputs.prompt"),
    ("two syntaxes", P, {"prompt_syntax": "a1111", "compel_prompts": True}, 400, "INVALID_INPUTS", "callInputs.compel_prompts"),
    ("a syntax and its opposite", P, {"prompt_syntax": "compel", "compel_prompts": False}, 400, "INVALID_INPUTS", "callInputs.compel_prompts"),
    ("webhooks to what is no URL", P, {"SEND_URL": "ftp://x/"}, 400, "URL_NOT_ALLOWED", "callInputs.SEND_URL"),
    ("webhooks into a private network", P, {"SEND_URL": "http://127.0.0.1:1/"}, 400, "URL_NOT_ALLOWED", "callInputs.SEND_URL"),
    ("webhooks with a password", P, {"SEND_URL": "http://a:b@example.com/"}, 400, "INVALID_INPUTS", "callInputs.SEND_URL"),
    ("webhooks to many", P, {"SEND_URL": ["http://x/"]}, 400, "INVALID_INPUTS", "callInputs.SEND_URL"),
    ("a key that is none", P, {"SIGN_KEY": "whsec_???"}, 400, "INVALID_INPUTS", "callInputs.SIGN_KEY"),
]  # fmt: skip

BODIES: list[tuple[str, bytes, int, str]] = [
    ("empty", b"", 400, "INVALID_JSON"),
    ("not JSON", b"prompt=a cat", 400, "INVALID_JSON"),
    ("cut JSON", b'{"modelInputs": {"prompt": "a', 400, "INVALID_JSON"),
    ("NaN", b'{"modelInputs": {"prompt": "a", "guidance_scale": NaN}}', 400, "INVALID_JSON"),
    ("a list", b"[1]", 400, "INVALID_JSON"),
    ("a number", b"1", 400, "INVALID_JSON"),
    ("a string of no JSON", b'"abc"', 400, "INVALID_JSON"),
    ("not UTF-8", b'{"modelInputs": {"prompt": "\xff"}}', 400, "INVALID_JSON"),
    ("deeply nested", b"[" * 100_000, 400, "INVALID_JSON"),
    ("inputs at the top", b'{"prompt": "a cat"}', 400, "UNKNOWN_INPUT"),
    ("misspelt half", b'{"modelInput": {}}', 400, "UNKNOWN_INPUT"),
    ("inputs as list", b'{"modelInputs": []}', 400, "INVALID_INPUTS"),
    ("options as text", b'{"modelInputs": {}, "callInputs": "x"}', 400, "INVALID_INPUTS"),
    ("no inputs", b"{}", 400, "MISSING_INPUT"),
    ("too large", b'{"modelInputs": {"prompt": "' + b"a" * 9_000_000 + b'"}}', 413, "BODY_TOO_LARGE"),
]

GOOD = {"prompt": "a red circle on a blue background", "num_inference_steps": 2, "seed": 5}


@pytest.fixture(scope="module")
def good(server: Server) -> np.ndarray:
    return images_of(server.post(GOOD).json())[0]


def check(response: Any, status: int, code: str) -> dict[str, Any]:
    assert response.status_code == status, response.text[:500]
    error = response.json()["$error"]
    assert error["code"] == code
    assert error["message"]
    assert error["requestId"] == response.headers["x-request-id"]
    assert "Traceback" not in response.text
    return error


@pytest.mark.parametrize(
    ("model_inputs", "call_inputs", "status", "code", "field"), [b[1:] for b in BAD], ids=[b[0] for b in BAD]
)
def test_bad_input_then_good(
    server: Server, good: np.ndarray, model_inputs: Any, call_inputs: Any, status: int, code: str, field: str
) -> None:  # fmt: skip
    assert check(server.post(model_inputs, call_inputs), status, code)["field"] == field
    assert np.array_equal(images_of(server.post(GOOD).json())[0], good)


@pytest.mark.parametrize(("body", "status", "code"), [b[1:] for b in BODIES], ids=[b[0] for b in BODIES])
def test_bad_body_then_good(server: Server, good: np.ndarray, body: bytes, status: int, code: str) -> None:
    check(server.client.post("/", content=body, headers={"Content-Type": "application/json"}), status, code)
    assert np.array_equal(images_of(server.post(GOOD).json())[0], good)


def test_the_table_has_sixty_rows() -> None:
    assert len(BAD) + len(BODIES) >= 60


def test_a_suggestion_and_what_is_allowed(server: Server) -> None:
    error = server.post({**P, "negativ_prompt": "x"}).json()["$error"]
    assert 'Did you mean "negative_prompt"?' in error["message"]
    assert "guidance_scale" in error["available"]
    error = server.post(P, {"SCHEDULER": "DDIMSheduler"}).json()["$error"]
    assert 'Did you mean "DDIMScheduler"?' in error["message"]


def test_a_model_that_cannot_be_read_is_an_error_and_harms_nobody(server: Server, good: np.ndarray) -> None:
    check(server.post(P, {"MODEL_ID": "tiny/cut"}), 422, "MODEL_BROKEN")
    assert np.array_equal(images_of(server.post(GOOD).json())[0], good)


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [("GET", "/nowhere", 404, "NOT_FOUND"), ("PUT", "/", 405, "METHOD_NOT_ALLOWED"), ("POST", "/models", 405, "METHOD_NOT_ALLOWED")],
)  # fmt: skip
def test_unknown_routes(server: Server, method: str, path: str, status: int, code: str) -> None:
    check(server.client.request(method, path), status, code)


def test_static_errors_do_not_wait_for_a_busy_worker(server: Server) -> None:
    """While a long job runs, every bad input is answered as fast as on an idle server, within a small factor."""

    def median_ms() -> float:
        times = []
        for _, model_inputs, call_inputs, status, code, _ in BAD:
            if code == "PIPELINE_ERROR":
                continue  # only the pipeline itself can tell
            began = time.perf_counter()
            assert server.post(model_inputs, call_inputs).status_code == status
            times.append((time.perf_counter() - began) * 1000)
        return statistics.median(times)

    idle = median_ms()
    long_job = {"prompt": "a red circle", "num_inference_steps": 400, "seed": 1}
    done = threading.Event()

    def run() -> None:
        assert server.post(long_job).status_code == 200
        done.set()

    thread = threading.Thread(target=run)
    thread.start()
    while not server.client.get("/health/ready").json()["workers"][0]["busy"]:
        time.sleep(0.01)
    busy = median_ms()
    assert not done.is_set(), "the job was over before the inputs were sent"
    thread.join()
    print(json.dumps({"idle_ms": idle, "busy_ms": busy}))
    assert busy < 10 * idle + 10
