"""A pipeline in Python code: images and latents in and out, a callback, checked jobs, files."""

import dataclasses
import hashlib
import pickle

import numpy as np
import pytest
import torch
from PIL import Image

import ldm
from ldm.images.canvas import open_canvas
from ldm.job import Init, Job, MemoryImage
from ldm.metadata.infotext import infotext, job_from_infotext
from ldm.pipeline import Pipeline, load_model
from ldm.places import ROOT
from ldm.safety.screen import Screen
from ldm.util import InputError
from tests.support.golden_data import tiny_model

JOB = Job("a red cube", width=64, height=64, steps=3, seed=11)


@pytest.fixture(scope="module")
def pipeline():
    return Pipeline(tiny_model())


def gradient(mode="RGB", size=(64, 64)):
    return Image.linear_gradient("L").resize(size).convert(mode)


def same(first, second):
    return all(np.array_equal(a.pixels, b.pixels) for a, b in zip(first, second, strict=True))


def test_the_package_offers_the_names_that_a_script_begins_with():
    offered = {"Init": Init, "Job": Job, "Pipeline": Pipeline, "load_model": load_model}
    assert {name: getattr(ldm, name) for name in offered} == offered
    assert set(ldm.__all__) == {*offered, "__version__"} and set(ldm.__all__) <= set(dir(ldm))
    with pytest.raises(AttributeError, match="module 'ldm' has no attribute 'Job2'"):
        ldm.Job2  # noqa: B018


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "P", "1", "LA", "CMYK"])
def test_an_image_in_memory_starts_a_job_as_its_file_does(tmp_path, mode):
    image = gradient(mode)
    image.convert("RGBA" if "A" in mode else "RGB").save(tmp_path / "start.png")
    expected = open_canvas(Init(str(tmp_path / "start.png"))).pixels
    assert np.array_equal(open_canvas(Init(image)).pixels, expected)


def test_arrays_paths_and_masks_in_memory(tmp_path):
    gradient().save(tmp_path / "start.png")
    array, mask = np.asarray(gradient()), Image.new("L", (64, 64), 255)
    of_file, of_array = Init(tmp_path / "start.png", mask=mask), Init(array, mask=mask)
    assert of_file.image == str(tmp_path / "start.png")
    assert isinstance(of_array.mask, MemoryImage)
    for init in (of_file, of_array, pickle.loads(pickle.dumps(of_array))):
        canvas = open_canvas(init)
        assert np.array_equal(canvas.pixels, array)
        assert canvas.repaint.all()


def test_an_image_in_memory_is_turned_upright():
    image, exif = gradient(size=(64, 32)), Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    image.info["exif"] = exif.tobytes()
    assert open_canvas(Init(image)).pixels.shape == (64, 32, 3)


def test_images_in_memory_are_equal_by_content():
    assert Init(gradient()) == Init(gradient())
    assert Init(gradient()) != Init(gradient(size=(64, 32)))
    with pytest.raises(TypeError, match="not list"):
        Init([1, 2])


@pytest.mark.long
def test_jobs_of_several_kinds_are_several_batches(pipeline):
    jobs = [JOB, dataclasses.replace(JOB, steps=2), dataclasses.replace(JOB, seed=12)]
    together = pipeline.make(jobs)
    assert [picture.job for picture in together] == jobs
    assert same([together[0], together[2]], pipeline.make([jobs[0], jobs[2]]))
    assert same([together[1]], pipeline.make(jobs[1]))
    assert pipeline.make([]) == []


@pytest.mark.long
def test_one_stream_goes_through_all_batches(pipeline):
    jobs = [dataclasses.replace(JOB, seed_mode="batch", batch_index=i) for i in range(3)]
    noise = pipeline.noise(jobs)
    expected = [*pipeline.make(jobs[:2], noise), *pipeline.make(jobs[2:], noise)]
    assert same(pipeline.make(jobs, batch_size=2), expected)


def test_prompts_are_enough(pipeline):
    pictures = pipeline(["a cube", "a cone"], images_per_prompt=2, seed=5, steps=1, height=64, width=64)
    assert [(p.job.prompt, p.job.seed) for p in pictures] == [
        ("a cube", 5), ("a cube", 6), ("a cone", 7), ("a cone", 8),
    ]  # fmt: skip
    side = pipeline.model.image_size * pipeline.factor
    (picture,) = pipeline.make(dataclasses.replace(pipeline.job("a cube"), steps=1))
    assert picture.pixels.shape == (side, side, 3) == (picture.job.height, picture.job.width, 3)


@pytest.mark.parametrize(("rng", "last"), [("philox", 2**64 - 1), ("cpu", 2**64 - 1), ("numpy", 2**32 - 1)])
def test_seeds_count_up_to_the_generators_last(pipeline, rng, last):
    fields = {"rng": rng, "steps": 1, "height": 64, "width": 64}
    pictures = pipeline("a cube", images_per_prompt=2, seed=last, **fields)
    assert [picture.job.seed for picture in pictures] == [last, 0]
    assert np.array_equal(pictures[1].pixels, pipeline("a cube", seed=0, **fields)[0].pixels)
    with pytest.raises(InputError, match=f"seed is {last + 1}"):
        pipeline("a cube", seed=last + 1, **fields)


