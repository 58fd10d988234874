"""What prompts say, in the syntaxes of compel and of AUTOMATIC1111's web UI."""

from __future__ import annotations

import re

import pytest
from compel.prompt_parser import Blend, PromptParser
from hypothesis import given, settings
from hypothesis import strategies as st

from api.errors import ApiError
from api.schema.phrases import Phrase, Prompt, Section, SyntaxFault
from api.schema.prompts import read
from api.service.prompts import check_syntax

TEXT = st.text("abc ,.:|()[]\\\"+-'é", max_size=12).filter(lambda text: text == text.strip() != "")
WEIGHTS = st.integers(1, 39).map(lambda n: n / 4).filter(lambda weight: weight != 1)


def phrases(text: str, syntax: str = "a1111") -> list[tuple[str, float]]:
    prompt = read(text, syntax)
    assert len(prompt.sections) == 1
    return [(words, round(weight, 6)) for words, weight in prompt.sections[0].phrases]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a red circle", [("a red circle", 1)]),
        ("", [("", 1)]),
        ("a (red) circle", [("a", 1), ("red", 1.1), ("circle", 1)]),
        ("a ((red)) [circle]", [("a", 1), ("red", 1.21), ("circle", round(1 / 1.1, 6))]),
        ("(red:1.3)(blue: .5 )", [("red", 1.3), ("blue", 0.5)]),
        ("((red:2) big:0.5) [(x:1.1)]", [("red", 1), ("big", 0.5), ("x", 1)]),
        (r"a \(b\) \[c\] \\d \e", [(r"a (b) [c] \d \e", 1)]),
        ("(masterpiece: best) 10:30 a|b", [("masterpiece: best", 1.1), ("10:30 a|b", 1)]),
        ("(red:1,5) BREAKFAST SAND", [("red:1,5", 1.1), ("BREAKFAST SAND", 1)]),
        ("a () b (:1.5)", [("a  b", 1)]),
    ],
)
def test_a1111(text: str, expected: list[tuple[str, float]]) -> None:
    assert phrases(text) == expected


def test_break_begins_a_section_also_within_brackets() -> None:
    assert read("a BREAK (b BREAK c:2) BREAK", "a1111").sections == (
        Section((Phrase("a"),)),
        Section((Phrase("b", 2.0),)),
        Section((Phrase("c", 2.0),)),
    )


@pytest.mark.parametrize(
    ("text", "syntax", "at", "says"),
    [
        ("a (red", "a1111", 3, "never closed"),
        ("a red)", "a1111", 6, "closes nothing"),
        ("(a]", "a1111", 3, "character 1 is still open"),
        ("[red:blue:0.5]", "a1111", 5, "not offered"),
        ("[a|b]", "a1111", 3, "not offered"),
        ("a AND b", "a1111", 3, "not offered"),
        ("a <lora:x:1>", "a1111", 3, "lora_weights"),
        ("(red:1.2.3)", "a1111", 5, "no number"),
        ("a (red:11)", "a1111", 4, "from 0 to 10"),
        ("a (red:-1)", "a1111", 4, "from 0 to 10"),
        ("(" * 40 + "a" + ")" * 40, "a1111", 33, "within each other"),
        (" BREAK ".join("ab" * 20), "a1111", 1, "40 sections"),
        ("[a] b " * 80, "a1111", 1, "80 phrases"),
        ("a (red", "compel", 3, "never closed"),
        ('a "red', "compel", 3, "never closed"),
        ("a red)", "compel", 6, "closes nothing"),
        ("cat.swap(dog)", "compel", 4, "not offered"),
        ("a withLora(x, 1)", "compel", 3, "lora_weights"),
        ('("a", "b").blend(1)', "compel", 12, "2 parts have 1 weights"),
        ('("a", "b").blend(1, x)', "compel", 18, "no numbers"),
        ('("a", "b").blend(1, -1)', "compel", 18, "add up to 0"),
        ('("a", "b(").and()', "compel", 9, "never closed"),
        ('c ("a", "b").and()', "compel", 13, "whole prompt"),
        ("(a)11", "compel", 2, "from 0 to 10"),
        ("a" + "+" * 9000, "compel", 1, "from 0 to 10"),
    ],
)
def test_faults_say_where(text: str, syntax: str, at: int, says: str) -> None:
    with pytest.raises(SyntaxFault, match=re.escape(says)) as caught:
        read(text, syntax)
    assert (caught.value.at + 1, str(caught.value)[:14].rstrip(":")) == (at, f"At character {at}"[:14])


def written_a1111(prompt: Prompt) -> str:
    def one(phrase: Phrase) -> str:
        text = re.sub(r"([\\()\[\]])", r"\\\1", phrase.text)
        return text if phrase.weight == 1 else f"({text}:{phrase.weight})"

    return " BREAK ".join(" ".join(map(one, section.phrases)) for section in prompt.sections)


