"""Prompts that change from step to step: the examples that the web UI documents, in other words."""

from __future__ import annotations

import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ldm.job import Job
from ldm.prompts.editing import Part, Script, Timeline, changes_of, parts_of, scripts_of, without_weight
from ldm.util import InputError

TEN = Timeline(10)


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("a cat", [(10, "a cat")]),
        ("", [(10, "")]),
        ("a [cat:3]", [(3, "a "), (10, "a cat")]),
        ("a [cat: 3 ]", [(3, "a "), (10, "a cat")]),
        ("a [cat::3]", [(3, "a cat"), (10, "a ")]),
        ("a [cat:dog:3]", [(3, "a cat"), (10, "a dog")]),
        ("a [ cat : dog : 1] x", [(1, "a  cat  x"), (10, "a  dog  x")]),
        ("a [cat:.5] x", [(5, "a  x"), (10, "a cat x")]),
        ("a [[[cat]]:2]", [(2, "a "), (10, "a [[cat]]")]),
        ("[(cat:2):3]", [(3, ""), (10, "(cat:2)")]),
        ("a[b:[c:d:2]:1]e", [(1, "abe"), (2, "ace"), (10, "ade")]),
        # without a change in the end: 0 comes before the first step, 1.0 is all steps
        ("[cat:dog:0]", [(10, "dog")]),
        ("[cat:dog:-2]", [(10, "dog")]),
        ("[cat:dog:1.0]", [(10, "cat")]),
        ("[cat:dog:99]", [(10, "cat")]),
        ("[cat:dog:1]", [(1, "cat"), (10, "dog")]),
        ("[cat:dog:0.29]", [(2, "cat"), (10, "dog")]),
        ("([cat:dog:4]:1.3)", [(4, "(cat:1.3)"), (10, "(dog:1.3)")]),
        # what the grammar does not cover is text
        ("a [unclosed", [(10, "a [unclosed")]),
        ("((a][:b:c [d:3]", [(3, "((a][:b:c "), (10, "((a][:b:c d")]),
        ("a | b [c:3]", [(10, "a | b [c:3]")]),
        ("[a|b:3]", [(10, "[a|b:3]")]),
        ("[c:3] \\", [(10, "[c:3] \\")]),
        (r"\[c:3\] [d\]:3]", [(3, r"\[c:3\] "), (10, r"\[c:3\] d\]")]),
        ("a [x:1.5e0:2]", [(2, "a x"), (10, "a 1.5e0")]),
        ("[a:b:c]", [(10, "[a:b:c]")]),
    ],
)
def test_texts_with_their_last_steps(prompt: str, expected: list[tuple[int, str]]) -> None:
    assert changes_of(prompt, TEN) == expected


def test_the_example_of_the_documentation() -> None:
    """Of five changes at shares of the steps, two of which add and remove."""
    prompt = "a [hill:pond:0.25] and [a fir:a yew:0.75][ ahead::0.6][ behind:0.25] [rough:fine:0.5]"
    assert changes_of(prompt, Timeline(100)) == [
        (25, "a hill and a fir ahead rough"),
        (50, "a pond and a fir ahead behind rough"),
        (60, "a pond and a fir ahead behind fine"),
        (75, "a pond and a fir behind fine"),
        (100, "a pond and a yew behind fine"),
    ]


@pytest.mark.parametrize(
    ("prompt", "turns"),
    [
        ("[cow|horse]", ["cow", "horse"]),
        ("[fe|]male", ["female", "male"]),
        ("[fe|||]male", ["female", "male", "male", "male"]),
        ("[a|b|[c|d]]", ["a", "b", "c", "a", "b", "d"]),
    ],
)
def test_alternation_takes_the_next_text_at_each_step(prompt: str, turns: list[str]) -> None:
    part = Part(tuple(changes_of(prompt, TEN)))
    assert [part.at(step) for step in range(1, 11)] == [turns[i % len(turns)] for i in range(10)]


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("a [cat:.5] x", [(8, "a cat x")]),
        ("a [cat:1.5] x", [(4, "a  x"), (8, "a cat x")]),
        ("a [cat:7] x", [(8, "a cat x")]),
        ("a [cat:12] x", [(2, "a  x"), (8, "a cat x")]),
    ],
)
def test_the_second_pass_goes_on_counting_from_the_first(
    prompt: str, expected: list[tuple[int, str]]
) -> None:
    assert changes_of(prompt, Timeline(8, before=10)) == expected


