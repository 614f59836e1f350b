"""Repainting a part of an image, and extending it."""

import re

import numpy as np
import pytest
from PIL import Image

import scripts.inpaint as inpaint
import scripts.txt2img as txt2img
from ldm.data.scenes import image_at
from ldm.images.watermark import INPAINTING_TEXT, Watermark
from ldm.metadata.infotext import job_from_infotext
from tests.support.golden_data import inpainting_config, small_config, written_model

FAST = ["--ddim_steps", "3", "--device", "cpu", "--precision", "full", "--quiet", "--skip_grid"]
SAMPLERS = ["--seed=42", "--plms", "--dpm_solver", "--ddim_eta=1"]


@pytest.fixture
def draw(tmp_path, monkeypatch):
    """Runs the script in this process, on scene.png (64x64) and mask.png (a square of 24 in the middle)."""
    monkeypatch.chdir(tmp_path)
    Image.fromarray(image_at(3, "fresh")).resize((64, 64)).save("scene.png")
    mask = np.zeros((64, 64), np.uint8)
    mask[20:44, 20:44] = 255
    Image.fromarray(mask).save("mask.png")

    def run(*options, outdir="out", inputs=("--init-img", "scene.png", "--mask", "mask.png")):
        code = inpaint.main([*FAST, *inputs, "--outdir", outdir, "--prompt", "a red cube", *options])
        return code, sorted((tmp_path / outdir / "samples").glob("*.png"))

    return run


@pytest.fixture(scope="module")
def nine_channels(tmp_path_factory):
    """Options that choose a tiny inpainting model in files."""
    return written_model(inpainting_config(small_config()), tmp_path_factory.mktemp("inpainting"))


def pixels(path):
    return np.asarray(Image.open(path)).astype(int)


def inside():
    return np.asarray(Image.open("mask.png")) > 127


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("kind", ["any model", "inpainting model"])
def test_nothing_outside_the_mask_changes(draw, nine_channels, kind, sampler):
    model = nine_channels if kind == "inpainting model" else []
    code, (path,) = draw("--no_watermark", sampler, *model)
    assert code == 0
    before, after = pixels("scene.png"), pixels(path)
    assert np.array_equal(before[~inside()], after[~inside()])
    assert np.abs(before - after)[inside()].mean() > 2


def test_an_inverted_mask_changes_the_rest(draw):
    _, (path,) = draw("--no_watermark", "--invert_mask")
    assert np.array_equal(pixels("scene.png")[inside()], pixels(path)[inside()])


def test_without_pasting_all_goes_through_the_autoencoder(draw):
    _, (path,) = draw("--no_watermark", "--no_paste")
    difference = np.abs(pixels("scene.png") - pixels(path))[~inside()]
    assert 0 < difference.mean() < 12  # the sampler keeps the latents there


def test_what_is_repainted_does_not_depend_on_what_was_there(draw, nine_channels):
    """At strength 1 neither kind of model sees the part under the mask."""
    hidden = pixels("scene.png").astype(np.uint8)
    hidden[inside()] = (0, 255, 0)
    Image.fromarray(hidden).save("green.png")
    # the encoder's view reaches beyond a latent cell, so other models see a little of it at the mask's edge
    options = ("--no_watermark", "--posterior_mean", "--mask_blur", "0", *nine_channels)
    _, (a,) = draw(*options, outdir="a")
    _, (b,) = draw(*options, outdir="b", inputs=("--init-img", "green.png", "--mask", "mask.png"))
    assert np.array_equal(pixels(a), pixels(b))


def test_strength_0_changes_nothing_much(draw):
    _, (path,) = draw("--no_watermark", "--strength", "0", "--posterior_mean")
    assert np.abs(pixels("scene.png") - pixels(path)).mean() < 4


def test_transparency_is_a_mask(draw):
    scene = Image.open("scene.png").convert("RGBA")
    scene.putalpha(Image.fromarray(np.where(inside(), 0, 255).astype(np.uint8)))
    scene.save("hole.png")
    _, (path,) = draw("--no_watermark", inputs=("--init-img", "hole.png"))
    assert np.array_equal(pixels("scene.png")[~inside()], pixels(path)[~inside()])


