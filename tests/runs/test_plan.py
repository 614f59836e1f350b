"""From options and prompt lists to jobs: numbers, seeds, batches, faults; and whole runs of them."""

import io
import json
import re
import sys
from dataclasses import fields

import numpy as np
import pytest
from PIL import Image

import scripts.img2img as img2img
import scripts.txt2img as txt2img
from ldm.cli.values import options_of, request_of
from ldm.images.sheet import layout
from ldm.job import batch_key
from ldm.metadata.infotext import job_from_infotext
from ldm.runs.options import COMPARED, RunOptions
from ldm.runs.plan import Plan, read_prompts
from ldm.runs.starts import Start
from ldm.util import InputError

FAST = ["--ddim_steps", "2", "--n_iter", "1", "--n_samples", "4", "--device", "cpu", "--quiet"]
EXACT = ["--precision", "full", "--no_watermark", "--skip_grid"]


def plan_of(*options, starts=1):
    opt = txt2img.parser().parse_args([*options])
    run, request = options_of(opt), request_of(opt)
    return Plan(
        run,
        request,
        read_prompts(run, request),
        [Start(None, 64, 64 + 8 * i) for i in range(starts)],
        lambda init: init,
    )


@pytest.fixture
def write(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def write(*lines):
        (tmp_path / "list.txt").write_text("\n".join(lines))
        return "list.txt"

    return write


@pytest.fixture
def draw(tmp_path, monkeypatch):
    """Runs txt2img in this process; returns exit code and images by name."""
    monkeypatch.chdir(tmp_path)

    def run(*options, outdir="out"):
        code = txt2img.main([*FAST, "--outdir", outdir, *options])
        return code, {
            str(p.relative_to(tmp_path / outdir)): p for p in sorted((tmp_path / outdir).rglob("*.png"))
        }

    return run


def job_in(path):
    return job_from_infotext(Image.open(path).text["parameters"])


def pixels(path):
    return np.asarray(Image.open(path)).astype(int)


# --- numbers, seeds, batches ----------------------------------------------------------------------------------


def test_without_new_options_all_is_as_in_the_original(write):
    """Batches of n_samples that do not reach into the next iteration, and seeds that count up."""
    plan = plan_of("--n_samples", "3", "--n_iter", "2")
    assert plan.batches() == [[0, 1, 2], [3, 4, 5]]
    assert [job.seed for job in plan] == [42, 43, 44, 45, 46, 47]
    listed = plan_of("--from-file", write("a", "b", "c", "d"), "--n_samples", "3", "--n_iter", "2")
    assert listed.batches() == [[0, 1, 2], [3], [4, 5, 6], [7]]
    assert [(job.prompt, job.seed) for job in listed] == [(p, 42 + i) for i, p in enumerate("abcdabcd")]


def test_pictures_to_start_from_are_gone_through_one_by_one():
    plan = plan_of("--n_samples", "2", "--n_iter", "2", starts=2)
    assert [(job.height, job.seed) for job in plan] == [(64 + 8 * (i // 4), 42 + i) for i in range(8)]
    assert plan.batches() == [[0, 1], [2, 3], [4, 5], [6, 7]]


def test_fixed_code_repeats_seeds_and_one_stream_has_one_seed():
    assert [j.seed for j in plan_of("--fixed_code", "--n_iter", "2", "--n_samples", "2")] == [42, 43, 42, 43]
    plan = plan_of("--seed_mode", "batch", "--n_iter", "2", "--n_samples", "2")
    assert [(job.seed, job.batch_index) for job in plan] == [(42, i) for i in range(4)]


@pytest.mark.parametrize("rng", ["philox", "cpu", "device", "numpy"])
def test_seeds_wrap_where_the_generator_ends(rng, write):
    last = 18446744073709551615 if rng in ("philox", "cpu") else 4294967295
    run = ["--rng", rng, "--seed", str(last), "--n_iter", "2", "--n_samples", "2"]
    assert [job.seed for job in plan_of(*run)] == [last, 0, 1, 2]
    assert [job.seed for job in plan_of(*run, "--fixed_code")] == [last, 0, last, 0]
    own = plan_of("--from-file", write(f"a --rng {rng} --seed {last} --n_iter 2"), "--n_iter", "1")
    assert [job.seed for job in own] == [last, 0]


def test_each_image_counts_up_as_its_own_generator_does(write):
    typed = ["--seed", "4294967295", "--n_iter", "1", "--n_samples", "1"]
    listed = plan_of("--from-file", write("a", "b --rng device", "c", "d --rng numpy"), *typed)
    assert [job.seed for job in listed] == [4294967295, 0, 4294967297, 2]
    swept = plan_of(*typed[:-1], "2", "--sweep", "rng=philox,numpy")
    assert [job.seed for job in swept] == [4294967295, 4294967295, 4294967296, 0]


LONG = 9223372036854775808
LISTS = {
    "jsonl": '{{"prompt": "a", "seed": {0}, "rng": "{1}"}}',
    "csv": "prompt,seed,rng\na,{0},{1}",
    "options": "a --seed {0} --rng {1}",
    "kohya": "a --d {0}",
}


@pytest.mark.parametrize("format", LISTS)
def test_seeds_of_64_bits_in_prompt_lists(format, write):
    for seed in (LONG, 2**64 - 1):
        file = write(LISTS[format].format(seed, "philox"))
        assert [job.seed for job in plan_of("--from-file", file, "--n_iter", "1")] == [seed]
    for seed in (2**64, 2**70, -3, -1):
        file = write(LISTS[format].format(seed, "philox"))
        with pytest.raises(
            InputError, match=f"is {seed}; give a whole number from 0 to 18446744073709551615"
        ):
            plan_of("--from-file", file)


def test_seeds_of_64_bits_in_a_sweep():
    swept = plan_of("--sweep", f"seed={LONG},0,18446744073709551613..18446744073709551615", "--n_iter", "1")
    assert [job.seed for job in swept][:5] == [LONG, 0, 2**64 - 3, 2**64 - 2, 2**64 - 1]
    for seed in (2**64, 2**70, -3, -1):
        with pytest.raises(
            InputError, match=f"seed is {seed}; give a whole number from 0 to 18446744073709551615"
        ):
            plan_of("--sweep", f"seed=1,{seed}")


@pytest.mark.parametrize("rng", ["device", "numpy"])
def test_a_long_seed_is_refused_where_the_finished_job_has_a_generator_of_32_bits(rng, write):
    long, short = ["--seed", str(LONG)], ["--rng", rng]
    said = (
        f"seed is {LONG}, but the noise generator {rng} takes seeds of 32 bits; use --rng philox, or a seed"
    )
    lines = write("a", f"b --rng {rng}")
    for typed in (
        [*long, *short],
        [*long, *short, "--seed_mode", "batch"],
        [*long, *short, "--fixed_code"],
        [*long, "--sweep", f"rng=philox,{rng}"],
        [*short, "--sweep", f"seed=1,{LONG}"],
        ["--sweep", f"seed=1,{LONG}", "--sweep", f"rng=philox,{rng}"],
        [*long, "--from-file", lines],
        ["--sweep", f"seed=1,{LONG}", "--from-file", lines],
    ):
        with pytest.raises(InputError, match=said) as caught:
            plan_of(*typed)
        assert str(caught.value).count("\n") == 0, typed
        assert ("line 2: " in str(caught.value)) == ("--from-file" in typed)


def test_a_long_seed_is_judged_by_the_generator_of_its_image(write):
    """The run's generator or seed does not matter where a line or the sweep sets another."""
    one = ["--n_iter", "1", "--n_samples", "1"]
    seed = ["--seed", str(LONG)]
    own = plan_of("--rng", "numpy", *seed, *one, "--from-file", write("a --rng philox"))
    assert [(job.rng, job.seed) for job in own] == [("philox", LONG)]
    assert [
        job.seed for job in plan_of("--rng", "numpy", *seed, *one, "--from-file", write("a --seed 5"))
    ] == [5]
    assert [job.seed for job in plan_of("--rng", "numpy", *seed, *one, "--sweep", "seed=6,7")] == [6, 7]
    swept = plan_of("--rng", "numpy", *one, "--from-file", write(f"a --seed {LONG}"), "--sweep", "seed=6")
    assert [job.seed for job in swept] == [6]


def test_a_line_may_have_seeds_and_counts_of_its_own(write):
    file = write("a --n_iter 2", "b --seed 7", "c", "d --seed 4294967295 --n_iter 2")
    plan = plan_of("--from-file", file, "--n_iter", "1")
    jobs = [("a", 42), ("a", 43), ("b", 7), ("c", 45), ("d", 4294967295), ("d", 4294967296)]
    assert [(job.prompt, job.seed) for job in plan] == jobs
    kohya = plan_of("--from-file", write("a --d 5,9"), "--n_iter", "1")
    assert [job.seed for job in kohya] == [5, 9]


def test_batches_hold_what_can_run_together(write):
    lines = ["a", "b --ddim_steps 9", "c --scale 3", "d --ddim_steps 9 --negative_prompt x", "e --W 72", "f"]
    plan = plan_of("--from-file", write(*lines), "--n_samples", "2", "--n_iter", "1")
    assert plan.batches() == [[0, 2], [1, 3], [4], [5]]
    assert sorted(i for batch in plan.batches() for i in batch) == list(range(6))
    for batch in plan.batches():
        assert len({batch_key(plan[i]) for i in batch}) == 1


def test_one_stream_of_noise_is_drawn_in_order(write):
    file = write("a", "b --ddim_steps 9", "c", "d")
    plan = plan_of("--from-file", file, "--n_samples", "3", "--n_iter", "1", "--seed_mode", "batch")
    assert plan.batches() == [[0], [1], [2], [3]]


def test_a_sweep_shares_the_noise_unless_the_seed_is_swept():
    plan = plan_of("--sweep", "scale=5,7.5,10", "--sweep", "steps=10,20", "--n_samples", "2", "--n_iter", "1")
    assert [job.seed for job in plan] == [42] * 6 + [43] * 6
    assert [(job.scale, job.steps) for job in plan[:6]] == [(s, n) for s in (5, 7.5, 10) for n in (10, 20)]
    assert [indices for _, indices in plan.sheets()] == [list(range(6)), list(range(6, 12))]
    swept = plan_of("--sweep", "seed=1..3", "--n_iter", "1", "--n_samples", "1")
    assert [job.seed for job in swept] == [1, 2, 3]


def test_expanded_prompts():
    plan = plan_of("--prompt", "a {red|blue} cube", "--expand", "--n_samples", "1", "--n_iter", "1")
    assert [(job.prompt, job.seed) for job in plan] == [("a red cube", 42), ("a blue cube", 43)]
    assert plan_of("--prompt", "a {red|blue} cube")[0].prompt == "a {red|blue} cube"


@pytest.mark.parametrize("count", [8_000, pytest.param(100_000, marks=pytest.mark.fuzz)])
def test_many_lines_are_planned(write, count):
    plan = plan_of(
        "--from-file", write(*(f"cube {i}" for i in range(count))), "--n_samples", "8", "--n_iter", "1"
    )
    batches = plan.batches()
    assert (len(plan), len(batches)) == (count, count // 8)
    assert (plan[count - 1].prompt, plan[-1].seed) == (f"cube {count - 1}", 42 + count - 1)


def test_too_many_images_are_refused():
    with pytest.raises(InputError, match="at most 1000000"):
        plan_of("--n_iter", "100000", "--n_samples", "100000")


# --- faults ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "lines", "said"),
    [
        ([], ["a --ddim_steps 0", "b", "c --W 500"], ["line 1: --ddim_steps is 0", "line 3: --W is 500"]),
        (
            [],
            ["a --plms --ddim_eta 1", "b --strength 0.5"],
            ["line 1: plms does not use --ddim_eta", "line 2: a strength"],
        ),
        (["--expand"], ["{a", "b", "c}"], ["line 1: a {", "line 3: a }"]),
        (
            ["--prompt_syntax", "a1111"],
            ["a [b:c:5]", "(x:1.1.1)"],
            ["line 2: the prompt's weight"],
        ),
        (
            ["--seed_mode", "batch"],
            ["a --seed 3", "b --rng cpu"],
            ["line 1: seed holds", "line 2: rng holds"],
        ),
        (
            ["--lora_dir", "."],
            ["a <lora:none:1>", "b <lora:x:y>", "c <lyco:none:1>", "d <hypernet:x:1>"],
            [
                "line 1: there is no LoRA",
                "line 2: <lora:x:y>",
                "line 3: there is no LoRA",
                "line 4: <hypernet:x:1> asks for a kind of network that is not supported",
            ],
        ),
        (
            ["--sweep", "eta=0,1"],
            ["a --plms", "b --plms"],
            ["line 1: plms does not use", "line 2: plms does not use"],
        ),
        (
            ["--expand"],
            ["a --init-img none.png", "b --H 8000000", "{a --ddim_steps 3", "c --W 500", "d --W 12"],
            [
                "line 1: none.png",
                "line 2: --H is 8000000",
                "line 3: a {",
                "line 4: --W is 500",
                "line 5: --W is 12",
            ],
        ),
    ],
)
def test_every_fault_of_a_list_is_told_before_the_model_is_loaded(
    draw, write, capsys, options, lines, said, monkeypatch
):
    monkeypatch.setattr("ldm.pipeline.load_model", lambda *args, **more: pytest.fail("the model was loaded"))
    assert draw("--from-file", write(*lines), *options) == (2, {})
    told = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("warning")]
    assert len(told) == len(said)
    for line, expected in zip(told, said, strict=True):
        assert f"list.txt, {expected}" in line


def test_what_is_text_here_and_not_elsewhere_is_named_by_its_place(write, caplog):
    list_ = write("a {b|c}", '{"prompt": "x"}', "b", "c (d:1.2)", "e (f:2)")
    plan_of(
        "--from-file", list_, "--negative_prompt", "<ti:x>, (y:1.2)", "--lora_dir", ".", "--n_samples", "1"
    )
    assert [record.getMessage().partition(" is ")[0] for record in caplog.records] == [
        "list.txt, line 1: {b|c}",
        "list.txt, line 4: (d:1.2)",
        "--negative_prompt: <ti:x> asks for a network, which a negative prompt cannot; it",
        "--negative_prompt: (y:1.2)",
    ]
    caplog.clear()
    plan_of("--prompt", "(a:2) cat", "--sweep", "prompt_syntax=plain,a1111")
    plan_of("--prompt", "(a:2) {b|c}", "--prompt_syntax", "a1111", "--expand")
    assert not caplog.records


def test_a_prompt_has_a_longest():
    with pytest.raises(InputError, match=r"^--prompt is longer than 10,000 characters; shorten it"):
        plan_of("--prompt", "a" * 10_001)


# --- whole runs -----------------------------------------------------------------------------------------------


@pytest.mark.long
def test_a_mixed_list_makes_each_picture_as_if_alone(draw, write, monkeypatch):
    lines = [
        "a red cube",
        "a blue sphere --W 72 --H 64",
        "a green cone --ddim_steps 1",
        "a red cube --scale 1",
        "a blue sphere --seed 7 --scale 3 --negative_prompt dull",
    ]
    code, files = draw("--from-file", write(*lines), *EXACT)
    assert code == 0
    assert [job_in(p).seed for p in files.values()] == [42, 43, 44, 45, 7]
    assert [Image.open(p).size for p in files.values()] == [(128, 128), (72, 64), *[(128, 128)] * 3]
    for i, path in enumerate(files.values()):
        job = job_in(path)
        options = ["--prompt", job.prompt, "--negative_prompt", job.negative_prompt, "--seed", str(job.seed)]
        options += ["--W", str(job.width), "--H", str(job.height), "--ddim_steps", str(job.steps)]
        _, alone = draw(*options, "--scale", str(job.scale), "--n_samples", "1", *EXACT, outdir=f"alone{i}")
        assert (
            np.abs(pixels(alone["samples/00000.png"]) - pixels(path)).max() <= 2
        )  # another batch size rounds


def test_prompts_come_from_standard_input(draw, monkeypatch):
    monkeypatch.setattr(
        sys, "stdin", io.TextIOWrapper(io.BytesIO(b'{"prompt": "a cube", "steps": 1, "count": 2}\n'))
    )
    code, files = draw("--from-file", "-", "--skip_grid")
    assert code == 0
    assert [(job_in(p).prompt, job_in(p).steps, job_in(p).seed) for p in files.values()] == [
        ("a cube", 1, 42),
        ("a cube", 1, 43),
    ]


def test_weights_are_in_the_picture_s_text(draw):
    _, files = draw("--prompt", "a (red:1.4) cube", "--prompt_syntax", "a1111", "--n_samples", "1", *EXACT)
    job = job_in(files["samples/00000.png"])
    assert (job.prompt, job.prompt_syntax) == ("a (red:1.4) cube", "a1111")


def test_a_dry_run_makes_nothing(draw, write, capsys, monkeypatch):
    monkeypatch.setattr("ldm.pipeline.load_model", lambda *args, **more: pytest.fail("the model was loaded"))
    lines = ["a cube", "a sphere --W 72", " ".join(["cone"] * 60)]
    code, files = draw("--from-file", write(*lines), "--dry_run")
    assert (code, files) == (0, {})
    said = capsys.readouterr().out
    assert "3 images in 2 batches" in said
    assert re.search(
        r"00000.png, 00002.png: 128x128, 2 steps, ddim, scale 7.5, seed 42, 44: a cube and 1 more", said
    )
    assert "00001.png: 72x128" in said
    assert "cut off: cone" in said
    assert re.search(r"time: about \S+ (s|min) on cpu in \w+ \(4 steps; rough", said)
    assert re.search(r"memory: about \S+ [MG]iB \(.* for decoding \d+x\d+", said)


def test_a_dry_run_names_the_files_that_a_run_writes(draw, capsys):
    draw("--n_samples", "2")
    draw("--n_samples", "3", "--dry_run")
    assert "00002.png to 00004.png" in capsys.readouterr().out
    _, files = draw("--n_samples", "3")
    assert [name for name in files if name.startswith("samples/")][-1] == "samples/00004.png"


@pytest.mark.long
def test_a_dry_run_of_a_run_that_continues_shows_what_is_missing(draw, capsys, tmp_path):
    run = ("--n_samples", "2", "--n_iter", "2")
    draw(*run)
    (tmp_path / "out/samples/00002.png").unlink()
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    assert draw(*run, "--resume", "--dry_run")[0] == 0
    said = capsys.readouterr().out
    assert "1 image in 1 batch of up to 2; 3 of 4 exist" in said
    assert "samples: 00002.png\n" in said
    assert draw(*run, "--seed", "1", "--resume", "--dry_run")[0] == 2
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before
    draw(*run, "--resume")
    draw(*run, "--resume", "--dry_run", "--json")
    plan, done = map(json.loads, capsys.readouterr().out.splitlines())
    assert plan["text"] == ["nothing to do: all 4 images exist"]
    assert (plan["images"], plan["existing"], plan["first"], done["code"]) == (4, 4, 0, 0)


def test_a_dry_run_for_programs_is_one_event(draw, capsys):
    draw("--n_samples", "2", "--n_iter", "2", "--dry_run", "--json")
    plan, done = map(json.loads, capsys.readouterr().out.splitlines())
    assert (plan["event"], plan["images"], plan["batches"], plan["first"]) == ("plan", 4, 2, 0)
    assert plan["memory"] > 2**28
    assert (done["event"], done["saved"], done["code"]) == ("done", 0, 0)


@pytest.mark.long
def test_a_batch_beyond_memory_is_refused_before_the_model_is_read(draw, capsys, monkeypatch):
    monkeypatch.setattr("ldm.runtime.memory.total_memory", lambda device: 2**30)
    monkeypatch.setattr("ldm.pipeline.load_model", lambda *args, **more: pytest.fail("the model was loaded"))
    assert draw("--n_samples", "2000") == (2, {})
    fitting = re.search(r"--n_samples (\d+) would fit", capsys.readouterr().err)
    assert fitting is not None
    # without --precision the figure depends on whether the CPU has bf16 instructions
    draw("--n_samples", "2000", "--dry_run", "--precision", "full")
    needed = re.search(
        r"too much: denoising 128x128 in batches of 2000 needs about ([0-9.]+) GiB", capsys.readouterr().out
    )
    assert needed is not None and 3.5 < float(needed[1]) < 4.5
    draw("--n_samples", fitting[1], "--dry_run")
    assert "too much" not in capsys.readouterr().out


def test_a_sweep_makes_a_sheet(draw):
    options = ("--sweep", "scale=1,4,9", "--sweep", "steps=1,2", "--n_samples", "1", "--prompt", "a cube")
    code, files = draw(*options, "--no_watermark")
    assert code == 0
    assert [name for name in files if name.startswith("sheet")] == ["sheet-0000.png"]
    rows, columns = ["scale=1", "scale=4", "scale=9"], ["steps=1", "steps=2"]
    placed = layout([(128, 128)] * 6, rows, columns, "seed=42, a cube")
    sheet = pixels(files["sheet-0000.png"])
    assert sheet.shape[1::-1] == placed.size
    for i, (left, top, right, bottom) in enumerate(placed.images):
        sample = files[f"samples/{i:05}.png"]
        assert (job_in(sample).scale, job_in(sample).steps) == ((1, 4, 9)[i // 2], i % 2 + 1)
        assert np.array_equal(sheet[top:bottom, left:right], pixels(sample))
    for left, top, right, bottom in (*placed.rows, *placed.columns):
        assert sheet[top:bottom, left:right].min() < 128  # something is written there


def test_lines_bring_and_resize_their_own_pictures(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (64, 64), "red").save("a.png")
    Image.new("RGB", (96, 64), "blue").save("b.png")
    (tmp_path / "list.txt").write_text("x\ny --init-img b.png\nz --W 80 --H 72\n")
    options = ["--init-img", "a.png", "--from-file", "list.txt", "--outdir", "out", *EXACT]
    assert img2img.main([*FAST, *options]) == 0
    files = sorted(tmp_path.glob("out/samples/*.png"))
    assert [Image.open(p).size for p in files] == [(64, 64), (96, 64), (80, 72)]
    inits = [job_in(p).init for p in files]
    assert [(init.image, init.resize) for init in inits] == [
        ("a.png", "none"),
        ("b.png", "none"),
        ("a.png", "fill"),
    ]


def test_images_of_each_prompt_of_a_list(write):
    plan = plan_of("--from-file", write("a cube", "a cone"), "--images_per_prompt", "2", "--n_iter", "1")
    assert [(job.prompt, job.seed) for job in plan] == [
        ("a cube", 42), ("a cube", 43), ("a cone", 44), ("a cone", 45),
    ]  # fmt: skip
    assert len(plan_of("--images_per_prompt", "5", "--n_samples", "2", "--n_iter", "1")) == 5


def test_run_files_have_options_in_the_order_of_earlier_versions():
    """As the run files of the first versions have them; newer ones follow."""
    first = [
        "n_samples",
        "fixed_code",
        "ema",
        "tiles",
        "no_watermark",
        "safety",
        "skip_grid",
        "inpaint",
        "compile",
    ]
    compared = [field.name for field in fields(RunOptions) if field.metadata == COMPARED]
    assert compared[: len(first)] == first
