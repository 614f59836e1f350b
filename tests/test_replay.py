"""The command of a picture gives its job back, pictures are compared, a watermark's evidence is worded."""

from __future__ import annotations

import argparse
import dataclasses
import math
import shlex
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import scripts.img2img
import scripts.inpaint
import scripts.txt2img
from ldm.cli.inputs import Start, _inits, check_options, read_prompts
from ldm.cli.replay import command, compare, describe_watermark, options, quoted
from ldm.cli.run import make_batches
from ldm.images.foreign import Recipe
from ldm.images.watermark import Evidence
from ldm.job import Init, Job
from ldm.util import InputError
from tests.images.test_metadata import HOSTILE

PARSERS = {
    "scripts/txt2img.py": scripts.txt2img.parser,
    "scripts/img2img.py": scripts.img2img.parser,
    "scripts/inpaint.py": scripts.inpaint.parser,
}


def typed(line: str) -> argparse.Namespace:
    """What the script that a command names makes of its arguments."""
    python, script, *arguments = shlex.split(line)
    assert python == "python"
    parsed = PARSERS[script]().parse_args(arguments)
    check_options(parsed)
    return parsed


def remade(recipe: Recipe) -> Job:
    """The last job that a recipe's command runs."""
    opt = typed(command(recipe))
    starts = [
        Start(init, recipe.job.width, recipe.job.height) for init in (_inits(opt) if opt.init_img else [None])
    ]
    *_, last = make_batches(opt, read_prompts(opt), starts)
    return last[-1]


TEXT_JOBS = [
    Job("a cat"),
    Job("a cat", "dog", seed=2**32 - 1, width=640, height=448, steps=30, scale=0.1 + 0.2, sampler="plms"),
    Job("-a cat", "--prompt", eta=1e-7, timestep_spacing="compvis", rng="numpy"),
    Job(
        "a cat", sampler="dpm_solver", upscale=1.5, upscale_in="latents", upscale_strength=1 / 3, rng="device"
    ),
    Job("a cat", loras=(("b", 0.8, 0.5), ("c d:1", -1.0, -1.0))),
    Job("a cat", scale=-1.5),
]


@pytest.mark.parametrize("job", TEXT_JOBS)
def test_a_command_gives_the_job_back(job: Job) -> None:
    assert remade(Recipe(job, "ldm")) == job


BATCH_JOB = Job("a cat", seed_mode="batch", batch_index=7, rng="cpu")
PICTURE_JOBS = [
    Job("x", init=init, strength=0.3, posterior="mean", paste=not (init.mask or init.alpha_mask))
    for init in (
        Init("-a b.png"),
        Init("-a b.png", width=64, height=None, resize="fit", background="#102030"),
        Init("-a b.png", mask="mask.png", invert_mask=True, mask_blur=0.5),
        Init("-a b.png", alpha_mask=True, width=64, height=96, resize="pad", outpaint=(8, 0, 16, 24)),
    )
]


def test_a_picture_of_a_batch_comes_last() -> None:
    recipe = Recipe(BATCH_JOB, "ldm", extras={"Batch size": "3", "Fixed code": "on"})
    opt = typed(command(recipe))
    assert (opt.n_samples, opt.n_iter, opt.fixed_code) == (3, 3, True)  # 7 is in the third batch of 3
    assert remade(Recipe(BATCH_JOB, "ldm")) == BATCH_JOB


