"""Images from images: the original's figures through the command line, and what people type."""

import re

import numpy as np
import pytest
import torch
from PIL import Image

import ldm.pipeline.noise
import scripts.img2img as img2img
from ldm.data.scenes import image_at
from ldm.metadata.infotext import job_from_infotext, parse_infotext
from ldm.modules.distributions.distributions import DiagonalGaussianDistribution
from tests.support.golden_data import TOLERANCE, figure, relative_error, tiny_model

FAST = [
    "--ddim_steps",
    "4",
    "--n_samples",
    "1",
    "--device",
    "cpu",
    "--precision",
    "full",
    "--quiet",
    "--skip_grid",
]
PLAIN = ["--no_watermark"]


@pytest.fixture
def draw(tmp_path, monkeypatch):
    """Runs the script with the bundled model in this process; returns exit code and samples."""
    monkeypatch.chdir(tmp_path)
    Image.fromarray(image_at(3, "fresh")).resize((64, 64)).save("scene.png")

    def run(*options, outdir="out", image="scene.png"):
        code = img2img.main([*FAST, "--init-img", image, "--outdir", outdir, *options])
        return code, sorted((tmp_path / outdir / "samples").glob("*.png"))

    return run


def pixels(path):
    return np.asarray(Image.open(path)).astype(int)


# --- fidelity -----------------------------------------------------------------------------------------------


class GivenNoise:
    """Returns the noise of the golden figures, whatever the seeds."""

    def draw(self, shape):
        noise = figure("img2img/noise")
        assert tuple(shape) == noise.shape
        return noise

    def skip(self, shape):
        pass


@pytest.mark.parametrize(
    "strength", ["0.2", *(pytest.param(strength, marks=pytest.mark.slow) for strength in ("0.75", "0.98"))]
)
def test_figures_of_the_original_through_the_command_line(tmp_path, monkeypatch, strength):
    """The model's input and output are replaced by the figures' latents and embeddings; the rest is the script's."""
    model, decoded = tiny_model(), []
    x0 = figure("sample/x0") / model.scale_factor
    prompts = {"first": figure("sample/cond")[:1], "second": figure("sample/cond")[1:]}
    monkeypatch.setattr(
        model, "get_learned_conditioning", lambda c: prompts.get(c[0], figure("sample/uncond")[:1])
    )
    certain = DiagonalGaussianDistribution(torch.cat([x0, torch.full_like(x0, -30.0)], 1), deterministic=True)
    monkeypatch.setattr(model, "encode_first_stage", lambda x: certain)
    monkeypatch.setattr(
        model, "decode_first_stage", lambda z: (decoded.append(z), torch.zeros(1, 3, 64, 64))[1]
    )
    monkeypatch.setattr(ldm.pipeline, "load_model", lambda *args, **options: model)
    monkeypatch.setattr(ldm.pipeline.noise, "noise_source", lambda *args: GivenNoise())
    (tmp_path / "list.txt").write_text("first\nsecond\n")
    Image.new("RGB", (64, 64)).save(tmp_path / "any.png")
    monkeypatch.chdir(tmp_path)
    code = img2img.main(
        [*FAST, "--ddim_steps", "50", "--n_samples", "2", "--strength", strength, "--scale", "5",
         "--from-file", "list.txt", "--init-img", "any.png"]
    )  # fmt: skip
    assert code == 0
    assert relative_error(torch.cat(decoded), figure(f"img2img/strength{strength}/decoded")) <= TOLERANCE


ORIGINAL_DEFAULTS = {
    "prompt": "a painting of a virus monster playing guitar",
    "init_img": ["x.png"],
    "outdir": "outputs/img2img-samples",
    "skip_grid": False,
    "skip_save": False,
    "ddim_steps": 50,
    "plms": False,
    "fixed_code": False,
    "ddim_eta": None,  # the sampler's own, which is 0 for those of the original
    "n_iter": 1,
    "C": 4,
    "f": 8,
    "n_samples": 2,
    "n_rows": 0,
    "scale": 5.0,
    "strength": 0.75,
    "from_file": None,
    "seed": 42,
    "precision": "autocast",
}


def test_every_option_of_the_original_has_its_default():
    options = vars(img2img.parser().parse_args(["--init-img", "x.png"]))
    assert {name: options[name] for name in ORIGINAL_DEFAULTS} == ORIGINAL_DEFAULTS


# --- strength -----------------------------------------------------------------------------------------------


