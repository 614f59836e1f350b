"""Programs that write a flat table of settings are recognised by marks, and read where their fields are known."""

from __future__ import annotations

import dataclasses
import gzip
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from ldm.job import Job
from ldm.metadata.foreign import programs
from ldm.metadata.read import Recipe, read_job
from ldm.metadata.recipe import Origin
from ldm.metadata.record import read_record, record
from ldm.util import InputError
from tests.support.metadata import ELEMENT, VALUES, XMP, noted

JOB = Job("a cat", "ugly", seed=5, width=64, height=96, steps=12, scale=3.0)
CPU = dataclasses.replace(JOB, rng="cpu")
KARRAS = dataclasses.replace(CPU, schedule="karras", convention="comfyui")

SWARM = {
    "sui_image_params": {
        "prompt": "a cat", "negativeprompt": "ugly", "model": "Official/v1-5", "seed": 5, "steps": 12, "cfgscale": 3,
        "width": 64, "height": 96, "sampler": "ddim", "scheduler": "normal", "loras": ["ink"], "loraweights": ["0.8"],
        "swarm_version": "0.9.3.1",
    },
    "sui_extra_data": {"date": "2025-01-25"},
}  # fmt: skip
RUINED = {
    "Prompt": "a cat", "Negative": "ugly", "steps": 12, "cfg": 3, "width": 64, "height": 96, "seed": 5,
    "sampler_name": "ddim", "scheduler": "karras", "base_model_name": "v1-5.safetensors", "clip_skip": 2,
    "loras": [["0123456789", "0.8 - styles\\ink.safetensors"]], "software": "RuinedFooocus",
}  # fmt: skip
FOOOCUS = {
    "prompt": "cat", "full_prompt": ["a cat"], "negative_prompt": "", "full_negative_prompt": ["ugly"], "seed": "5",
    "steps": 12, "guidance_scale": 3, "resolution": "(64, 96)", "sampler": "ddim", "scheduler": "karras",
    "base_model": "v1-5", "base_model_hash": "0123456789", "performance": "Speed", "sharpness": 2,
    "loras": [["ink", 0.8, "0123456789"]], "lora_combined_1": "ink : 0.8", "vae": "Default (model)",
    "version": "Fooocus v2.5.5",
}  # fmt: skip
TENSOR = {
    "prompt": "a cat", "negativePrompt": "ugly", "width": 64, "height": 96, "seed": "5", "steps": 12, "cfgScale": 3,
    "samplerName": "ddim", "baseModel": {"modelFileName": "v1-5", "hash": "0123456789"},
    "models": [{"type": "LORA", "modelFileName": "ink", "weight": 0.8, "hash": "0123456789"}],
}  # fmt: skip
MATRIX = {
    "PositivePrompt": "a cat", "NegativePrompt": "ugly", "Width": 64, "Height": 96, "Seed": 5, "Steps": 12,
    "CfgScale": 3, "Sampler": "DDIM", "ModelName": "v1-5.safetensors", "ModelHash": "0123456789",
}  # fmt: skip
EASY = {
    "prompt": "a cat", "negative_prompt": "ugly", "seed": "5", "use_stable_diffusion_model": "/models/v1-5.ckpt",
    "sampler_name": "ddim", "width": "64", "height": "96", "num_inference_steps": "12", "guidance_scale": "3",
    "clip_skip": "False", "use_vae_model": "None", "tiling": "none", "use_lora_model": "ink", "lora_alpha": "0.8",
}  # fmt: skip
EASY_NAMED = {
    "Prompt": "a cat", "Negative Prompt": "ugly", "Seed": "5", "Stable Diffusion model": "v1-5", "Sampler": "ddim",
    "Width": "64", "Height": "96", "Steps": "12", "Guidance Scale": "3", "Use Face Correction": "GFPGANv1.4",
}  # fmt: skip
DRAW = {
    "c": "a cat", "uc": "ugly", "model": "v1-5.ckpt", "sampler": "DDIM", "scale": 3, "seed": 5, "size": "64x96",
    "steps": 12, "strength": 1, "seed_mode": "Torch CPU Compatible",
    "v2": {"loras": [{"file": "ink.ckpt", "weight": 0.8}]},
}  # fmt: skip
NOVEL = {
    "prompt": "a cat", "uc": "ugly", "steps": 12, "scale": 3.0, "seed": 5, "sampler": "ddim", "width": 64,
    "height": 96, "strength": 0.7, "noise": 0.2, "request_type": "PromptGenerateRequest",
}  # fmt: skip
KOHYA = {
    "prompt": "a cat",
    "negative-prompt": "ugly",
    "seed": "5",
    "sampler": "ddim",
    "steps": "12",
    "scale": "3",
}

