from __future__ import annotations

import dataclasses
import io
import time
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from ldm.images.writer import encode_png
from ldm.job import Init, Job
from ldm.metadata.infotext import infotext, job_from_infotext, parse_infotext
from ldm.util import InputError
from tests.support.metadata import EXTRAS, FULL, HOSTILE


def test_layout() -> None:
    job = Job(prompt="a cat,\non a mat", negative_prompt="dog", seed=7, width=512, height=768)
    assert infotext(job, EXTRAS) == (
        "a cat,\n"
        "on a mat\n"
        "Negative prompt: dog\n"
        "Steps: 50, Sampler: DDIM, CFG scale: 7.5, Seed: 7, Size: 512x768, Model hash: 6ce0161689, "
        'Model: "v1-5, pruned: ema", RNG: NV, Precision: full, Version: 1.2'
    )


def test_numbers_and_defaults_are_written_plainly() -> None:
    text = infotext(
        dataclasses.replace(
            FULL, prompt="x", negative_prompt="", scale=7.0, eta=1.0, upscale=2.0, loras=(), controls=()
        ),
        {},
    )
    assert text == (
        "x\nSteps: 999, Sampler: PLMS, CFG scale: 7, Seed: 18446744073709551615, Size: 768x8, RNG: GPU, "
        "Schedule type: Karras, Sigmas: 14.6 0.5 0, Timesteps: 999 1.5, Eta DDIM: 1, Sigma noise: 0.9, "
        "Sigma churn: 2.5, Convention: comfyui, Step noise: brownian, Step RNG: CPU, ENSD: 31337, "
        "Timestep spacing: compvis, Seed mode: batch, Batch index: 5, "
        "Denoising strength: 0.3, "
        'Posterior: mean, Init image: "photo, of: me.png", Init width: 768, Init height: 8, Resize: pad, '
        "Background: #102030, Outpaint: 8 0 16 24, Mask: mask.png, Alpha mask: on, Invert mask: on, "
        "Mask levels: on, Masked area padding: 24, Mask blur: 0.5, "
        "Paste: off, Hires upscale: 2, Hires upscaler: Latent, Upscale strength: 0.3333333333333333, "
        "Guidance interval: 0.1 0.3333333333333333, Guidance interval in: sigma, Guidance schedule: linear_down, "
        "Prompt syntax: a1111, Clip skip: 2, Guidance rescale: 0.7, Variation seed: 9223372036854775808, "
        "Variation seed strength: 0.25, Seamless: x, Cache steps: 3 1 10, Token merging ratio: 0.5, "
        "Image CFG scale: 1.25, Hint: inpaint, Control mode: guess, Control resize: pad"
    )
    assert "RNG: CPU" in infotext(Job(prompt="x", rng="cpu", width=512, height=512), {})


def test_every_field_of_a_job_survives() -> None:
    defaults = Job(prompt="", width=512, height=512)
    for field in dataclasses.fields(Job):
        assert getattr(FULL, field.name) != getattr(defaults, field.name), f"FULL should vary {field.name}"
    assert FULL.init is not None
    for field in dataclasses.fields(Init):
        assert getattr(FULL.init, field.name) != getattr(Init("x"), field.name), f"FULL.init: {field.name}"
    assert job_from_infotext(infotext(FULL, EXTRAS)) == FULL


def test_folders_of_files_stay_private() -> None:
    job = dataclasses.replace(FULL, init=Init("/home/me/secret/photo.png", mask="secret/mask.png"))
    text = infotext(job, {})
    assert "secret" not in text and "photo.png" in text and "mask.png" in text


@pytest.mark.parametrize("sampler", ["ddim", "plms", "dpm_solver"])
@pytest.mark.parametrize("rng", ["philox", "cpu", "device", "numpy"])
def test_names_survive(sampler: str, rng: str) -> None:
    job = Job(prompt="x", sampler=sampler, rng=rng, width=512, height=512)
    assert job_from_infotext(infotext(job, {})) == job


@pytest.mark.parametrize("prompt", HOSTILE)
@pytest.mark.parametrize("negative", ["", "5x5", *HOSTILE[3:8], "a\x00"])
def test_hostile_prompts_survive_as_text_and_in_a_file(prompt: str, negative: str) -> None:
    job = Job(prompt=prompt, negative_prompt=negative, width=512, height=512)
    text = infotext(job, EXTRAS)
    assert job_from_infotext(text) == job
    assert parse_infotext(text)["Model"] == EXTRAS["Model"]
    assert not set(text) & {"\x00", "\x1b", "\x9b", "\r", "\x7f"}
    png = encode_png(np.zeros((8, 8, 3), np.uint8), text)
    with Image.open(io.BytesIO(png)) as image:
        assert job_from_infotext(image.info["parameters"]) == job


@given(prompt=st.text(), negative=st.text(alphabet='Negative prompt:\n\r", x5\\\x00é\ud800'), extra=st.text())
def test_any_text_survives(prompt: str, negative: str, extra: str) -> None:
    job = Job(prompt=prompt, negative_prompt=negative, width=512, height=512)
    text = infotext(job, {"Note": extra, "Version": "1"})
    text.encode("utf-8")
    assert job_from_infotext(text) == job
    assert parse_infotext(text).get("Note", "") == extra


@given(scale=st.floats(allow_nan=False), eta=st.floats(allow_nan=False), seed=st.integers())
def test_numbers_survive_exactly(scale: float, eta: float, seed: int) -> None:
    job = Job(prompt="x", scale=scale, eta=eta, seed=seed, width=512, height=512)
    assert job_from_infotext(infotext(job, {})) == job


