"""Weighted and long prompts give what plain diffusers gives with plain compel's embeddings."""

from __future__ import annotations

import concurrent.futures
import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from compel import Compel, ReturnedEmbeddingsType

from api.engine.calling import to_uint8
from api.engine.chunks import chunked, tokens_of
from api.engine.cloning import keep_text_model
from api.engine.device import Device
from api.engine.generate import Engine
from api.errors import ApiError
from api.models.description import describe
from api.schema.catalogue import catalogue
from api.schema.generation import ModelRef
from api.schema.phrases import Phrase
from api.service.prompts import weighs_prompts
from scripts.demo_model.checker import read
from tests.generating import a_request
from tests.running import ROOT
from tests.tiny import save_tiny
from tests.unit.test_offload import save_flux, save_sdxl

PIPELINES = {
    "sd": "StableDiffusionPipeline",
    "sdxl": "StableDiffusionXLPipeline",
    "refiner": "StableDiffusionXLImg2ImgPipeline",
    "flux": "FluxPipeline",
}
INPUTS: dict[str, Any] = {"num_inference_steps": 2, "guidance_scale": 4.0, "width": 64, "height": 64}
LONG = "a red circle on a white background, " * 20 + "and a blue square."


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("weighing")
    for name, save in (("sd", save_tiny), ("sdxl", save_sdxl), ("flux", save_flux)):
        save(root / name)
    flux = diffusers.FluxTransformer2DModel.from_pretrained(root / "flux" / "transformer")
    with torch.no_grad():
        for name, weight in flux.named_parameters():
            if "blocks" in name and "norm" not in name:
                weight.mul_(3)  # else no pixel shows what the prompt was
    flux.save_pretrained(root / "flux" / "transformer")
    return {name: root / name for name in ("sd", "sdxl", "flux")}


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    engine = Engine(Device("cpu"), embeddings_limit=0)
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def plain(folders: dict[str, Path]) -> dict[str, Any]:
    """The models through plain diffusers."""
    found = {name: getattr(diffusers, PIPELINES[name]).from_pretrained(path) for name, path in folders.items()}
    for pipe in found.values():
        pipe.set_progress_bar_config(disable=True)
        keep_text_model(pipe.text_encoder)  # which diffusers' clip_skip needs
    return found


def scheduler_of(name: str) -> str:
    return "FlowMatchEulerDiscreteScheduler" if name == "flux" else "EulerDiscreteScheduler"


def asked(folders: dict[str, Path], name: str, syntax: str, images: int = 1, **inputs: Any) -> Any:
    ref = ModelRef(f"tiny/{name}", "main", "fp32", str(folders[name]))
    given = {**INPUTS, **inputs}
    return a_request(name, ref, PIPELINES[name], scheduler_of(name), given, prompt_syntax=syntax, images=images)


def reference(pipe: Any, name: str, **inputs: Any) -> np.ndarray:
    pipe.scheduler = getattr(diffusers, scheduler_of(name)).from_config(pipe.scheduler.config)
    with torch.no_grad():
        out = pipe(**{**INPUTS, **inputs}, generator=torch.Generator().manual_seed(1), output_type="pt")
    return to_uint8(out.images)


def close(one: np.ndarray, other: np.ndarray) -> bool:
    """Equal but for the rounding of merged rows."""
    return one.shape == other.shape and bool(np.abs(one.astype(int) - other).max() <= 1)


def compel_of_sd(pipe: Any, **more: Any) -> Compel:
    return Compel(pipe.tokenizer, pipe.text_encoder, truncate_long_prompts=False, **more)


