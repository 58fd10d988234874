"""The prompt syntax of compel: ``word++``, ``(two words)1.3``, ``"two words"--``, ``("a", "b").blend(0.7, 0.3)``.

Read here rather than by compel's own parser: that one takes 12 s for six parentheses within each other, and comes with
torch. A test compares the two. What compel quietly takes for words, a bracket without its other half or an operator
in the middle of a prompt, is a fault here.

https://github.com/damian0815/compel/blob/main/doc/syntax.md
"""

from __future__ import annotations

import re

from api.schema.phrases import DEEPEST, HEAVIEST, Phrase, Prompt, Section, SyntaxFault, joined

_MORE, _LESS = 1.1, 0.9
_MOST_SIGNS = 1000
"""Behind one word that count: no weight is that large, and more of them are no number."""
_NUMBER = r"\d++\.?+\d*+|\.\d++"
_SIGNS = r"(?P<signs>\++|-+)"
_ATTEND = rf"\.attend\(\s*(?:(?P<attend_signs>\++|-+)|(?P<attend>{_NUMBER}))\s*\)"
_SUFFIX = re.compile(rf"{_SIGNS}|(?P<number>{_NUMBER})|{_ATTEND}")
_IN_WORDS = r'[^\s\\()",.+-]'
_PIECE = re.compile(
    r'\\(?P<escaped>[\\()"+-])'
    r'|(?P<bracket>[()"])'
    r"|(?P<refused>\.swap\(|\b(?:with|use)Lora\()"
    rf"|(?P<word>{_IN_WORDS}+(?:[+-]++{_IN_WORDS}+)*+)(?:{_SIGNS}(?=[\s()\",.]|$)|{_ATTEND})?"
    r"|(?P<text>\s+|[\\,.+-])"
)
_OPERATOR = re.compile(r"\)\s*\.(?P<name>and|add|blend)\((?P<weights>[^()]*)\)\s*$")
_ANY_OPERATOR = re.compile(r"\.(and|add|blend)\(")


def read(text: str) -> Prompt:
    """Read a prompt of this syntax.

    Raises:
        SyntaxFault: a bracket without its other half, an operator where none can be, or one that is not offered.
    """
    operator = _OPERATOR.search(text)
    if operator is None or not text.lstrip().startswith("("):
        return Prompt((Section(_phrases(text)),))
    first = text.index("(") + 1
    parts = _parts(text[first : operator.start()], first)
    weights, normalized = _weights(operator["weights"], operator.start("weights"))
    if weights and len(weights) != len(parts):
        message = f"{len(parts)} parts have {len(weights)} weights. Give each part one, or none of them."
        raise SyntaxFault(operator.start("name"), message)
    blended = operator["name"] == "blend"
    low = -HEAVIEST if blended else 0
    if not normalized and not blended:
        raise SyntaxFault(operator.start("weights"), "no_normalize is of .blend() only.")
    if any(not low <= weight <= HEAVIEST for weight in weights):
        raise SyntaxFault(operator.start("weights"), f"A weight may be from {low:g} to {HEAVIEST:g}.")
    if blended and normalized and weights and abs(sum(weights)) < 1e-6:
        raise SyntaxFault(operator.start("weights"), "The weights add up to 0. Add no_normalize to leave them so.")
    weights = weights or [1.0] * len(parts)
    sections = tuple(Section(part, weight) for part, weight in zip(parts, weights, strict=True))
    return Prompt(sections, blended, normalized)


def _weights(text: str, at: int) -> tuple[list[float], bool]:
    words = [word.strip() for word in text.split(",")] if text.strip() else []
    normalized = "no_normalize" not in words[-1:]
    try:
        return [float(word) for word in (words if normalized else words[:-1])], normalized
    except ValueError:
        raise SyntaxFault(at, f'"{text[:40]}" are no numbers with commas between them.') from None


def _parts(text: str, at: int) -> list[tuple[Phrase, ...]]:
    """What stands between an operator's parentheses, with commas between."""
    found, start, depth, quoted = list[tuple[Phrase, ...]](), 0, 0, False
    for i, character in [*enumerate(text), (len(text), ",")]:
        if i and text[i - 1] == "\\" and character != ",":
            continue
        if character == '"':
            quoted = not quoted
        depth += {"(": 1, ")": -1}.get(character, 0) * (not quoted)
        if character != "," or ((depth or quoted) and i < len(text)):
            continue
        part = text[start:i]
        lead = len(part) - len(part.lstrip())
        part, begins = part.strip(), at + start + lead
        if not part:
            raise SyntaxFault(begins, "A part is empty.")
        if len(part) > 1 and part[0] == part[-1] == '"':
            part, begins = part[1:-1].replace('\\"', '"'), begins + 1
        try:
            found.append(_phrases(part))
        except SyntaxFault as fault:
            raise fault.moved(begins) from None
        start = i + 1
    return found


def _phrases(text: str) -> tuple[Phrase, ...]:
    pieces: list[Phrase] = []
    open_: list[tuple[str, int, int]] = []
    """Which bracket, where it stands, and with which piece it began."""
    at = 0
    while match := _PIECE.match(text, at):
        at = match.end()
        if match["bracket"]:
            at = _bracket(text, match.start(), pieces, open_)
        elif match["refused"]:
            name = match["refused"].strip("(")
            other = "Send callInputs.lora_weights." if "Lora" in name else "Nothing else does the same."
            raise SyntaxFault(match.start(), f"{name} is not offered. {other}")
        else:
            words = match["word"] or match["escaped"] or match["text"]
            pieces.append(Phrase(words, _factor(match)))
    if open_:
        bracket, where, _ = open_[-1]
        raise SyntaxFault(where, f"This {bracket} is never closed. Write \\{bracket} where it is meant.")
    return joined(pieces)


def _bracket(text: str, at: int, pieces: list[Phrase], open_: list[tuple[str, int, int]]) -> int:
    """Open or close one; where to go on."""
    bracket = text[at]
    if bracket == "(" or (bracket == '"' and all(other != '"' for other, _, _ in open_)):
        if len(open_) == DEEPEST:
            raise SyntaxFault(at, f"There may be {DEEPEST} brackets within each other.")
        open_.append((bracket, at, len(pieces)))
        return at + 1
    if not open_ or open_[-1][0] != ("(" if bracket == ")" else '"'):
        hint = f"; the {open_[-1][0]} at character {open_[-1][1] + 1} is still open" if open_ else ""
        raise SyntaxFault(at, f"This {bracket} closes nothing{hint}. Write \\{bracket} where it is meant.")
    first = open_.pop()[2]
    if operator := _ANY_OPERATOR.match(text, at + 1):
        message = f'.{operator[1]}() is about a whole prompt: ("one part", "another").{operator[1]}().'
        raise SyntaxFault(at + 1, message)
    suffix = _SUFFIX.match(text, at + 1)
    if suffix is None:
        return at + 1
    factor = _factor(suffix)
    pieces[first:] = [Phrase(piece, weight * factor) for piece, weight in pieces[first:]]
    return suffix.end()


def _factor(match: re.Match[str]) -> float:
    """What the operator behind a word or a bracket says; 1: there is none."""
    said = match.groupdict()
    if signs := said["signs"] or said["attend_signs"]:
        return float((_MORE if signs[0] == "+" else _LESS) ** min(len(signs), _MOST_SIGNS))
    return float(said.get("number") or said["attend"] or 1)