SYGIL = {
    "SD:prompt": "a cat ### ugly", "SD:seed": "5", "SD:width": "64", "SD:height": "96", "SD:steps": "12",
    "SD:cfg_scale": "3.0", "SD:sampler": "ddim", "SD:normalize_prompt_weights": "True",
    "SD:denoising_strength": "0.75",
}  # fmt: skip


def image(path: Path, texts: dict[str, str]) -> str:
    info = PngInfo()
    for key, text in texts.items():
        info.add_itxt(key, text)
    Image.new("RGB", (64, 96)).save(path, pnginfo=info)
    return str(path)


def held(content: dict[str, Any], keyword: str = "parameters") -> dict[str, str]:
    return {keyword: json.dumps(content)}


@pytest.mark.parametrize(("name", "texts", "job"), [
    ("SwarmUI", held(SWARM), CPU), ("RuinedFooocus", held(RUINED), KARRAS), ("Fooocus", held(FOOOCUS), KARRAS),
    ("TensorArt", held(TENSOR, "generation_data"), CPU), ("Draw Things", held(DRAW), CPU),
    ("Stability Matrix", held(MATRIX, "parameters-json") | {"parameters": "x"}, CPU), ("Easy Diffusion", EASY, JOB),
    ("Easy Diffusion", held(EASY), JOB), ("Easy Diffusion", EASY_NAMED, JOB), ("sd-scripts of kohya", KOHYA, JOB),
    ("Sygil", SYGIL, JOB),
    ("NovelAI", {"Software": "NovelAI", "Description": "a cat", "Comment": json.dumps(NOVEL)}, JOB),
])  # fmt: skip
def test_programs_are_read(name: str, texts: dict[str, str], job: Job, tmp_path: Path) -> None:
    recipe = read_job(image(tmp_path / "x.png", texts))
    assert (recipe.source, dataclasses.replace(recipe.job, loras=(), clip_skip=1)) == (name, job)
    assert not noted(recipe, "not used")
    assert recipe.job.loras == ((("ink", 0.8, 0.8),) if "ink" in str(texts) else ())
    assert recipe.model.partition(".")[0] == ("v1-5" if "v1-5" in str(texts) else "")


def test_clip_skip_is_read() -> None:
    for content, skip in ((RUINED, 2), (NOVEL | {"software": "NovelAI"}, 2), (EASY_NAMED, 1)):
        recipe = programs.read(held(content), Origin())
        assert recipe is not None and recipe.job.clip_skip == skip


def test_what_they_do_more_is_noted() -> None:
    for content, words in ((EASY_NAMED, ("face correction",)),):
        recipe = programs.read(held(content), Origin())
        assert recipe is not None and noted(recipe, *words), words
    fooocus = programs.read(held(FOOOCUS), Origin())
    assert fooocus is not None and fooocus.extras == {"Lora hashes": "ink: 0123456789"}
    assert not any("upscaling" in note for note in fooocus.notes)


@pytest.mark.parametrize(("content", "strength"), [
    (EASY | {"prompt_strength": "0.4", "init_image": "data:image/png;base64,AAAA" * 100}, 0.4),
    (DRAW | {"strength": 0.4}, 0.4), (NOVEL | {"request_type": "Img2ImgRequest", "noise_schedule": "native"}, 0.7),
    ({"sui_image_params": SWARM["sui_image_params"] | {"initimage": "a.png", "initimagecreativity": 0.6}}, 0.6),
])  # fmt: skip
def test_they_start_from_an_image(content: dict[str, Any], strength: float) -> None:
    recipe = programs.read(held(content), Origin())
    assert recipe is not None and recipe.job.strength == strength and noted(recipe, "starts from an image")


DESCRIPTION = (
    "a cat&#xA;-ugly&#xA;Steps: 12, Sampler: DDIM, Guidance Scale: 3.0, Seed: 5, Size: 64x96, Model: v1-5.ckpt, "
    "Strength: 1.0, Seed Mode: Torch CPU Compatible, Shift: 1.0"
)


@pytest.mark.parametrize("with_json", [True, False])
def test_xmp_of_draw_things(with_json: bool, tmp_path: Path) -> None:
    """Its description comes first in the file, and has less information than its JSON."""
    described = ELEMENT.format(DESCRIPTION).replace("UserComment", "description")
    packet = XMP.format(described + (ELEMENT.removeprefix(">").format(json.dumps(DRAW)) if with_json else ""))
    Image.new("RGB", (64, 96)).save(tmp_path / "x.jpg", xmp=packet.encode())
    recipe = read_job(str(tmp_path / "x.jpg"))
    plain = dataclasses.replace(recipe.job, loras=(), prompt_syntax="plain", clip_skip=1)
    assert (recipe.source, plain, recipe.model) == ("Draw Things", CPU, "v1-5.ckpt")
    assert recipe.job.loras == ((("ink", 0.8, 0.8),) if with_json else ())


