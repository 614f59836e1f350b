"""Prompt lists in each dialect, against hand-written jobs."""

import dataclasses
import io
import json
import logging
import re
import sys
import tracemalloc

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ldm.cli.options import make_parser
from ldm.fields import SETTINGS
from ldm.job import Init, Job
from ldm.job_values import override
from ldm.models.diffusion.solvers import SOLVERS
from ldm.prompts.dialects import FORMATS, read_prompt_list
from ldm.prompts.lines import Line
from ldm.util import InputError
from scripts import txt2img


@pytest.fixture
def read(tmp_path):
    def read(content, format="auto"):
        path = tmp_path / "list.txt"
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return read_prompt_list(path, format)

    return read


@pytest.fixture
def refusal(read):
    """The error, a line for each fault, without the file's name."""

    def refusal(content, format="auto"):
        with pytest.raises(InputError) as caught:
            read(content, format)
        lines = str(caught.value).split("\n")
        assert all(line.isprintable() for line in lines)
        return [line.partition("list.txt, ")[2] or line for line in lines]

    return refusal


def changed(line, defaults):
    """The job of a line based on another job, except for its seed."""
    return override(defaults, {"prompt": line.prompt, **line.overrides})


def one(lines):
    (line,) = lines
    return line.prompt, line.seeds, line.count, dict(line.overrides)


# --- each dialect -------------------------------------------------------------------------------------------

