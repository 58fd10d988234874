"""Reads prompts in the syntaxes that are offered."""

from __future__ import annotations

from api.schema import prompts_a1111, prompts_compel
from api.schema.phrases import HEAVIEST, Phrase, Prompt, Section, SyntaxFault

PROMPTS = ("prompt", "prompt_2", "negative_prompt", "negative_prompt_2")
"""Inputs that a syntax is about."""
SYNTAXES = ("plain", "compel", "a1111")
_MOST_SECTIONS = 16
_MOST_LOWERED = 64
"""Phrases that count less than 1: each costs a call of the text encoder."""


def read(text: str, syntax: str) -> Prompt:
    """Read a prompt.

    Args:
        text: as it was sent.
        syntax: one of ``SYNTAXES``.

    Raises:
        SyntaxFault: it is no prompt of that syntax, or asks for more than is reasonable.
    """
    if syntax == "plain":
        return Prompt((Section((Phrase(text),)),))
    found = (prompts_compel if syntax == "compel" else prompts_a1111).read(text)
    phrases = [phrase for section in found.sections for phrase in section.phrases]
    for phrase in phrases:
        if not 0 <= phrase.weight <= HEAVIEST:
            message = f'"{phrase.text[:40]}" counts {phrase.weight:g}; it may count from 0 to {HEAVIEST:g}.'
            raise SyntaxFault(max(0, text.find(phrase.text)), message)
    if len(found.sections) > _MOST_SECTIONS:
        raise SyntaxFault(0, f"It has {len(found.sections)} sections; there may be {_MOST_SECTIONS}.")
    if (lowered := sum(phrase.weight < 1 for phrase in phrases)) > _MOST_LOWERED:
        raise SyntaxFault(0, f"{lowered} phrases count less than 1; there may be {_MOST_LOWERED} of them.")
    return found
