"""Prompt weights by the web UI's rules: its examples, and chunks written by hand or counted token by token."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ldm.modules.encoders.tokenizer import CLIPTokenizer
from ldm.prompts.weights import chunk_prompt, parse_weights
from ldm.util import InputError

BEGIN, END, COMMA = 49406, 49407, 267
CAT, DOG = 2368, 1929


@pytest.fixture(scope="module")
def tokenizer():
    tokenizer = CLIPTokenizer.openai()
    assert tokenizer.encode("cat, dog") == [BEGIN, CAT, COMMA, DOG, END]
    return tokenizer


def flat(prompt):
    (section,) = parse_weights(prompt)
    return [(text, pytest.approx(weight)) for text, weight in section]


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("", []),
        ("normal text", [("normal text", 1)]),
        ("an (important) word", [("an ", 1), ("important", 1.1), (" word", 1)]),
        ("(unbalanced", [("unbalanced", 1.1)]),
        ("[unbalanced", [("unbalanced", 1 / 1.1)]),
        (r"\(literal\]", [("(literal]", 1)]),
        (r"\\(x)\a", [("\\", 1), ("x", 1.1), ("a", 1)]),
        ("(unnecessary)(parens)", [("unnecessaryparens", 1.1)]),
        ("a (((house:1.3)) [on] a (hill:0.5), sun, (((sky))).",
         [("a ", 1), ("house", 1.573), (" ", 1.1), ("on", 1), (" a ", 1.1), ("hill", 0.55), (", sun, ", 1.1),
          ("sky", 1.4641), (".", 1.1)]),
        ("((a:2)b:3)", [("a", 6), ("b", 3)]),
        ("[[a]]", [("a", 1 / 1.21)]),
        ("([a])", [("a", 1)]),
        ("(a : 1.5 )", [("a ", 1.5)]),
        ("(a:+.5)(b:-2)", [("a", 0.5), ("b", -2)]),
        ("(a:0)b", [("a", 0), ("b", 1)]),
        ("a) b] c:1.2) : d", [("a) b] c:1.2) : d", 1)]),
        ("(a:b:1.2)", [("a:b", 1.2)]),
        ("(1:2) 3:4", [("1", 2), (" 3:4", 1)]),
        ("BREAKER xBREAK break", [("BREAKER xBREAK break", 1)]),
        ("(a:1)b", [("ab", 1)]),
        ("BRAND and SAND", [("BRAND and SAND", 1)]),
        (r"\[a|b\] \[x:1.3\]", [("[a|b] [x:1.3]", 1)]),
        ("a | b", [("a | b", 1)]),
    ],
)  # fmt: skip
def test_weights(prompt, expected):
    assert [part for part in flat(prompt) if part[0]] == [(t, pytest.approx(w)) for t, w in expected]


def test_break_makes_sections():
    sections = parse_weights("a BREAK b\nBREAK\n(c BREAK d:2)BREAK")
    texts = [[(text, weight) for text, weight in section if text] for section in sections]
    assert texts == [[("a", 1)], [("b", 1)], [("c", 2)], [("d", 2)], []]


@pytest.mark.parametrize(
    ("prompt", "fault"),
    [
        ("(a:1.2.3)", "the prompt's weight 1.2.3 is not a number"),
        ("(a:.)", "the prompt's weight . is not a number"),
        (f"(a:{'9' * 400})", "multiply to no finite number"),
        ("(" * 101, "more than 100 open brackets"),
    ],
)
def test_what_is_refused(prompt, fault):
    with pytest.raises(InputError) as caught:
        parse_weights(prompt)
    assert fault in str(caught.value)


@given(st.text("a ()[]:.12\\|", max_size=30))
@settings(max_examples=500)
def test_every_bracket_is_used_or_text(prompt):
    try:
        sections = parse_weights(prompt)
    except InputError:
        return
    text = "".join(text for section in sections for text, _ in section)
    assert [c for c in text if c in "a|"] == [c for c in prompt if c in "a|"]
    assert not ("(" in text and "\\(" not in prompt)


@given(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\\()[]"), max_size=40))
def test_text_without_signs_is_one_text(prompt):
    if "BREAK" not in prompt:
        assert parse_weights(prompt) == [[(prompt, 1.0)]] if prompt else [[]]


# --- chunks -------------------------------------------------------------------------------------------------


def inner(chunk, length=75):
    """The ids between begin and end token, the padding left out."""
    assert chunk.ids[0] == BEGIN
    assert chunk.ids[-1] == END
    assert len(chunk.ids) == len(chunk.weights) == length + 2
    return [token for token in chunk.ids[1:-1] if token != END]


def counts(prompt, tokenizer):
    return [len(inner(chunk)) for chunk in chunk_prompt(prompt, tokenizer)]


def test_a_short_prompt_is_what_the_tokenizer_gives(tokenizer):
    for prompt in ("", "a cat", "cat " * 75):
        (chunk,) = chunk_prompt(prompt, tokenizer)
        assert [list(chunk.ids)] == tokenizer([prompt])
        assert set(chunk.weights) == {1.0}


def test_weights_lie_on_their_tokens(tokenizer):
    (chunk,) = chunk_prompt("cat (dog:1.5) [cat]", tokenizer)
    assert chunk.ids[:5] == (BEGIN, CAT, DOG, CAT, END)
    assert chunk.weights == pytest.approx([1, 1, 1.5, 1 / 1.1, *[1] * 73])


def test_long_prompts_are_cut_every_75_tokens(tokenizer):
    assert counts("cat " * 76, tokenizer) == [75, 1]
    assert counts("cat " * 151, tokenizer) == [75, 75, 1]


def prompt_of(*runs):
    """Runs of cats with commas between them."""
    return ", ".join(" ".join(["cat"] * run) for run in runs)


@pytest.mark.parametrize(
    ("runs", "expected"),
    [
        ((74, 5), [75, 5]),  # the comma is the 75th token: nothing to move
        ((70, 10), [71, 10]),  # the comma is the 71st
        ((55, 30), [56, 30]),  # the comma is the 56th, 20 before the cut
        ((54, 30), [75, 10]),  # 21 before it: too far
        ((75, 5), [75, 6]),  # the comma itself comes next
        ((60, 13, 5), [75, 5]),  # of two commas the later one
        ((60, 10, 10), [72, 10]),
        ((60, 14, 5), [75, 6]),  # a comma comes next, so the one before does not count
        ((60, 13, 60, 13, 5), [75, 75, 5]),
        ((70, 70, 30), [71, 71, 30]),  # the same in the second chunk
    ],
)
def test_a_chunk_ends_at_a_comma_near_its_end(tokenizer, runs, expected):
    assert counts(prompt_of(*runs), tokenizer) == expected


def test_an_embedding_moves_to_the_next_chunk_as_a_whole():
    tokenizer = CLIPTokenizer.openai()
    tokenizer.use_placeholders({"my-style": range(49408, 49412)})
    for before, expected in ((71, [75, 1]), (72, [72, 5]), (74, [74, 5]), (75, [75, 5])):
        assert counts("cat " * before + "my-style dog", tokenizer) == expected
    commas = prompt_of(60, 12) + " my-style"  # the comma counts only where the chunk is full
    assert counts(commas, tokenizer) == [73, 4]
    assert counts(prompt_of(60, 14) + " my-style", tokenizer) == [61, 18]


def test_break_begins_a_chunk(tokenizer):
    assert counts("cat BREAK dog", tokenizer) == [1, 1]
    assert counts("BREAK dog", tokenizer) == [0, 1]
    assert counts("cat BREAK", tokenizer) == [1]
    assert counts("cat BREAK BREAK dog", tokenizer) == [1, 0, 1]
    assert counts("cat " * 75 + "BREAK dog", tokenizer) == [75, 1]
    assert counts("BREAK", tokenizer) == [0]


def counted(ids, length=75, reach=20):
    """The web UI's algorithm of cutting, token by token."""
    chunks, chunk, comma = [], [], -1
    for token in ids:
        if token == COMMA:
            comma = len(chunk)
        elif len(chunk) == length and comma != -1 and length - comma <= reach:
            chunks.append(chunk[: comma + 1])
            chunk, comma = chunk[comma + 1 :], -1
        if len(chunk) == length:
            chunks.append(chunk)
            chunk, comma = [], -1
        chunk.append(token)
    return [*chunks, chunk]


@given(st.lists(st.sampled_from(["cat", "cat", "cat", "dog", "dog", ","]), max_size=300))
@settings(max_examples=200, deadline=None)
def test_cuts_are_those_of_counting_tokens(tokenizer, words):
    ids = [{"cat": CAT, "dog": DOG, ",": COMMA}[word] for word in words]
    prompt = " ".join(words)
    if ",,," not in prompt.replace(" ", ""):
        assert [inner(chunk) for chunk in chunk_prompt(prompt, tokenizer)] == counted(ids)