def test_a_folder_of_pairs(draw, tmp_path):
    (tmp_path / "pairs").mkdir()
    for name in ("a", "b"):
        Image.open("scene.png").save(tmp_path / "pairs" / f"{name}.png")
        Image.open("mask.png").save(tmp_path / "pairs" / f"{name}_mask.png")
    _, files = draw(inputs=("--indir", "pairs"))
    assert [job_from_infotext(Image.open(path).text["parameters"]).init.image for path in files] == [
        "a.png",
        "b.png",
    ]


@pytest.mark.parametrize("kind", ["any model", "inpainting model"])
def test_outpainting_keeps_the_picture(draw, nine_channels, kind):
    model = nine_channels if kind == "inpainting model" else []
    _, (path,) = draw("--outpaint", "0,16,64,8", "--no_watermark", *model, inputs=("--init-img", "scene.png"))
    grown = pixels(path)
    assert grown.shape == (64 + 16 + 8, 64 + 64, 3)
    assert np.array_equal(grown[16:80, :64], pixels("scene.png"))
    assert grown[16:80, 80:].std() > 0


def test_an_inpainting_model_draws_from_text_alone(nine_channels, tmp_path, monkeypatch):
    """With everything masked it works like any other model."""
    monkeypatch.chdir(tmp_path)
    options = [*FAST, "--W", "64", "--H", "64", "--n_iter", "1", "--n_samples", "1", *nine_channels]
    assert txt2img.main([*options, "--outdir", "out"]) == 0
    assert np.asarray(Image.open("out/samples/00000.png")).std() > 0


@pytest.mark.long
def test_the_watermark_of_the_inpainting_app_marks_what_is_new(draw):
    size = ("--W", "256", "--H", "256", "--ddim_steps", "1")
    for name, options in (("plain", ["--no_watermark"]), ("marked", []), ("all", ["--no_paste"])):
        draw(*size, *options, outdir=name)
    plain, marked = (pixels(f"{name}/samples/00000.png") for name in ("plain", "marked"))
    wholly = Watermark(INPAINTING_TEXT).mark(plain.astype(np.uint8))
    mask = np.asarray(Image.open("mask.png").resize((256, 256))) > 127
    assert np.array_equal(marked[~mask], plain[~mask])
    assert not np.array_equal(marked[mask], plain[mask])
    assert set(map(tuple, marked[mask] - plain[mask])) <= set(map(tuple, wholly[mask] - plain[mask]))
    _, (bare,) = draw(*size, "--no_paste", "--no_watermark", outdir="bare")
    assert np.array_equal(
        pixels("all/samples/00000.png"), Watermark(INPAINTING_TEXT).mark(np.asarray(Image.open(bare)))
    )


def test_the_command_is_in_the_picture(draw):
    _, (path,) = draw("--mask_blur", "2", "--outpaint", "0,0,8,0")
    job = job_from_infotext(Image.open(path).text["parameters"])
    assert (job.init.image, job.init.mask, job.init.mask_blur) == ("scene.png", "mask.png", 2)
    assert (job.init.outpaint, job.width, job.strength) == ((0, 0, 8, 0), 72, 1.0)


@pytest.mark.parametrize(
    ("inputs", "said"),
    [
        ([], "--init-img"),
        (["--init-img", "scene.png"], "transparency"),
        (["--init-img", "scene.png", "--mask", "black.png"], "black.png"),
        (["--init-img", "scene.png", "--mask", "missing.png"], "missing.png"),
        (["--init-img", "scene.png", "--mask", "mask.png", "--mask_blur", "-1"], "--mask_blur is -1"),
        (["--init-img", "scene.png", "--mask", "mask.png", "--indir", "empty"], "--indir"),
        (["--indir", "empty"], "empty"),
        (["--init-img", "scene.png", "--outpaint", "-8,0,0,0"], "--outpaint"),
        (["--init-img", "scene.png", "--mask", "mask.png", "--plms", "--ddim_eta", "1"], "plms does not use"),
    ],
    ids=" ".join,
)
def test_mistakes_are_one_line_and_code_2(draw, tmp_path, capsys, inputs, said):
    Image.new("L", (64, 64)).save("black.png")
    (tmp_path / "empty").mkdir()
    if "-8,0,0,0" in inputs:  # a value that begins with a dash
        inputs = [*inputs[:2], "--outpaint=-8,0,0,0"]
    code, files = draw(inputs=inputs)
    error = capsys.readouterr().err
    assert code == 2
    assert re.search(said, error)
    assert len(error.strip().splitlines()) == 1
    assert not files
