"""The command of an image recreates its job, images are compared, a watermark's evidence is reported."""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from PIL.PngImagePlugin import PngInfo

import scripts.img2img
import scripts.inpaint
import scripts.replay
import scripts.txt2img
from ldm.cli.changes import changed
from ldm.cli.explain import describe_watermark
from ldm.cli.recipe_jobs import jobs_up_to
from ldm.cli.values import check_options, options_of, request_of
from ldm.data.scenes import image_at
from ldm.images.canvas import open_canvas
from ldm.images.compare import compare
from ldm.images.watermark import Evidence
from ldm.images.writer import encode_png
from ldm.job import Init, Job
from ldm.metadata.command import command, command_alone, count, options, place, quoted, remark_alone
from ldm.metadata.read import Recipe, read_job
from ldm.metadata.record import record
from ldm.places import ROOT
from ldm.runs.plan import Plan, read_prompts
from ldm.runs.starts import Start, inits_of
from ldm.util import InputError
from tests.support.metadata import HOSTILE
from tests.support.scripts import SMALL

PARSERS = {
    "scripts/txt2img.py": scripts.txt2img.parser,
    "scripts/img2img.py": scripts.img2img.parser,
    "scripts/inpaint.py": scripts.inpaint.parser,
}


def typed(line: str) -> argparse.Namespace:
    """The arguments of a command as its script parses them."""
    python, script, *arguments = shlex.split(line)
    assert python == "python"
    parsed = PARSERS[script]().parse_args(arguments)
    check_options(parsed)
    return parsed


def remade(recipe: Recipe) -> Job:
    """The last job that a recipe's command runs."""
    opt = typed(command(recipe))
    run, request = options_of(opt), request_of(opt)
    starts = [
        Start(init, recipe.job.width, recipe.job.height)
        for init in (inits_of(request, run.inpaint) if request.images else [None])
    ]
    return Plan(run, request, read_prompts(run, request), starts, open_canvas)[-1]


TEXT_JOBS = [
    Job("a cat", width=512, height=512),
    Job("a cat", "dog", seed=2**32 - 1, width=640, height=448, steps=30, scale=0.1 + 0.2, sampler="plms"),
    Job("-a cat", "--prompt", eta=1e-7, timestep_spacing="compvis", rng="numpy", width=512, height=512),
    Job(
        "a cat",
        sampler="dpm_solver",
        upscale=1.5,
        upscale_in="latents",
        upscale_strength=1 / 3,
        rng="device",
        width=512,
        height=512,
    ),
    Job(
        "a cat",
        sampler="dpmpp_2m_sde",
        schedule="karras",
        eta=0.25,
        s_noise=1.0625,
        convention="comfyui",
        clip_skip=2,
        guidance_rescale=0.5,
        guidance_interval=(0.125, 5.0),
        guidance_interval_in="sigma",
        guidance_schedule="linear",
        width=512,
        height=512,
    ),
    Job("a cat", sampler="heun", s_churn=2.5, sigmas=(14.5, 1.0, 0.0), width=512, height=512),
    Job("a cat", sampler="lcm", timesteps=(999.0, 499.0), width=512, height=512),
    Job("a cat", loras=(("b", 0.8, 0.5), ("c d:1", -1.0, -1.0)), width=512, height=512),
    Job("a cat", scale=-1.5, width=512, height=512),
    Job("a cat", seed=2**64 - 1, width=512, height=512),
    Job("a (cat:1.2)", prompt_syntax="a1111", width=512, height=512),
    Job("a cat", eta=1.0, step_noise="brownian", width=512, height=512),
    Job("a cat", eta=1.0, step_rng="cpu", step_seed_delta=3, width=512, height=512),
    Job("a cat", variation_seed=7, variation_strength=0.25, seamless="x", width=512, height=512),
    Job("a cat", merge_tokens=0.5, cache_steps=(1, 3), width=512, height=512),
    Job(
        "a cat",
        controls=(("c.safetensors", "a.png", 0.5, 0.1, 0.75),),
        hint="canny",
        control_mode="prompt",
        control_resize="fill",
        width=512,
        height=512,
    ),
]