A1111 = [
    ("--prompt a cat --steps 20", ("a cat", (), 1, {"steps": 20})),
    ('--prompt "a -- cat" --seed 5', ("a -- cat", (5,), 1, {})),
    ("--seed 7 --prompt a   big cat", ("a big cat", (7,), 1, {})),
    (
        "--prompt cat --negative_prompt bad art, worse --cfg_scale 7 --width 640 --height 512",
        ("cat", (), 1, {"negative_prompt": "bad art, worse", "scale": 7.0, "width": 640, "height": 512}),
    ),
    ("--prompt cat --sampler_name DDIM --n_iter 2 --batch_size 3", ("cat", (), 6, {"sampler": "ddim"})),
    (r"--prompt it\'s \"here\" --steps 9", ('it\'s "here"', (), 1, {"steps": 9})),
    ("--prompt '' --steps 9", ("", (), 1, {"steps": 9})),
    ("--prompt cat --steps 9 --restore_faces false", ("cat", (), 1, {"steps": 9})),
    ("a plain cat", ("a plain cat", (), 1, {})),
]
KOHYA = [
    (
        "a cat --n bad art --w 640 --d 1,2",
        ("a cat", (1, 2), 1, {"negative_prompt": "bad art", "width": 640}),
    ),
    (
        "a cat --W 640 --H 512 --S 28 --L 7.5",
        ("a cat", (), 1, {"width": 640, "height": 512, "steps": 28, "scale": 7.5}),
    ),
    ('it\'s "quoted" \\( --t 0.4', ('it\'s "quoted" \\(', (), 1, {"strength": 0.4})),
    ("a--b - c --d 4294967295", ("a--b - c", (4294967295,), 1, {})),
    (
        "a cat --ss plms --n don't --s 3",
        ("a cat", (), 1, {"sampler": "plms", "negative_prompt": "don't", "steps": 3}),
    ),
    ("a -- cat", ("a -- cat", (), 1, {})),
]
INVOKEAI = [
    ('"a cat" -n4 -S1234 -C7.5', ("a cat", (1234,), 4, {"scale": 7.5})),
    ("a cat -s 50 -S 123 -W 512 -H 640 -C 7.5 -A ddim",
     ("a cat", (123,), 1, {"steps": 50, "width": 512, "height": 640, "scale": 7.5, "sampler": "ddim"})),
    ("a well-fed cat - fat -n2", ("a well-fed cat - fat", (), 2, {})),
    ("it's a cat -s20", ("it's a cat", (), 1, {"steps": 20})),
    ('"a \\"cat\\"" --steps=20 --cfg_scale 6', ('a "cat"', (), 1, {"steps": 20, "scale": 6.0})),
    ("a [bad] cat [ugly hat] -s9", ("a cat", (), 1, {"negative_prompt": "bad ugly hat", "steps": 9})),
    ("a cat -I cat.png -f 0.3 -S1", ("a cat", (1,), 1, {"init.image": "cat.png", "strength": 0.3})),
    ("-s20 --prompt 'a cat'", ("a cat", (), 1, {"steps": 20})),
    ('"a cat"', ("a cat", (), 1, {})),
]  # fmt: skip
OPTIONS = [
    ("a cat --seed 5 --ddim_steps 20 --W 640", ("a cat", (5,), 1, {"steps": 20, "width": 640})),
    ('--prompt "a cat" --H 512 --scale=-1.5', ("a cat", (), 1, {"height": 512, "scale": -1.5})),
    ("it's raw (( --negative_prompt bad art --plms",
     ("it's raw ((", (), 1, {"negative_prompt": "bad art", "sampler": "plms"})),
    ("a cat --n_iter 2 --n_samples 3 --dpm_solver", ("a cat", (), 6, {"sampler": "dpm_solver"})),
    ("a cat --ddim_eta 0.5 --timestep_spacing quad --rng cpu",
     ("a cat", (), 1, {"eta": 0.5, "timestep_spacing": "quad", "rng": "cpu"})),
    ("a cat --init-img a.png --strength 0.5 --outpaint 0,0,64,0 --mask m.png --invert_mask --no_paste",
     ("a cat", (), 1, {"init.image": "a.png", "strength": 0.5, "init.outpaint": (0, 0, 64, 0), "init.mask": "m.png",
                       "init.invert_mask": True, "paste": False})),
    ("a cat --upscale 2 --upscale_in latents --upscale_strength 0.4 --posterior_mean",
     ("a cat", (), 1, {"upscale": 2.0, "upscale_in": "latents", "upscale_strength": 0.4, "posterior": "mean"})),
]  # fmt: skip
JSONL = [
    ('{"prompt": "a cat", "steps": 20}', ("a cat", (), 1, {"steps": 20})),
    ('{"prompt": "", "seed": 5, "count": 2}', ("", (5,), 2, {})),
    (
        '{"prompt": "a", "init": {"image": "a.png", "outpaint": [1, 2, 3, 4]}}',
        ("a", (), 1, {"init.image": "a.png", "init.outpaint": (1, 2, 3, 4)}),
    ),
    ('{"prompt": "a", "init": "a.png", "scale": 7}', ("a", (), 1, {"init.image": "a.png", "scale": 7.0})),
    ('{"prompt": "two\\nlines \\u2028", "init": null}', ("two\nlines \u2028", (), 1, {"init": None})),
    ('{"prompt": "a", "W": 640, "ddim_steps": 9}', ("a", (), 1, {"width": 640, "steps": 9})),
]
CSV = [
    ("prompt,steps,W\na cat,20,640", ("a cat", (), 1, {"steps": 20, "width": 640})),
    ('seed, prompt\n5, "a cat, red"', ("a cat, red", (5,), 1, {})),
    ('prompt;scale\n"a ""cat""";7,5'.replace("7,5", "7.5"), ('a "cat"', (), 1, {"scale": 7.5})),
    ("prompt\tnegative_prompt\na, b\tc", ("a, b", (), 1, {"negative_prompt": "c"})),
    (
        "\nprompt, paste, init.image, steps\n\n,false,a.png,\n",
        ("", (), 1, {"paste": False, "init.image": "a.png"}),
    ),
    ('prompt,count\n"two\nlines",3', ("two\nlines", (), 3, {})),
]
TABLE = [
    (name, content, expected)
    for name, cases in (
        ("a1111", A1111), ("kohya", KOHYA), ("invokeai", INVOKEAI),
        ("options", OPTIONS), ("jsonl", JSONL), ("csv", CSV),
    )
    for content, expected in cases
]  # fmt: skip


@pytest.mark.parametrize(("format", "content", "expected"), TABLE)
def test_a_line_of_each_dialect(read, format, content, expected):
    assert one(read(content, format)) == expected


