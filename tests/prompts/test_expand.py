"""Prompts with options, and sweeps, against lists written by hand."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ldm.prompts.expand import MAX_JOBS, expand, expand_lines, parse_sweep
from ldm.prompts.files import Faults
from ldm.prompts.lines import Line
from ldm.util import InputError


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("", [""]),
        ("a cat", ["a cat"]),
        ("a {red|blue} cat", ["a red cat", "a blue cat"]),
        ("{a|b}{c|d}", ["ac", "ad", "bc", "bd"]),
        ("{a|b{1|2}|c}", ["a", "b1", "b2", "c"]),
        ("{|very }big", ["big", "very big"]),
        ("{{a|b}|c} {d|e}", ["a d", "a e", "b d", "b e", "c d", "c e"]),
        ("{a|a}", ["a", "a"]),
        ("{a} | b", ["{a} | b"]),
        ("{{a|b}}", ["{a}", "{b}"]),
        ("{}", ["{}"]),
        (r"\{a\|b\} {c|\|}", ["{a|b} c", "{a|b} |"]),
        (r"\(a\) \\ {\[|b}", [r"\(a\) \\ \[", r"\(a\) \\ b"]),
        (r"\\{a|b}", [r"\\a", r"\\b"]),
        ("a\\", ["a\\"]),
        ("(x:1.2) {京|🌃\n}", ["(x:1.2) 京", "(x:1.2) 🌃\n"]),
    ],
)
def test_every_combination(prompt, expected):
    assert expand(prompt) == expected


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [  # the output of dynamicprompts 0.31's CombinatorialPromptGenerator
        ("a {2$$red|blue} cube", ["a red,blue cube", "a blue,red cube"]),
        ("{2$$a|b|c}", ["a,b", "a,c", "b,a", "b,c", "c,a", "c,b"]),
        ("{1-2$$ and $$a|b}", ["a", "b", "a and b", "b and a"]),
        ("{-2$$a|b}", ["a", "b", "a,b", "b,a"]),
        ("{2-$$ $$a|b}", ["a b", "b a"]),
        ("{0-1$$a|b}", ["", "a", "b"]),
        ("{3$$a|b}", ["a,b", "b,a"]),
        ("{2$$a}", ["a"]),
        ("{0.5::a|.5::b|1::{c|d}}", ["a", "b", "c", "d"]),
        ("{a::b|c}", ["a::b", "c"]),
        ("{!a|b}", ["a", "b"]),
        ("{1-2$$x {a|b}|c}", ["x a", "x b", "c", "x a,c", "x b,c", "c,x a", "c,x b"]),
        (r"\__a__ {b|c}", ["__a__ b", "__a__ c"]),
        ("snake_case, a ____ b", ["snake_case, a ____ b"]),
    ],
)
def test_counts_separators_and_weights_of_dynamic_prompts(prompt, expected):
    assert expand(prompt) == expected


@pytest.mark.parametrize(
    ("prompt", "fault"),
    [
        (
            "a __colour__ {cube|cone}",
            r"__colour__ is a wildcard, whose file is not read; write its options as {a|b}",
        ),
        ("{a|__dir/my *__}", "__dir/my *__ is a wildcard"),
        ("${x={a|b}} ${x}", "${x= is a variable of dynamic prompts, which is not supported"),
        ("a ${x}", "${x} is a variable"),
        ("{~a|b}", "{~a chooses at random or in turn, which --expand does not do; leave the ~ out"),
        ("{x$$a|b}", "{x$$a does not say how many of the options to take; write {2$$a|b|c}"),
        ("{30$$" + "|".join(map(str, range(40))) + "}", "the prompt would give more than 10^15 prompts"),
        ("{2$$" + "|".join(map(str, range(101))) + "}", "the prompt would give 10100 prompts"),
    ],
)
def test_what_is_not_supported_of_dynamic_prompts_is_refused(prompt, fault):
    with pytest.raises(InputError) as caught:
        expand(prompt)
    assert str(caught.value).startswith(fault)


@given(st.lists(st.lists(st.text("ab ", max_size=2), min_size=2, max_size=3), max_size=4))
def test_groups_are_a_product(groups):
    prompt = "-".join(f"{{{'|'.join(group)}}}" for group in groups)
    assert expand(prompt) == ["-".join(texts) for texts in itertools.product(*groups)]


@pytest.mark.parametrize(
    ("prompt", "fault"),
    [
        ("a {b|c", r"a { is not closed in the prompt; write \{ for a literal one"),
        ("a {b|{c}", r"a { is not closed"),
        ("a } b", r"a } closes nothing in the prompt; write \} for a literal one"),
        ("{a|b}}", r"a } closes nothing"),
        ("{" * 51 + "a|b" + "}" * 51, "more than 50 braces"),
        ("{" * 9999, "more than 50 braces"),
        ("{a|b}" * 13, "the prompt would give 8192 prompts; use fewer options, at most 1000"),
        ("{a|b|c|d}" * 1000, r"the prompt would give more than 10^15 prompts"),
    ],
)
def test_faults_of_options(prompt, fault):
    with pytest.raises(InputError) as caught:
        expand(prompt, 1000)
    assert fault in str(caught.value)


def test_lines_keep_what_else_they_say():
    faults = Faults("list")
    lines = [Line(2, "{a|b}", (5,), 2, {"steps": 3}), Line(4, "c")]
    assert expand_lines(lines, faults) == [
        Line(2, "a", (5,), 2, {"steps": 3}),
        Line(2, "b", (5,), 2, {"steps": 3}),
        Line(4, "c"),
    ]
    with pytest.raises(InputError, match=r"^the lines up to 3 would give 6 prompts"):
        expand_lines([Line(i, "{a|b}") for i in range(1, 5)], faults, cap=2)
    assert len(expand_lines([Line(i, "a") for i in range(1, 5)], faults, cap=2)) == 4
    assert expand_lines([Line(2, "a"), Line(4, "{")], faults) == [Line(2, "a")]
    with pytest.raises(InputError, match=r"^list, line 4: a \{ is not closed"):
        faults.raise_any()


@pytest.mark.parametrize(
    ("text", "field", "values"),
    [
        ("scale=5,7.5,10", "scale", (5.0, 7.5, 10.0)),
        ("steps=10..50:10", "steps", (10, 20, 30, 40, 50)),
        ("steps=3..1", "steps", (3, 2, 1)),
        ("steps=10..25:10", "steps", (10, 20)),
        ("ddim_steps=5,10..12", "steps", (5, 10, 11, 12)),
        ("eta=0..1:0.1", "eta", (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)),
        ("scale=-1..1:.5", "scale", (-1.0, -0.5, 0.0, 0.5, 1.0)),
        ("W=512,640", "width", (512, 640)),
        ("sampler=DDIM,plms", "sampler", ("ddim", "plms")),
        ("paste=true,false", "paste", (True, False)),
        (r"prompt=a cat\, red,a dog,", "prompt", ("a cat, red", "a dog", "")),
        ("prompt=1..3", "prompt", ("1..3",)),
        ("init.mask_blur=0,4", "init.mask_blur", (0.0, 4.0)),
        ("seed=4294967295", "seed", (4294967295,)),
        ("seed=18446744073709551615..0:9223372036854775808", "seed", (2**64 - 1, 2**63 - 1)),
    ],
)
def test_values_of_an_axis(text, field, values):
    (axis,) = parse_sweep([text]).axes
    assert (axis.field, axis.values) == (field, values)
    assert list(map(type, axis.values)) == list(map(type, values))


def test_a_sweep_goes_row_by_row():
    sweep = parse_sweep(["scale=5,7.5", "ddim_steps=10,20,30"])
    assert list(sweep.overrides()) == [
        {"scale": 5.0, "steps": 10}, {"scale": 5.0, "steps": 20}, {"scale": 5.0, "steps": 30},
        {"scale": 7.5, "steps": 10}, {"scale": 7.5, "steps": 20}, {"scale": 7.5, "steps": 30},
    ]  # fmt: skip
    assert sweep.rows == ["scale=5", "scale=7.5"]
    assert sweep.columns == ["ddim_steps=10", "ddim_steps=20", "ddim_steps=30"]
    assert sweep.sheets == [""]


def test_one_axis_is_a_row_and_a_third_makes_sheets():
    sweep = parse_sweep(["seed=1..3"])
    assert (sweep.rows, sweep.columns) == ([""], ["seed=1", "seed=2", "seed=3"])
    assert [o["seed"] for o in sweep.overrides()] == [1, 2, 3]
    sweep = parse_sweep(["seed=1,2", "steps=5,6", "eta=0,1"])
    assert sweep.sheets == ["eta=0", "eta=1"]
    assert [(o["eta"], o["seed"], o["steps"]) for o in sweep.overrides()] == [
        (0, 1, 5), (0, 1, 6), (0, 2, 5), (0, 2, 6), (1, 1, 5), (1, 1, 6), (1, 2, 5), (1, 2, 6),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("texts", "fault"),
    [
        ([], "a sweep needs a setting and its values"),
        (["foo=1"], "--sweep foo=1 names no setting"),
        (["scale"], "--sweep scale names no setting"),
        (["\x1b[2J=1"], "--sweep \\x1b[2J=1 names no setting"),
        (["scale="], "--sweep scale is empty; give a finite number"),
        (["scale=5,,6"], "--sweep scale is empty"),
        (["scale=x"], "--sweep scale is x; give a finite number"),
        (["steps=0,1"], "--sweep steps is 0; give a whole number from 1 to 999"),
        (["steps=1..2000:999"], "--sweep steps is 1000; give a whole number from 1 to 999"),
        (
            ["steps=10..50:0"],
            "--sweep steps is 10..50:0; write a range such as 10..50:10, with a step above 0",
        ),
        (["steps=10..50:-10"], "--sweep steps is 10..50:-10; write a range"),
        (["scale=nan..3"], "--sweep scale is nan..3; write a range"),
        (["scale=1..inf"], "--sweep scale has a range of more than 10000 values"),
        (["scale=1..1e999999999"], "--sweep scale "),
        (["scale=1..2:1e-999999999"], "--sweep scale "),
        (["width=500"], "--sweep width is 500; give a multiple of 8"),
        (["sampler=eular"], "--sweep sampler is eular; give ddim"),
        (["seed=1,1"], "--sweep seed has a value twice"),
        (["steps=1", "ddim_steps=2"], "--sweep steps is given twice"),
        (["outpaint=0,0,64,0"], "--sweep outpaint: its values hold commas"),
        (
            ["seed=1..200", "steps=1..200"],
            "--sweep would give 40000 combinations; use fewer values, at most 10000",
        ),
    ],
)
def test_faults_of_sweeps(texts, fault):
    with pytest.raises(InputError) as caught:
        parse_sweep(texts)
    assert str(caught.value).startswith(fault)
    assert str(caught.value).isprintable()


def test_a_sweep_may_be_as_large_as_the_cap():
    assert len(list(parse_sweep([f"seed=1..{MAX_JOBS}"]).overrides())) == MAX_JOBS