@pytest.mark.parametrize("job", PICTURE_JOBS)
def test_pictures_to_start_from(job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("-a b.png", "mask.png"):
        Image.new("RGB", (8, 8)).save(tmp_path / name)
    assert remade(Recipe(job, "ldm")) == job


def test_every_field_of_a_job_is_tried() -> None:
    jobs = [*TEXT_JOBS, BATCH_JOB, *PICTURE_JOBS]
    for field in dataclasses.fields(Job):
        assert any(getattr(job, field.name) != getattr(Job(""), field.name) for job in jobs), field.name
    for field in dataclasses.fields(Init):
        inits = [job.init for job in PICTURE_JOBS]
        assert any(getattr(init, field.name) != getattr(Init(""), field.name) for init in inits), field.name


def test_the_script_fits_the_job() -> None:
    scripts_of = {
        "txt2img": Job("x"),
        "img2img": Job("x", strength=0.5),  # its picture is not known
        "inpaint": Job("x", init=Init("a.png", mask="m.png")),
    }
    assert {name: options(Recipe(job, "A1111"))[0] for name, job in scripts_of.items()} == {
        n: n for n in scripts_of
    }


def test_what_a_run_noted_and_what_is_changed() -> None:
    recipe = Recipe(Job("x"), "ldm", extras={"Precision": "full", "EMA": "off", "Fixed code": "on"})
    opt = typed(
        command(recipe, {"ckpt": "my model.ckpt", "seed": "7", "skip_save": None}, drop=["skip_grid"])
    )
    assert (opt.precision, opt.ema, opt.ckpt, opt.seed) == ("full", "off", "my model.ckpt", 7)
    assert (opt.skip_save, opt.skip_grid, opt.fixed_code) == (True, False, False)


def test_loras_as_tags() -> None:
    job = TEXT_JOBS[4]
    opt = typed(command(Recipe(dataclasses.replace(job, loras=job.loras[:1]), "ldm"), {"lora_dir": "loras"}))
    assert (opt.prompt, opt.lora_dir, opt.lora) == ("a cat <lora:b:0.5:0.8>", "loras", [])


BASH = shutil.which("bash")


def as_bash_reads(line: str) -> list[str]:
    assert BASH
    run = subprocess.run([BASH, "-c", f"printf '%s\\0' {line}"], capture_output=True, check=True, timeout=60)
    return run.stdout.decode("utf-8", "surrogatepass").split("\0")[:-1]


@pytest.mark.skipif(not BASH, reason="needs bash")
def test_bash_reads_hostile_arguments_back() -> None:
    prompts = [
        *HOSTILE,
        "$(touch x) `y` ${z} !! ~ * ' \" \\",
        "\x1b[201~\ntouch owned\n",
        "'",
        "\\'",
        "-",
        "\x01a1",
    ]
    line = " ".join(map(quoted, prompts))
    assert line.isprintable()
    assert as_bash_reads(line) == [prompt.replace("\0", " ") for prompt in prompts]


@pytest.mark.skipif(not BASH, reason="needs bash")
@given(prompts=st.lists(st.text(min_size=1), min_size=30, max_size=60))
@settings(max_examples=15, deadline=None)
def test_bash_reads_any_argument_back(prompts: list[str]) -> None:
    assert as_bash_reads(" ".join(map(quoted, prompts))) == [prompt.replace("\0", " ") for prompt in prompts]


@pytest.mark.parametrize("prompt", HOSTILE)
def test_commands_are_one_line_without_controls(prompt: str) -> None:
    job = Job(prompt, prompt, init=Init(prompt), loras=((prompt, 1.0, 1.0),))
    assert command(Recipe(job, "A1111")).isprintable()


# --- comparing ---------------------------------------------------------------------------------------------------


def test_equal_pictures() -> None:
    picture = np.random.default_rng(0).integers(0, 256, (8, 16, 3), dtype=np.uint8)
    difference = compare(picture, picture.copy())
    assert (difference.equal, difference.total, difference.largest, difference.psnr) == (
        128,
        128,
        0,
        math.inf,
    )
    assert str(difference) == "identical: all 128 pixels are equal"


def test_the_largest_possible_difference() -> None:
    black, white = np.zeros((4, 4, 3), np.uint8), np.full((4, 4, 3), 255, np.uint8)
    for difference in (compare(black, white), compare(white, black)):
        assert (difference.equal, difference.largest, difference.psnr) == (0, 255, 0.0)


def test_a_uniform_difference_has_the_psnr_of_the_formula() -> None:
    picture = np.full((10, 10, 3), 100, np.uint8)
    assert compare(picture, picture + 3).psnr == pytest.approx(20 * math.log10(255 / 3))
    one = picture.copy()
    one[0, 0, 1] = 110  # one value of 300: a mean square of a third
    difference = compare(picture, one)
    assert (difference.equal, difference.largest) == (99, 10)
    assert difference.psnr == pytest.approx(10 * math.log10(255**2 * 3))
    assert str(difference) == (
        "different: 99 of 100 pixels (99%) are equal, the largest difference is 10 of 255, PSNR 52.9 dB"
    )


def test_nearly_all_is_not_all() -> None:
    first = np.zeros((100, 100, 3), np.uint8)
    second = first.copy()
    second[0, 0] = 1
    assert "(99.9%)" in str(compare(first, second))


def test_pictures_of_two_sizes_are_refused() -> None:
    with pytest.raises(InputError, match="16x8 and 8x16"):
        compare(np.zeros((8, 16, 3), np.uint8), np.zeros((16, 8, 3), np.uint8))


@pytest.mark.parametrize(
    ("agreeing", "chance", "words"),
    [
        (136, 2.0**-136, "is there"),
        (80, 1e-3, "may be there"),
        (68, 0.53, "is not to be seen"),
        (0, 1.0, "1 of 1 pictures"),
    ],
)
def test_evidence_in_words(agreeing: int, chance: float, words: str) -> None:
    line = describe_watermark(Evidence(agreeing, 136, chance), "Stable\x1b")
    assert words in line and f"{agreeing} of 136 bits" in line and line.isprintable()


def test_the_watermark_of_a_marked_picture_is_seen() -> None:
    pytest.importorskip("imwatermark")
    from ldm.images.watermark import TEXT, Watermark, detect

    x = np.linspace(0, 255, 512)
    plain = np.stack(np.broadcast_arrays(x, x[:, None], 128.0), axis=-1).astype(np.uint8)
    assert "is there" in describe_watermark(detect(Watermark().mark(plain)), TEXT)
    assert "is there" not in describe_watermark(detect(plain), TEXT)