MOCHI = (
    "Include in Image: a cat; Exclude from Image: ugly; Model: v1-5; Steps: 12; Guidance Scale: 3.0; Seed: 5; "
    "Size: 64x96; Upscaler: ; Scheduler: DDIM; ML Compute Unit: CPU &amp; GPU; Generator: Mochi Diffusion 4.0"
)


def test_the_description_of_mochi_diffusion(tmp_path: Path) -> None:
    packet = XMP.format(ELEMENT.format(MOCHI).replace("UserComment", "description"))
    Image.new("RGB", (64, 96)).save(tmp_path / "x.jpg", xmp=packet.encode())
    recipe = read_job(str(tmp_path / "x.jpg"))
    assert (recipe.source, recipe.job, recipe.model) == ("Mochi Diffusion", JOB, "v1-5")
    assert noted(recipe, "noise generator is not supported")


def hide(image: Image.Image, channels: tuple[int, ...], data: bytes) -> Image.Image:
    """Bits in the lowest bits of channels, one after another down each column."""
    bits = iter(f"{int.from_bytes(data, 'big'):0{8 * len(data)}b}")
    for x in range(image.width):
        for y in range(image.height):
            pixel = list(image.getpixel((x, y)))  # pyright: ignore[reportArgumentType]
            for i in channels:
                pixel[i] = pixel[i] & ~1 | int(next(bits, "0"))
            image.putpixel((x, y), tuple(pixel))
    return image


WEB_UI = "a cat\nNegative prompt: ugly\nSteps: 12, Sampler: DDIM, CFG scale: 3, Seed: 5, Size: 64x96"
NAI = json.dumps({"Software": "NovelAI", "Description": "a cat", "Comment": json.dumps(NOVEL)})


@pytest.mark.parametrize(("mark", "mode"), [
    (b"stealth_pnginfo", "RGBA"), (b"stealth_pngcomp", "RGBA"), (b"stealth_rgbinfo", "RGB"),
    (b"stealth_rgbcomp", "RGBA"),
])  # fmt: skip
@pytest.mark.parametrize(("text", "source"), [(WEB_UI, "A1111"), (NAI, "NovelAI")])
def test_a_text_hidden_in_the_pixels(mark: bytes, mode: str, text: str, source: str, tmp_path: Path) -> None:
    content = gzip.compress(text.encode()) if mark.endswith(b"comp") else text.encode()
    data = mark + (8 * len(content)).to_bytes(4, "big") + content
    drawn = Image.new(mode, (64, 96), (90, 120, 150, 255)[: len(mode)])
    hide(drawn, (3,) if b"png" in mark else (0, 1, 2), data).save(tmp_path / "x.png")
    recipe = read_job(str(tmp_path / "x.png"))
    plain = dataclasses.replace(recipe.job, prompt_syntax="plain", timestep_spacing="uniform", clip_skip=1)
    assert (recipe.source, plain) == (source, JOB)


@pytest.mark.parametrize(
    "content",
    [b"\x1f\x8b damaged", gzip.compress(b"\xff\xfe"), gzip.compress(bytes(5_000_000))],
    ids=["damaged", "no text", "inflates"],  # not the bytes, which hold the time
)
def test_a_hidden_text_that_is_damaged_or_inflates_says_nothing(content: bytes, tmp_path: Path) -> None:
    data = b"stealth_pngcomp" + b"\xff\xff\xff\xff" + content
    hide(Image.new("RGBA", (256, 256), (90, 120, 150, 255)), (3,), data).save(tmp_path / "x.png")
    with pytest.raises(InputError, match="holds no generation settings"):
        read_job(str(tmp_path / "x.png"))


