"""Notations of other programs that are text here: one warning for each."""

import time

import pytest

from ldm.prompts.notations import warn_of_notations


@pytest.fixture
def warnings(caplog):
    def warnings(prompt="", negative="", expanded=False, weighted=False, tagged=False):
        caplog.clear()
        warn_of_notations(
            [("--prompt", prompt)], [("--negative_prompt", negative)],
            expanded=expanded, weighted=weighted, tagged=tagged,
        )  # fmt: skip
        return [record.getMessage() for record in caplog.records]

    return warnings


@pytest.mark.parametrize(
    ("prompt", "said", "read_with"),
    [
        ("a {red|blue} cube", "--prompt: {red|blue} is read as text; --expand writes", "expanded"),
        ("a __colour__ cube", "__colour__ is a wildcard, whose file is not read", "expanded"),
        ("${x=a} cube", "${x= is a variable of dynamic prompts", "expanded"),
        ("a (red:1.3) cube", "(red:1.3) is read as text; --prompt_syntax a1111", "weighted"),
        ("a ((red)) cube", "((red)) is read as text; --prompt_syntax a1111", "weighted"),
        ("a [red:blue:0.5] cube", "[red:blue:0.5] is read as text; --prompt_syntax a1111", "weighted"),
        ("a [red|blue] cube", "[red|blue] is read as text; --prompt_syntax a1111", "weighted"),
        ("a cat BREAK a dog", "BREAK is read as text; --prompt_syntax a1111", "weighted"),
        ("a cat AND a dog", "AND is read as text; --prompt_syntax a1111", "weighted"),
        ("<lora:ink:1> cube", "<lora:ink:1> asks for a network, and without --lora_dir", "tagged"),
        ("<hypernet:ink:1> cube", "<hypernet:ink:1> asks for a network", "tagged"),
        ("a cat <segment:face>", "<segment:face> is not a tag that is known here", None),
        ("a cat++", "t++ is InvokeAI's way", None),
        ("a (big cat)1.3", "(big cat)1.3 is InvokeAI's way", None),
        ('("a", "b").blend(1, 1)', ").blend( is InvokeAI's way", None),
        ("embedding:ink, a cat", "embedding:ink is ComfyUI's name of an embedding", None),
        ("a cat /* big */", "/* begins a comment in ComfyUI", None),
        ("withLora(ink, 0.8)", "withLora(ink, 0.8) asks for a network", None),
        ("a cat, {lora:ink:1}", "lora:ink looks like a tag for a network", None),
        ("a cat < lora:ink:1>", "lora:ink looks like a tag for a network", None),
        ("a cat &lt;lora:ink:1&gt;", "lora:ink looks like a tag for a network", None),
        ("a cat ＜lora：ink：1＞", "lora：ink looks like a tag for a network", None),
        ("a cat <lora:ink:1", "<lora:ink:1 looks like a tag for a network", None),
        ("a cat <lora=ink:1>", "<lora=ink:1> looks like a tag for a network", None),
    ],
)
def test_one_warning_for_each_notation(warnings, prompt, said, read_with):
    (message,) = warnings(prompt)
    assert said in message
    if read_with:
        assert warnings(prompt, **{read_with: True}) == []


@pytest.mark.parametrize(
    "prompt", ["a cat", "a (red) cube [x]", "a {red} cube", "a <cat-toy>", "C++ code, a -- b", "CATS AND DOGS",
               "snake_case", "see https://x/y", "ratio 3:2 (x:y)", "a, b; c: d | e", "rock 'n' roll", "<3"],
)  # fmt: skip
def test_plain_prompts_pass_in_silence(warnings, prompt):
    expected = 1 if prompt.startswith("C++") else 0
    assert len(warnings(prompt, prompt)) == 2 * expected


def test_a_negative_prompt_asks_for_no_network(warnings):
    (message,) = warnings(negative="bad <lora:ink:1>", tagged=True)
    assert message == (
        "--negative_prompt: <lora:ink:1> asks for a network, which a negative prompt cannot; it is read as text. "
        "Move it to the prompt"
    )
    (message,) = warnings("a AND b", "c AND d", weighted=True)
    assert (
        message == "--negative_prompt: AND joins prompts, which a negative prompt cannot; it is read as text"
    )
    assert "in a negative prompt, with --expand, too" in warnings(negative="{a|b}", expanded=True)[0]


@pytest.mark.parametrize(
    "unit",
    ["{", "{|", "(", "(:", "[|", "[:", "<a:", "<lora:", "lora: ", "/*", "__a", "${a", "a+", "a)", "AND"],
)
def test_strange_long_prompts_are_looked_at_in_no_time(warnings, unit):
    start = time.process_time()
    warnings(unit * 10_000, unit * 10_000)
    assert time.process_time() - start < 1