@pytest.mark.parametrize(
    ("format", "content", "expected"), [row for row in TABLE if row[2][1:] != ((), 1, {})]
)
def test_auto_finds_the_dialect(read, caplog, format, content, expected):
    with caplog.at_level(logging.INFO):
        assert one(read(content)) == expected
    assert len(caplog.records) == 1


@pytest.mark.parametrize("format", ["kohya", "invokeai"])
def test_comments(read, format):
    lines = {"kohya": "a --w 640", "invokeai": "a -W640"}[format]
    assert [line.number for line in read(f"# no\n{lines}\n  # no\n", format)] == [2]
    assert [line.number for line in read(f"# no\n{lines}\n  # no\n")] == [2]
    assert len(read(f"// no\n{lines}", format)) == {"kohya": 2, "invokeai": 1}[format]


# --- text stays text ----------------------------------------------------------------------------------------

PLAIN = [
    "a cat",
    "a cat -- or a dog",
    "well--known, state-of-the-art --",
    "rock -n- roll, drum-n-bass, rock -n roll",
    "a jet F-16 -C, -S and -W",
    "--ar 16:9 a cat --v 5",
    "a cat --ar 16:9 --s 250 --v 5",
    "a cat --steps twenty",
    "a cat--steps 20",
    "a cat --w",
    "a cat --steps",
    "a portrait -m dark",
    "rated -x",
    "-20 degrees",
    "a cat -s20 in the rain",
    "--prompt",
    "--prompt --steps 20",
    "it's --steps 20 'o clock",
    "# no comment",
    "// no comment",
    "{red|blue} cat",
    '{"red"|"blue"} cat',
    "{prompt: 5}",
    "prompt",
    "prompt, a cat",
    "a, seed",
    " leading and trailing ",
    "%s {} <script> [/] \"'\\n \x1b[31m \x00 \u202e",
    '"quoted"',
    "[bad] cat",
]


@pytest.mark.parametrize("text", PLAIN)
def test_plain_prompts_stay_plain(read, text):
    assert read(text) == [Line(1, text)]


BESIDE = [  # without lines that have a known option of one dialect or another
    text
    for text in PLAIN
    if not text.startswith(("#", "//", '"', "--prompt"))
    and not any(sign in text for sign in ("[", "--s", "--w", "-s20"))
]


@pytest.mark.parametrize("text", BESIDE)
@pytest.mark.parametrize("own", ["a --l 7.5", "a -C7.5", "a --scale 7.5", '--prompt "a" --cfg_scale 7.5'])
def test_plain_prompts_stay_plain_beside_lines_with_options(read, text, own):
    assert read(f"{own}\n{text}")[1].prompt.strip() == text.strip()


@given(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\r\n"), max_size=60))
@settings(max_examples=300)
def test_plain_takes_any_line_as_it_is(monkeypatch_stdin, text):
    monkeypatch_stdin(text + "\nlast")
    expected = [Line(2, "last")] if not text.strip() else [Line(1, text), Line(2, "last")]
    if not text.startswith("\ufeff"):
        assert read_prompt_list("-", "plain") == expected


@pytest.fixture(scope="module")
def monkeypatch_stdin():
    with pytest.MonkeyPatch.context() as patch:
        yield lambda text: patch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text.encode())))


@given(st.text(st.sampled_from("ab -\"'\\[]{}#/=,:5nsSdwWC\t"), max_size=40), st.sampled_from(FORMATS))
@settings(max_examples=300, deadline=None)
def test_any_line_is_read_or_refused(monkeypatch_stdin, text, format):
    monkeypatch_stdin(f"{text}\nb")
    try:
        lines = read_prompt_list("-", format)
    except InputError as error:
        assert all(part.isprintable() for part in str(error).split("\n"))
    else:
        assert all(isinstance(changed(line, Job("", width=512, height=512)), Job) for line in lines)


def test_a_warning_names_the_dialect_once(read, caplog):
    read("a cat\nb --w 640\n" * 3)
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert "read as kohya's dialect (--w in line 2); --prompt_format plain" in record.getMessage()


def test_no_warning_for_a_named_format_or_plain_text(read, caplog):
    read("b --w 640", "kohya")
    read("b --w 640", "plain")
    read("b -- 640, rock -n roll\nwell-known")
    assert not caplog.records


