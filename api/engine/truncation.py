"""What text encoders did not read of a prompt, because it is longer than they take."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import CLIPTokenizer

_LONGEST = 300
"""Characters of it that are told."""


def cut_off(pipe: Any, inputs: Mapping[str, Any], syntax: str) -> list[dict[str, str]]:
    """Warnings of what no text encoder of a pipeline has read.

    Args:
        pipe: that the prompts were given to.
        inputs: its arguments.
        syntax: of the prompts; unless it is ``plain``, CLIP's encoders read prompts of any length.
    """
    tokenizers = {name: getattr(pipe, name, None) for name in ("tokenizer", "tokenizer_2", "tokenizer_3")}
    limits = {name: (part, limit) for name, part in tokenizers.items() if (limit := _limit(part, inputs))}
    if not limits or (syntax != "plain" and all(isinstance(part, CLIPTokenizer) for part, _ in limits.values())):
        return []
    found = []
    for kind in ("prompt", "negative_prompt"):
        for at, text in _texts(inputs, kind):
            unread = [_unread(part, text, limit) for part, limit in limits.values()]
            if all(unread):
                longest = max(limit for _, limit in limits.values())
                words = min(unread, key=len)
                shown = words if len(words) <= _LONGEST else words[:_LONGEST] + "…"
                message = f'Longer than the {longest} tokens that the text encoder takes. It has not read: "{shown}"'
                found.append({"field": f"modelInputs.{kind}{at}", "message": message})
    return found


def _limit(tokenizer: Any, inputs: Mapping[str, Any]) -> int | None:
    """The tokens that a prompt may have, marks included; None: not known."""
    if isinstance(tokenizer, CLIPTokenizer):
        return int(tokenizer.model_max_length)
    is_t5 = any(cls.__name__.startswith("T5Tokenizer") for cls in type(tokenizer).__mro__)
    return inputs.get("max_sequence_length") if is_t5 else None


def _texts(inputs: Mapping[str, Any], kind: str) -> list[tuple[str, str]]:
    value = inputs.get(kind)
    return [(f"[{i}]", text) for i, text in enumerate(value)] if isinstance(value, list) else [("", value or "")]


def _unread(tokenizer: Any, text: str, limit: int) -> str:
    if len(text.encode()) < limit - 1:  # a token is a byte at least
        return ""
    ids = tokenizer(text)["input_ids"]
    return str(tokenizer.decode(ids[limit - 1 : -1])).strip() if len(ids) > limit else ""
