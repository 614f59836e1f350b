"""Images of other programs become jobs; this toolkit's records are read back exactly."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import zlib
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from ldm.images.writer import encode_png
from ldm.job import Init, Job
from ldm.job_values import check_fields
from ldm.metadata.foreign import comfyui, invokeai, programs, webui
from ldm.metadata.infotext import infotext
from ldm.metadata.read import Recipe, read_job
from ldm.metadata.recipe import UNKNOWN
from ldm.metadata.record import read_record, record, without_folders
from ldm.models.diffusion.noise import noise_source
from ldm.models.diffusion.passes import follows_path, schedule_of
from ldm.util import InputError
from tests.support.metadata import EXTRAS, FULL, HOSTILE, INVOKE, PIXELS, VALUES, graph, noted, png

WEB_UI = (
    "masterpiece, (cat:1.2) <lora:x:0.8>\nNegative prompt: lowres,\nugly\nSteps: 20, Sampler: Euler a, "
    "Schedule type: Karras, CFG scale: 7, Seed: 965400086, Size: 640x448, Model hash: 6ce0161689, Model: v1-5, "
    "Clip skip: 2, ENSD: 31337, RNG: CPU, Version: v1.10.1"
)


# --- this toolkit ---------------------------------------------------------------------------------------------


def test_a_record_is_exact() -> None:
    held = read_record(record(FULL, EXTRAS))
    assert held == (FULL, EXTRAS, ())
    for field in dataclasses.fields(Job):
        assert type(getattr(held.job, field.name)) is type(getattr(FULL, field.name)), field.name
    assert isinstance(held.job.init, Init)
    assert held.job.init.outpaint == (8, 0, 16, 24)


@pytest.mark.parametrize("prompt", HOSTILE)
def test_hostile_prompts_survive_in_a_record(prompt: str, tmp_path: Path) -> None:
    job = Job(prompt=prompt, negative_prompt=prompt[::-1], width=512, height=512)
    text = record(job, {})
    assert read_record(text).job == job
    assert not set(text) & {"\x00", "\x1b", "\x9b", "\r", "\n", "\x7f"}
    path = tmp_path / "x.png"
    path.write_bytes(encode_png(PIXELS, infotext(job, {}), record=text))
    assert read_job(str(path)).job == job


@given(
    prompt=st.text(),
    seed=st.integers(0, 2**64 - 1),
    scale=st.floats(allow_nan=False, allow_infinity=False),
    borders=st.tuples(*[st.integers(0, 4096)] * 4),
)
def test_any_job_survives_in_a_record(
    prompt: str, seed: int, scale: float, borders: tuple[int, int, int, int]
) -> None:
    job = Job(prompt, seed=seed, scale=scale, init=Init("a.png", outpaint=borders), width=512, height=512)
    assert read_record(record(job, {"Note": prompt})).job == job


def test_folders_stay_private_in_a_record() -> None:
    job = dataclasses.replace(FULL, init=Init("/home/me/secret/photo.png", mask="C:\\secret\\mask.png"))
    assert "secret" not in record(job, {})
    assert read_record(record(job, {})).job.init == Init("photo.png", mask="mask.png")


def test_a_file_cannot_choose_a_folder_to_read_from(tmp_path: Path) -> None:
    content = {"version": 1, "job": {"prompt": "x", "init": {"image": "/etc/../etc/passwd.png"}}}
    recipe = read_job(png(tmp_path / "x.png", ldm=json.dumps(content)))
    assert recipe.job.init == Init("passwd.png")
    assert noted(recipe, "passwd.png", "does not hold")


def test_the_record_is_preferred_and_a_damaged_one_does_no_harm(tmp_path: Path) -> None:
    job = Job("a cat", seed=7, width=512, height=512)
    path = png(
        tmp_path / "a.png",
        parameters=infotext(Job("other", width=512, height=512), EXTRAS),
        ldm=record(job, EXTRAS),
    )
    assert read_job(path) == Recipe(job, "ldm", EXTRAS["Model"], EXTRAS["Model hash"], EXTRAS)
    path = png(tmp_path / "b.png", parameters=infotext(job, {"Version": "ldm 1.0"}), ldm='{"job": 3}')
    recipe = read_job(path)
    assert (recipe.job, recipe.source) == (job, "ldm")
    assert noted(recipe, "`ldm`", "holds no job")


def test_fields_of_a_newer_version_are_named() -> None:
    content = json.loads(record(FULL, {}))
    content["job"] |= {"novelty\x1b": 1}
    content["job"]["init"] |= {"shine": [2]}
    del content["job"]["eta"]
    held = read_record(json.dumps(content))
    assert held.job == dataclasses.replace(without_folders(FULL), eta=None)
    assert held.unknown == ("job.novelty\x1b", "job.init.shine")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("seed", "7"), ("seed", 1.5), ("seed", True), ("seed", None), ("rng", "dice"), ("prompt", ["x"]),
        ("init", "a.png"), ("init", {}), ("init", {"image": "a", "outpaint": [1, 2]}), ("paste", 1),
        ("init", {"image": "a", "outpaint": [1, 2, 3, "\x1b"]}), ("scale", "big"), ("scale", 10**400),
        ("scale", float("inf")), ("eta", float("nan")),
    ],
)  # fmt: skip
def test_values_that_a_field_cannot_have_are_refused(name: str, value: object) -> None:
    with pytest.raises(InputError, match=name) as caught:
        read_record(json.dumps({"job": {"prompt": "x", name: value}}))
    assert str(caught.value).isprintable()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("sampler", "from-file=/etc/passwd"), ("sampler", "help"), ("timestep_spacing", "weird"), ("seed", -1),
        ("seed", 2**64), ("steps", 0), ("steps", 1000), ("width", 7), ("height", 0), ("strength", 1.5), ("eta", -0.1),
        ("upscale", 9), ("upscale_strength", -1), ("batch_index", -1), ("prompt", "x" * 65_537),
        ("loras", [["a", 1.0, 1.0]] * 101), ("init", {"image": "a", "mask_blur": 1e9}),
        ("init", {"image": "a", "resize": "--help"}), ("init", {"image": "a", "width": 0}),
    ],
)  # fmt: skip
def test_a_record_cannot_go_beyond_the_range_of_a_field(name: str, value: object, tmp_path: Path) -> None:
    text = json.dumps({"version": 1, "job": {"prompt": "x", name: value}})
    path = png(
        tmp_path / "x.png",
        ldm=text,
        parameters=infotext(Job("x", width=512, height=512), {"Version": "ldm 1.0"}),
    )
    with pytest.raises(InputError, match=rf"job\.{name}.* cannot be .*; give") as caught:
        read_job(path)
    assert str(caught.value).isprintable() and len(str(caught.value)) < 400


def test_an_own_infotext_cannot_go_beyond_the_range_of_a_field() -> None:
    text = infotext(Job("x", sampler=cast(Any, "help"), width=512, height=512), {"Version": "ldm 1.0"})
    with pytest.raises(InputError, match=r"job\.sampler cannot be help; give ddim"):
        webui.read(text)


@pytest.mark.parametrize("seed", [2**63, 2**64 - 1, 156680208700286, 2**32 - 1])
def test_seeds_of_64_bits_of_other_programs_give_their_noise(seed: int) -> None:
    """A GPU's generator uses all of a seed, torch's on the CPU the lower 32 bits; both can be run."""
    text = WEB_UI.replace("965400086", str(seed))
    cpp = text.replace("v1.10.1", "stable-diffusion.cpp").replace("CPU", "{0}")
    invoke = {**INVOKE, "seed": seed}
    flat = {"prompt": "a cat", "seed": seed, "num_inference_steps": 12, "guidance_scale": 3}
    swarm = {"sui_image_params": {"prompt": "a cat", "seed": seed, "steps": 12}}
    on_gpu = [
        webui.read(text.replace("RNG: CPU", "RNG: NV")), webui.read(text.replace("RNG: CPU", "RNG: GPU")),
        webui.read(text.replace("RNG: CPU, ", "")), webui.read(cpp.format("cuda")),
        invokeai.read_metadata(json.dumps(invoke | {"rand_device": "cuda"})), programs.read(
            {"parameters": json.dumps(flat)}, UNKNOWN
        ),
    ]  # fmt: skip
    on_cpu = [
        webui.read(text), webui.read(cpp.format("cpu")),
        invokeai.read_metadata(json.dumps(invoke | {"rand_device": "cpu"})), comfy(graph(n3={"seed": seed})),
        programs.read({"parameters": json.dumps(swarm)}, UNKNOWN),
    ]  # fmt: skip
    theirs = torch.randn(4, 8, generator=torch.Generator().manual_seed(seed))
    for recipe in on_gpu:
        assert recipe is not None and (recipe.job.rng, recipe.job.seed) == ("philox", seed), recipe
        assert not noted(recipe, "32 bits")
        check_fields(recipe.job)
    for recipe in on_cpu:
        assert recipe is not None and recipe.job.rng == "cpu"
        ours = noise_source("cpu", "batch", [recipe.job.seed], "cpu").draw((4, 8))
        assert torch.equal(ours, theirs)
        assert recipe.job.seed == seed  # all of it, of which a Brownian path of the steps is made
        check_fields(recipe.job)


def test_values_of_other_programs_beyond_their_range_are_noted() -> None:
    settings = "Steps: 5000, Sampler: DDIM, CFG scale: 7, Seed: 1, Size: 500x70, Denoising strength: 3"
    recipe = webui.read(f"x\n{settings}, Version: v1.10.1")
    assert (recipe.job.steps, recipe.job.width, recipe.job.height, recipe.job.strength) == (50, 496, 64, 1.0)
    for words in (
        ("steps cannot be 5000", "using 50"),
        ("width 500", "using 496"),
        ("strength cannot be 3",),
    ):
        assert noted(recipe, *words), recipe.notes


@pytest.mark.parametrize("text", ["", "[]", "{", '{"job": []}', '{"job": {}}', "[" * 100_000, "9" * 5000])
def test_what_is_no_record_is_refused(text: str) -> None:
    with pytest.raises(InputError):
        read_record(text)


def test_an_independent_reader_finds_the_infotext_beside_a_record() -> None:
    sd_parsers = pytest.importorskip("sd_parsers")
    job = Job(
        prompt="a cat", negative_prompt="dog", seed=1234, steps=30, sampler="plms", width=512, height=512
    )
    text, held = infotext(job, {"Model": "v1-5"}), record(job, {"Model": "v1-5"})
    info = sd_parsers.ParserManager().parse(io.BytesIO(encode_png(PIXELS, text, record=held)))
    assert info is not None
    assert info.generator.name == "AUTOMATIC1111"
    (sampler,) = info.samplers
    assert (sampler.name, sampler.parameters["seed"], sampler.model.name) == ("PLMS", "1234", "v1-5")
    assert (sampler.prompts[0].value, sampler.negative_prompts[0].value) == ("a cat", "dog")


def chunks(png: bytes) -> list[tuple[bytes, bytes]]:
    """Kinds and contents of a PNG's chunks, read without a library."""
    found, at = [], 8
    while at < len(png):
        length = int.from_bytes(png[at : at + 4], "big")
        found.append((png[at + 4 : at + 8], png[at + 8 : at + 8 + length]))
        at += 12 + length
    return found