def test_options_taken_as_text_are_told(read, caplog):
    assert read("a --w 640\nb\nc --ar 16:9\nd --v 5")[2].prompt == "c --ar 16:9"
    assert "in 2 lines, first --ar in line 3" in caplog.records[1].getMessage()
    caplog.clear()
    read("a --steps 20x")
    assert "in 1 line, first --steps in line 1" in caplog.records[0].getMessage()
    caplog.clear()
    assert read("a --w 640\nrock -n roll")[1].prompt == "rock -n roll"
    assert len(caplog.records) == 1  # one dash means nothing in this dialect


def test_the_dialect_of_most_lines_wins(read, caplog):
    read("--prompt a --seed 1\n--prompt b --seed 2\n--prompt c --cfg_scale 2")
    assert "AUTOMATIC1111" in caplog.records[0].getMessage()
    caplog.clear()
    read("--prompt a --seed 1\n--prompt b --seed 2\n--prompt c --scale 2")
    assert "this tool's options" in caplog.records[0].getMessage()


# --- faults -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("format", "text", "fault"),
    [
        ("kohya", "a --w 500", "--w is 500; give a multiple of 8 from 8 to 65536"),
        ("kohya", "a --s 1000", "--s is 1000; give a whole number from 1 to 999"),
        ("kohya", "a --foo 5", "--foo is not an option of kohya's dialect, which has --n, --w,"),
        ("kohya", "a --w 640 --am 1,2", "--am has no counterpart here; leave it out"),
        ("kohya", "a --w", "--w needs a value"),
        ("kohya", "a --d 1,-2", "--d is -2; give a whole number from 0 to 18446744073709551615"),
        ("kohya", "a --d 1,x", "--d is x; give a whole number from 0 to 18446744073709551615"),
        ("kohya", "--w 640", "has no prompt; write one"),
        ("kohya", "a --w 640 --W 640", "--w is given twice; leave one out"),
        ("a1111", "a --steps 20", "there is text before --steps; put --prompt before it"),
        ("a1111", "--prompt it's", "a quote does not close"),
        ("a1111", "--prompt a --restore_faces true", "--restore_faces has no counterpart here"),
        ("a1111", "--prompt a --sampler_name Eular q", "--sampler_name is eular_q; give ddim, plms,"),
        ("a1111", "--prompt a --steps 20 30", "--steps is 20 30; give a whole number from 1 to 999"),
        ("invokeai", "a -n4 b", "b is after the options; put it into the prompt"),
        ("invokeai", "a -Z4", "-Z is not an option of InvokeAI's dialect"),
        ("invokeai", "a -G 0.8", "-G has no counterpart here"),
        ("invokeai", "-s20", "has no prompt"),
        ("invokeai", "a -s 3.5", "-s is 3.5; give a whole number from 1 to 999"),
        ("options", "a --plms 5", "--plms takes no value, so 5 is too much"),
        ("options", "a --plms --dpm_solver", "--dpm_solver is given twice"),
        ("options", "a --scale nan", "--scale is nan; give a finite number"),
        ("options", "a --scale 1e999", "--scale is inf; give a finite number"),
        ("options", "a --ddim_eta -1", "--ddim_eta is -1.0; give a number from 0 to 10"),
        ("options", "a --outpaint 1,2,3", "--outpaint is 1,2,3; give 4 values, each a whole number from 0 to 65536"),
        ("options", "a --outdir x", "--outdir is not an option of this tool's options for a line"),
        ("options", "a --prompt b", "--prompt is given twice"),
        ("options", "a --n_iter 1000 --n_samples 1000", "1000000 images of one line; give at most 100000"),
        ("jsonl", "a cat", "is not valid JSON (Expecting value at column 1)"),
        ("jsonl", '["a"]', "is not a JSON object; write one such as"),
        ("jsonl", '{"prompt": 5}', "prompt is 5; give valid text"),
        ("jsonl", '{"prompt": "\\ud800"}', "prompt is \\ud800; give valid text"),
        ("jsonl", '{"prompt": "a", "steps": "20"}', "steps is 20; give a whole number"),
        ("jsonl", '{"prompt": "a", "steps": 20.5}', "steps is 20.5; give a whole number"),
        ("jsonl", '{"prompt": "a", "steps": true}', "steps is True; give a whole number"),
        ("jsonl", '{"prompt": "a", "scale": NaN}', "scale is nan; give a finite number"),
        ("jsonl", '{"prompt": "a", "scale": 1e999}', "scale is inf; give a finite number"),
        ("jsonl", '{"prompt": "a", "scale": 1' + "0" * 400 + "}", "scale is 1000"),
        ("jsonl", '{"prompt": "a", "seed": 1' + "0" * 5000 + "}", "is not JSON that can be read"),
        ("jsonl", '{"prompt": "a", "foo\\u001b": 1}', "foo\\x1b is unknown; the names are prompt, "),
        ("jsonl", '{"prompt": "a", "prompt": "b"}', "prompt is given twice"),
        ("jsonl", '{"steps": 20}', "has no prompt"),
        ("jsonl", '{"prompt": "a", "init": {"image": 5}}', "init.image is 5; give valid text"),
        ("jsonl", '{"prompt": ' + "[" * 9000, "is not "),
        ("csv", "prompt,steps\na,20,30", "line 2: has 3 cells, but the header 2; quote a cell"),
        ("csv", "prompt,steps\na,x", "line 2: steps is x; give a whole number from 1 to 999"),
        ("csv", "prompt,stps\na,20", "stps is unknown; did you mean steps?"),
        ("csv", "steps,seed\n1,2", "the header names no prompt"),
        ("csv", "prompt,steps,ddim_steps\na,1,2", "steps has more than one column"),
        ("csv", 'prompt,steps\n"a"b,1', "line 2: is not a row of CSV:"),
        ("csv", 'prompt,steps\n"a,1', "line 2: is not a row of CSV:"),
    ],
)  # fmt: skip
def test_one_fault(refusal, format, text, fault):
    (line,) = refusal(text, format)
    assert line.startswith(fault if fault.startswith("line ") else f"line 1: {fault}")