def of_compel(pipe: Any, name: str, prompts: list[str], negatives: list[str], pooled: list[str]) -> dict[str, Any]:
    """What a user of diffusers and compel hands to the pipeline."""
    if name == "sd":
        compel = compel_of_sd(pipe)
        both = compel(prompts + negatives)
        return {"prompt_embeds": both[: len(prompts)], "negative_prompt_embeds": both[len(prompts) :]}
    kind = ReturnedEmbeddingsType.PENULTIMATE_HIDDEN_STATES_NON_NORMALIZED
    pairs = [(pipe.tokenizer, pipe.text_encoder), (pipe.tokenizer_2, pipe.text_encoder_2)]
    each = [Compel(*pair, truncate_long_prompts=False, returned_embeddings_type=kind) for pair in pairs]
    with torch.no_grad():
        both = torch.cat([compel(prompts + negatives) for compel in each], dim=-1)
        vectors = each[1].conditioning_provider.get_pooled_embeddings(pooled)
    count = len(prompts)
    return {
        "prompt_embeds": both[:count], "negative_prompt_embeds": both[count:],
        "pooled_prompt_embeds": vectors[:count], "negative_pooled_prompt_embeds": vectors[count:],
    }  # fmt: skip


WEIGHTED = [
    # ours, in the web UI's syntax; compel's; without weights
    ("a (red:1.5) circle", "a (red)1.5 circle", "a red circle"),
    ("a (red:0.4) circle, [small]", "a (red)0.4 circle, (small)0.9090909090909091", "a red circle, small"),
    ("((a red:1.2) circle:2)", "((a red)1.2 circle)2", "a red circle"),
    (r"a \(red\) (circle:0)", r"a \(red\) (circle)0", "a (red) circle"),
]


@pytest.mark.parametrize("name", ["sd", "sdxl"])
@pytest.mark.parametrize(("ours", "theirs", "bare"), WEIGHTED)
def test_weights_are_those_of_compel(
    engine: Engine, folders: dict[str, Path], plain: dict[str, Any], name: str, ours: str, theirs: str, bare: str
) -> None:
    embeds = of_compel(plain[name], name, [theirs], ["(blue)1.4 x"], [bare, "blue x"])
    expected = reference(plain[name], name, **embeds)
    for syntax, prompt, negative in (("a1111", ours, "(blue:1.4) x"), ("compel", theirs, "(blue)1.4 x")):
        got = engine.generate(asked(folders, name, syntax, prompt=prompt, negative_prompt=negative)).images
        assert close(got, expected)
    unweighted = reference(plain[name], name, prompt=bare, negative_prompt="blue x")
    assert not np.array_equal(expected, unweighted)


@pytest.mark.parametrize("name", ["sd", "sdxl"])
@pytest.mark.parametrize(
    "prompt",
    [
        '("a red circle", "a blue square").and(1, 0.5)',
        '("a red circle", "a (blue)1.3 square").blend(0.7, 0.3)',
        '("a red circle", "blue").blend(1, -0.5, no_normalize)',
    ],
)
def test_sections_are_those_of_compel(
    engine: Engine, folders: dict[str, Path], plain: dict[str, Any], name: str, prompt: str
) -> None:
    embeds = of_compel(plain[name], name, [prompt], [""], ["a red circle", ""])
    if "blend" in prompt and name == "sdxl":
        second = of_compel(plain[name], name, ["x"], [""], ["blue" if "no_n" in prompt else "a blue square", ""])
        weights = (1, -0.5) if "no_n" in prompt else (0.7, 0.3)
        pooled = embeds["pooled_prompt_embeds"], second["pooled_prompt_embeds"]
        embeds["pooled_prompt_embeds"] = pooled[0] * weights[0] + pooled[1] * weights[1]
    expected = reference(plain[name], name, **embeds)
    got = engine.generate(asked(folders, name, "compel", prompt=prompt, negative_prompt="")).images
    assert close(got, expected)


MORE: list[dict[str, Any]] = [{}, {"negative_prompt": "blue"}, {"clip_skip": 1}, {"num_images_per_prompt": 2}]
PLAIN = [(name, more) for name in ("sd", "sdxl") for more in MORE] + [("flux", MORE[0]), ("flux", MORE[3])]