def test_strength_0_is_the_autoencoders_round_trip(draw):
    Image.fromarray(image_at(3, "fresh")).save("scene.png")
    _, (path,) = draw("--strength", "0", "--posterior_mean", *PLAIN)
    error = pixels(path) - pixels("scene.png")
    assert 10 * np.log10(255**2 / np.mean(error**2)) > 28


@pytest.mark.parametrize(
    "sampler",
    ["--quiet", *(pytest.param(name, marks=pytest.mark.long) for name in ("--plms", "--dpm_solver"))],
)
def test_more_strength_changes_more(draw, sampler):
    changes = []
    for strength in ("0", "0.5", "1"):
        options = ("--strength", strength, "--prompt", "a red cube", "--ddim_steps", "6", sampler)
        _, (path,) = draw(*options, outdir=strength)
        changes.append(np.abs(pixels(path) - pixels("scene.png")).mean())
    assert changes[0] < changes[1] < changes[2]


def test_strength_1_knows_nothing_of_the_picture(draw):
    Image.new("RGB", (64, 64), "green").save("other.png")
    _, (a,) = draw("--strength", "1", *PLAIN)
    _, (b,) = draw("--strength", "1", *PLAIN, image="other.png", outdir="b")
    assert np.array_equal(pixels(a), pixels(b))


@pytest.mark.parametrize(("strength", "said"), [("0.75", "37 of 50"), ("0", "0 of 50"), ("1", "50 of 50")])
def test_the_steps_that_run_are_said(draw, capsys, monkeypatch, strength, said):
    monkeypatch.setattr(ldm.pipeline.Pipeline, "begin", lambda *args: [])
    options = [option for option in FAST if option != "--quiet"]
    img2img.main([*options, "--ddim_steps", "50", "--strength", strength, "--init-img", "scene.png"])
    assert said in capsys.readouterr().err


# --- options without effect in the original -----------------------------------------------------------------


@pytest.mark.long
def test_samplers_eta_and_fixed_code_have_an_effect(draw):
    options = ("--n_iter", "2", *PLAIN)
    _, ddim = draw(*options)
    for name in ("--plms", "--ddim_eta=1", "--dpm_solver"):
        _, other = draw(*options, name, outdir=name.strip("-"))
        assert not np.array_equal(pixels(ddim[0]), pixels(other[0])), name
    assert not np.array_equal(pixels(ddim[0]), pixels(ddim[1]))
    _, fixed = draw(*options, "--fixed_code", outdir="fixed")
    assert np.array_equal(pixels(fixed[0]), pixels(fixed[1]))
    assert np.array_equal(pixels(fixed[0]), pixels(ddim[0]))


def test_an_image_can_be_made_alone(draw):
    _, many = draw("--n_samples", "2", "--seed", "5", *PLAIN)
    _, (alone,) = draw("--seed", "6", *PLAIN, outdir="alone")
    assert np.abs(pixels(many[1]) - pixels(alone)).max() <= 2


# --- sizes and several images -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "size"),
    [
        ((), (96, 64)),
        (("--W", "64", "--H", "64"), (64, 64)),
        (("--W", "64"), (64, 32)),
        (("--H", "40", "--W", "72"), (72, 40)),
        (("--W", "64", "--H", "64", "--resize", "fit"), (64, 32)),
    ],
    ids=str,
)
def test_sizes(draw, options, size):
    Image.new("RGB", (100, 70), "red").save("odd.png")
    _, (path,) = draw(*options, "--ddim_steps", "2", image="odd.png")
    assert Image.open(path).size == size


def test_a_folder_is_a_job_for_each_picture(draw, tmp_path):
    (tmp_path / "in").mkdir()
    for name, size in (("b2.png", 64), ("b10.png", 96)):
        Image.new("RGB", (size, size), "blue").save(tmp_path / "in" / name)
    _, files = draw("--n_samples", "2", image="in")
    assert [Image.open(path).size[0] for path in files] == [64, 64, 96, 96]
    names = [parse_infotext(Image.open(path).text["parameters"])["Init image"] for path in files]
    assert names == ["b2.png", "b2.png", "b10.png", "b10.png"]


def test_a_picture_that_goes_away_ends_the_run_with_what_is_done(draw, tmp_path, capsys, monkeypatch):
    (tmp_path / "in").mkdir()
    for i in range(9):  # more than are kept open
        Image.new("RGB", (32, 32), (25 * i, 0, 0)).save(tmp_path / "in" / f"{i}.png")
    begin = ldm.pipeline.Pipeline.begin

    def begin_and_remove(*args):
        (tmp_path / "in" / "8.png").unlink(missing_ok=True)
        Image.new("RGB", (32, 32)).save(tmp_path / "in" / "3.png")
        return begin(*args)

    monkeypatch.setattr(ldm.pipeline.Pipeline, "begin", begin_and_remove)
    code, files = draw("--ddim_steps", "1", image="in")
    assert code == 1
    assert 3 <= len(files) < 9
    assert re.search("3.png has changed|8.png: no such file", capsys.readouterr().err)