def test_the_record_lies_uncompressed_in_a_chunk_of_its_own() -> None:
    held = record(Job("a cat", width=512, height=512), EXTRAS)
    found = [content for kind, content in chunks(encode_png(PIXELS, record=held)) if kind == b"tEXt"]
    assert found == [b"ldm\0" + held.encode("latin-1")]
    held = record(Job("кошка", width=512, height=512), EXTRAS)
    (content,) = (content for kind, content in chunks(encode_png(PIXELS, record=held)) if kind == b"iTXt")
    assert content == b"ldm\0\0\0\0\0" + held.encode()


def test_a_record_that_is_too_long_is_left_out_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    png = encode_png(PIXELS, "x\nSteps: 1", record=record(Job("x" * 70_000, width=512, height=512), {}))
    assert [content[:11] for kind, content in chunks(png) if kind == b"tEXt"] == [b"parameters\0"]
    assert "left out" in caplog.text


# --- the web UI and stable-diffusion.cpp ------------------------------------------------------------------------


def test_a_text_of_the_web_ui() -> None:
    recipe = webui.read(WEB_UI)
    assert recipe.job == Job(
        "masterpiece, (cat:1.2)", "lowres,\nugly", seed=965400086, width=640, height=448, steps=20,
        sampler="euler_a", scale=7.0, rng="cpu", loras=(("x", 0.8, 0.8),), prompt_syntax="a1111", schedule="karras",
        convention="a1111", clip_skip=2, step_seed_delta=31337,
    )  # fmt: skip
    assert (recipe.source, recipe.model, recipe.model_hash) == ("A1111", "v1-5", "6ce0161689")
    assert recipe.notes == ("it needs the LoRA x",)
    assert webui.read(WEB_UI.replace("Euler a", "Euler")).job.step_seed_delta == 0


