"""IP-Adapters: diffusers' own figures with the same weights, files, the image encoder, mistakes."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from ldm.checkpoints.adapters.control import read_control
from ldm.checkpoints.adapters.ip import ip_network
from ldm.checkpoints.convert import convert
from ldm.checkpoints.formats.detect import CheckpointError
from ldm.checkpoints.formats.read import Checkpoint, read_checkpoint
from ldm.job import Job
from ldm.pipeline import Pipeline
from ldm.pipeline.image_prompt import prepared, see
from ldm.util import InputError
from tests.support.control import ENCODER, ip_layers, ip_weights, weights_of
from tests.support.golden_data import relative_error, small_config, tiny_model, weight_of, written_model

JOB = Job("a red cube", width=64, height=64, steps=2, seed=11, scale=6.0)


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_model(small_config())


@pytest.fixture(scope="module")
def pipeline(model: Any) -> Pipeline:
    return Pipeline(model)


def plus(model: Any) -> dict[str, Tensor]:
    """Two heads, as many layers as the published one."""
    shapes = {"latents": (1, 6, 48), "proj_in.weight": (48, 32), "proj_in.bias": (48,), "proj_out.weight": (16, 48),
              "proj_out.bias": (16,), "norm_out.weight": (16,), "norm_out.bias": (16,)}  # fmt: skip
    for i in range(4):
        attention = {"norm1.weight": (48,), "norm1.bias": (48,), "norm2.weight": (48,), "norm2.bias": (48,),
                     "to_q.weight": (128, 48), "to_kv.weight": (256, 48), "to_out.weight": (48, 128)}  # fmt: skip
        feed = {"0.weight": (48,), "0.bias": (48,), "1.weight": (192, 48), "3.weight": (48, 192)}
        shapes |= {f"layers.{i}.0.{name}": shape for name, shape in attention.items()}
        shapes |= {f"layers.{i}.1.{name}": shape for name, shape in feed.items()}
    return weights_of({f"image_proj.{name}": shape for name, shape in shapes.items()} | ip_layers(model))


@pytest.fixture(scope="module")
def folder(model: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Both kinds, in both formats, with an image encoder beside them, and two images."""
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    folder = tmp_path_factory.mktemp("ip")
    torch.manual_seed(0)
    CLIPVisionModelWithProjection(CLIPVisionConfig(**ENCODER)).save_pretrained(folder / "image_encoder")
    for name, weights in (("plain", ip_weights(model)), ("plus", plus(model))):
        save_file(weights, folder / f"{name}.safetensors")
        parts: dict[str, dict[str, Tensor]] = {"image_proj": {}, "ip_adapter": {}}
        for key, tensor in weights.items():
            part, _, rest = key.partition(".")
            parts[part][rest] = tensor
        torch.save(parts, folder / f"{name}.bin")
    for name, seed in (("one", 1), ("two", 2)):
        pixels = np.random.RandomState(seed).randint(0, 256, (40, 56, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{name}.png")
    return folder


def prompted(folder: Path, *controls: tuple[str, str, float], job: Job = JOB, ends: Any = (0.0, 1.0)) -> Job:
    given = (
        (str(folder / file), str(folder / f"{image}.png"), weight, *ends) for file, image, weight in controls
    )
    return replace(job, controls=tuple(given))


def made(pipeline: Pipeline, *jobs: Job) -> list[Tensor]:
    return [image.latent for image in pipeline.make(jobs)]


@pytest.fixture(scope="module")
def theirs(model: Any, folder: Path) -> Any:
    """The same U-Net in diffusers' pipeline."""
    diffusers = pytest.importorskip("diffusers")
    out = folder / "diffusers"
    convert(Checkpoint(folder, "torch zip", model.state_dict()), small_config(), out, "diffusers")
    pipe = diffusers.StableDiffusionPipeline(
        vae=diffusers.AutoencoderKL.from_pretrained(out / "vae"), text_encoder=None, tokenizer=None,
        unet=diffusers.UNet2DConditionModel.from_pretrained(out / "unet"), safety_checker=None,
        scheduler=diffusers.DDIMScheduler.from_pretrained(out / "scheduler"), feature_extractor=None,
        image_encoder=None, requires_safety_checker=False,
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.long
@pytest.mark.parametrize(
    "controls",
    [
        [("plain.bin", "one", 0.7)],
        [("plus.safetensors", "one", 1.0)],
        [("plain.safetensors", "one", 0.5), ("plus.bin", "two", 0.8)],
    ],
    ids=lambda controls: " ".join(file for file, *_ in controls),
)
@torch.no_grad()
def test_diffusers_makes_the_same_latents(
    model: Any, pipeline: Pipeline, theirs: Any, folder: Path, controls: list[tuple[str, str, float]]
) -> None:
    from transformers import CLIPVisionModelWithProjection

    files = [file for file, *_ in controls]
    theirs.load_ip_adapter(str(folder), subfolder="", weight_name=files, image_encoder_folder=None)
    theirs.set_ip_adapter_scale([weight for *_, weight in controls])
    encoder = CLIPVisionModelWithProjection.from_pretrained(folder / "image_encoder")
    embeds = []
    for file, image, _ in controls:
        pixels = prepared(np.asarray(Image.open(folder / f"{image}.png")), ENCODER["image_size"])
        if file.startswith("plus"):
            both = encoder(
                torch.cat([torch.zeros_like(pixels), pixels]), output_hidden_states=True
            ).hidden_states[-2]
        else:
            found = encoder(pixels).image_embeds
            both = torch.cat([torch.zeros_like(found), found])
        embeds.append(both[:, None])
    code = weight_of("noise", (1, 4, 8, 8))
    expected = theirs(
        prompt_embeds=model.get_learned_conditioning([JOB.prompt]),
        negative_prompt_embeds=model.get_learned_conditioning([""]),
        ip_adapter_image_embeds=embeds, num_inference_steps=JOB.steps, guidance_scale=JOB.scale, latents=code,
        output_type="latent",
    ).images  # fmt: skip
    (ours,) = pipeline.make([prompted(folder, *controls)], start_code=code)
    assert relative_error(ours.latent[None], expected) < 1e-5
    (without,) = pipeline.make([JOB], start_code=code)
    assert relative_error(without.latent[None], expected) > 1e-3


def test_both_formats_hold_the_same(folder: Path) -> None:
    for name in ("plain", "plus"):
        first, second = (
            read_checkpoint(folder / f"{name}{end}").state_dict for end in (".bin", ".safetensors")
        )
        assert first.keys() == second.keys()
        assert all(torch.equal(first[key], second[key]) for key in first)


def test_weights_and_windows(pipeline: Pipeline, folder: Path) -> None:
    without, none, never = made(
        pipeline, JOB, prompted(folder, ("plain.bin", "one", 0.0)),
        prompted(folder, ("plain.bin", "one", 1.0), ends=(0.3, 0.6)),
    )  # fmt: skip
    assert torch.equal(without, none) and torch.equal(without, never)
    twice, once = made(
        pipeline,
        prompted(folder, ("plain.bin", "one", 0.25), ("plain.safetensors", "one", 0.25)),
        prompted(folder, ("plain.bin", "one", 0.5)),
    )
    assert relative_error(twice, once) < 1e-5
    assert torch.equal(made(pipeline, JOB)[0], without)  # nothing stays on the model


def test_without_guidance_and_in_a_batch(pipeline: Pipeline, folder: Path) -> None:
    jobs = [prompted(folder, ("plus.bin", "one", 0.6), job=replace(JOB, seed=seed)) for seed in (1, 2)]
    for one, latent in zip(jobs, made(pipeline, *jobs), strict=True):
        assert relative_error(latent, made(pipeline, one)[0]) < 1e-5
    plain, seen = made(pipeline, *(replace(one, scale=1.0) for one in (JOB, jobs[0])))
    assert relative_error(plain, seen) > 1e-3


def test_an_image_is_prepared_as_clip_does_it(folder: Path) -> None:
    transformers = pytest.importorskip("transformers")
    processor = getattr(transformers, "CLIPImageProcessorPil", None) or transformers.CLIPImageProcessor
    image = Image.open(folder / "one.png")
    theirs = processor(size={"shortest_edge": 28}, crop_size=28)(image, return_tensors="pt").pixel_values
    assert torch.allclose(prepared(np.asarray(image), 28), theirs, atol=1e-6)


def test_the_plus_adapter_sees_all_states(folder: Path) -> None:
    one = str(folder / "one.png")
    assert see(folder / "plus.bin", one, True, 32, torch.device("cpu")).shape == (2, 5, 32)
    with pytest.raises(InputError, match="is an image encoder of 24 numbers, and the IP-Adapter reads 1024"):
        see(folder / "plain.bin", one, False, 1024, torch.device("cpu"))


# --- mistakes -------------------------------------------------------------------------------------------------------


def changed(model: Any, name: str) -> dict[str, Tensor]:
    weights = ip_weights(model)
    if name == "SDXL":
        return {key: torch.zeros(64, 2048) if key.endswith("_ip.weight") else t for key, t in weights.items()}
    if name == "FaceID":
        return {**weights, "image_proj.proj.2.weight": torch.zeros(4, 4)}
    if name == "layers":
        return {key: tensor for key, tensor in weights.items() if not key.startswith("ip_adapter.3.")}
    return {key: tensor for key, tensor in weights.items() if key != "image_proj.norm.weight"}


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("SDXL", "is an IP-Adapter for SDXL, and this toolkit runs Stable Diffusion v1"),
        (
            "FaceID",
            "is an IP-Adapter FaceID, which reads faces by InsightFace's network.*give ip-adapter-plus-face",
        ),
        ("layers", "layers of attention, of other sizes than the model's"),
        ("norm", "image_proj is incomplete"),
    ],
)
def test_other_files_are_named(model: Any, tmp_path: Path, name: str, said: str) -> None:
    save_file(changed(model, name), tmp_path / "a.safetensors")
    with pytest.raises(CheckpointError, match=said):
        ip_network(read_control(tmp_path / "a.safetensors").source, model.model.diffusion_model)


def test_without_an_encoder_its_place_is_named(model: Any, tmp_path: Path, folder: Path) -> None:
    save_file(ip_weights(model), tmp_path / "a.safetensors")
    job = replace(JOB, controls=((str(tmp_path / "a.safetensors"), str(folder / "one.png"), 1.0, 0.0, 1.0),))
    with pytest.raises(InputError, match="needs CLIP's image encoder: put the folder image_encoder"):
        Pipeline(model).make([job])


@pytest.mark.long
def test_the_command_and_its_replay(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from transformers import CLIPVisionModelWithProjection

    import scripts.replay as replay
    import scripts.txt2img as txt2img

    monkeypatch.chdir(tmp_path)
    options = [*written_model(small_config()), "--device", "cpu", "--quiet"]
    control = f"{folder / 'plain.bin'}:{folder / 'one.png'}:0.6"
    typed = ["--prompt", "a red cube", "--W", "64", "--H", "64", "--ddim_steps", "2", "--n_samples", "1"]
    assert txt2img.main([*options, *typed, "--n_iter", "1", "--control", control, "--save_hints"]) == 0
    file = tmp_path / "outputs/txt2img-samples/samples/00000.png"
    entries = Image.open(file).text
    assert json.dumps(["plain.bin", "one.png", 0.6, 0.0, 1.0])[1:-1] in entries["ldm"]
    for name in ("plain.bin", "one.png"):
        (file.parent / name).write_bytes((folder / name).read_bytes())
    (file.parent / "image_encoder").symlink_to(folder / "image_encoder")
    assert replay.main([str(file), "--verify", *options]) == 0
    assert "another one" not in (said := capsys.readouterr()).err and "identical" in said.out
    encoder = CLIPVisionModelWithProjection.from_pretrained(folder / "image_encoder")
    for weight in encoder.parameters():
        weight.data *= 1.01
    (file.parent / "image_encoder").unlink()
    encoder.save_pretrained(file.parent / "image_encoder")
    replay.main([str(file), "--outdir", "again", *options])
    assert "the image encoder for" in capsys.readouterr().err
    assert not list(tmp_path.rglob("hints/*"))
    assert replay.main([str(file), "--verify", "--control", control, *options]) == 0
    assert "identical" in capsys.readouterr().out
    assert txt2img.main([*options, *typed, "--control", f"{folder / 'plain.bin'}:none.png"]) == 2
    settings = file.parent / "image_encoder/config.json"
    settings.write_text(settings.read_text().replace('"projection_dim": 24', '"projection_dim": 48'))
    capsys.readouterr()
    monkeypatch.setattr(
        "ldm.pipeline.load.load_into", lambda *rest, **more: pytest.fail("weights were loaded")
    )
    assert (
        txt2img.main([*options, *typed, "--control", f"{file.parent / 'plain.bin'}:{folder / 'one.png'}"])
        == 2
    )
    assert "is an image encoder of 48 numbers, and the IP-Adapter reads 24" in capsys.readouterr().err