def test_steps_count_from_0_and_the_last_text_has_what_is_left() -> None:
    """So a change after step 3 is seen by the fifth of the steps, as in the web UI."""
    (part,) = parts_of("[a:b:3]", TEN)
    assert "".join(part.at(step) for step in range(12)) == "aaaabbbbbbbb"
    (part,) = parts_of("[a|b]", TEN)
    assert "".join(part.at(step) for step in range(6)) == "aababa"


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("a cat", [("a cat", 1)]),
        ("a cat :1.2 AND a dog", [("a cat", 1.2), (" a dog", 1)]),
        ("a cat: .5 AND a dog:-2. AND x", [("a cat", 0.5), (" a dog", -2), (" x", 1)]),
        ("a cat :1.2", [("a cat", 1.2)]),
        ("a (cat:1.2)", [("a (cat:1.2)", 1)]),
        ("SAND and BAND", [("SAND and BAND", 1)]),
        ("a AND", [("a", 1), ("", 1)]),
    ],
)
def test_and_joins_weighted_prompts(prompt: str, expected: list[tuple[str, float]]) -> None:
    assert [(part.at(0), part.weight) for part in parts_of(prompt, TEN)] == expected


def test_a_negative_prompt_changes_and_is_not_joined() -> None:
    job = Job("[a:b:2] AND c", "[d:e:3] AND f :2", steps=10, prompt_syntax="a1111", upscale=2.0)
    first, second = scripts_of(job)
    assert first.texts() == ["a", "b", " c", "d AND f :2", "e AND f :2"]
    assert second.texts() == ["b", " c", "e AND f :2"]
    assert first.ends() == {2, 3, 10}
    plain = Script.of(Job("[a:b:2] AND c", "[d]", steps=10))
    assert plain.texts() == ["[a:b:2] AND c", "[d]"]
    assert not plain.is_composed


@pytest.mark.parametrize("prompt", ["a cat", "a cat :1.2", "16:9", "(a:1.2)"])
def test_a_number_at_the_end_can_be_text(prompt: str) -> None:
    (part,) = parts_of(without_weight(prompt), TEN)
    assert (part.at(0), part.weight) == (prompt, 1)


@given(st.text("a[]():|\\3 .", max_size=30))
@settings(max_examples=100)
def test_without_a_change_a_prompt_is_as_it_was(prompt: str) -> None:
    found = changes_of(prompt, TEN)
    assert found[-1][0] == 10
    assert [end for end, _ in found] == sorted({end for end, _ in found})
    if "|" not in prompt and ":" not in prompt:
        assert found == [(10, prompt)]


@pytest.mark.parametrize("unit", ["[", "[a:", "[a:3]", "[a|b]", "(", "[(", "a AND ", ":1", "[[a:3]:3]", "[|"])
def test_long_prompts_are_read_in_no_time(unit: str) -> None:
    start = time.process_time()
    try:
        parts_of(unit * 2_000, TEN)
    except InputError as error:
        assert "more than 100 open brackets" in str(error)
    assert time.process_time() - start < 1


def test_a_weight_without_an_end_is_refused() -> None:
    with pytest.raises(InputError, match="not a finite number"):
        parts_of("a:" + "9" * 400, TEN)


def test_shares_of_given_levels_are_those_of_their_steps() -> None:
    """A list of levels has its own number of steps, whatever is asked for."""
    asked = {"prompt_syntax": "a1111", "negative_prompt": "[c|d]"}
    expected = Script.of(Job("[a:b:0.5]", steps=4, **asked))  # type: ignore[arg-type]
    for levels in ({"sigmas": (8.0, 4.0, 2.0, 1.0, 0.0)}, {"timesteps": (900.0, 600.0, 300.0, 100.0)}):
        assert Script.of(Job("[a:b:0.5]", steps=50, **asked, **levels)) == expected  # type: ignore[arg-type]