@pytest.mark.parametrize("sampler", ["DPM++ SDE", "DPM++ 2M SDE", "DPM++ 2M SDE Heun", "DPM++ 3M SDE"])
def test_steps_on_a_brownian_path_of_the_web_ui(sampler: str) -> None:
    recipe = webui.read(WEB_UI.replace("Euler a", sampler).replace("<lora:x:0.8>", ""))
    assert recipe.notes == () and recipe.job.convention == "a1111" and follows_path(recipe.job)


def test_unipc_of_other_programs() -> None:
    """As the authors' code: order 3, bh1 unless named, in the web UI on steps that are even in time."""
    recipe = webui.read(WEB_UI.replace("Euler a", "UniPC").replace("Karras", "Automatic"))
    assert (recipe.job.sampler, recipe.job.schedule) == ("unipc_bh1", "auto")
    assert schedule_of(recipe.job).name == "time_uniform"
    for name, sampler in (("uni_pc", "unipc_bh1"), ("uni_pc_bh2", "unipc_bh2")):
        job = comfy(graph(n3={"sampler_name": name, "scheduler": "normal"})).job
        assert (job.sampler, schedule_of(job).name) == (sampler, "normal")
        assert schedule_of(job).discard_next_to_last


def test_plain_ddim_of_the_web_ui_differs_in_little() -> None:
    text = (
        "a cat\nSteps: 50, Sampler: DDIM, CFG scale: 7.5, Seed: 42, Size: 512x512, RNG: NV, Version: v1.5.2"
    )
    recipe = webui.read(text)
    assert (recipe.job, recipe.notes) == (Job("a cat", prompt_syntax="a1111", width=512, height=512), ())
    (note,) = webui.read(text.replace("1.5.2", "1.10.1-12-gabc")).notes
    assert "last step" in note
    assert webui.read(text.replace("Steps: 50", "Steps: 30")).job.timestep_spacing == "compvis"


