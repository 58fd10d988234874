"""Tokenizers that several jobs use at once, directly and through a processor."""

from __future__ import annotations

import json
import shutil
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from transformers import CLIPImageProcessor, CLIPProcessor, CLIPTokenizer

from api.engine.device import Device
from api.engine.loader import load
from api.engine.tokenizers import taking_turns
from api.schema.generation import ModelRef
from tests.families import save_family
from tests.running import ROOT

LENGTHS = (7, 20, 33, 60)


class Slow(CLIPTokenizer):
    """One that gives other threads time to come between its settings and their use."""

    def set_truncation_and_padding(self, *args: Any, **kwargs: Any) -> None:
        super().set_truncation_and_padding(*args, **kwargs)
        time.sleep(0.005)


@pytest.fixture(scope="module")
def components() -> dict[str, Any]:
    tokenizer = Slow.from_pretrained(ROOT / "models" / "shapes" / "tokenizer")
    processor = CLIPProcessor(CLIPImageProcessor(), tokenizer)
    return {"tokenizer": tokenizer, "processor": processor, "scheduler": object(), "none": None}


def wrong_lengths(ways: list[Any]) -> list[tuple[int, int]]:
    """What many threads get that ask for other lengths than they were given."""
    wrong: list[tuple[int, int]] = []

    def ask(way: Any, length: int) -> None:
        for _ in range(5):
            ids = way(text="a red circle", padding="max_length", max_length=length, truncation=True)["input_ids"]
            got = len(ids[0]) if isinstance(ids[0], list) else len(ids)
            if got != length:
                wrong.append((length, got))

    threads = [threading.Thread(target=ask, args=(way, length)) for way in ways for length in LENGTHS]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return wrong


def test_one_lock_for_a_tokenizer_by_every_way_to_it(components: dict[str, Any]) -> None:
    turned = taking_turns(components)
    assert not wrong_lengths([turned["tokenizer"], turned["processor"], turned["processor"].tokenizer])


def test_without_turns_lengths_are_mixed_up(components: dict[str, Any]) -> None:
    """That the test above would see it."""
    assert wrong_lengths([components["tokenizer"], components["processor"]])


def test_they_stay_what_they_are(components: dict[str, Any]) -> None:
    turned = taking_turns(components)
    assert isinstance(turned["processor"], CLIPProcessor) and isinstance(turned["tokenizer"], CLIPTokenizer)
    assert type(turned["processor"]).__name__ == "CLIPProcessor"
    assert turned["scheduler"] is components["scheduler"] and turned["none"] is None
    assert components["processor"].tokenizer is components["tokenizer"]  # the model's own is left as it was


def test_a_tokenizer_that_is_only_a_model_of_sentencepiece(tmp_path: Path) -> None:
    """As PixArt and others are saved: no tokenizer.json, which is made when it is read."""
    folder = tmp_path / "pixart"
    save_family("pixart", folder)
    shutil.rmtree(folder / "tokenizer")
    (folder / "tokenizer").mkdir()
    prompt = "a red circle on a blue background"
    lines = (f"{prompt} number {number}" for number in range(200))
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=lines, model_prefix=str(folder / "tokenizer" / "spiece"), vocab_size=50, pad_id=0, eos_id=1,
        unk_id=2, bos_id=-1, hard_vocab_limit=False, minloglevel=2,
    )  # fmt: skip
    config = {"tokenizer_class": "T5Tokenizer", "model_max_length": 120, "extra_ids": 0}
    (folder / "tokenizer" / "tokenizer_config.json").write_text(json.dumps(config))
    model = load(ModelRef("some/pixart", "1", "fp32", str(folder)), Device("cpu"))
    theirs = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer" / "spiece.model"))
    assert model.components["tokenizer"](prompt).input_ids == [*theirs.encode(prompt), theirs.eos_id()]