def written_compel(prompt: Prompt) -> str:
    def one(phrase: Phrase) -> str:
        text = re.sub(r'([\\()"+-])', r"\\\1", phrase.text)
        return text if phrase.weight == 1 else f"({text}){phrase.weight}"

    return " ".join(map(one, prompt.sections[0].phrases))


SECTIONS = st.lists(st.builds(Phrase, TEXT, WEIGHTS), min_size=1, max_size=5).map(
    lambda found: Section(tuple(p for i, p in enumerate(found) if i == 0 or found[i - 1].weight != p.weight))
)


@given(st.lists(SECTIONS, min_size=1, max_size=3))
def test_what_is_written_as_a1111_is_read_as_it_was(sections: list[Section]) -> None:
    prompt = Prompt(tuple(sections))
    assert read(written_a1111(prompt), "a1111") == prompt


@given(SECTIONS)
def test_what_is_written_as_compel_is_read_as_it_was(section: Section) -> None:
    prompt = Prompt((section,))
    assert read(written_compel(prompt), "compel") == prompt


@given(st.text("ab()[]:|1.\\ BREAK", max_size=30), st.sampled_from(["a1111", "compel"]))
def test_whatever_is_sent_is_read_or_refused(text: str, syntax: str) -> None:
    try:
        prompt = read(text, syntax)
    except SyntaxFault as fault:
        assert 0 <= fault.at <= len(text)
    else:
        assert prompt.sections and all(section.phrases for section in prompt.sections)


WORDS = st.sampled_from(["red", "big", "state-of-the-art", "cat's", "é", "10:30", "x,", "end."])
SIGNS = st.sampled_from(["", "+", "++", "-", "--", "1.3", "0.5", "2", ".attend(1.2)", ".attend(++)"])


def _grouped(inner: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    return st.tuples(st.lists(inner, min_size=1, max_size=2).map(" ".join), SIGNS).map(lambda g: f"({g[0]}){g[1]}")


SIGNED = st.tuples(WORDS.filter(str.isalpha), st.sampled_from(["+", "--"])).map("".join)
WRITTEN = st.lists(WORDS | SIGNED | _grouped(WORDS | SIGNED) | _grouped(_grouped(WORDS)), min_size=1, max_size=3).map(
    " ".join
)
FEW = settings(max_examples=40)
"""compel's own parser takes its time."""


def _same_words(ours: list[tuple[str, float]], theirs: list[tuple[str, float]]) -> bool:
    """Whether the same characters have the same weights; spaces do not reach CLIP's tokens."""

    def spread(found: list[tuple[str, float]]) -> list[tuple[str, float]]:
        return [(c, pytest.approx(weight)) for text, weight in found for c in text if not c.isspace()]

    return spread(ours) == [(c, weight) for text, weight in theirs for c in text if not c.isspace()]


@FEW
@given(WRITTEN)
def test_compel_reads_the_same(text: str) -> None:
    theirs = PromptParser().parse_conjunction(text)
    ours = read(text, "compel").sections[0].phrases
    assert _same_words(list(ours), [(f.text, f.weight) for f in theirs.prompts[0].children])


@FEW
@given(st.lists(WRITTEN, min_size=1, max_size=2), st.sampled_from(["and", "add", "blend"]), st.booleans())
def test_compel_reads_the_same_of_operators(parts: list[str], operator: str, weighted: bool) -> None:
    weights = [0.5 + i for i in range(len(parts))] if weighted else []
    quoted = [f'"{part}"' for part in parts]
    text = f"({', '.join(quoted)}).{operator}({', '.join(map(str, weights))})"
    theirs, ours = PromptParser().parse_conjunction(text), read(text, "compel")
    if operator == "blend":
        assert isinstance(theirs.prompts[0], Blend) and ours.blended and ours.normalized
        theirs = theirs.prompts[0]
    assert [section.weight for section in ours.sections] == theirs.weights
    for section, other in zip(ours.sections, theirs.prompts, strict=True):
        assert _same_words(list(section.phrases), [(f.text, f.weight) for f in other.children])


def test_the_prompt_with_the_fault_is_named() -> None:
    options = {"prompt_syntax": "a1111"}
    inputs = {"prompt": ["a (b:2)", "a (b"], "negative_prompt": "c"}
    with pytest.raises(ApiError, match="At character 3: This") as caught:
        check_syntax(options, inputs)
    assert (caught.value.code, caught.value.field) == ("INVALID_INPUTS", "modelInputs.prompt[1]")
    with pytest.raises(ApiError) as caught:
        check_syntax({"compel_prompts": True}, {"prompt": "a", "negative_prompt": "b)"})
    assert caught.value.field == "modelInputs.negative_prompt"
    assert check_syntax({}, inputs) == check_syntax({"compel_prompts": False}, inputs) == "plain"