def test_brackets_weigh_in_the_web_ui_unless_it_was_told_otherwise() -> None:
    settings = "Steps: 20, Sampler: PLMS, CFG scale: 7, Seed: 1, Size: 64x64, RNG: NV, Version: v1.5.2"
    text = f"a (cat:1.2) BREAK [dog]\n{settings}"
    for emphasis, syntax in (("", "a1111"), (", Emphasis: No norm", "a1111"), (", Emphasis: None", "plain")):
        recipe = webui.read(text + emphasis)
        assert (recipe.job.prompt, recipe.job.prompt_syntax) == ("a (cat:1.2) BREAK [dog]", syntax)
        assert not noted(recipe, "weights") and noted(recipe, "No norm") == ("No norm" in emphasis)


def test_a_second_pass_of_the_web_ui() -> None:
    text = "x\nSteps: 20, Sampler: PLMS, CFG scale: 7, Seed: 1, Size: 512x768, Denoising strength: 0.7, "
    job = webui.read(text + "Hires upscale: 1.5, Hires upscaler: Latent").job
    assert (job.upscale, job.upscale_in, job.upscale_strength, job.strength) == (1.5, "latents", 0.7, 1.0)
    recipe = webui.read(text + "Hires resize: 1024x1536, Hires steps: 9, Hires upscaler: R-ESRGAN 4x+")
    assert (recipe.job.upscale, recipe.job.upscale_in) == (2.0, "pixels")
    assert noted(recipe, "Hires steps", "9") and noted(recipe, "R-ESRGAN 4x+", "Lanczos")
    job = webui.read(text + "First pass size: 256x384").job
    assert (job.width, job.height, job.upscale, job.upscale_strength) == (256, 384, 2.0, 0.7)


def test_image_to_image_of_the_web_ui() -> None:
    recipe = webui.read(
        "x\nSteps: 20, Sampler: DDIM, CFG scale: 7, Seed: 1, Denoising strength: 0.7, Mask blur: 4"
    )
    assert (recipe.job.strength, recipe.job.init) == (0.7, None)
    assert noted(recipe, "starts from an image") and noted(recipe, "Mask blur", "4") and noted(recipe, "size")


def test_noise_of_the_web_ui() -> None:
    text = "x\nSteps: 20, Sampler: PLMS, CFG scale: 7, Seed: -1, Size: 64x64"
    assert webui.read(text).job.rng == "philox"
    assert webui.read(text).job.seed == 42 and noted(webui.read(text), "random seed", "-1", "42")
    assert webui.read(text + ", RNG: GPU").job.rng == "philox"
    assert noted(webui.read(text + ", RNG: dice"), "dice")


def test_a_text_of_stable_diffusion_cpp() -> None:
    recipe = webui.read(
        "a lovely cat\nSteps: 30, CFG scale: 5.000000, Guidance: 3.500000, Eta: 0.000000, Seed: 197583933, "
        "Size: 512x768, Model: v1-5.safetensors, RNG: cuda, Sampler: dpm++2m karras, Skip layers: [7, 8, 9], "
        "Hires upscale: Latent, Hires scale: 2.000000, "
        'Version: stable-diffusion.cpp, SDCPP: {"seed": 1, "prompt": "Steps: 3, Seed: 4, Sampler: x"}'
    )
    assert recipe.source == "stable-diffusion.cpp"
    assert recipe.job == Job(
        "a lovely cat", seed=197583933, width=512, height=768, steps=30, scale=5.0, sampler="dpmpp_2m",
        upscale=2.0, upscale_in="latents", prompt_syntax="a1111", schedule="karras",
    )  # fmt: skip
    assert recipe.model == "v1-5.safetensors"
    assert not noted(recipe, "dpm++2m") and not noted(recipe, "karras") and noted(recipe, "Skip layers")
    assert not noted(recipe, "Guidance") and noted(recipe, "upscale_strength", "0.5")


@pytest.mark.parametrize("prompt", ["a [cat|dog]", "a [cat:3]", "a cat AND a dog", "ratio 16:9"])
def test_prompts_that_change_are_those_of_the_web_ui_only(prompt: str) -> None:
    text = f"{prompt}\nSteps: 30, Sampler: DDIM, CFG scale: 5, Seed: 5, Size: 64x64, Version: "
    assert webui.read(f"{text}v1.10.1").job.prompt_syntax == "a1111"
    recipe = webui.read(f"{text}stable-diffusion.cpp")
    assert recipe.job.prompt_syntax == "plain" and noted(recipe, "plain text")


