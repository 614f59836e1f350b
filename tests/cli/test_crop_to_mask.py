"""Only the region around a mask: made as if it were cut out, and put back exactly."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import scripts.inpaint as inpaint
import scripts.replay as replay
from ldm.data.scenes import image_at
from ldm.job import Init, Job
from ldm.metadata.read import read_job
from ldm.pipeline import Pipeline
from tests.support.golden_data import inpainting_config, small_config, tiny_model, written_model
from tests.support.metadata import png

FAST = ["--ddim_steps", "2", "--device", "cpu", "--precision", "full", "--quiet"]
BOX = (60, 10, 124, 74)  # left, top, right, bottom of the region of 64x64 in the image of 150x90


@pytest.fixture
def photo(tmp_path, monkeypatch):
    """An image of 150x90 with a mask of 32x32, and the files of its region alone."""
    monkeypatch.chdir(tmp_path)
    image = Image.fromarray(image_at(3, "fresh")).resize((150, 90))
    mask = Image.new("L", (150, 90))
    mask.paste(255, (76, 26, 108, 58))
    for name, whole in (("photo", image), ("mask", mask)):
        whole.save(f"{name}.png")
        whole.crop(BOX).save(f"{name}-alone.png")
    return Init("photo.png", mask="mask.png", crop_to_mask=16, width=64, height=64)


def pixels(name):
    return np.asarray(Image.open(name).convert("RGB"))


def inside():
    return np.asarray(Image.open("mask.png")) > 127


def configs():
    return {"any model": small_config(), "inpainting model": inpainting_config(small_config())}


@pytest.mark.parametrize("kind", ["any model", "inpainting model"])
@pytest.mark.parametrize("paste", [True, False])
def test_a_region_of_the_working_size_is_as_if_it_were_cut_out(photo, kind, paste):
    pipeline = Pipeline(tiny_model(configs()[kind]))
    alone = Init("photo-alone.png", mask="mask-alone.png")
    whole, part = (
        pipeline.make([Job("a cat", steps=2, seed=3, init=init, paste=paste)])[0].pixels
        for init in (photo, alone)
    )
    expected = pixels("photo.png").copy()
    expected[BOX[1] : BOX[3], BOX[0] : BOX[2]] = part
    assert np.array_equal(whole, expected)
    assert (whole != pixels("photo.png"))[inside()].mean() > 0.5


@pytest.mark.parametrize("kind", ["any model", "inpainting model"])
def test_nothing_outside_the_mask_changes_at_another_size(photo, kind):
    pipeline = Pipeline(tiny_model(configs()[kind]))
    job = Job("a cat", steps=2, seed=3, init=Init(photo.image, mask=photo.mask, crop_to_mask=3))
    (made,) = pipeline.make([job])
    assert (made.job.width, made.job.height) == (64, 64) and made.latent.shape[1:] == (
        8,
        8,
    )  # the model's own
    changed = (made.pixels != pixels("photo.png")).any(2)
    assert not changed[~inside()].any() and changed[inside()].mean() > 0.5
    assert np.array_equal(made.kept, ~inside() | made.kept) and not made.kept[inside()].all()
    (again,) = pipeline.make([job])
    assert np.array_equal(again.pixels, made.pixels)


def test_grey_masks_and_second_passes_go_with_it(photo):
    pipeline = Pipeline(tiny_model(small_config()))
    for changes in ({"init": Init(photo.image, mask=photo.mask, crop_to_mask=3, mask_levels=True)},
                    {"init": Init(photo.image, mask=photo.mask, crop_to_mask=3), "upscale": 2.0}):  # fmt: skip
        (made,) = pipeline.make([Job("a cat", steps=2, seed=3, **changes)])
        assert made.pixels.shape == (90, 150, 3)
        assert np.array_equal(made.pixels[~inside()], pixels("photo.png")[~inside()])


@pytest.mark.long
@pytest.mark.parametrize("kind", ["any model", "inpainting model"])
def test_the_command_and_its_replay(photo, tmp_path, capsys, kind):
    model = written_model(configs()[kind])
    typed = ["--init-img", "photo.png", "--mask", "mask.png", "--crop_to_mask", "5", "--n_samples", "2"]
    assert inpaint.main([*FAST, *model, *typed, "--outdir", "out"]) == 0
    file = tmp_path / "out/samples/00000.png"
    made = read_job(str(file))
    assert (made.job.init.crop_to_mask, made.job.width, made.job.height) == (5, 64, 64)
    assert pixels(file).shape == (90, 150, 3) and len(list((tmp_path / "out").glob("grid*.png"))) == 1
    assert np.array_equal(pixels(file)[~inside()], pixels("photo.png")[~inside()])
    text = Image.open(file).text["parameters"]
    assert "Inpaint area: Only masked" in text and "Masked area padding: 5" in text
    given = ["--init-img", "photo.png", "--mask", "mask.png"]
    assert replay.main([str(file), "--verify", "--quiet", "--device", "cpu", *model, *given]) == 0
    assert "identical" in capsys.readouterr().out


@pytest.mark.long
def test_an_image_of_the_web_ui_is_made_in_its_way(photo, tmp_path):
    text = (
        "a cube\nSteps: 2, Sampler: DDIM, CFG scale: 7, Seed: 5, Size: 64x64, Denoising strength: 0.75, "
        "Mask blur: 4, Inpaint area: Only masked, Masked area padding: 16, Version: v1.10.1"
    )
    png(Path("theirs.png"), parameters=text)
    given = ["--init-img", "photo.png", "--mask", "mask.png", "--device", "cpu", "--quiet"]
    assert replay.main(["theirs.png", *given, "--outdir", "again"]) == 0
    made = read_job("again/theirs.png").job
    assert (made.init.crop_to_mask, made.width, made.strength) == (16, 64, 0.75)
    assert pixels("again/theirs.png").shape == (90, 150, 3)


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        (["--crop_to_mask", "-1"], "crop_to_mask is -1; give a whole number from 0 to 65536"),
        (["--crop_to_mask", "8", "--W", "60"], "--W is 60, not a multiple of 8; use 56 or 64"),
        (["--crop_to_mask", "x"], "--crop_to_mask: 'x' is not a whole number"),
    ],
)
def test_mistakes_are_one_line(photo, capsys, typed, said):
    given = ["--init-img", "photo.png", "--mask", "mask.png"]
    try:
        assert inpaint.main([*FAST, *given, *typed]) == 2
    except SystemExit as left:
        assert left.code == 2
    assert said in capsys.readouterr().err.splitlines()[-1]