def test_ordinary_prompts_need_no_exact_form() -> None:
    for prompt in ("", "a cat", "two\nlines", 'commas, colons: "quotes"', "日本語 👩‍🚀", "  spaces  "):
        assert "Exact" not in infotext(Job(prompt=prompt, negative_prompt=prompt, width=512, height=512), {})


@pytest.mark.parametrize(
    "key", ["Seed", "RNG", "Eta DDIM", "Size-1", "Prompt", "Negative prompt", "a: b", "x", "", "new\nline"]
)
def test_extras_cannot_pose_as_something_else(key: str) -> None:
    with pytest.raises(ValueError, match="extra entry"):
        infotext(Job(prompt="x", width=512, height=512), {key: "1"})


@pytest.mark.parametrize("value", ["512x512", "0x0", '"512x512"', '"', '"a"', "a\\", " x"])
def test_extras_that_look_like_something_else_survive(value: str) -> None:
    text = infotext(FULL, {"Model": value, "Note": value, "Version": value})
    entries = parse_infotext(text)
    assert [entries[key] for key in ("Model", "Note", "Version")] == [value] * 3
    assert "Model-1" not in entries
    assert job_from_infotext(text) == FULL


def test_empty_extras_are_left_out() -> None:
    assert "Model" not in infotext(Job(prompt="x", width=512, height=512), {"Model": ""})


def test_a_text_of_the_web_ui_is_read() -> None:
    text = (
        "masterpiece, (cat:1.2) <lora:x:0.8>\r\nNegative prompt: lowres,\r\nugly\r\nSteps: 20, "
        "Sampler: DPM++ 2M, Schedule type: Karras, CFG scale: 7, Seed: 965400086, Size: 640x448, "
        'Model hash: 6ce0161689, Model: v1-5, Lora hashes: "x: abc, y: def", RNG: CPU, Version: v1.10.1\n'
    )
    entries = parse_infotext(text)
    assert entries["Lora hashes"] == "x: abc, y: def"
    assert entries["Schedule type"] == "Karras"
    assert (entries["Size-1"], entries["Size-2"]) == ("640", "448")
    assert job_from_infotext(text) == Job(
        prompt="masterpiece, (cat:1.2)",
        loras=(("x", 0.8, 0.8),),
        negative_prompt="lowres,\nugly",
        steps=20,
        sampler="dpmpp_2m",
        schedule="karras",
        scale=7.0,
        seed=965400086,
        width=640,
        height=448,
        rng="cpu",
    )


def test_without_settings_all_is_prompt() -> None:
    text = "a cat, time: noon, place: home"
    assert parse_infotext(text) == {"Prompt": text, "Negative prompt": ""}
    with pytest.raises(InputError, match="Steps"):
        job_from_infotext(text)


@pytest.mark.parametrize(("key", "value"), [("Steps", "many"), ("CFG scale", "\x1b[1m"), ("Seed", "1.5")])
def test_a_value_that_is_no_number_is_named(key: str, value: str) -> None:
    entries: dict[str, Any] = {"Steps": "20", "CFG scale": "7", "Seed": "1"} | {key: value}
    with pytest.raises(InputError, match=key) as caught:
        job_from_infotext("x\n" + ", ".join(f"{k}: {v}" for k, v in entries.items()))
    assert str(caught.value).isprintable()


def test_reading_long_lines_takes_linear_time() -> None:
    start = time.process_time()
    parse_infotext("a" * 60_000)
    parse_infotext("a" + " " * 60_000 + "b")
    assert time.process_time() - start < 5  # far from it; quadratic time would be minutes


@pytest.mark.parametrize(
    "prompt", ["a cat, on a mat", "two\nlines, Seed: 9", "日本語", "x\x00, Seed: 5, Hashes: {}"]
)
def test_an_independent_reader_agrees(prompt: str) -> None:
    sd_parsers = pytest.importorskip("sd_parsers")
    job = Job(
        prompt=prompt,
        negative_prompt="dog",
        seed=1234,
        steps=30,
        sampler="plms",
        eta=0.5,
        width=512,
        height=512,
    )
    text = infotext(job, {"Model": "v1-5", "Model hash": "6ce0161689"})
    png = encode_png(np.zeros((8, 8, 3), np.uint8), text)
    info = sd_parsers.ParserManager().parse(io.BytesIO(png))
    assert info is not None
    (sampler,) = info.samplers
    assert sampler.name == "PLMS"
    assert sampler.parameters["seed"] == "1234"
    assert sampler.parameters["steps"] == "30"
    assert sampler.model.name == "v1-5"
    assert sampler.model.hash == "6ce0161689"
    assert sampler.prompts[0].value == prompt.replace("\x00", "\\x00")
    assert sampler.negative_prompts[0].value == "dog"
    assert info.metadata["Size"] == "512x512"
    assert "Hashes" not in info.metadata


@pytest.mark.parametrize("label", ["Latent", "Latent (nearest)", "Latent (antialiased)"])
def test_upscalers_of_latents_are_told_from_others(label: str) -> None:
    text = f"x\nSteps: 20, Sampler: DDIM, CFG scale: 7, Hires upscale: 2, Hires upscaler: {label}"
    assert job_from_infotext(text).upscale_in == "latents"
    assert job_from_infotext(text.replace(label, "R-ESRGAN 4x+")).upscale_in == "pixels"


@pytest.mark.parametrize("entry", ["Outpaint: 1 2", "Paste: maybe", "Init width: wide"])
def test_values_that_are_none_are_refused(entry: str) -> None:
    with pytest.raises(InputError, match=entry.partition(":")[0]):
        job_from_infotext(f"x\nSteps: 20, Sampler: DDIM, CFG scale: 7, Init image: a.png, {entry}")