@pytest.mark.parametrize(("rng", "own"), [("cuda", "philox"), ("cpu", "cpu"), ("std_default", "philox")])
def test_noise_of_stable_diffusion_cpp(rng: str, own: str) -> None:
    text = (
        f"x\nSteps: 30, CFG scale: 5.0, Eta: 0.5, Seed: 1, Size: 64x64, RNG: {rng}, Sampler: ddim_trailing, "
    )
    recipe = webui.read(text + "Version: stable-diffusion.cpp")
    assert (recipe.job.rng, recipe.job.eta) == (own, 0.5)
    assert noted(recipe, "std_default") == (rng == "std_default")


@pytest.mark.parametrize(
    "entry", ["RNG: dice", "Timestep spacing: 1, CFG scale: nan", "Hires upscale: 1e999"]
)
@pytest.mark.parametrize("version", ["ldm 1.0", "v1.10.1"])
def test_values_that_are_none_are_refused_or_noted(entry: str, version: str) -> None:
    text = f"x\nSteps: 20, Sampler: DDIM, CFG scale: 7, Seed: 3, {entry}, Version: {version}"
    try:
        recipe = webui.read(text)
    except InputError as error:
        assert "cannot be" in str(error)
    else:
        assert version != "ldm 1.0" and noted(recipe, "dice")


def test_json_of_an_unknown_program_is_refused_without_a_name() -> None:
    with pytest.raises(InputError, match="JSON of a program that is not supported"):
        webui.read('{"prompt": "x"}')


# --- ComfyUI ---------------------------------------------------------------------------------------------------


def comfy(content: object) -> Recipe:
    return comfyui.read(json.dumps(content))


PLAIN = Job("a cat", "dog", seed=156680208700286, width=512, height=768, steps=20, scale=8.0, rng="cpu")


def test_a_graph_of_comfyui() -> None:
    recipe = comfy(graph())
    assert recipe == Recipe(PLAIN, "ComfyUI", "v1-5.ckpt")


@pytest.mark.parametrize(
    ("sampler", "step_rng", "on_path"),
    [
        ("dpmpp_2m_sde", "auto", True),
        ("dpmpp_3m_sde_gpu", "philox", True),
        ("euler_ancestral", "philox", False),
        ("heun", "auto", False),
    ],
)
def test_the_noise_of_steps_of_comfyui(sampler: str, step_rng: str, on_path: bool) -> None:
    """A path of its seed on the CPU, or on the GPU for names in _gpu; else the GPU's generator of that seed."""
    recipe = comfy(graph(n3={"sampler_name": sampler, "scheduler": "karras"}))
    assert (recipe.job.rng, recipe.job.step_rng, follows_path(recipe.job)) == ("cpu", step_rng, on_path)
    assert bool(recipe.notes) == (sampler == "euler_ancestral")
    batch = comfy(graph(n3={"sampler_name": sampler, "scheduler": "karras"}, n5={"batch_size": 4}))
    assert not follows_path(batch.job) and batch.job.step_rng == "auto"
    assert noted(batch, "steps", "whole batch") == (sampler != "heun")


@pytest.mark.parametrize("count", [1, 4])
def test_the_noise_of_comfyui_is_made_again(count: int) -> None:
    """One draw of a CPU generator for the whole batch, from a seed above 32 bits."""
    shape = (count, 4, 96, 64)
    theirs = torch.randn(shape, generator=torch.Generator().manual_seed(156680208700286))
    job = comfy(graph(n5={"batch_size": count})).job
    ours = noise_source(job.rng, job.seed_mode, [job.seed], "cpu").draw(shape)
    assert torch.equal(ours, theirs)


def test_a_batch_of_comfyui_is_one_stream() -> None:
    recipe = comfy(graph(n5={"batch_size": 4}))
    assert (recipe.job.rng, recipe.job.seed_mode, recipe.job.batch_index) == ("cpu", "batch", 0)
    assert noted(recipe, "batch of 4")


def test_values_behind_links() -> None:
    nodes = graph(n3={"seed": ["n20", 0], "steps": ["n22", 0]}, n6={"text": ["n21", 0]})
    nodes |= {
        "n20": {"class_type": "PrimitiveInt", "inputs": {"value": 7}},
        "n21": {"class_type": "Text Multiline", "inputs": {"text": "from elsewhere"}},
        "n22": {"class_type": "Reroute", "inputs": {"steps": ["n23", 0]}},
        "n23": {"class_type": "Int", "inputs": {"int": 25}},
    }
    job = comfy(nodes).job
    assert (job.seed, job.steps, job.prompt) == (7, 25, "from elsewhere")