def test_a_fault_in_the_first_line_of_json(refusal):
    (told,) = refusal('{"prompt": "a",}\n{"prompt": "b"}')
    assert told.startswith("line 1: is not valid JSON (")


# --- lists of other programs ------------------------------------------------------------------------------------

KOHYA_TOML = """# sample prompts
[prompt]
width = 640
sample_steps = 9
[[prompt.subset]]
prompt = "a cat"
negative_prompt = "bad"
seed = 5
scale = 6
[[prompt.subset]]
prompt = "a dog"
width = 512
"""
TWO = [("a cat", (), {"steps": 9}), ("a dog", (), {})]


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ('["a cat", "a dog"]', [("a cat", (), {}), ("a dog", (), {})]),
        ('[\n  {"prompt": "a cat", "steps": 9},\n  "a dog"\n]\n', TWO),
        ('{\n  "prompt": "a cat",\n  "steps": 9\n}\n{"prompt": "a dog"}', TWO),
        ('{"prompts": [{"text": "a cat", "num_inference_steps": 9}, "a dog"]}', TWO),
        ('{"prompt": ["a cat", "a dog"], "seed": 5}', [("a cat", (5,), {}), ("a dog", (5,), {})]),
        ('{"file_name": "1.png", "text": "a cat"}', [("a cat", (), {})]),
        (
            '[{"prompt": "a cat", "sample_steps": 9, "sample_sampler": "DDIM", "cfg_scale": 6}]',
            [("a cat", (), {"steps": 9, "sampler": "ddim", "scale": 6.0})],
        ),
        (
            KOHYA_TOML,
            [
                ("a cat", (5,), {"negative_prompt": "bad", "scale": 6.0, "width": 640, "steps": 9}),
                ("a dog", (), {"width": 512, "steps": 9}),
            ],
        ),
        ("- prompt: a cat\n  steps: 9\n- a dog\n", TWO),
        ("prompts:\n  - a cat\n  - 'a dog'\n", [("a cat", (), {}), ("a dog", (), {})]),
        ("name,prompt,negative_prompt\nink,a cat,bad\n", [("a cat", (), {"negative_prompt": "bad"})]),
        ("text,steps\na cat,9\na dog,\n", TWO),
        ("Prompt\tCategory\ta\n".replace("\ta\n", "\n") + "a cat\tAnimals\n", [("a cat", (), {})]),
        ("Prompt,CFG Scale,Seed\na cat,6,5\n", [("a cat", (5,), {"scale": 6.0})]),
    ],
)
def test_lists_of_other_programs(read, content, expected):
    lines = read(content)
    assert [(line.prompt, line.seeds, dict(line.overrides)) for line in lines] == expected


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        ('["a cat", "a dog"', "line 1: is not valid JSON (Expecting ',' delimiter"),
        (
            '[\n "a cat",\n a dog\n]',
            "line 3: is not valid JSON (Expecting value at column 2); --prompt_format plain",
        ),
        ("['a cat', 'a dog']", "line 1: is not valid JSON (Expecting value at column 2)"),
        ('["a cat",\n 5]', "line 2: 5 is not a prompt; write a text in quotes or an object"),
        ('[{"prompt": "a",\n "stps": 3}]', "line 1: stps is unknown; did you mean steps?"),
        ('["a", ' + "1" * 5000 + "]", "line 1: is not followed by JSON that can be read"),
        ('["' + "a" * 10_001 + '"]', "line 1: prompt is longer than 10,000 characters"),
        ("[prompt]\nwidth = x\n", "line 1: is not valid TOML ("),
        (
            "- prompt: a\n  steps: &a 3\n- prompt: *a\n",
            "line 1: is not valid YAML (aliases are not supported",
        ),
        (
            'name,prompt,negative_prompt\nink,"{prompt}, ink",bad\n',
            "line 2: is a style, whose {prompt} is replaced",
        ),
    ],
)
def test_faults_of_lists_of_other_programs(refusal, content, fault):
    assert refusal(content)[0].startswith(fault)