@pytest.mark.parametrize("job", TEXT_JOBS)
def test_a_command_gives_the_job_back(job: Job) -> None:
    assert remade(Recipe(job, "ldm")) == job


BATCH_JOB = Job("a cat", seed_mode="batch", batch_index=7, rng="cpu", width=512, height=512)
PICTURE_JOBS = [
    Job(
        "x",
        init=init,
        strength=0.3,
        posterior="mean",
        image_scale=1.25,
        paste=not (init.mask or init.alpha_mask),
        width=512,
        height=512,
    )
    for init in (
        Init("-a b.png"),
        Init("-a b.png", width=64, height=None, resize="fit", background="#102030"),
        Init("-a b.png", mask="mask.png", invert_mask=True, mask_blur=0.5, mask_levels=True, crop_to_mask=8),
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
        assert any(
            getattr(job, field.name) != getattr(Job("", width=512, height=512), field.name) for job in jobs
        ), field.name
    for field in dataclasses.fields(Init):
        inits = [job.init for job in PICTURE_JOBS]
        assert any(getattr(init, field.name) != getattr(Init(""), field.name) for init in inits), field.name


def test_the_script_fits_the_job() -> None:
    scripts_of = {
        "txt2img": Job("x", width=512, height=512),
        "img2img": Job("x", strength=0.5, width=512, height=512),  # its image is not known
        "inpaint": Job("x", init=Init("a.png", mask="m.png"), width=512, height=512),
    }
    assert {name: options(Recipe(job, "A1111"), {})[0] for name, job in scripts_of.items()} == {
        n: n for n in scripts_of
    }


def test_what_a_run_noted_and_what_is_changed() -> None:
    recipe = Recipe(
        Job("x", width=512, height=512), "ldm", extras={"Precision": "full", "EMA": "off", "Fixed code": "on"}
    )
    opt = typed(
        command(recipe, {"ckpt": "my model.ckpt", "seed": "7", "skip_save": None}, drop=["skip_grid"])
    )
    assert (opt.precision, opt.ema, opt.ckpt, opt.seed) == ("full", "off", "my model.ckpt", 7)
    assert (opt.skip_save, opt.skip_grid, opt.fixed_code) == (True, False, False)


def test_an_installed_package_shows_the_command_and_no_script(monkeypatch, tmp_path: Path) -> None:
    recipe = Recipe(Job("a cube"), "ldm")
    in_checkout = command(recipe)
    monkeypatch.setattr("ldm.places._installed_files", lambda: tmp_path)
    assert in_checkout.startswith("python scripts/txt2img.py --prompt 'a cube' ")
    assert command(recipe) == in_checkout.replace("python scripts/txt2img.py", "ldm txt2img")


def test_the_command_of_one_image_makes_no_other() -> None:
    held = {"Batch size": "3", "Batch pos": "1"}
    recipe = Recipe(Job("x", seed=43, width=64, height=64), "ldm", extras=held)
    opt = typed(command_alone(recipe))
    assert (opt.seed, opt.n_samples, opt.n_iter) == (43, 1, 1)
    assert "batch of 3: alone, its last bits can differ" in remark_alone(recipe)
    assert remark_alone(Recipe(recipe.job, "ldm", extras={"Batch size": "1"})) == ""
    assert "one stream of its run" in remark_alone(Recipe(BATCH_JOB, "ldm", extras={"Batch size": "3"}))


def test_the_gallery_copies_the_command_of_one_image(made: Callable[..., list[Path]]) -> None:
    made(scripts.txt2img, "--n_samples", "2", "--n_iter", "1", "--W", "64", "--H", "64", "--gallery")
    figures = Path("out/gallery.html").read_text().split("<figure>")[1:]
    assert ["--seed 42" in figure for figure in figures] == [True, False]
    assert all("--n_samples 1 --n_iter 1" in figure and "batch of 2" in figure for figure in figures)


def test_loras_as_tags() -> None:
    job = TEXT_JOBS[7]
    opt = typed(command(Recipe(dataclasses.replace(job, loras=job.loras[:1]), "ldm"), {"lora_dir": "loras"}))
    assert (opt.prompt, opt.lora_dir, opt.lora) == ("a cat <lora:b:0.5:0.8>", "loras", [])


BASH = shutil.which("bash")


def as_bash_reads(line: str) -> list[str]:
    assert BASH
    run = subprocess.run([BASH, "-c", f"printf '%s\\0' {line}"], capture_output=True, check=True, timeout=600)
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
    job = Job(prompt, prompt, init=Init(prompt), loras=((prompt, 1.0, 1.0),), width=512, height=512)
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
        (0, 1.0, "1 of 1 images"),
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


# --- the script --------------------------------------------------------------------------------------------------

FAST = ["--ddim_steps", "2", "--device", "cpu", "--quiet", "--skip_grid"]


@pytest.fixture
def made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[Path]]:
    """Runs a script with the bundled model; returns its samples."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def run(script: ModuleType, *options: str) -> list[Path]:
        size = SMALL if script is scripts.txt2img else []
        assert script.main([*FAST, *size, "--outdir", "out", *options]) == 0
        return sorted((tmp_path / "out" / "samples").glob("*.png"))

    return run


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path).convert("RGB"))


def same(first: Path, second: Path) -> bool:
    return bool((pixels(first) == pixels(second)).all())


def test_a_picture_of_a_batch_comes_back_bit_for_bit(made: Callable[..., list[Path]], capsys) -> None:
    samples = made(scripts.txt2img, "--n_samples", "3", "--n_iter", "1", "--prompt", "a red cube")
    before = samples[1].read_bytes()
    for times in (1, 2):
        assert scripts.replay.main([str(samples[1]), "--verify", "--quiet"]) == 0
        assert "identical: all" in capsys.readouterr().out
        assert len(list(Path("outputs/replay").iterdir())) == times  # no companion, no overwriting
    assert samples[1].read_bytes() == before == Path("outputs/replay/00001-1.png").read_bytes()
    recipe = read_job("outputs/replay/00001.png")
    assert (recipe.job.seed, recipe.extras["Batch size"], recipe.extras["Batch pos"]) == (43, "3", "1")
    assert recipe.model_hash and recipe.extras["Config"] == "shapes-inference"


def test_a_changed_option(made: Callable[..., list[Path]], capsys) -> None:
    samples = made(scripts.txt2img, "--n_samples", "2", "--n_iter", "1", "--no_watermark")
    assert scripts.replay.main([str(samples[1]), "--seed", "42", "--n_samples", "1", "--quiet"]) == 0
    assert read_job("outputs/replay/00001.png").job == read_job(str(samples[0])).job
    assert scripts.replay.main([str(samples[1]), "--verify", "--scale", "3", "--quiet"]) == 1
    assert "different" in capsys.readouterr().out
    assert (
        scripts.replay.main([str(samples[1]), "--verify", "--scale", "3", "--tolerance", "255", "--quiet"])
        == 0
    )


def test_a_stream_of_a_run(made: Callable[..., list[Path]]) -> None:
    samples = made(
        scripts.txt2img, "--n_samples", "2", "--n_iter", "2", "--seed_mode", "batch", "--rng", "cpu"
    )
    assert scripts.replay.main([str(samples[2]), "--verify", "--quiet"]) == 0
    assert not same(samples[2], samples[0])


def test_the_other_images_of_a_batch_have_the_noise_that_they_had(made: Callable[..., list[Path]]) -> None:
    """A batch of equal noise is computed otherwise, which a guided one of two does not show."""
    samples = made(scripts.txt2img, "--n_samples", "2", "--n_iter", "1", "--seed", "5")
    jobs, wanted = jobs_up_to(read_job(str(samples[1])), {})
    assert ([job.seed for job in jobs], wanted) == ([5, 6], 1)


LINES = {
    "lists": "a red cube\na blue ball\na green cone",
    "sizes": "a red cube --width 64\na blue ball --width 96\na green cone --width 64",
    "steps": "a red cube --steps 3\na blue ball\na green cone --steps 1",
    "lengths": "a red cube\na BREAK blue ball\na green cone\na BREAK red BREAK cone",
}


@pytest.mark.parametrize(
    ("lines", "options"),
    [
        ("lists", ["--n_samples", "2", "--n_iter", "2"]),
        pytest.param(
            "lists",
            ["--n_samples", "2", "--rng", "cpu", "--ddim_eta", "0.5", "--upscale", "1.5"],
            marks=pytest.mark.long,
        ),
        pytest.param("sizes", ["--n_samples", "2", "--n_iter", "2", "--fixed_code"], marks=pytest.mark.slow),
        ("steps", ["--n_samples", "3", "--rng", "cpu"]),
        pytest.param(
            "lengths",
            ["--n_samples", "4", "--prompt_syntax", "a1111", "--rng", "cpu", "--ddim_eta", "1"],
            marks=pytest.mark.long,
        ),
    ],
)
def test_every_image_of_a_stream_comes_back(
    lines: str, options: list[str], made: Callable[..., list[Path]], capsys
) -> None:
    Path("list.txt").write_text(LINES[lines])
    typed = ["--from-file", "list.txt", "--n_iter", "1", "--seed_mode", "batch", "--W", "64", "--H", "64"]
    samples = list(map(str, made(scripts.txt2img, *typed, *options)))
    capsys.readouterr()
    assert scripts.replay.main([*samples, "--verify", "--quiet", "--device", "cpu"]) == 0
    assert capsys.readouterr().out.count("identical") == len(samples)
    again = [read_job(f"outputs/replay/{Path(sample).name}") for sample in samples]
    assert again == list(map(read_job, samples))


@pytest.mark.long
def test_images_of_a_stream_that_start_from_images_come_back(made: Callable[..., list[Path]], capsys) -> None:
    for i in range(2):
        Image.fromarray(image_at(i, "fresh")[:64, : 64 + 32 * i]).save(f"scene{i}.png")
        Image.fromarray(np.tile(np.array([0, 255], np.uint8).repeat(32 + 16 * i), (64, 1))).save(
            f"scene{i}_mask.png"
        )
    Path("list.txt").write_text(LINES["lists"])
    typed = ["--indir", ".", "--from-file", "list.txt", "--seed_mode", "batch", "--ddim_eta", "0.5"]
    samples = list(map(str, made(scripts.inpaint, *typed, "--n_samples", "2", "--rng", "cpu")))
    capsys.readouterr()
    given = ["--init-img", ".", "--mask", "."]
    assert scripts.replay.main([*samples, "--verify", "--quiet", "--device", "cpu", *given]) == 0
    assert len(samples) == 6 and capsys.readouterr().out.count("identical") == 6


def test_what_a_newer_version_wrote_is_said(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    assert scripts.replay.main([forged("a.png", novelty=3), "--quiet", "--device", "cpu"]) == 0
    assert "warning: a.png: a newer version wrote job.novelty" in capsys.readouterr().err


@pytest.mark.long
def test_seeds_of_64_bits_come_back(made: Callable[..., list[Path]], capsys) -> None:
    lines = [{"seed": 2**63}, {"seed": 0}, {"seed": 2**64 - 1, "count": 2}]
    Path("list.jsonl").write_text("\n".join(json.dumps({"prompt": "a red cube", **line}) for line in lines))
    typed = ["--from-file", "list.jsonl", "--n_samples", "1", "--n_iter", "1", "--W", "64", "--H", "64"]
    samples = made(scripts.txt2img, *typed, "--precision", "full", "--no_watermark")
    texts = [Image.open(sample).text["parameters"] for sample in samples]
    for text, seed in zip(texts, ("9223372036854775808", "0", "18446744073709551615", "0"), strict=True):
        assert f", Seed: {seed}, " in text
    # all 64 bits count: their lower 32 alone would make the first two the same
    assert same(samples[1], samples[3]) and not same(samples[0], samples[1])
    assert not same(samples[2], samples[1])
    assert scripts.replay.main([*map(str, samples), "--verify", "--quiet", "--device", "cpu"]) == 0
    assert capsys.readouterr().out.count("identical") == 4
    whole = samples[2].read_bytes()
    samples[2].unlink()
    made(scripts.txt2img, *typed, "--precision", "full", "--no_watermark", "--resume")
    assert samples[2].read_bytes() == whole


@pytest.mark.parametrize("script", [scripts.img2img, scripts.inpaint])
def test_seeds_of_64_bits_come_back_where_an_image_is_changed(
    script: ModuleType, made: Callable[..., list[Path]], capsys
) -> None:
    Image.fromarray(image_at(0, "fresh")[:64, :64]).save("scene.png")
    Image.fromarray(np.tile(np.array([0, 255], np.uint8).repeat(32), (64, 1))).save("mask.png")
    given = ["--init-img", "scene.png", *(["--mask", "mask.png"] if script is scripts.inpaint else [])]
    samples = made(script, *given, "--n_samples", "2", "--n_iter", "1", "--seed", str(2**64 - 1))
    assert [read_job(str(sample)).job.seed for sample in samples] == [2**64 - 1, 0]
    assert not same(*samples)
    capsys.readouterr()
    again = [*map(str, samples), "--verify", "--quiet", "--device", "cpu", *given]
    assert scripts.replay.main(again) == 0
    assert capsys.readouterr().out.count("identical") == 2


@pytest.mark.parametrize(("field", "value"), [("prompt", "a \ud800"), ("seed", 2**64 - 1)])
def test_what_can_be_read_but_not_run_is_refused_in_one_line(
    field: str, value: object, tmp_path: Path, monkeypatch, capsys
) -> None:
    monkeypatch.chdir(tmp_path)
    file = forged("a.png", rng="numpy", **{field: value})
    assert scripts.replay.main([file, "--quiet", "--device", "cpu"]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: a.png: {field} is ") and line.isprintable()


def test_where_a_stream_is_not_known_it_is_said(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    old = {"seed_mode": "batch", "batch_index": 1}
    typed = ["--device", "cpu"]
    assert scripts.replay.main([forged("a.png", {"Batch size": "2"}, **old), *typed]) == 0
    assert "does not say what its run drew before it" in capsys.readouterr().err
    assert scripts.replay.main(["a.png", "--show"]) == 0
    assert "does not say what its run drew before it" in capsys.readouterr().out
    for stream in (
        "nonsense",
        "after 9x9*999999999999 row 0 of 1 after - entry 0 of 1",
        "after - row 1 of 1 after - entry 0 of 1",
    ):
        assert scripts.replay.main([forged("a.png", {"Stream": stream}, **old), *typed]) == 2
        assert "its place in the noise of its run cannot be used" in capsys.readouterr().err
    held = {"Stream": "after 2x4x8x8*3 row 1 of 2 after - entry 1 of 2"}
    assert scripts.replay.main([forged("a.png", held, **old), *typed, "--n_samples", "1"]) == 2
    assert "--n_samples does not go with an image of --seed_mode batch" in capsys.readouterr().err


def test_pictures_to_start_from_lie_beside_or_are_given(made: Callable[..., list[Path]], capsys) -> None:
    Image.fromarray(image_at(3, "fresh")[:64, :64]).save("scene.png")
    Image.fromarray(np.tile(np.array([0, 255], np.uint8).repeat(32), (64, 1))).save("mask.png")
    [first, *_] = made(scripts.img2img, "--init-img", "scene.png", "--strength", "0.5")
    *_, last = made(scripts.inpaint, "--init-img", "scene.png", "--mask", "mask.png")
    assert scripts.replay.main([str(first), "--quiet"]) == 2
    assert "scene.png, does not exist; give it with --init-img" in capsys.readouterr().err
    assert scripts.replay.main([str(first), "--verify", "--quiet", "--init-img", "."]) == 0
    for name in ("scene.png", "mask.png"):
        shutil.copy(name, last.parent)
    assert scripts.replay.main([str(first), str(last), "--verify", "--quiet"]) == 0
    shutil.copy("mask.png", last.parent / "scene.png")
    assert scripts.replay.main([str(first), "--quiet"]) == 2
    assert "its hash differs" in capsys.readouterr().err


def test_one_bad_file_does_not_stop_the_others(made: Callable[..., list[Path]], capsys) -> None:
    [sample, *_] = made(scripts.txt2img, "--n_samples", "1", "--n_iter", "1")
    Path("text.png").write_text("no picture")
    assert scripts.replay.main(["text.png", "absent.png", str(sample), "--quiet"]) == 1
    assert Path("outputs/replay/00000.png").is_file()
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    assert [error.split(":")[1].strip() for error in errors] == ["text.png", "absent.png"]
    assert scripts.replay.main(["text.png", "--quiet"]) == 2


def test_foreign_files_are_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    settings = "Steps: 20, Sampler: Euler a, CFG scale: 7, Seed: 5, Size: 64x96, Clip skip: 2"
    text = f"a cat\nNegative prompt: dog\n{settings}"
    info, exif = PngInfo(), Image.Exif()
    info.add_text("parameters", text)
    exif.get_ifd(0x8769)[0x9286] = b"UNICODE\0" + text.encode("utf-16-be")
    Image.new("RGB", (64, 96)).save("a.png", pnginfo=info)
    Image.new("RGB", (64, 96)).save("b.jpg", exif=exif)
    assert scripts.replay.main(["a.png", "--show", "--ddim_steps", "40"]) == 0
    out = capsys.readouterr().out
    assert (
        "made by A1111" in out and "--ddim_steps 40" in out and "--clip_skip 2" in out and "too small" in out
    )
    assert scripts.replay.main(["a.png", "b.jpg", "--show", "--json"]) == 0
    first, second = map(json.loads, capsys.readouterr().out.splitlines())
    assert first["arguments"] == second["arguments"] and first["source"] == "A1111"
    opt = typed(second["command"])
    assert (opt.prompt, opt.seed, opt.W, opt.H, opt.ddim_eta) == ("a cat", 5, 64, 96, None)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.png", "b.jpg"]


def test_the_seed_of_the_picture_is_changed_not_of_its_batch() -> None:
    recipe = Recipe(
        Job("x", seed=1, width=512, height=512), "ldm", extras={"Batch size": "3", "Batch pos": "2"}
    )
    assert (place(recipe), typed(command(recipe)).seed) == (2, 2**64 - 1)  # seeds wrap around
    assert typed(command(recipe, {"rng": "device"})).seed == 2**32 - 1
    short = dataclasses.replace(recipe, job=Job("x", seed=1, rng="numpy", width=512, height=512))
    assert typed(command(short)).seed == 2**32 - 1
    assert typed(command(short, {"rng": "philox", "seed": str(2**63)})).seed == 2**63 - 2
    assert remade(recipe) == recipe.job and remade(short) == short.job
    assert typed(command(recipe, {"seed": "9"})).seed == 7
    assert typed(command(recipe, {"seed": "9", "n_samples": "1"})).seed == 9
    assert place(recipe, {"n_samples": "1"}) == 0


def test_how_many_pictures_a_command_makes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    by_image = Recipe(
        Job("x", seed=1, width=512, height=512), "ldm", extras={"Batch size": "3", "Batch pos": "2"}
    )
    of_a_run = Recipe(BATCH_JOB, "ldm", extras={"Batch size": "3"})
    changed = {"n_samples": "2"}
    for recipe, changes in ((by_image, {}), (by_image, changed), (of_a_run, {}), (of_a_run, changed)):
        opt = typed(command(recipe, changes))
        assert count(recipe, changes) == opt.n_iter * opt.n_samples > place(recipe, changes)
    monkeypatch.chdir(tmp_path)
    held = record(by_image.job, by_image.extras)
    Path("a.png").write_bytes(encode_png(np.zeros((8, 8, 3), np.uint8), record=held))
    assert scripts.replay.main(["a.png", "--show"]) == 0
    assert "  this makes 3 images; sample 00002 is this one\n" in capsys.readouterr().out
    assert scripts.replay.main(["a.png", "--show", "--n_samples", "1"]) == 0
    assert "images" not in capsys.readouterr().out
    assert scripts.replay.main(["a.png", "--show", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert (shown["samples"], shown["sample"]) == (3, 2)
    assert scripts.replay.main(["a.png", "--show", "--n_samples", "few"]) == 2
    assert "--n_samples is few" in capsys.readouterr().err


def test_from_the_command_line_it_says_the_same(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(
        encode_png(np.zeros((8, 8, 3), np.uint8), record=record(Job("a cat", width=512, height=512), {}))
    )
    script = str(ROOT / "scripts/replay.py")
    run = subprocess.run(
        [sys.executable, script, str(path), "--show"], capture_output=True, text=True, check=True
    )
    assert run.stdout.splitlines()[1].strip() == command(Recipe(Job("a cat", width=512, height=512), "ldm"))


# --- untrusted files ---------------------------------------------------------------------------------------------


def forged(path: str, extras: dict[str, str] | None = None, **fields: object) -> str:
    """An image with a record that somebody wrote by hand."""
    job = {"prompt": "x", "width": 64, "height": 64, "steps": 1, **fields}
    text = json.dumps({"version": 1, "job": job, "extras": extras or {}})
    Path(path).write_bytes(encode_png(np.zeros((64, 64, 3), np.uint8), record=text))
    return path


FORGED = [
    ("sampler", "help"), ("sampler", "version"), ("sampler", "plms=3"), ("sampler", "from-file=secret.txt"),
    ("sampler", "cache_weights=owned"), ("timestep_spacing", "weird"), ("rng", "--help"), ("steps", 0), ("seed", -1),
    ("upscale_in", "x"), ("seed", 2**64), ("seed", 2**70), ("seed", -3),
]  # fmt: skip


def test_a_file_chooses_no_option_and_stops_no_other(made: Callable[..., list[Path]], capsys) -> None:
    [good] = made(scripts.txt2img, "--n_samples", "1", "--n_iter", "1", "--W", "64", "--H", "64")
    bad = [forged(f"{i}.png", **{field: value}) for i, (field, value) in enumerate(FORGED)]
    Path("secret.txt").write_text("root:x:0:0")
    before = {path.name for path in Path().iterdir()} | {"outputs"}
    capsys.readouterr()
    assert scripts.replay.main([*bad, str(good), "--verify", "--quiet", "--device", "cpu"]) == 1
    told = capsys.readouterr()
    assert "identical" in told.out and told.out.count("\n") == 1
    assert [line.partition(" cannot be ")[0] for line in told.err.splitlines()] == [
        f"error: {i}.png: the record is not usable: job.{field}" for i, (field, _) in enumerate(FORGED)
    ]
    assert {path.name for path in Path().iterdir()} == before
    assert scripts.replay.main([*bad, "--verify", "--quiet"]) == 2


def test_nothing_of_a_file_is_parsed_as_a_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    extras = {"Precision": "--help", "EMA": "--version", "Tiles": "--x", "Batch size": "--help"}
    parsed: list[list[str]] = []
    parse = argparse.ArgumentParser.parse_known_args

    def spy(self, args=None, namespace=None):
        parsed.append(list(args))
        return parse(self, args, namespace)

    monkeypatch.setattr(argparse.ArgumentParser, "parse_known_args", spy)
    file = forged("a.png", {**extras, "Model": "--help", "Config": "--help"}, prompt="--help")
    typed = [file, "--quiet", "--device", "cpu"]
    assert scripts.replay.main(typed) == 0
    assert {word for words in parsed for word in words} == {*typed}
    assert read_job("outputs/replay/a.png").job.prompt == "--help"


def test_the_help_lists_no_option_that_is_always_refused(capsys) -> None:
    text = scripts.replay.parser().format_help()
    assert "--n_samples" in text
    for option in ("--n_iter", "--from-file", "--sweep", "--resume", "--skip_grid", "--n_rows", "--indir"):
        assert option not in text
        value = ["x"] if option in ("--from-file", "--sweep", "--indir") else []
        value = ["2"] if option in ("--n_iter", "--n_rows") else value
        assert scripts.replay.main(["a.png", option, *value]) == 2
        assert f"replay.py does not take {option} (" in capsys.readouterr().err


def test_typed_options_change_the_job() -> None:
    job = Job("x", width=64, height=96, sampler="plms")
    assert changed(job, {"ddim_steps": 7, "dpm_solver": True, "W": 128}) == dataclasses.replace(
        job, steps=7, sampler="dpm_solver", width=128
    )
    begun = changed(job, {"init_img": ["a.png"]})
    assert (begun.strength, begun.init) == (0.75, Init("a.png", width=64, height=96, resize="fill"))
    painted = changed(job, {"init_img": ["a.png"], "mask": "m.png", "no_paste": True})
    assert painted.strength == 1 and painted.init and painted.init.mask == "m.png" and not painted.paste
    again = changed(begun, {"outpaint": (8, 0, 0, 0), "H": 32, "posterior_mean": True})
    assert (again.strength, again.posterior) == (0.75, "mean")
    assert again.init == Init(
        "a.png", width=64, height=32, resize="fill", outpaint=(8, 0, 0, 0), alpha_mask=True
    )
    unknown = Job(
        "x", strength=0.5, width=512, height=512
    )  # of another program, whose starting image is not known
    assert changed(unknown, {"init_img": ["a.png"], "W": 32}).init == Init("a.png", width=32, resize="fit")


@pytest.mark.parametrize(
    ("typed", "words"),
    [
        ({"strength": 0.5}, "--strength needs an image to start from"),
        ({"mask": "m.png"}, "--mask needs an image to start from"),
        ({"init_img": ["a.png"], "mask_blur": 3.0}, "--mask_blur needs a mask"),
        ({"init_img": ["a.png"], "mask": "m.png", "upscale": 2.0}, "--upscale does not go with a mask"),
    ],
)
def test_typed_options_that_need_another_are_refused(typed: dict[str, object], words: str) -> None:
    with pytest.raises(InputError, match=words):
        changed(Job("x", width=512, height=512), typed)


def test_a_batch_of_any_size_that_a_file_claims_is_not_made(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    large = forged("a.png", {"Batch size": "99999", "Batch pos": "99998"})
    assert scripts.replay.main([large, "--device", "cpu"]) == 0
    assert "asks for a batch of 99999; it is made alone" in capsys.readouterr().err
    late = forged("b.png", seed_mode="batch", batch_index=100_000, rng="cpu")
    assert scripts.replay.main([late, "--device", "cpu"]) == 2
    assert "it is image 100000 of one stream of noise" in capsys.readouterr().err
    info = PngInfo()
    info.add_text("ldm", json.dumps({"job": {"prompt": "x" * 3_900_000}}))
    Image.new("RGB", (8, 8)).save("c.png", pnginfo=info)
    assert scripts.replay.main(["c.png"]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert "job.prompt cannot be" in line and len(line) < 300


# --- prompts of the web UI -----------------------------------------------------------------------------------------


def web_ui_picture(path: Path, prompt: str, seed: int = 42) -> str:
    settings = f"Steps: 2, Sampler: DDIM, CFG scale: 7.5, Seed: {seed}, Size: 64x64, RNG: NV, Version: v1.5.2"
    info = PngInfo()
    info.add_text("parameters", f"{prompt}\n{settings}")
    Image.new("RGB", (64, 64)).save(path, pnginfo=info)
    return str(path)


@pytest.mark.long
def test_prompts_of_the_web_ui_are_read_by_its_rules(made: Callable[..., list[Path]]) -> None:
    long = ", ".join(["a red cube on a blue sphere"] * 12)
    prompts = ["a red cube", "a (red:1.4) cube", "a red BREAK cube", long]
    files = [web_ui_picture(Path(f"{i}.png"), prompt, seed=42 + i) for i, prompt in enumerate(prompts)]
    assert scripts.replay.main([*files, "--quiet", "--device", "cpu"]) == 0
    again = [Path(f"outputs/replay/{i}.png") for i in range(len(prompts))]
    Path("prompts.txt").write_text("\n".join(prompts))
    listed = ["--from-file", "prompts.txt", "--n_samples", "1", "--n_iter", "1", "--W", "64", "--H", "64"]
    plain = made(scripts.txt2img, *listed)
    weighted = made(scripts.txt2img, *listed, "--prompt_syntax", "a1111")[len(prompts) :]
    assert [same(*pair) for pair in zip(again, weighted, strict=True)] == [True] * 4
    assert [same(*pair) for pair in zip(again, plain, strict=True)] == [True, False, False, False]


def test_what_more_the_web_ui_reads_is_text_with_a_note(tmp_path: Path, capsys) -> None:
    for prompt in ("a (cat:1.2.3)", "[a cat:(a dog:1.2.3):1]", "a cat AND (a dog:.)"):
        path = web_ui_picture(tmp_path / "a.png", prompt)
        assert scripts.replay.main([path, "--show", "--json"]) == 0
        shown = json.loads(capsys.readouterr().out)
        assert "--prompt_syntax" not in shown["arguments"]
        assert sum("its prompts are read as plain text: " in note for note in shown["notes"]) == 1