def test_loras_controls_and_clip_skip_are_noted() -> None:
    nodes = graph(
        n3={
            "model": ["n30", 0],
            "positive": ["n31", 0],
            "negative": ["n31", 1],
            "sampler_name": "euler_ancestral",
        },
        n6={"clip": ["n32", 0]},
    )
    nodes |= {
        "n30": {"class_type": "LoraLoader", "inputs": {
            "lora_name": "a/b.safetensors", "strength_model": 0.8, "strength_clip": 1, "model": ["n33", 0],
            "clip": ["n4", 1]}},
        "n31": {"class_type": "ControlNetApplyAdvanced", "inputs": {"positive": ["n6", 0], "negative": ["n7", 0]}},
        "n32": {"class_type": "CLIPSetLastLayer", "inputs": {"stop_at_clip_layer": -2, "clip": ["n30", 1]}},
        "n33": {"class_type": "FreeU", "inputs": {"model": ["n4", 0]}},
    }  # fmt: skip
    recipe = comfy(nodes)
    assert (recipe.job.prompt, recipe.job.negative_prompt, recipe.model) == ("a cat", "dog", "v1-5.ckpt")
    assert (recipe.job.sampler, recipe.job.schedule, recipe.job.convention) == (
        "euler_a",
        "ddim_uniform",
        "comfyui",
    )
    assert recipe.job.loras == (("b", 0.8, 1.0),) and recipe.job.clip_skip == 2
    for words in (("LoRA b",), ("ControlNetApplyAdvanced",), ("FreeU",)):
        assert noted(recipe, *words), (words, recipe.notes)


def test_image_to_image_of_comfyui_runs_as_many_steps() -> None:
    nodes = graph(n3={"denoise": 0.5, "latent_image": ["n40", 0]})
    nodes |= {
        "n40": {"class_type": "VAEEncode", "inputs": {"pixels": ["n41", 0], "vae": ["n4", 2]}},
        "n41": {"class_type": "LoadImage", "inputs": {"image": "me/photo.png"}},
    }
    job = comfy(nodes).job
    assert (job.init, job.strength, job.steps) == (Init("photo.png"), 0.5, 40)


def test_a_second_pass_of_comfyui() -> None:
    nodes = graph(n8={"samples": ["n51", 0]})
    nodes["n50"] = {"class_type": "LatentUpscaleBy", "inputs": {"samples": ["n3", 0], "scale_by": 1.5}}
    again = nodes["n3"]["inputs"] | {"seed": 5, "steps": 14, "denoise": 0.5, "latent_image": ["n50", 0]}
    nodes["n51"] = {"class_type": "KSampler", "inputs": again}
    recipe = comfy(nodes)
    assert recipe.job == dataclasses.replace(PLAIN, upscale=1.5, upscale_in="latents", upscale_strength=0.5)
    assert noted(recipe, "second pass")


def test_a_custom_sampler_takes_its_settings_from_the_nodes_beside_it() -> None:
    nodes = graph()
    parts = nodes["n3"]["inputs"]
    beside = {
        "noise": {"noise_seed": 3},
        "guider": {key: parts[key] for key in ("cfg", "positive", "negative", "model")},
        "sampler": {"sampler_name": "ddim"},
        "sigmas": {key: parts[key] for key in ("steps", "scheduler", "denoise")},
    }
    nodes |= {f"n_{name}": {"class_type": name, "inputs": inputs} for name, inputs in beside.items()}
    links = {name: [f"n_{name}", 0] for name in beside}
    nodes["n3"] = {"class_type": "SamplerCustomAdvanced", "inputs": links | {"latent_image": ["n5", 0]}}
    assert comfy(nodes).job == dataclasses.replace(PLAIN, seed=3)


def test_an_independent_reader_agrees_on_a_graph() -> None:
    sd_parsers = pytest.importorskip("sd_parsers")
    types = {
        "model": "MODEL",
        "positive": "CONDITIONING",
        "negative": "CONDITIONING",
        "latent_image": "LATENT",
    }
    links = [
        [0, value[0], value[1], node, 0, types.get(name, "CLIP")]
        for node, content in graph().items()
        for name, value in content["inputs"].items()
        if isinstance(value, list)
    ]
    info = sd_parsers.parsers.ComfyUIParser().parse({"prompt": graph(), "workflow": {"links": links}})
    (sampler,) = info.samplers
    recipe = comfy(graph())
    assert (sampler.prompts[0].value, sampler.negative_prompts[0].value) == (
        PLAIN.prompt,
        PLAIN.negative_prompt,
    )
    assert (sampler.parameters["steps"], sampler.parameters["cfg_scale"]) == (PLAIN.steps, PLAIN.scale)
    assert sampler.model.name.endswith(recipe.model)


@pytest.mark.parametrize("name", ["model", "positive", "latent_image", "seed"])
def test_circles_end(name: str) -> None:
    comfy(graph(n3={name: ["n3", 0]}))
    nodes = graph(n3={name: ["n60", 0]})
    for i in (0, 1):
        inputs = {key: [f"n6{1 - i}", 0] for key in ("model", "conditioning", "samples", "value")}
        nodes[f"n6{i}"] = {"class_type": "Loop", "inputs": inputs}
    comfy(nodes)


LINKS = st.tuples(st.sampled_from(list(graph())), st.integers(0, 2)).map(list)