@pytest.mark.parametrize(("name", "more"), PLAIN)
def test_without_weights_it_is_the_plain_image(
    engine: Engine, folders: dict[str, Path], plain: dict[str, Any], name: str, more: dict[str, Any]
) -> None:
    images = more.get("num_images_per_prompt", 1)
    expected = reference(plain[name], name, prompt="a (red) circle, small", **more)
    for syntax, prompt in (("a1111", r"a \(red\) (circle:1), small"), ("compel", r"a \(red\) (circle)1.0, small")):
        got = engine.generate(asked(folders, name, syntax, images, prompt=prompt, **more)).images
        assert np.array_equal(got, expected), syntax


@pytest.mark.parametrize("skip", [None, 0, 1])
@pytest.mark.parametrize("name", ["sd", "sdxl"])
def test_a_weight_beside_others_keeps_the_layer(
    engine: Engine, folders: dict[str, Path], plain: dict[str, Any], name: str, skip: int | None
) -> None:
    """Of a section that counts so little more than 1 that no pixel shows it: the layer that clip_skip says is taken."""
    expected = reference(plain[name], name, prompt="a red circle", negative_prompt="blue", clip_skip=skip)
    given = {"prompt": "a (red:1.00001) circle", "negative_prompt": "(blue:1.00001)", "clip_skip": skip}
    assert close(engine.generate(asked(folders, name, "a1111", **given)).images, expected)
    if skip:
        assert not close(reference(plain[name], name, prompt="a red circle", negative_prompt="blue"), expected)


@pytest.mark.parametrize("name", ["sd", "sdxl"])
def test_lists_of_prompts_and_several_images_of_each(
    engine: Engine, folders: dict[str, Path], plain: dict[str, Any], name: str
) -> None:
    prompts, negatives = ["a (red)1.5 circle", "a blue square", '("x", "y").and()'], ["", "(blue)0.3", "z"]
    bare = ["a red circle", "a blue square", "x", "", "blue", "z"]
    embeds = of_compel(plain[name], name, prompts, negatives, bare)
    expected = reference(plain[name], name, **embeds, num_images_per_prompt=2)
    given = {"prompt": prompts, "negative_prompt": negatives, "num_images_per_prompt": 2}
    got = engine.generate(asked(folders, name, "compel", 6, **given)).images
    assert len(got) == 6
    assert close(got, expected)


def test_sdxls_second_prompts_are_read_as_well(engine: Engine, folders: dict[str, Path], plain: dict[str, Any]) -> None:
    pipe = plain["sdxl"]
    left = of_compel(pipe, "sdxl", ["a (red)1.5 circle"], ["blue"], ["big", "small"])
    right = of_compel(pipe, "sdxl", ["(big)0.5"], ["(small)1.2"], ["big", "small"])
    for key in ("prompt_embeds", "negative_prompt_embeds"):
        left[key] = torch.cat([left[key][..., :16], right[key][..., 16:]], dim=-1)
    given = {"prompt": "a (red:1.5) circle", "prompt_2": "(big:0.5)", "negative_prompt": "blue"}
    got = engine.generate(asked(folders, "sdxl", "a1111", **given, negative_prompt_2="(small:1.2)")).images
    assert close(got, reference(pipe, "sdxl", **left))


def test_flux_weighs_what_t5_makes_of_it(engine: Engine, folders: dict[str, Path], plain: dict[str, Any]) -> None:
    pipe = plain["flux"]
    compel = Compel(pipe.tokenizer_2, pipe.text_encoder_2, model_max_length=32)
    with torch.no_grad():
        pooled = pipe._get_clip_prompt_embeds(["a red circle"])
        embeds = {"prompt_embeds": compel(["(a red circle)9"]), "pooled_prompt_embeds": pooled}
    expected = reference(pipe, "flux", **embeds, max_sequence_length=32)
    given = {"prompt": "(a red circle:9)", "max_sequence_length": 32}
    assert close(engine.generate(asked(folders, "flux", "a1111", **given)).images, expected)
    assert not close(reference(pipe, "flux", prompt="a red circle", max_sequence_length=32), expected)
    twice = engine.generate(asked(folders, "flux", "a1111", 2, **given, num_images_per_prompt=2)).images
    assert len(twice) == 2 and close(twice[:1], expected)


