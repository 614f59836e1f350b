"""Models that edit images (InstructPix2Pix): guidance by prompt and image, diffusers' own figures, files."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import scripts.img2img as img2img
import scripts.replay as replay
from ldm.checkpoints.configs import EDIT_CONFIG, config_for
from ldm.checkpoints.convert import convert
from ldm.checkpoints.formats.read import Checkpoint, read_checkpoint
from ldm.checkpoints.load import skip_init
from ldm.checkpoints.model_files import read_model
from ldm.config import read_config
from ldm.job import Init, Job
from ldm.metadata.infotext import infotext, job_from_infotext
from ldm.metadata.read import read_job
from ldm.models.diffusion.guidance import Guidance
from ldm.pipeline import Pipeline
from ldm.util import InputError, instantiate_from_config
from tests.support.golden_data import (
    edit_config,
    keys,
    relative_error,
    small_config,
    tiny_model,
    weight_of,
    written_model,
)

JOB = Job(
    "make it blue", negative_prompt="grey", width=64, height=64, steps=4, seed=11, scale=6.0, image_scale=1.6
)


def photo() -> np.ndarray:
    return np.random.RandomState(3).randint(0, 256, (64, 64, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_model(edit_config(small_config()))


@pytest.fixture(scope="module")
def pipeline(model: Any) -> Pipeline:
    return Pipeline(model)


@pytest.fixture(scope="module")
def job() -> Job:
    return replace(JOB, init=Init(photo()))


class Table:
    """Predicts a number for each conditioning, whatever the latents."""

    def apply_model(self, x: torch.Tensor, t: torch.Tensor, cond: torch.Tensor) -> torch.Tensor:
        return cond[:, None, None, None].expand(x.shape)


def predicted(guidance: Guidance) -> float:
    return float(guidance.noise(Table(), torch.zeros(1, 4, 2, 2), torch.zeros(1)).flatten()[0])


NEITHER, IMAGE, BOTH = (torch.tensor([value], dtype=torch.float64) for value in (2.0, 5.0, 11.0))


@pytest.mark.parametrize(("text", "image"), [(7.5, 1.5), (1.0, 2.0), (3.0, 1.0), (0.0, 0.0)])
def test_the_guidance_is_equation_3(text: float, image: float) -> None:
    guidance = Guidance(BOTH, NEITHER, text, image=IMAGE, image_scale=image)
    assert predicted(guidance) == pytest.approx(2 + image * (5 - 2) + text * (11 - 5))
    half = guidance.with_share(0.5)
    assert predicted(half) == pytest.approx(2 + (1 + image) / 2 * 3 + (1 + text) / 2 * 6)
    assert predicted(guidance.with_share(0)) == 11


def test_prompts_that_are_joined_move_away_from_the_image_alone() -> None:
    both = torch.tensor([11.0, 7.0], dtype=torch.float64)
    weights = torch.tensor([1.0, -0.5])[:, None, None, None, None]
    guidance = Guidance(both, NEITHER, 2.0, 0.0, weights, IMAGE, 1.5)
    assert predicted(guidance) == pytest.approx(2 + 1.5 * 3 + 2 * (6 - 0.5 * 2))


@pytest.fixture(scope="module")
def theirs(model: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The same weights in diffusers' pipeline for such models, by way of its own folder."""
    diffusers = pytest.importorskip("diffusers")
    folder = tmp_path_factory.mktemp("edit") / "folder"
    convert(
        Checkpoint(folder, "torch zip", model.state_dict()), edit_config(small_config()), folder, "diffusers"
    )
    pipe = diffusers.StableDiffusionInstructPix2PixPipeline
    parts = {
        "vae": diffusers.AutoencoderKL.from_pretrained(folder / "vae"),
        "unet": diffusers.UNet2DConditionModel.from_pretrained(folder / "unet"),
        "scheduler": diffusers.DDIMScheduler.from_pretrained(folder / "scheduler"),
    }
    made = pipe(**parts, text_encoder=None, tokenizer=None, safety_checker=None, feature_extractor=None,
                requires_safety_checker=False)  # fmt: skip
    made.set_progress_bar_config(disable=True)
    return made


@pytest.mark.long
@pytest.mark.parametrize(("scale", "image_scale"), [(6.0, 1.6), (3.0, 1.0)])
@torch.no_grad()
def test_diffusers_makes_the_same_latents(
    pipeline: Pipeline, theirs: Any, job: Job, scale: float, image_scale: float
) -> None:
    job = replace(job, scale=scale, image_scale=image_scale)
    code = weight_of("noise", (1, 4, 8, 8))
    (ours,) = pipeline.make([job], start_code=code)
    encode = pipeline.model.get_learned_conditioning
    expected = theirs(
        prompt_embeds=encode([job.prompt]),
        negative_prompt_embeds=encode([job.negative_prompt]),
        image=Image.fromarray(photo()),
        num_inference_steps=job.steps,
        guidance_scale=scale,
        image_guidance_scale=image_scale,
        latents=code,
        output_type="latent",
    ).images
    assert relative_error(ours.latent[None], expected) < 1e-5