@given(data=st.data())
@settings(max_examples=40, deadline=None)
def test_hostile_graphs_are_read_or_refused(data: st.DataObject) -> None:
    nodes = graph()
    for _ in range(data.draw(st.integers(1, 6))):
        node = nodes[data.draw(st.sampled_from(list(nodes)))]
        node["inputs"][data.draw(st.sampled_from(sorted(node["inputs"])))] = data.draw(VALUES | LINKS)
        node["class_type"] = data.draw(st.just(node["class_type"]) | VALUES)
    try:
        recipe = comfy(nodes)
    except InputError:
        return
    assert read_record(record(recipe.job, {})).job == recipe.job  # so every field has its type
    assert all(note.isprintable() for note in recipe.notes)


@pytest.mark.parametrize("value", [10**400, 5e-324, float("inf"), float("nan"), -1, "\x1b", [[]], True])
@pytest.mark.parametrize("name", ["seed", "steps", "cfg", "denoise", "sampler_name", "scheduler"])
def test_odd_values_are_noted(name: str, value: object) -> None:
    nodes = graph(n3={name: value, "latent_image": ["n40", 0]})
    nodes["n40"] = {"class_type": "LoadImage", "inputs": {"image": "a.png", "width": value}}
    try:
        job = comfy(nodes).job
    except InputError:
        return
    assert read_record(record(job, {})).job == job


def test_a_large_graph_is_read_in_linear_time() -> None:
    chain = {f"m{i}": {"class_type": "Loop", "inputs": {"model": [f"m{i + 1}", 0]}} for i in range(9_000)}
    recipe = comfy(graph(n3={"model": ["m0", 0]}) | chain)
    assert len(recipe.notes) < 50
    with pytest.raises(InputError, match="10000 nodes"):
        comfy({str(i): {} for i in range(10_001)})


@pytest.mark.parametrize(
    "text", ["a plain prompt", "[1]", "{}", "[" * 100_000, '{"1": {"inputs": {"images": 3}}}']
)
def test_what_is_no_graph_is_refused(text: str) -> None:
    with pytest.raises(InputError):
        comfyui.read(text)


# --- InvokeAI --------------------------------------------------------------------------------------------------


def test_json_of_invokeai() -> None:
    recipe = invokeai.read_metadata(json.dumps(INVOKE))
    assert recipe.job == Job(
        "a cat", "dog", seed=7, height=640, rng="cpu", loras=(("b", 0.75, 0.75),), width=512
    )
    assert (recipe.source, recipe.model, recipe.model_hash) == ("InvokeAI", "v1-5", "blake3:abc")
    assert recipe.notes == ("it needs the LoRA b",)
    assert invokeai.read_metadata(json.dumps(INVOKE | {"rand_device": "cuda"})).job.rng == "philox"


def test_what_invokeai_does_more_is_noted() -> None:
    more = {"clip_skip": 1, "hrf_enabled": True, "strength": 0.4, "init_image": "x/y.png", "steps": 30}
    recipe = invokeai.read_metadata(json.dumps(INVOKE | more))
    assert (recipe.job.init, recipe.job.strength) == (Init("y.png"), 0.4)
    assert recipe.job.clip_skip == 2 and noted(recipe, "hrf_enabled") and noted(recipe, "timesteps for 30")


def test_json_of_invokeai_2() -> None:
    content = {
        "model_weights": "stable-diffusion-1.4", "model_hash": "fe4efff1",
        "image": {
            "prompt": [{"prompt": "a cat [dog, cow] on a mat", "weight": 1.0}], "steps": 50, "cfg_scale": 7.5,
            "threshold": 0, "perlin": 0, "height": 512, "width": 640, "seed": 9, "seamless": False, "type": "txt2img",
            "sampler": "k_euler_a", "variations": [],
        },
    }  # fmt: skip
    recipe = invokeai.read_sd_metadata(json.dumps(content))
    assert recipe.job == Job("a cat on a mat", "dog, cow", seed=9, width=640, sampler="euler_a", height=512)
    assert (recipe.model, recipe.model_hash) == ("stable-diffusion-1.4", "fe4efff1")


@pytest.mark.parametrize(
    "text",
    [
        '"a \\"cat\\"" -s 50 -S 9 -W 640 -H 512 -C 7.5 -A plms -G 0.8',
        'a "cat" -s50 -S9 -W640 -H512 -C7.5 -A plms -G0.8',
    ],
)
def test_commands_of_invokeai(text: str) -> None:
    recipe = invokeai.read_dream(text)
    assert dataclasses.replace(recipe.job, prompt="") == Job(
        "", seed=9, width=640, sampler="plms", height=512
    )
    assert recipe.job.prompt.replace("\\", "") == 'a "cat"'
    assert noted(recipe, "-G 0.8")