def test_encoding_and_starting_noise_are_independent(draw):
    """With torch's generator both come from CPU streams of the image's seed."""
    from ldm.job import Job
    from ldm.models.diffusion.noise import noise_source
    from ldm.pipeline.noise import posterior_noise

    jobs = [Job("", seed=seed, rng="cpu", width=512, height=512) for seed in (1, 2)]
    posterior = posterior_noise(jobs, torch.device("cpu")).draw((2, 4, 32, 32))
    start = noise_source("cpu", "image", [1, 2], "cpu").draw((2, 4, 32, 32))
    together = torch.corrcoef(torch.cat([posterior, start]).flatten(1))
    assert (together - torch.eye(4)).abs().max() < 0.06


def test_the_command_is_in_the_picture(draw):
    _, (path,) = draw(
        "--strength", "0.5", "--W", "64", "--H", "96", "--resize", "pad", "--background", "#102030"
    )
    text = Image.open(path).text["parameters"]
    job = job_from_infotext(text)
    assert (job.strength, job.width, job.height, job.scale) == (0.5, 64, 96, 5.0)
    assert job.init is not None
    assert (job.init.image, job.init.resize, job.init.background) == ("scene.png", "pad", "#102030")
    assert re.fullmatch("[0-9a-f]{10}", parse_infotext(text)["Init image hash"])
    assert parse_infotext(text)["Safety"] == "unchecked"


@pytest.mark.long
def test_upscaling_is_another_pass_at_a_larger_size(draw):
    half = ("--W", "64", "--H", "64")
    for space in ("pixels", "latents"):
        _, (path,) = draw(
            *half, "--upscale", "1.5", "--upscale_in", space, "--upscale_strength", "0.25", outdir=space
        )
        assert Image.open(path).size == (96, 96)
        job = job_from_infotext(Image.open(path).text["parameters"])
        assert (job.width, job.upscale, job.upscale_in, job.upscale_strength) == (64, 1.5, space, 0.25)
    # at strength 0 nothing but the enlarging is left
    _, (small,) = draw(*half, *PLAIN, outdir="small")
    _, (large,) = draw(*half, "--upscale", "2", "--upscale_strength", "0", *PLAIN, outdir="large")
    back = np.asarray(Image.open(large).resize((64, 64), Image.Resampling.BOX)).astype(int)
    assert np.abs(back - pixels(small)).mean() < 6


# --- mistakes -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--strength", "1.5"], "--strength is 1.5; give a number from 0 to 1"),
        (["--strength", "nan"], "--strength is nan"),
        (["--strength", "-0.1"], "--strength is -0.1"),
        (["--upscale", "0.5"], "--upscale is 0.5"),
        (["--upscale_strength", "2"], "--upscale_strength is 2"),
        (["--W", "100"], "100"),
        (["--W", "64", "--resize", "none"], "--W 64 needs a way to resize"),
        (["--background", "plaid"], "plaid"),
        (["--init-img", "missing.png"], "missing.png"),
        (["--init-img", "page.png"], "page.png.*web page"),
        (["--init-img", "cut.png"], "cut.png.*truncated|cut.png.*damaged"),
        (["--init-img", "dot.png"], "1x1"),
        (["--init-img", "nothing"], "nothing"),
        (["--safety", "on"], "no safety model"),
        (["--safety_model", "no/such"], "no/such"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_mistakes_are_one_line_and_code_2(draw, tmp_path, capsys, monkeypatch, options, said):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "page.png").write_bytes(b"<!DOCTYPE html><html>please log in</html>")
    (tmp_path / "cut.png").write_bytes((tmp_path / "scene.png").read_bytes()[:2000])
    (tmp_path / "nothing").mkdir()
    Image.new("RGB", (1, 1)).save(tmp_path / "dot.png")
    code, files = draw(*options)
    error = capsys.readouterr().err
    assert code == 2
    assert re.search(said, error)
    assert len(error.strip().splitlines()) == 1
    assert not files


def test_a_missing_option_is_one_line(capsys):
    with pytest.raises(SystemExit) as caught:
        img2img.main([])
    assert caught.value.code == 2
    error = capsys.readouterr().err
    assert "--init-img" in error and len(error.strip().splitlines()) == 1