def test_the_image_is_seen_and_not_noised(pipeline: Pipeline, job: Job) -> None:
    """Of any strength; a mask keeps the rest of it besides."""
    a, b, other = (
        pipeline.make([one])[0].pixels
        for one in (job, replace(job, strength=0.3), replace(job, init=Init(255 - photo())))
    )
    assert np.array_equal(a, b) and not np.array_equal(a, other)
    mask = np.zeros((64, 64), np.uint8)
    mask[:, 32:] = 255
    (part,) = pipeline.make([replace(job, init=Init(photo(), mask=mask))])
    assert np.array_equal(part.pixels[:, :32], photo()[:, :32])
    (larger,) = pipeline.make([replace(job, upscale=2.0, steps=2)])
    assert larger.pixels.shape == (128, 128, 3)


def test_without_an_image_it_is_guided_by_the_prompt(pipeline: Pipeline) -> None:
    text = replace(JOB, image_scale=1.5)
    a, b = (pipeline.make([one])[0].pixels for one in (text, replace(text, scale=1.0)))
    assert not np.array_equal(a, b)


def test_a_batch_is_its_images(pipeline: Pipeline, job: Job) -> None:
    jobs = [replace(job, seed=seed, scale=scale) for seed, scale in ((1, 4.0), (2, 7.0))]
    together = [image.latent for image in pipeline.make(jobs)]
    for one, latent in zip(jobs, together, strict=True):
        assert relative_error(latent, pipeline.make([one])[0].latent) < 1e-5


def test_other_models_refuse_its_scale() -> None:
    pipeline = Pipeline(tiny_model(small_config()))
    with pytest.raises(InputError, match=r"--image_scale 1\.6 is for models that edit images"):
        pipeline.make([replace(JOB, init=Init(photo()))])


# --- files ----------------------------------------------------------------------------------------------------------


def test_the_config_has_the_published_shapes() -> None:
    """Those of v1, but for the first convolution: timbrooks/instruct-pix2pix has 8 channels there."""
    with torch.device("meta"), skip_init():
        model = instantiate_from_config(read_config(EDIT_CONFIG))
    first = "model.diffusion_model.input_blocks.0.0.weight"
    expected = {**keys("keys_v1.json"), first: [320, 8, 3, 3]}
    shapes = {key: list(value.shape) for key, value in model.state_dict().items()}
    assert {key: shape for key, shape in shapes.items() if not key.endswith("position_ids")} == {
        key: shape for key, shape in expected.items() if not key.endswith("position_ids")
    }


def test_its_content_chooses_the_config(model: Any, tmp_path: Path) -> None:
    config = edit_config(small_config())
    assert config_for(model.state_dict()) == EDIT_CONFIG
    torch.save(model.state_dict(), tmp_path / "edit.pt")
    convert(read_model(tmp_path / "edit.pt"), config, tmp_path / "folder", "diffusers")
    index = (tmp_path / "folder/model_index.json").read_text()
    assert '"StableDiffusionInstructPix2PixPipeline"' in index
    convert(read_model(tmp_path / "folder"), config, tmp_path / "edit.safetensors", "compvis")
    found = read_checkpoint(tmp_path / "edit.safetensors")
    assert found.metadata["modelspec.architecture"] == "stable-diffusion-v1-edit"
    assert found.state_dict.keys() == model.state_dict().keys()


@pytest.mark.long
def test_the_command_and_its_replay(
    model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Image.fromarray(photo()).save("photo.png")
    chosen = written_model(edit_config(small_config()), model=model)
    options = [*chosen, "--device", "cpu", "--precision", "full"]
    typed = ["--init-img", "photo.png", "--prompt", "make it blue", "--ddim_steps", "2", "--n_samples", "1"]
    assert img2img.main([*options, *typed, "--image_scale", "1.2", "--outdir", "out"]) == 0
    assert "edits the image that it sees, and starts from noise" in capsys.readouterr().err
    file = str(tmp_path / "out/samples/00000.png")
    made = read_job(file).job
    assert (made.image_scale, made.strength) == (1.2, 1.0)
    assert replay.main([file, "--init-img", "photo.png", "--verify", "--quiet", *options]) == 0
    assert "identical" in capsys.readouterr().out
    assert img2img.main([*typed, "--image_scale", "1.2", "--outdir", "other", "--quiet"]) == 2
    assert "is for models that edit images" in capsys.readouterr().err.splitlines()[-1]


def test_the_web_uis_entry_is_read() -> None:
    text = infotext(replace(JOB, init=Init("photo.png")), {"Version": "ldm x"})
    assert "Image CFG scale: 1.6" in text and job_from_infotext(text).image_scale == 1.6
