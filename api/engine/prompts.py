"""Prompts with weights, and prompts longer than a text encoder takes at once.

A pipeline stays as it is, but its ``encode_prompt`` is handed embeddings of what the prompt says. A prompt without
weights that fits is encoded by the pipeline itself: its image is that of a plain request.
"""

from __future__ import annotations

import inspect
import weakref
from typing import Any

import torch

from api.engine.weighing import Side
from api.errors import ApiError
from api.schema.phrases import Prompt
from api.schema.prompts import PROMPTS, read

_MOST_CHUNKS = 16
"""Runs of tokens that a prompt may be encoded in: with each, the denoiser has more to attend to."""


def understand(pipe: Any, syntax: str) -> None:
    """Have a job's pipeline read its prompts in a syntax.

    Args:
        pipe: the job's own, of Stable Diffusion 1, 2, XL or FLUX.1.
        syntax: ``compel`` or ``a1111``.
    """
    itself, method = weakref.ref(pipe), type(pipe).encode_prompt
    signature = inspect.signature(pipe.encode_prompt)

    def encode_prompt(*args: Any, **kwargs: Any) -> Any:
        given = signature.bind(*args, **kwargs)
        given.apply_defaults()
        _encode(itself(), given.arguments, syntax)
        return method(itself(), *given.args, **given.kwargs)

    pipe.encode_prompt = encode_prompt


def _encode(pipe: Any, given: dict[str, Any], syntax: str) -> None:
    """In what ``encode_prompt`` is given, replace prompts by their words, and add embeddings where that is not all."""
    prompts = {name: _read(given[name], syntax) for name in PROMPTS if given.get(name) is not None}
    for name, found in prompts.items():
        texts = [prompt.text for prompt in found]
        given[name] = texts if isinstance(given[name], list) else texts[0]
    sides = _sides(pipe, given, prompts)
    if not all(side.is_plain for side in sides):
        _embed(pipe, sides, given)


def _read(value: Any, syntax: str) -> list[Prompt]:
    return [read(text, syntax) for text in (value if isinstance(value, list) else [value])]


def _sides(pipe: Any, given: dict[str, Any], prompts: dict[str, list[Prompt]]) -> list[Side]:
    """The encoders whose embeddings are weighted, and what each of them gets, as the pipelines have it."""
    positive, negative = prompts["prompt"], prompts.get("negative_prompt")
    if _is_flux(given):
        second = prompts.get("prompt_2", positive)
        return [Side(pipe, pipe.tokenizer_2, pipe.text_encoder_2, _of_t5, second, [], longest=_longest(given))]
    skip, is_xl = given.get("clip_skip"), "pooled_prompt_embeds" in given
    zeros = is_xl and negative is None and pipe.config.force_zeros_for_empty_prompt
    negatives: list[list[Prompt]] = [[], []]
    if given["do_classifier_free_guidance"] and not zeros:
        first = negative or _read("", "plain")
        negatives = [_each(one, len(positive)) for one in (first, prompts.get("negative_prompt_2", first))]
    if not is_xl:
        return [Side(pipe, pipe.tokenizer, pipe.text_encoder, _of_sd, positive, negatives[0], skip)]
    second = _each(prompts.get("prompt_2", positive), len(positive))
    both = [
        Side(pipe, pipe.tokenizer, pipe.text_encoder, _of_sdxl, positive, negatives[0], skip),
        Side(pipe, pipe.tokenizer_2, pipe.text_encoder_2, _of_sdxl, second, negatives[1], skip),
    ]
    # a refiner has one encoder, the second, which gets the first prompt
    return both if pipe.tokenizer is not None else [both[1].reading(positive, negatives[0])]


def _each(prompts: list[Prompt], count: int) -> list[Prompt]:
    return prompts * count if len(prompts) == 1 else prompts


def _is_flux(given: dict[str, Any]) -> bool:
    return "clip_skip" not in given


def _longest(given: dict[str, Any]) -> int:
    return int(given["max_sequence_length"])


def _of_sd(encoder: Any, ids: torch.Tensor, mask: torch.Tensor | None, skip: int | None) -> torch.Tensor:
    if skip is None:
        return encoder(ids, attention_mask=mask)[0]  # type: ignore[no-any-return]
    states = encoder(ids, attention_mask=mask, output_hidden_states=True)[-1]
    return encoder.text_model.final_layer_norm(states[-(skip + 1)])  # type: ignore[no-any-return]


def _of_sdxl(encoder: Any, ids: torch.Tensor, mask: torch.Tensor | None, skip: int | None) -> torch.Tensor:
    given = {} if mask is None else {"attention_mask": mask}
    states = encoder(ids, output_hidden_states=True, **given).hidden_states
    return states[-((skip or 0) + 2)]  # type: ignore[no-any-return]


def _of_t5(encoder: Any, ids: torch.Tensor, mask: torch.Tensor | None, skip: int | None) -> torch.Tensor:
    given = {} if mask is None else {"attention_mask": mask}
    return encoder(ids, output_hidden_states=False, **given)[0]  # type: ignore[no-any-return]


def _embed(pipe: Any, sides: list[Side], given: dict[str, Any]) -> None:
    """Add the embeddings; all rows are made equally long, as those of one call must be."""
    polarities = [False, True] if sides[0].negative else [False]
    rows = {(i, negative): side.rows(negative) for i, side in enumerate(sides) for negative in polarities}
    longest = max(len(row) for found in rows.values() for row in found)
    if longest > _MOST_CHUNKS:
        message = (
            f"The prompt would be encoded in {longest} runs of tokens; there may be {_MOST_CHUNKS}. Make it shorter."
        )
        raise ApiError("LIMIT_EXCEEDED", message, field="modelInputs.prompt")
    for negative in polarities:
        columns = [side.together(rows[i, negative], longest, negative) for i, side in enumerate(sides)]
        given["negative_prompt_embeds" if negative else "prompt_embeds"] = torch.cat(columns, dim=-1)
    if _is_flux(given):
        count = given["num_images_per_prompt"]  # of these, the pipeline repeats nothing
        given["prompt_embeds"] = given["prompt_embeds"].repeat_interleave(count, dim=0)
        given["pooled_prompt_embeds"] = pipe._get_clip_prompt_embeds(
            prompt=given["prompt"], num_images_per_prompt=count, device=given["device"]
        )
    elif "pooled_prompt_embeds" in given:
        for negative in polarities:
            name = "negative_pooled_prompt_embeds" if negative else "pooled_prompt_embeds"
            given[name] = sides[-1].pooled(negative)
