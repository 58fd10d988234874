"""Cuts what is too long for a text encoder into runs of tokens that are not."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from api.schema.phrases import Phrase

_NEAR = 20
"""Tokens before a cut in which a comma or full stop is looked for."""
_PAUSES = (",", ".", ";", ":", "!", "?")


def tokens_of(tokenizer: Any, texts: Sequence[str]) -> int:
    """How many tokens texts are, without those at the ends."""
    return sum(map(len, tokenizer(list(texts), add_special_tokens=False)["input_ids"]))


def chunked(phrases: Sequence[Phrase], tokenizer: Any, room: int) -> list[tuple[Phrase, ...]]:
    """Phrases in runs of at most ``room`` tokens, cut behind a comma where one is near, else between words.

    compel would cut them as well, and then looks for each phrase in what it has cut: where a padding token is also one
    of the prompt's, such as SDXL's "!", it does not find it.
    """
    if tokens_of(tokenizer, [phrase.text for phrase in phrases]) <= room:
        return [tuple(phrases)]
    words = [Phrase(word, weight) for text, weight in phrases for word in re.findall(r"\S+", text)]
    counts = [len(ids) for ids in tokenizer([word.text for word in words], add_special_tokens=False)["input_ids"]]
    units = [unit for word, count in zip(words, counts, strict=True) for unit in _split(word, count, tokenizer, room)]
    runs, first = list[tuple[Phrase, ...]](), 0
    while first < len(units):
        last, used = first, 0
        while last < len(units) and used + units[last][1] <= room:
            used += units[last][1]
            last += 1
        if last < len(units):
            last = _cut(units, first, last)
        runs.append(_joined([phrase for phrase, _ in units[first:last]]))
        first = last
    return runs


def _cut(units: list[tuple[Phrase, int]], first: int, last: int) -> int:
    """Where to end a run that could go on to ``last``."""
    passed = 0
    for i in range(last - 1, first, -1):
        if units[i][0].text.endswith(_PAUSES):
            return i + 1
        passed += units[i][1]
        if passed > _NEAR:
            break
    return last


def _split(word: Phrase, count: int, tokenizer: Any, room: int) -> list[tuple[Phrase, int]]:
    """A word and how many tokens it is; one that is too long by itself in pieces."""
    if count <= room:
        return [(word, count)]
    middle = len(word.text) // 2
    halves = [Phrase(word.text[:middle], word.weight), Phrase(word.text[middle:], word.weight)]
    return [part for half in halves for part in _split(half, tokens_of(tokenizer, [half.text]), tokenizer, room)]


def _joined(words: Sequence[Phrase]) -> tuple[Phrase, ...]:
    out: list[Phrase] = []
    for text, weight in words:
        if out and out[-1].weight == weight:
            out[-1] = Phrase(f"{out[-1].text} {text}", weight)
        else:
            out.append(Phrase(text, weight))
    return tuple(out)