@pytest.mark.parametrize("name", ["sd", "sdxl"])
def test_a_long_prompt_is_read_to_its_end(
    engine: Engine, folders: dict[str, Path], plain: dict[str, Any], name: str
) -> None:
    """Its runs are those of the same prompts, one behind the other."""
    tokenizer = plain[name].tokenizer
    runs = [run[0].text for run in chunked((Phrase(LONG),), tokenizer, 75)]
    assert len(runs) > 1 and " ".join(runs) == LONG and all(tokens_of(tokenizer, [run]) <= 75 for run in runs)
    quoted = ", ".join(f'"{run}"' for run in runs)
    embeds = of_compel(plain[name], name, [f"({quoted}).and()"], ["blue"], [LONG, "blue"])
    expected = reference(plain[name], name, **embeds)
    given = {"prompt": LONG, "negative_prompt": "blue"}
    for syntax in ("a1111", "compel"):
        done = engine.generate(asked(folders, name, syntax, **given))
        assert close(done.images, expected)
        assert "warnings" not in done.meta
    assert not close(reference(plain[name], name, **given), expected)


def test_what_is_cut_off_is_told(engine: Engine, folders: dict[str, Path], plain: dict[str, Any]) -> None:
    tokenizer = plain["sd"].tokenizer
    unread = tokenizer.decode(tokenizer(LONG).input_ids[76:-1])
    given = {"prompt": ["a circle", LONG], "negative_prompt": ["x", LONG]}
    warnings = engine.generate(asked(folders, "sd", "plain", 2, **given)).meta["warnings"]
    assert [warning["field"] for warning in warnings] == ["modelInputs.prompt[1]", "modelInputs.negative_prompt[1]"]
    assert f'"{unread[:300]}' in warnings[0]["message"] and "77 tokens" in warnings[0]["message"]
    exact = next(text for n in range(200) if tokens_of(tokenizer, [text := "a " * n]) == 75)
    assert "warnings" not in engine.generate(asked(folders, "sd", "plain", prompt=exact)).meta
    assert "warnings" in engine.generate(asked(folders, "sd", "plain", prompt=exact + "b")).meta


def test_runs_end_behind_commas_and_never_lose_a_word(plain: dict[str, Any]) -> None:
    tokenizer = plain["sd"].tokenizer
    words = [Phrase("one, two three " * 9, 1.5), Phrase("x" * 400, 1.0), Phrase("four " * 90, 0.5)]
    runs = chunked(words, tokenizer, 75)
    assert all(tokens_of(tokenizer, [phrase.text for phrase in run]) <= 75 for run in runs)
    for weight in (1.5, 1.0, 0.5):
        found = "".join(phrase.text for run in runs for phrase in run if phrase.weight == weight)
        expected = next(phrase.text for phrase in words if phrase.weight == weight)
        assert found.replace(" ", "") == expected.replace(" ", "")
    first = chunked((Phrase("a " * 70 + "b, " + "c " * 30),), tokenizer, 75)[0]
    assert first[0].text.endswith("b,")


def test_a_mark_that_is_written_out_is_no_word(engine: Engine, folders: dict[str, Path]) -> None:
    mark = "<|startoftext|>"
    texts = (f"({mark}a red:1.5) {mark} circle ({mark}:0.5)", "(a red:1.5) circle")
    one, other = (engine.generate(asked(folders, "sd", "a1111", prompt=text)).images for text in texts)
    assert np.array_equal(one, other)


def test_too_long_is_too_long(engine: Engine, folders: dict[str, Path]) -> None:
    with pytest.raises(ApiError, match="runs of tokens") as caught:
        engine.generate(asked(folders, "sd", "compel", prompt="word " * 1500))
    assert caught.value.code == "LIMIT_EXCEEDED"