def test_a_job_for_a_model_without_signal_at_the_end_has_its_schedule(pipeline, monkeypatch):
    assert pipeline.job("a cube").schedule == "auto"
    monkeypatch.setattr(pipeline.model, "zero_terminal_snr", True)
    job = pipeline.job("a cube")
    assert job.schedule == "trailing" and "Schedule type: trailing" in infotext(job, {})
    assert pipeline.job("a cube", schedule="original").schedule == "original"


def test_a_job_without_a_size_has_the_models_own(pipeline):
    side = pipeline.model.image_size * pipeline.factor
    job = Job("a cube", steps=1)
    (picture,) = pipeline.make(job)
    assert (picture.job.width, picture.job.height) == picture.pixels.shape[:2] == (side, side)
    assert job_from_infotext(infotext(picture.job, {})) == picture.job
    (begun,) = pipeline.finish(pipeline.begin([job]))
    assert same([begun], [picture])
    assert (
        pipeline.start_code(job, 2, pipeline.noise([job, job])).shape[-2:] == (side // pipeline.factor,) * 2
    )
    (half,) = pipeline.make(dataclasses.replace(job, height=side // 2))
    assert half.pixels.shape == (side // 2, side, 3)


def test_a_start_image_gives_the_size(pipeline):
    (picture,) = pipeline("a cube", init=Init(gradient(size=(96, 64))), strength=0.5, steps=2)
    assert picture.pixels.shape == (64, 96, 3)
    with pytest.raises(InputError, match=r"64x64.*96x64"):
        pipeline.make(dataclasses.replace(JOB, init=Init(gradient(size=(96, 64)))))


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"width": 100}, "100"), ({"strength": 5.0}, "5"), ({"prompt_syntax": "compel"}, "compel"),
        ({"sampler": "eular"}, "eular"), ({"seed": -2}, "-2"), ({"steps": 0}, "0"), ({"steps": "many"}, "many"),
        ({"sampler": "plms", "eta": 0.5}, "eta"), ({"timestep_spacing": "compvis", "steps": 300}, "300"),
    ],
)  # fmt: skip
def test_jobs_are_checked_before_the_first_is_made(pipeline, fields, named, monkeypatch):
    monkeypatch.setattr(pipeline, "begin", lambda *args, **kwargs: pytest.fail("a job was begun"))
    with pytest.raises(InputError, match=named):
        pipeline.make([JOB, dataclasses.replace(JOB, **fields)])


def test_a_callback_sees_every_step_and_its_estimate(pipeline):
    seen = []
    (picture,) = pipeline.make(JOB, on_step=seen.append)
    assert [(step.index, step.total) for step in seen] == [(0, 3), (1, 3), (2, 3)]
    # DDIM ends at the noise level of timestep 0: its estimate with 3 % of noise
    first, last = ((seen[i].estimate[0] - picture.latent).norm() / picture.latent.norm() for i in (0, -1))
    assert last < 0.1 < first
    assert pipeline.decode(seen[0].estimate).shape == (1, 64, 64, 3)


def test_a_callback_can_stop(pipeline):
    seen = []
    (picture,) = pipeline.make(JOB, on_step=lambda step: seen.append(step) or step.index < 1)
    assert [step.index for step in seen] == [0, 1]
    assert np.array_equal(picture.pixels, pipeline.decode(seen[-1].estimate)[0])
    assert picture.notes["Stopped"] == "after step 2 of 3"


def test_latents_in_and_out(pipeline):
    (picture,) = pipeline.make(JOB)
    assert np.array_equal(pipeline.decode(picture.latent[None])[0], picture.pixels)
    image = Image.fromarray(picture.pixels)
    half = dataclasses.replace(JOB, strength=0.5, steps=4, posterior="mean")
    of_image = pipeline.make(dataclasses.replace(half, init=Init(image)))
    assert same(of_image, pipeline.make(half, latents=pipeline.encode(image)))
    assert not same(of_image, pipeline.make(half, latents=picture.latent[None]))


def test_a_saved_picture_makes_itself_again(pipeline, tmp_path):
    (picture,) = pipeline.make(JOB)
    path = picture.save(tmp_path / "cube.png", watermark=False)
    with Image.open(path) as image:
        assert np.array_equal(np.asarray(image), picture.pixels)
        assert same([picture], pipeline.make(job_from_infotext(image.info["parameters"])))
    with pytest.raises(FileExistsError):
        picture.save(path)


def test_the_bundled_model_needs_no_names(tmp_path):
    pipe = Pipeline.from_pretrained(device="cpu", precision="full")
    (picture,) = pipe("a red cube", steps=2)
    assert picture.pixels.shape == (128, 128, 3)
    assert picture.notes["Config"] == "shapes-inference"
    with Image.open(picture.save(tmp_path / "cube.png")) as image:
        text = image.info["parameters"]
    digest = hashlib.sha256((ROOT / "models/ldm/shapes/model.ckpt").read_bytes()).hexdigest()
    assert f"Model hash: {digest[:10]}, Model: shapes" in text


def test_what_the_safety_check_flags_is_blank(pipeline, monkeypatch):
    monkeypatch.setattr(pipeline, "screen", Screen(lambda images: torch.ones(len(images), dtype=torch.bool)))
    (picture,) = pipeline.make(JOB)
    assert not picture.pixels.any()
    assert picture.notes["Safety"] == "flagged"
