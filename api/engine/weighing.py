"""One text encoder's embeddings of prompts with weights, made by compel.

compel calls the job's own view, so its calls go through the executor like the pipeline's.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from types import SimpleNamespace
from typing import Any

import torch
from diffusers.loaders import TextualInversionLoaderMixin

from api.engine.chunks import chunked, tokens_of
from api.schema.phrases import Phrase, Prompt, Section

Take = Callable[[Any, torch.Tensor, torch.Tensor | None, int | None], torch.Tensor]
"""(encoder, token ids, attention mask, clip_skip) → the embeddings that the pipeline would take."""
_ENDS = 2
"""Tokens at the ends of what a CLIP encoder takes at once."""


@dataclass
class Side:
    """One encoder, and the prompts that it is to encode.

    Attributes:
        pipe: whose textual inversions are put in.
        tokenizer: the encoder's.
        encoder: the job's view.
        take: what the pipeline takes of it.
        positive, negative: a prompt for each row; of the negative ones there may be none.
        skip: layers that are left out for the positive ones; diffusers leaves none out for the others.
        longest: tokens beyond which a prompt is cut off, for encoders that take long ones; None: it is encoded in
            chunks of what the tokenizer says that the encoder takes at once.
    """

    pipe: Any
    tokenizer: Any
    encoder: Any
    take: Take
    positive: list[Prompt]
    negative: list[Prompt]
    skip: int | None = None
    longest: int | None = None
    _weighers: dict[int | None, _Weigher] = field(default_factory=dict, repr=False)

    def reading(self, positive: list[Prompt], negative: list[Prompt]) -> Side:
        """The same for other prompts."""
        return dataclasses.replace(self, positive=positive, negative=negative, _weighers={})

    @cached_property
    def is_plain(self) -> bool:
        """Whether the pipeline itself makes the same of the bare words."""

        def fits(prompt: Prompt) -> bool:
            return self.longest is not None or tokens_of(self.tokenizer, [prompt.text]) <= self._room

        return all(prompt.is_unweighted and fits(prompt) for prompt in (*self.positive, *self.negative))

    @property
    def _room(self) -> int:
        return int(self.tokenizer.model_max_length) - _ENDS

    def rows(self, negative: bool) -> list[list[torch.Tensor]]:
        """Of each prompt, embeddings in chunks of shape (1, tokens, width)."""
        weigher = self._weigher(negative)
        return [self._row(prompt, weigher) for prompt in (self.negative if negative else self.positive)]

    def together(self, rows: list[list[torch.Tensor]], count: int, negative: bool) -> torch.Tensor:
        """Rows as one tensor, of so many chunks each: (prompts, tokens, width)."""
        weigher = self._weigher(negative)
        return torch.cat([torch.cat(weigher.filled(row, count), dim=1) for row in rows])

    def pooled(self, negative: bool) -> torch.Tensor:
        """One vector for each prompt, of its words without weights, as the pipeline takes it.

        Of several sections it is the first one's; compel would encode the syntax with the words.
        """
        return torch.cat([self._pooled(prompt) for prompt in (self.negative if negative else self.positive)])

    def _pooled(self, prompt: Prompt) -> torch.Tensor:
        if prompt.blended:
            return _blended([self._vector(section.text) for section in prompt.sections], prompt)
        return self._vector(prompt.sections[0].text)

    def _vector(self, text: str) -> torch.Tensor:
        most = self.tokenizer.model_max_length
        given = {"padding": "max_length", "max_length": most, "truncation": True, "return_tensors": "pt"}
        ids = self.tokenizer([self._converted(text)], **given).input_ids
        vector: torch.Tensor = self.encoder(ids.to(self.encoder.device), output_hidden_states=True)[0]
        return vector

    def _weigher(self, negative: bool) -> _Weigher:
        skip = None if negative else self.skip
        if skip not in self._weighers:
            encoder = _Encoder(self.encoder, self.take, skip)
            longest = self.longest or int(self.tokenizer.model_max_length)
            self._weighers[skip] = _Weigher(self.tokenizer, encoder, longest)
        return self._weighers[skip]

    def _row(self, prompt: Prompt, weigher: _Weigher) -> list[torch.Tensor]:
        sections = [[weigher.chunk(chunk) for chunk in self._chunks(section)] for section in prompt.sections]
        if prompt.blended:
            count = max(map(len, sections))
            whole = _blended([torch.cat(weigher.filled(chunks, count), dim=1) for chunks in sections], prompt)
            return list(whole.chunk(count, dim=1))
        weighted = zip(prompt.sections, sections, strict=True)
        return [weigher.towards(chunk, section.weight) for section, chunks in weighted for chunk in chunks]

    def _chunks(self, section: Section) -> list[tuple[Phrase, ...]]:
        # compel looks for the words among the tokens, and takes a mark that was written out for the one in front
        mark = self.tokenizer.bos_token or "\0"
        words = [Phrase(self._converted(text.replace(mark, " ")), weight) for text, weight in section.phrases]
        phrases = tuple(phrase for phrase in words if phrase.text.strip()) or (Phrase(""),)
        return [phrases] if self.longest is not None else chunked(phrases, self.tokenizer, self._room)

    def _converted(self, text: str) -> str:
        """The words, with a token for each vector of a textual inversion."""
        if isinstance(self.pipe, TextualInversionLoaderMixin):
            return str(self.pipe.maybe_convert_prompt(text, self.tokenizer))
        return text


class _Encoder:
    """A text encoder as compel calls it; what it says is its last layer is the one that the pipeline would take."""

    def __init__(self, encoder: Any, take: Take, skip: int | None) -> None:
        self._encoder, self._take, self._skip = encoder, take, skip
        self.device, self.dtype, self.config = encoder.device, encoder.dtype, encoder.config

    def __call__(self, ids: torch.Tensor, mask: torch.Tensor | None = None, **flags: Any) -> Any:
        if mask is not None and bool(mask.all()):
            mask = None  # the very call that the pipeline makes: it merges with others, and is remembered with them
        return SimpleNamespace(last_hidden_state=self._take(self._encoder, ids.long(), mask, self._skip))


class _Weigher:
    """compel, for one encoder and one of its layers.

    Args:
        tokenizer: the encoder's.
        encoder: see there.
        longest: tokens that the encoder is given at once.
    """

    def __init__(self, tokenizer: Any, encoder: _Encoder, longest: int) -> None:
        from compel import Compel  # takes seconds: it brings the pipelines that it knows

        uses_mask = bool(getattr(encoder.config, "use_attention_mask", False))
        padding = 0 if uses_mask else 1
        self._compel = Compel(tokenizer, encoder, padding_attention_mask_value=padding, model_max_length=longest)

    def chunk(self, phrases: Sequence[Phrase]) -> torch.Tensor:
        """Embeddings of phrases that fit at once: (1, tokens, width)."""
        from compel.prompt_parser import Conjunction, FlattenedPrompt, Fragment

        fragments = [Fragment("", weight) for _, weight in phrases]
        for fragment, phrase in zip(fragments, phrases, strict=True):
            fragment.text = phrase.text  # as it is: its constructor would take backslashes for its own
        found: torch.Tensor = self._compel.build_conditioning_tensor_for_conjunction(
            Conjunction([FlattenedPrompt(fragments)])
        )[0]
        return found

    @cached_property
    def empty(self) -> torch.Tensor:
        """A chunk without words."""
        return self.chunk((Phrase(""),))

    def filled(self, chunks: list[torch.Tensor], count: int) -> list[torch.Tensor]:
        """So many chunks, those that are missing without words."""
        return chunks + [self.empty] * (count - len(chunks)) if len(chunks) < count else chunks

    def towards(self, chunk: torch.Tensor, weight: float) -> torch.Tensor:
        """A chunk that counts as much as a section does: what makes it differ from one without words, so often."""
        return chunk if weight == 1 else self.empty + (chunk - self.empty) * weight


def _blended(found: list[torch.Tensor], prompt: Prompt) -> torch.Tensor:
    weights = torch.tensor([section.weight for section in prompt.sections], dtype=torch.float32)
    if prompt.normalized:
        weights = weights / weights.sum()
    shape = (-1, *[1] * found[0].dim())
    return (torch.stack(found) * weights.to(found[0]).reshape(shape)).sum(dim=0)