@pytest.mark.parametrize(
    ("name", "content", "fault"),
    [
        ("list.json", "a cat", "is not valid JSON"),
        ("list.csv", "text,stps\na cat,9", "stps is unknown; did you mean steps?"),
        ("list.csv", "a cat\na dog", "the header names no prompt"),
        ("list.TOML", "a cat", "is not valid TOML"),
        ("list.yml", "a: [", "is not valid YAML"),
    ],
)
def test_a_name_says_how_a_list_is_meant(tmp_path, name, content, fault):
    (tmp_path / name).write_text(content)
    with pytest.raises(InputError, match=re.escape(fault)):
        read_prompt_list(tmp_path / name)


def test_a_long_array_in_one_line(read):
    prompts = [f"{i} cats" for i in range(5000)]
    assert [line.prompt for line in read(json.dumps(prompts))] == prompts


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("# a note", "line 2: # a note is drawn as a prompt, not a comment; delete it"),
        ("// a note", "not a comment"),
        ('"a dog",', "is drawn with its quotes; leave them out"),
        ("- a dog", "is drawn with its bullet or number; leave it out"),
        ("12. a dog", "is drawn with its bullet or number"),
        ("120: a dog", "is drawn with its bullet or number"),
        ('"a dog", "a cat"', "is drawn with its quotes"),
        ("prompts = ['a dog', 'a cat']", "looks like a program's line"),
        ("a dog ### bad", "is drawn with ###, which begins a negative prompt"),
        ("Negative prompt: bad", "is drawn with its label"),
        ("Negative: bad", "is drawn with its label"),
        ("/imagine prompt: a dog", "is drawn with its label"),
        ("Steps: 20, Sampler: DDIM, CFG scale: 7", "is the settings of an image"),
        ("img/1.png\ta dog", "is drawn with the name of a file"),
        ("1.jpg|a dog", "is drawn with the name of a file"),
    ],
)
def test_what_looks_like_no_prompt_is_drawn_with_a_warning(read, caplog, text, said):
    assert read(f"a cat\n{text}\n{text}")[1].prompt == text
    (record,) = caplog.records
    assert said in record.getMessage()
    assert record.getMessage().endswith("(2 such lines)")
    caplog.clear()
    read(f"a cat\n{text}", "plain")
    assert not caplog.records