@given(content=st.dictionaries(st.sampled_from(sorted(INVOKE)), VALUES))
@settings(max_examples=30, deadline=None)
def test_hostile_json_of_invokeai_is_read_or_refused(content: dict[str, Any]) -> None:
    for read, text in (
        (invokeai.read_metadata, json.dumps(INVOKE | content)),
        (invokeai.read_sd_metadata, json.dumps({"image": INVOKE | content} | content)),
        (invokeai.read_dream, " ".join(map(str, content.values()))),
    ):
        try:
            recipe = read(text)
        except InputError:
            continue
        assert read_record(record(recipe.job, {})).job == recipe.job
        assert all(note.isprintable() for note in recipe.notes)


# --- files -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["jpg", "webp", "png"])
@pytest.mark.parametrize("order", ["big", "little"])
def test_exif_comments(kind: str, order: str, tmp_path: Path) -> None:
    exif = Image.Exif()
    encoded = WEB_UI.encode("utf-16-be" if order == "big" else "utf-16-le")
    exif.get_ifd(0x8769)[0x9286] = b"UNICODE\0" + encoded
    path = tmp_path / f"a.{kind}"
    Image.fromarray(PIXELS).save(path, exif=exif.tobytes())
    assert read_job(str(path)) == webui.read(WEB_UI)


@pytest.mark.parametrize("code", [b"ASCII\0\0\0", bytes(8), b""])
def test_exif_comments_in_other_character_sets(code: bytes, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif.get_ifd(0x8769)[0x9286] = code + "кошка\nSteps: 5, Sampler: DDIM, CFG scale: 2, Seed: 3".encode()
    Image.fromarray(PIXELS).save(tmp_path / "a.jpg", exif=exif)
    assert read_job(str(tmp_path / "a.jpg")).job.prompt == "кошка"


def test_every_keyword_is_found(tmp_path: Path) -> None:
    texts = {"prompt": json.dumps(graph()), "invokeai_metadata": json.dumps(INVOKE), "Dream": '"x" -s5 -S3'}
    for key, text in texts.items():
        assert read_job(png(tmp_path / "a.png", **{key: text})).source in ("ComfyUI", "InvokeAI")
    both = png(tmp_path / "a.png", parameters=WEB_UI, prompt=texts["prompt"])
    assert read_job(both).source == "ComfyUI"
    assert read_job(png(tmp_path / "a.png", parameters=WEB_UI, prompt="plain")).source == "A1111"


def test_compressed_and_late_chunks(tmp_path: Path) -> None:
    info = PngInfo()
    info.add_text("parameters", WEB_UI, zip=True)
    Image.fromarray(PIXELS).save(tmp_path / "a.png", pnginfo=info)
    assert read_job(str(tmp_path / "a.png")).source == "A1111"
    data = encode_png(PIXELS)
    chunk = b"tEXtparameters\0" + WEB_UI.encode()
    late = (len(chunk) - 4).to_bytes(4, "big") + chunk + zlib.crc32(chunk).to_bytes(4, "big")
    (tmp_path / "b.png").write_bytes(data[:-12] + late + data[-12:])
    assert read_job(str(tmp_path / "b.png")).source == "A1111"


def test_a_bomb_of_text_is_refused(tmp_path: Path) -> None:
    info = PngInfo()
    info.add_text("parameters", "x" * 50_000_000, zip=True)
    Image.fromarray(PIXELS).save(tmp_path / "a.png", pnginfo=info)
    with pytest.raises(InputError, match="inflates too far"):
        read_job(str(tmp_path / "a.png"))


@pytest.mark.parametrize("content", [b"", b"text", encode_png(PIXELS)[:40], encode_png(PIXELS)])
def test_files_without_settings_are_refused_in_one_line(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "od\x1bd.png"
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"od\\x1bd\.png: ") as caught:
        read_job(str(path))
    assert str(caught.value).isprintable()


def test_other_formats_are_refused(tmp_path: Path) -> None:
    Image.fromarray(PIXELS).save(tmp_path / "a.bmp")
    with pytest.raises(InputError, match="BMP"):
        read_job(str(tmp_path / "a.bmp"))
    with pytest.raises(InputError, match="no such file"):
        read_job(str(tmp_path / "absent.png"))


@pytest.mark.parametrize("kind", ["png", "jpg", "webp"])
@pytest.mark.parametrize("count", [30, pytest.param(150, marks=pytest.mark.fuzz)])
def test_damaged_files_are_read_or_refused(kind: str, tmp_path: Path, count: int) -> None:
    exif = Image.Exif()
    exif.get_ifd(0x8769)[0x9286] = b"UNICODE\0" + WEB_UI.encode("utf-16-be")
    path = tmp_path / f"a.{kind}"
    Image.fromarray(PIXELS).save(path, exif=exif.tobytes())
    data = np.frombuffer(path.read_bytes(), np.uint8)
    rng = np.random.default_rng(0)
    for _ in range(count):
        damaged = data.copy()
        places = rng.integers(0, len(data), rng.integers(1, 9))
        damaged[places] = rng.integers(0, 256, len(places), dtype=np.uint8)
        path.write_bytes(damaged[: rng.integers(len(data) // 2, len(data) + 1)].tobytes())
        with contextlib.suppress(InputError):
            read_job(str(path))