@pytest.mark.parametrize("content", [
    {"Software": "NovelAI", "Description": "a cat", "Comment": json.dumps(NOVEL)}, SWARM, FOOOCUS,
])  # fmt: skip
@pytest.mark.parametrize("ending", ["jpg", "webp"])
def test_json_in_exif(content: dict[str, Any], ending: str, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif.get_ifd(0x8769)[0x9286] = b"UNICODE\0" + json.dumps(content).encode("utf-16-le")
    Image.new("RGB", (64, 96)).save(tmp_path / f"x.{ending}", exif=exif)
    job = read_job(str(tmp_path / f"x.{ending}")).job
    assert dataclasses.replace(job, loras=(), rng="cpu", clip_skip=1) == (
        KARRAS if content is FOOOCUS else CPU
    )


def test_a_graph_of_comfyui_in_webp(tmp_path: Path) -> None:
    from tests.support.metadata import graph

    exif = Image.Exif()
    exif[0x0110] = f"prompt:{json.dumps(graph())}"
    exif[0x010F] = "workflow:{}"
    Image.new("RGB", (64, 96)).save(tmp_path / "x.webp", exif=exif)
    assert read_job(str(tmp_path / "x.webp")).source == "ComfyUI"


@pytest.mark.parametrize(("texts", "words"), [
    ({"Software": "Imaginairy / Stable Diffusion v1.4", "Comment": "{}"}, "made with imaginAIry"),
    ({"Description": "a cat --v 6 Job ID: 0123"}, "made with Midjourney"),
    ({"Nmkdiffusion": '{"prompt": "a cat"}'}, "made with NMKD"),
    ({"Software": "NovelAI"}, "made with NovelAI"), ({"Software": "GIMP"}, "holds no generation settings"),
    ({"parameters": '{"foo": 1}'}, "JSON of a program that is not supported"),
])  # fmt: skip
def test_others_are_named(texts: dict[str, str], words: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=words) as caught:
        read_job(image(tmp_path / "x.png", texts))
    assert "Fooocus" not in str(caught.value)


LINES = (
    "a cat\nWidth: 64\nHeight: 96\nSeed: 5\nSteps: 12\nGuidance Scale: 3\nPrompt Strength: 0.8\nSampler: ddim\n"
    "Negative Prompt: ugly\nStable Diffusion model: /models/v1-5.ckpt\n"
)


@pytest.mark.parametrize(("ending", "text", "source"), [
    ("json", json.dumps(EASY), "Easy Diffusion"), ("json", json.dumps({"reqBody": EASY}), "Easy Diffusion"),
    ("txt", "".join(f"{key}: {value}\n" for key, value in EASY_NAMED.items()), "Easy Diffusion"),
    ("txt", LINES, "Easy Diffusion"),
    ("txt", "a cat\nNegative prompt: ugly\nSteps: 12, Sampler: DDIM, CFG scale: 3, Seed: 5, Size: 64x96\n", "A1111"),
])  # fmt: skip
def test_settings_in_a_file_beside_the_image(ending: str, text: str, source: str, tmp_path: Path) -> None:
    Image.new("RGB", (64, 96)).save(tmp_path / "x.jpg")
    (tmp_path / f"x.{ending}").write_text(text, "utf-8")
    recipe = read_job(str(tmp_path / "x.jpg"))
    plain = dataclasses.replace(recipe.job, loras=(), prompt_syntax="plain", timestep_spacing="uniform")
    assert (plain, recipe.source) == (JOB, source) and noted(recipe, f"x.{ending}, next to it")


def test_a_caption_beside_an_image_says_nothing(tmp_path: Path) -> None:
    Image.new("RGB", (64, 96)).save(tmp_path / "x.jpg")
    (tmp_path / "x.txt").write_text("a cat on a mat, Style: oil")
    (tmp_path / "x.json").mkdir()
    with pytest.raises(InputError, match="holds no generation settings"):
        read_job(str(tmp_path / "x.jpg"))


def test_independent_readers_agree() -> None:
    sd_parsers = pytest.importorskip("sd_parsers")
    texts = {
        "Software": "NovelAI",
        "Description": "a cat",
        "Source": "Stable Diffusion 81274D13",
        "Comment": json.dumps(NOVEL),
    }
    for parser, table in (
        (sd_parsers.parsers.NovelAIParser, texts),
        (sd_parsers.parsers.FooocusParser, held(FOOOCUS)),
    ):
        (sampler,) = parser().parse(table).samplers
        recipe = programs.read(table, Origin())
        assert recipe is not None
        assert (int(sampler.parameters["seed"]), float(sampler.parameters["cfg_scale"])) == (
            5,
            recipe.job.scale,
        )
        assert sampler.name == recipe.job.sampler


TABLES = [SWARM["sui_image_params"], RUINED, FOOOCUS, TENSOR, MATRIX, EASY, DRAW, NOVEL]


@given(
    table=st.sampled_from(TABLES),
    changes=st.dictionaries(st.sampled_from(sorted({k for t in TABLES for k in t})), VALUES),
)
@settings(max_examples=50, deadline=None)
def test_hostile_tables_are_read_or_refused(table: dict[str, Any], changes: dict[str, Any]) -> None:
    try:
        recipe = programs.read(held(table | changes), Origin("x.png", (64, 96)))
    except InputError:
        return
    if recipe is not None:
        assert isinstance(recipe, Recipe) and read_record(record(recipe.job, {})).job == recipe.job
        assert all(note.isprintable() for note in recipe.notes)