def test_what_is_off_anyway_in_json_needs_no_counterpart(read):
    """As in requests to the web UI's API."""
    off = {"restore_faces": False, "override_settings": {}, "styles": [], "script_name": None}
    (line,) = read(json.dumps({"prompt": "a cat", "steps": 20, **off}))
    assert (line.prompt, line.overrides) == ("a cat", {"steps": 20})
    with pytest.raises(InputError, match="restore_faces is unknown"):
        read(json.dumps({"prompt": "a cat", "restore_faces": True}))


def test_almost_a_header_is_told(read, caplog):
    assert read("prompt,stps\na,20")[0].prompt == "prompt,stps"
    assert "is not read as CSV, since there is no column stps" in caplog.records[0].getMessage()


def test_all_faults_at_once_in_order(refusal):
    content = b"a --w 500 --s 0\nb --x 1\n\nc\n\xff\n" + b"d --l x\n" * 30
    told = refusal(content, "kohya")
    assert told[:4] == [
        "line 1: --w is 500; give a multiple of 8 from 8 to 65536",
        "line 1: --s is 0; give a whole number from 1 to 999",
        "line 2: --x is not an option of kohya's dialect, which has --n, --w, --h, --s, --d, --l, --t, --ss",
        "line 5: byte 0xff at offset 27 is not UTF-8 (ÿ in Windows-1252); save the file as UTF-8",
    ]
    assert len(told) == 21
    assert told[-1] == "and 14 more"


def test_under_auto_too(refusal):
    told = refusal("a --w 640 --n bad\nplain\nb --w 500 --foo 1\nc --w x")
    assert [line.partition(" is ")[0] for line in told] == ["line 3: --w", "line 3: --foo", "line 4: --w"]


def test_csv_line_numbers_count_lines_of_the_file(refusal):
    told = refusal('\nprompt,steps\n\n"a\nb",0\n\xff\nc,x\n'.encode("latin-1"), "csv")
    assert [line.partition(":")[0] for line in told] == ["line 4", "line 6", "line 7"]


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("content", ["", "\n \r\n", "\ufeff"])
def test_nothing_in_the_list(refusal, format, content):
    (told,) = refusal(content, format)
    assert told.endswith("holds no prompt: write one a line")


@pytest.mark.parametrize("format", ["kohya", "invokeai"])
def test_only_comments(refusal, format):
    assert refusal("# nothing\n", format)[0].endswith("holds no prompt: write one a line")


def test_only_a_header(refusal):
    assert refusal("prompt,steps\n")[0].endswith("holds no prompt: write one a line")


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
@pytest.mark.parametrize(
    "lines",
    [
        ['{"prompt": "ein Mädchen", "steps": 7}', "", '{"prompt": "b"}'],
        ["prompt,steps", "ein Mädchen,7", "b,"],
        ["ein Mädchen --s 7", "", "b"],
        ["ein Mädchen -s7", "", "b"],
        ['--prompt "ein Mädchen" --steps 7', "", "b"],
    ],
)
def test_byte_order_mark_and_line_ends(read, end, mark, lines):
    first, second = read(mark + end.join(lines))
    assert (first.prompt, first.overrides, second.prompt, second.number) == (
        "ein Mädchen",
        {"steps": 7},
        "b",
        3,
    )


def test_controls_and_separators_stay_in_prompts(read):
    text = "a\x00b\x1b[31m\u202ec\x85d\u2028e\x0bf\x0cg\x1ch"
    assert read(f"{text} --w 640")[0].prompt == text
    assert read(f"{text} -W640")[0].prompt == text
    assert read(f"--prompt {text} --steps 3")[0].prompt == text
    assert read(json.dumps({"prompt": text, "steps": 3}))[0].prompt == text


# --- jobs ---------------------------------------------------------------------------------------------------