def test_a_refiner_has_the_second_encoder_alone(plain: dict[str, Any], tmp_path: Path) -> None:
    """Built of the same parts; admission knows its layers."""
    parts = plain["sdxl"].components
    names = ("vae", "unet", "scheduler", "tokenizer_2", "text_encoder_2")
    given = {name: parts[name] for name in names} | {"tokenizer": None, "text_encoder": None}
    diffusers.StableDiffusionXLImg2ImgPipeline(**given, requires_aesthetics_score=True).save_pretrained(tmp_path)
    assert describe("tiny/refiner", tmp_path).text_layers == 2


def test_requests_of_all_syntaxes_at_once_each_get_their_own(folders: dict[str, Path]) -> None:
    prompts = [
        ("plain", "a (red:1.5) circle"), ("a1111", "a (red:1.5) circle"), ("compel", "a (red:1.5) circle"),
        ("a1111", LONG), ("compel", "a red++ circle"), ("plain", LONG), ("compel", "a red-- circle"),
        ("compel", '("a", "b").blend()'), ("a1111", "a BREAK (b:0.2)"),
    ]  # fmt: skip
    jobs = [asked(folders, name, syntax, prompt=text) for name in ("sd", "sdxl") for syntax, text in prompts]
    one = Engine(Device("cpu"), embeddings_limit=0)
    try:
        alone = [one.generate(job).images for job in jobs]
    finally:
        one.close()
    assert len({images.tobytes() for images in alone}) == len(jobs)
    together = Engine(Device("cpu"))
    try:
        with concurrent.futures.ThreadPoolExecutor(9) as pool:
            for _ in range(2):
                found = list(pool.map(lambda job: together.generate(job).images, jobs))
                assert all(close(images, expected) for images, expected in zip(found, alone, strict=True))
        assert together.embeddings.hits > 0
    finally:
        together.close()


def test_a_heavier_colour_is_the_one_that_is_drawn(engine: Engine) -> None:
    """Of two that contradict each other, in the demo model's pictures, as its checker reads them."""
    ref = ModelRef("demo/shapes", "main", "fp32", str(ROOT / "models" / "shapes"))

    def colours(prompt: str) -> list[set[str]]:
        given = {"prompt": prompt, "num_images_per_prompt": 8, "num_inference_steps": 15, "guidance_scale": 4.0}
        seeds = {"seed": list(range(8)), "images": 8, "prompt_syntax": "a1111"}
        scheduler = "DPMSolverMultistepScheduler"
        request = a_request("demo", ref, PIPELINES["sd"], scheduler, {**INPUTS, **given}, **seeds)
        return [{thing.colour for thing in read(image).things} for image in engine.generate(request).images]

    red = colours("a (red:1.6) (blue:0.4) circle on white")
    blue = colours("a (red:0.4) (blue:1.6) circle on white")
    assert red.count({"red"}) >= 7 and blue.count({"blue"}) >= 7
    neither = colours("a red blue circle on white")
    assert neither.count({"red"}) < 7 and neither.count({"blue"}) < 7


def test_admission_knows_which_pipelines_encode_prompts_so() -> None:
    """By name and inputs, without diffusers; the signatures are what is installed."""
    clip = {"prompt", "do_classifier_free_guidance", "negative_prompt", "prompt_embeds", "clip_skip"}
    flux = {"prompt", "prompt_2", "prompt_embeds", "pooled_prompt_embeds", "max_sequence_length"}
    for name, accepted in catalogue().pipelines.items():
        method = getattr(getattr(diffusers, name), "encode_prompt", None)
        arguments = set(inspect.signature(method).parameters) if method else set()
        is_clip = clip <= arguments and "prompt_3" not in arguments
        is_flux = flux <= arguments and "clip_skip" not in arguments and "Flux" in name
        assert weighs_prompts(name, accepted) == (is_clip or is_flux), name
