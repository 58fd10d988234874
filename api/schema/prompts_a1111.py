r"""The prompt syntax of AUTOMATIC1111's web UI, as its wiki describes it.

``(word)`` counts 1.1 times as much, ``[word]`` 1.1 times less, ``(word:1.3)`` 1.3 times; brackets within each other
are multiplied; ``BREAK`` begins a new section; ``\(``, ``\)``, ``\[``, ``\]`` and ``\\`` are the characters
themselves. Prompt editing (``[a:b:0.5]``, ``[a|b]``), ``AND`` and ``<lora:...>`` are refused: read as plain words they
would quietly mean something else.

https://github.com/AUTOMATIC1111/stable-diffusion-webui/wiki/Features
"""

from __future__ import annotations

import itertools
import re

from api.schema.phrases import DEEPEST, Phrase, Prompt, Section, SyntaxFault, joined

_STEP = 1.1
_CLOSES = {")": "(", "]": "["}
_PIECE = re.compile(
    r"\\(?P<escaped>[\\()\[\]])"
    r"|(?P<bracket>[()\[\]])"
    r"|:\s*(?P<weight>[+-]?(?:\d++\.?+\d*+|\.\d++))\s*(?=\))"
    r"|:\s*(?P<malformed>[+-]?[\d.]++)\s*(?=\))"
    r"|(?P<odd>[:|])"
    r"|(?P<break>(?<!\w)BREAK(?!\w))"
    r"|(?P<and>(?<!\w)AND(?!\w))"
    r"|(?P<network><(?:lora|lyco|hypernet):[^<>]*>)"
    r"|(?P<text>\\|<|[A-Za-z]+|[^\\()\[\]:|<A-Za-z]+)",
)

_REFUSED = {
    "and": "AND, which composes pictures, is not offered. Write it small, or use BREAK.",
    "network": "Networks are not named in the prompt: send them as callInputs.lora_weights.",
    "malformed": "Between the colon and the parenthesis is no number, such as 1.3.",
}


class _Open:
    """A bracket that is open: which, where, and with which piece it began."""

    def __init__(self, bracket: str, at: int, first: int) -> None:
        self.bracket, self.at, self.first = bracket, at, first
        self.odd: int | None = None
        """Where something is in it that is not read."""
        self.weight: float | None = None


def read(text: str) -> Prompt:
    """Read a prompt of this syntax.

    Raises:
        SyntaxFault: a bracket without its other half, or something of the syntax that is not offered.
    """
    pieces: list[Phrase | None] = []
    """None: a section ends."""
    open_: list[_Open] = []
    for match in _PIECE.finditer(text):
        kind, at = match.lastgroup or "", match.start()
        if kind == "bracket":
            _bracket(match[0], at, pieces, open_)
        elif kind == "weight" and open_ and open_[-1].bracket == "(":
            open_[-1].weight = float(match["weight"])
        elif kind in _REFUSED:
            raise SyntaxFault(at, _REFUSED[kind])
        elif kind == "break":
            pieces.append(None)
        else:
            if kind == "odd" and open_ and open_[-1].odd is None:
                open_[-1].odd = at
            pieces.append(Phrase(match["escaped"] or match[0]))
    if open_:
        last = open_[-1]
        raise SyntaxFault(last.at, f'This "{last.bracket}" is never closed. Write \\{last.bracket} where it is meant.')
    ends = [-1, *(i for i, piece in enumerate(pieces) if piece is None), len(pieces)]
    runs = [[piece for piece in pieces[a + 1 : b] if piece] for a, b in itertools.pairwise(ends)]
    found = [Section(joined(run)) for run in runs]
    return Prompt(tuple(section for section in found if section.text) or (found[0],))


def _bracket(bracket: str, at: int, pieces: list[Phrase | None], open_: list[_Open]) -> None:
    if bracket in "([":
        if len(open_) == DEEPEST:
            raise SyntaxFault(at, f"There may be {DEEPEST} brackets within each other.")
        open_.append(_Open(bracket, at, len(pieces)))
        return
    if not open_ or open_[-1].bracket != _CLOSES[bracket]:
        hint = f'; the "{open_[-1].bracket}" at character {open_[-1].at + 1} is still open' if open_ else ""
        raise SyntaxFault(at, f'This "{bracket}" closes nothing{hint}. Write \\{bracket} where it is meant.')
    last = open_.pop()
    if bracket == "]" and last.odd is not None:
        message = "[a:b:0.5] and [a|b], which change the prompt on the way, are not offered. Weights are (word:0.5)."
        raise SyntaxFault(last.odd, message)
    factor = _STEP if last.weight is None else last.weight
    for i in range(last.first, len(pieces)):
        if (piece := pieces[i]) is not None:
            pieces[i] = Phrase(piece.text, piece.weight / _STEP if bracket == "]" else piece.weight * factor)
