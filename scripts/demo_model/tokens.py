"""The demo model's tokenizer: CLIP's byte-pair scheme, its merges learned on our words."""

from __future__ import annotations

import json
from pathlib import Path

from transformers import CLIPTokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode

from scripts.demo_model.grammar import words

START, END = "<|startoftext|>", "<|endoftext|>"
LENGTH = 77


def _merges(vocabulary: list[str]) -> list[tuple[str, str]]:
    """Merge each word left to right until it is one token; any other text stays bytes."""
    merges: dict[tuple[str, str], None] = {}
    for word in vocabulary:
        symbols = [*word[:-1], word[-1] + "</w>"]
        for pair in merges:
            symbols = _apply(symbols, pair)
        while len(symbols) > 1:
            pair = (symbols[0], symbols[1])
            merges[pair] = None
            symbols = _apply(symbols, pair)
    return list(merges)


def _apply(symbols: list[str], pair: tuple[str, str]) -> list[str]:
    out: list[str] = []
    for symbol in symbols:
        if out and (out[-1], symbol) == pair:
            out[-1] += symbol
        else:
            out.append(symbol)
    return out


def make_tokenizer(folder: Path) -> CLIPTokenizer:
    """Write a CLIP tokenizer for the demo grammar to ``folder`` and load it back.

    ``vocab.json`` and ``merges.txt`` are kept beside the ``tokenizer.json`` that transformers 5
    saves, because other tools look for them.
    """
    alphabet = list(bytes_to_unicode().values())
    merges = _merges(words())
    vocab = [*alphabet, *(c + "</w>" for c in alphabet), *("".join(m) for m in merges), START, END]
    unique = {token: index for index, token in enumerate(dict.fromkeys(vocab))}
    tokenizer = CLIPTokenizer(
        vocab=unique,
        merges=merges,
        bos_token=START,
        eos_token=END,
        unk_token=END,
        pad_token=END,
        model_max_length=LENGTH,
    )
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(folder)
    (folder / "vocab.json").write_text(json.dumps(unique, ensure_ascii=False) + "\n", encoding="utf-8")
    lines = ["#version: 0.2", *(" ".join(m) for m in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return CLIPTokenizer.from_pretrained(folder)