def test_a_line_changes_what_it_says():
    defaults = Job(
        "x", negative_prompt="n", seed=9, steps=7, init=Init("a.png", resize="fill"), width=512, height=512
    )
    line = Line(1, "a", overrides={"steps": 3, "init.mask": "m.png"})
    init = Init("a.png", resize="fill", mask="m.png")
    assert changed(line, defaults) == Job("a", "n", seed=9, steps=3, init=init, width=512, height=512)
    assert changed(Line(1, "a", overrides={"init": None}), defaults).init is None
    assert changed(
        Line(1, "a", overrides={"init.image": "b.png"}), Job("", width=512, height=512)
    ).init == Init("b.png")
    assert changed(Line(1, "a"), defaults) == dataclasses.replace(defaults, prompt="a")


def test_a_line_needs_a_picture_to_change():
    with pytest.raises(ValueError, match=r"^mask of an image to start from, but there is none"):
        changed(Line(4, "a", overrides={"init.mask": "m.png"}), Job("", width=512, height=512))


TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)


def values(setting):
    """Values of a setting, in its range."""
    low, high = max(setting.low, -1e6), min(setting.high, 1e6)
    if setting.row:
        one = values(setting.row[0]) if len(setting.row) == 1 else st.tuples(*map(values, setting.row))
        return st.lists(one, max_size=2).map(tuple) if setting.many else one
    one = {
        str: st.sampled_from(setting.choices) if setting.choices else TEXT,
        bool: st.booleans(),
        int: st.integers(-(int(-low) // setting.multiple), int(high) // setting.multiple).map(
            lambda n: n * setting.multiple
        ),
        float: st.floats(low, high),
    }[setting.kind]
    return st.none() | one if setting.optional else one


INITS = st.builds(
    Init, **{n.removeprefix("init."): values(s) for n, s in SETTINGS.items() if n.startswith("init.")}
)
JOBS = st.builds(
    Job, init=st.none() | INITS, **{n: values(s) for n, s in SETTINGS.items() if not n.startswith("init.")}
)


@given(st.lists(JOBS, min_size=1, max_size=3), JOBS, st.sampled_from(["auto", "jsonl"]))
@settings(max_examples=40, deadline=None)
def test_a_job_written_as_json_comes_back(monkeypatch_stdin, jobs, defaults, format):
    monkeypatch_stdin("\n".join(json.dumps(dataclasses.asdict(job)) for job in jobs))
    lines = read_prompt_list("-", format)
    assert [dataclasses.replace(changed(line, defaults), seed=line.seeds[0]) for line in lines] == jobs
    assert all((len(line.seeds), line.count) == (1, 1) for line in lines)


def test_every_field_of_a_job_can_be_set():
    names = {f.name for f in dataclasses.fields(Job)} - {"init"}
    assert set(SETTINGS) == names | {f"init.{f.name}" for f in dataclasses.fields(Init)}


def test_choices_and_ranges_are_those_of_the_rest():
    assert set(SETTINGS["sampler"].choices) == set(SOLVERS)
    actions = {action.dest: action for action in txt2img.parser()._actions}
    assert SETTINGS["timestep_spacing"].choices == tuple(actions["timestep_spacing"].choices)
    assert SETTINGS["rng"].choices == tuple(actions["rng"].choices)
    assert make_parser("").parse_args([]).mask_blur <= SETTINGS["init.mask_blur"].high


# --- size ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", ["- -w 640", "--w 640 --d 7", "-W640"])
def test_a_long_list_takes_little_memory(read, options):
    content = "".join(
        f"{i:07d} a prompt of the usual length with a few words {options}\n" for i in range(2_500)
    )
    tracemalloc.start()
    try:
        lines = read(content)
        assert tracemalloc.get_traced_memory()[1] < 2 << 20
    finally:
        tracemalloc.stop()
    assert [line.number for line in lines] == list(range(1, 2_501))


@pytest.mark.parametrize(
    "text", ["-" * 9999, "{" * 9999, '"' * 9999, " --" * 3333, "--w " * 2499, "[|" * 4999]
)
def test_strange_long_lines_are_prompts(read, text):
    assert read(text) == [Line(1, text)]


def test_a_line_of_very_many_options(refusal):
    told = refusal("a " + "-s20 " * 1999, "invokeai")
    assert told[0] == "line 1: -s is given twice; leave one out"
    assert told[-1] == "and 980 more"
