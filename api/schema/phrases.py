"""What a prompt says once its syntax has been read: phrases and how much each of them counts."""

from __future__ import annotations

from typing import NamedTuple

HEAVIEST = 10.0
"""The most that a phrase may count, all its brackets together."""
DEEPEST = 32
"""Brackets within each other."""


class SyntaxFault(Exception):
    """A prompt that cannot be read.

    Args:
        at: index of the character that it is about.
        message: what is wrong with it, and what to write instead.
    """

    def __init__(self, at: int, message: str) -> None:
        super().__init__(f"At character {at + 1}: {message}")
        self.at = at
        self.message = message

    def moved(self, by: int) -> SyntaxFault:
        """The same in a longer text, where it stands so many characters further on."""
        return SyntaxFault(self.at + by, self.message)


class Phrase(NamedTuple):
    """Words that count alike; 1: as usual."""

    text: str
    weight: float = 1.0


class Section(NamedTuple):
    """Phrases that are encoded together, apart from those of other sections, and how much the section counts."""

    phrases: tuple[Phrase, ...]
    weight: float = 1.0

    @property
    def text(self) -> str:
        """Its words, without weights."""
        return " ".join(phrase.text for phrase in self.phrases)


class Prompt(NamedTuple):
    """A prompt.

    Attributes:
        sections: at least one.
        blended: their embeddings are added up, by weight; else they stand one behind the other.
        normalized: a blend's weights are divided by their sum.
    """

    sections: tuple[Section, ...]
    blended: bool = False
    normalized: bool = True

    @property
    def is_unweighted(self) -> bool:
        """Whether it is one text of which all counts as usual."""
        only = self.sections[0]
        return (
            len(self.sections) == 1
            and (self.blended or only.weight == 1)
            and all(phrase.weight == 1 for phrase in only.phrases)
        )

    @property
    def text(self) -> str:
        """All of its words, without weights."""
        return " ".join(section.text for section in self.sections)


def joined(phrases: list[Phrase]) -> tuple[Phrase, ...]:
    """Phrases without empty ones, neighbours that count alike as one."""
    out: list[Phrase] = []
    for text, weight in phrases:
        if out and out[-1].weight == weight:
            out[-1] = Phrase(out[-1].text + text, weight)
        elif text.strip():
            out.append(Phrase(text, weight))
    return tuple(Phrase(text.strip(), weight) for text, weight in out) or (Phrase(""),)
