"""Infotexts as the web UI, its forks, extensions and other programs write them."""

from __future__ import annotations

import contextlib
import io
import json
import struct
import time
import zlib
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, features
from PIL.PngImagePlugin import PngInfo

from ldm.job import Job
from ldm.metadata.foreign import webui
from ldm.metadata.read import Recipe, read_job
from ldm.metadata.recipe import Origin
from ldm.metadata.record import read_record, record
from ldm.util import InputError
from tests.support.metadata import ELEMENT, XMP, noted

SETTINGS = "Steps: 12, Sampler: DDIM, CFG scale: 7, Seed: 5, Size: 64x64"
TEXT = f"a cat\nNegative prompt: ugly\n{SETTINGS}"


def read(more: str, settings: str = SETTINGS, size: tuple[int, int] | None = None) -> Recipe:
    """The recipe of "a cat" with more entries."""
    return webui.read(f"a cat\nNegative prompt: ugly\n{settings}{more}", Origin("x.png", size))


def of_this_size(width: int, height: int, more: str, size: tuple[int, int] | None = None) -> Recipe:
    return read(more, SETTINGS.replace("64x64", f"{width}x{height}"), size)


def second_pass(job: Job) -> tuple[int, int, float, float]:
    return job.width, job.height, job.upscale, job.upscale_strength


# --- where the settings are ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        f"{TEXT}\nTemplate: a {{cat|dog}}\nNegative Template: __bad__",
        f"{TEXT}\nTemplate: a cat, Steps: 3, Sampler: PLMS, Seed: 9",
        f"{TEXT}\n \n",
        f"\ufeff\n  {TEXT}  \n\0",
        TEXT.replace("\n", "\r\n"),
        TEXT.replace("\n", "\r"),
        TEXT.replace("\n", "  \n  "),
        TEXT.replace(", Sampler", " | Sampler").replace(", CFG", " | CFG").replace(", S", " | S"),
        TEXT.replace("Negative prompt", "negative prompt"),
        f"{TEXT}\nTime taken: 3.2 sec.",
        TEXT.replace(", ", ", \n"),
        TEXT.replace(", ", ","),
        TEXT.replace("\n", " "),
        TEXT.replace("\n", "."),
        TEXT.replace("\n", ",.", 1),
        TEXT.replace("ugly\n", "ugly "),
        TEXT.replace("prompt: ", "prompt: \n"),
    ],
)
def test_the_settings_are_found_in_whatever_surrounds_them(text: str, tmp_path: Path) -> None:
    info = PngInfo()
    info.add_itxt("parameters", text)
    Image.new("RGB", (64, 64)).save(tmp_path / "x.png", pnginfo=info)
    job = read_job(str(tmp_path / "x.png")).job
    assert job == Job(
        "a cat", "ugly", 5, 64, 64, 12, "ddim", 7.0, timestep_spacing="compvis", prompt_syntax="a1111"
    )


def test_a_prompt_that_looks_like_settings_stays_a_prompt() -> None:
    prompt = "Steps: 3\nSteps: 4, Sampler: PLMS, CFG scale: 1, Seed: 8"
    job = webui.read(f"{prompt}\nNegative prompt: a: b, c: d, e: f\nsecond\n\nthird\n{SETTINGS}").job
    assert (job.prompt, job.negative_prompt) == (prompt, "a: b, c: d, e: f\nsecond\n\nthird")
    assert (job.steps, job.seed) == (12, 5)


@pytest.mark.parametrize(("text", "prompts"), [
    (SETTINGS, ("", "")),
    (f"Negative prompt: ugly\n{SETTINGS}", ("", "ugly")),
    (f"a cat\nNegative prompt: \n{SETTINGS}", ("a cat", "")),
    (f"a cat\nNegative prompt: x\nNegative prompt: y\n{SETTINGS}", ("a cat", "x\ny")),
])  # fmt: skip
def test_prompts_may_be_missing(text: str, prompts: tuple[str, str]) -> None:
    job = webui.read(text).job
    assert (job.prompt, job.negative_prompt) == prompts


def test_values_may_hold_what_parts_entries_elsewhere() -> None:
    resources = json.dumps([{"type": "checkpoint", "modelName": "x, Steps: 99, Seed: 1"}])
    more = f', Civitai resources: {resources}, Hires prompt: "two\\nlines, Seed: 8", Clip skip: 2'
    recipe = read(more)
    assert (recipe.job.steps, recipe.job.seed) == (12, 5)
    assert recipe.job.clip_skip == 2 and noted(recipe, "Hires prompt")
    assert not noted(recipe, "Civitai")


def test_a_value_over_several_lines_does_not_hide_what_follows() -> None:
    recipe = read(", ADetailer prompt: a face\nsmiling, Seed: 9, Clip skip: 2, Version: v1.5.0")
    assert recipe.job.seed == 5
    assert recipe.job.clip_skip == 2 and noted(recipe, "ADetailer prompt a face")


def test_a_quoted_value_may_hold_ends_of_line() -> None:
    recipe = read(
        ', Wildcard prompt: "a __x__,\nb: c, d: e, Seed: 8", Hires upscale: 2, Denoising strength: 0.3'
    )
    assert (recipe.job.seed, recipe.job.upscale, recipe.job.strength) == (5, 2.0, 1.0)
    assert noted(recipe, "Wildcard prompt a __x__")


def test_resources_of_civitai_that_no_tag_asks_for_are_noted() -> None:
    resources = (
        '[{"type":"checkpoint","modelVersionId":290640},'
        '{"type":"ImageJobNetworkParams { Type = lora }","weight":0.4,"modelVersionId":426797},'
        '{"type":"lora","modelName":"ink","weight":1}]'
    )
    recipe = webui.read(
        f"a cat <lora:ink:1>\n{SETTINGS}, Civitai resources: {resources}, Civitai metadata: {{}}"
    )
    (note,) = (note for note in recipe.notes if "Civitai" in note)
    assert "lora version 426797 at 0.4" in note


def test_bars_leave_commas_to_the_values() -> None:
    settings = SETTINGS.replace(", ", " | ")
    recipe = read(' | Lora hashes: "ink: 0123456789ab, pen: ba9876543210" | Operations: txt2img', settings)
    assert recipe.extras == {"Lora hashes": "ink: 0123456789ab, pen: ba9876543210"}
    assert (recipe.job.steps, recipe.job.scale, recipe.job.width) == (12, 7.0, 64)


# --- names and values ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [
        "Steps: 12, Sampler: PLMS, CFG Scale: 3, Seed: 5, Size: 64x96",
        "steps: 12, sampler: plms, cfg_scale: 3.0, seed: 5, size: 64 x 96",
        "Steps: 12.0, Sampler name: PLMS, Guidance Scale: 3, SEED: 5, Width: 64, Height: 96",
        "Seed: 5, Size: (64 * 96), CFG: 3, Sampling method: PLMS, Sampling steps: 12",
    ],
)
def test_entries_are_known_whatever_their_spelling(settings: str) -> None:
    job = read("", settings).job
    assert (job.steps, job.sampler, job.scale, job.seed, job.width, job.height) == (
        12,
        "plms",
        3.0,
        5,
        64,
        96,
    )


def test_what_is_not_given_is_said() -> None:
    recipe = read("", "Sampler: DDIM, Seed: 5, Clip skip: 1", (64, 100))
    assert (recipe.job.width, recipe.job.height, recipe.job.steps) == (64, 96, 50)
    assert noted(recipe, "image's own, 64x96") and noted(recipe, "steps", "50") and noted(recipe, "CFG scale")
    with pytest.raises(InputError, match="no generation settings"):
        read("", "time: noon, place: home, who: me")


def test_the_images_own_size_is_that_after_the_second_pass() -> None:
    settings = "Steps: 12, Sampler: DDIM, CFG scale: 7, Seed: 5"
    job = read(", Hires upscale: 2, Denoising strength: 0.4", settings, (128, 192)).job
    assert second_pass(job) == (64, 96, 2.0, 0.4)


def test_a_schedule_is_the_same_in_one_entry_and_in_two() -> None:
    sampler = "Sampler: DPM++ 2M"
    one = webui.read(TEXT.replace("Sampler: DDIM", f"{sampler} Karras"))
    two = webui.read(TEXT.replace("Sampler: DDIM", f"{sampler}, Schedule type: Karras"))
    assert one == two and (one.job.sampler, one.job.schedule) == ("dpmpp_2m", "karras")


def test_eta_of_older_versions() -> None:
    assert read(", Eta: 0.67").job.eta == 0.67
    assert read(", Eta DDIM: 0.3").job.eta == 0.3


@pytest.mark.parametrize(("version", "rng", "source"), [
    ("v1.10.1", "philox", "A1111"), ("f2.0.1v1.10.1", "philox", "A1111"), ("ComfyUI", "cpu", "ComfyUI"),
    ("Fooocus v2.5.5", "cpu", "Fooocus"), ("v1.10.1, RNG: CPU", "cpu", "A1111"),
    ("ComfyUI, RNG: NV", "philox", "ComfyUI"),
])  # fmt: skip
def test_the_version_says_whose_noise_it_is(version: str, rng: str, source: str) -> None:
    recipe = read(f", Version: {version}")
    assert (recipe.job.rng, recipe.source) == (rng, source)


def test_what_changes_nothing_is_not_noted() -> None:
    more = (
        ", Clip skip: 1, ENSD: 31337, Variation seed: 3, Tiling: False, VAE: Automatic, Seed resize from: 0x0"
    )
    assert read(f"{more}, RNG: NV, Version: v1.5.0").notes == ()


def test_what_sd_next_writes_of_its_run_is_not_noted() -> None:
    more = ", Batch: 1x2, Index: 1x1, App: SD.Next, Version: a1b2c3d, Parser: Full parser, Pipeline: X"
    (note,) = read(f"{more}, Operations: txt2img").notes
    assert "NVIDIA" in note


def test_what_is_left_out_is_noted_once_and_whole() -> None:
    recipe = read(
        ", Face restoration: CodeFormer, Seed resize from: 512x384, Emphasis: No norm, VAE: x.pt, VAE hash: 12"
    )
    for words in (("CodeFormer",), ("512x384",), ("No norm",), ("VAE x.pt", "--vae")):
        assert noted(recipe, *words), words
    assert sum("VAE" in note or "resize" in note for note in recipe.notes) == 2


# --- a second pass, or an image to start from ----------------------------------------------------------------------


@pytest.mark.parametrize("more", [
    "Denoising strength: 0", "Denoising strength: 1",
    "App: SD.Next, Operations: txt2img, Denoising strength: 0.3", "Clip skip: 1",
    "Conditional mask weight: 1.0", "Hires resize: 0x0, Hires steps: 0, Hires upscaler: None",
    "App: SD.Next, Operations: none",
])  # fmt: skip
def test_text_to_image(more: str) -> None:
    recipe = read(f", {more}")
    assert (recipe.job.strength, recipe.job.upscale) == (1.0, 1.0)
    assert not noted(recipe, "starts from")


@pytest.mark.parametrize(("more", "strength"), [
    ("Denoising strength: 0.7", 0.7), ("Denoising strength: 0.7, Mask blur: 4", 0.7), ("Init image hash: ab", 0.75),
    ("App: SD.Next, Operations: img2img, Denoising strength: 0.3", 0.3), ("Denoising strength: 0, Mask blur: 4", 0.0),
    ("App: SD.Next, Operations: inpaint; color", 0.75), ("Soft inpainting enabled: True", 0.75),
    ("denoise: 0.6, Init image size: 64x64", 0.6),
    ("App: SD.Next, Operations: img2img; upscale, Hires scale: 2, Denoising strength: 0.3", 0.3),
])  # fmt: skip
def test_image_to_image(more: str, strength: float) -> None:
    recipe = read(f", {more}")
    assert (recipe.job.strength, recipe.job.upscale) == (strength, 1.0)
    assert noted(recipe, "only its denoising strength") == (more == "Denoising strength: 0.7")
    assert noted(recipe, "starts from an image") and noted(recipe, "mask") == (
        "ask" in more or "inpaint;" in more
    )


@pytest.mark.parametrize(("size", "more", "expected"), [
    ((512, 512), "Hires upscale: 2, Denoising strength: 0.7", (512, 512, 2.0, 0.7)),
    ((512, 768), "Hires resize: 1024x1536, Hires upscaler: Lanczos, Denoising strength: 0.7", (512, 768, 2.0, 0.7)),
    ((512, 512), "Hires resize: 768x0, Hires steps: 12, Denoising strength: 0.7", (512, 512, 1.5, 0.7)),
    ((1024, 1024), "First pass size: 0x0, Denoising strength: 0.7", (512, 512, 2.0, 0.7)),
    ((1024, 768), "First pass size: 0x0, Denoising strength: 0.7", (640, 448, 768 / 448, 0.7)),
    ((1024, 1024), "First pass size: 512x512, Denoising strength: 0.7", (512, 512, 2.0, 0.7)),
    ((512, 512), "App: SD.Next, Operations: txt2img; hires, Hires scale: 2, Hires strength: 0.3, Hires force: True",
     (512, 512, 2.0, 0.3)),
    ((512, 512), "App: SD.Next, Operations: upscale; txt2img, Hires fixed: 768x768, Hires upscaler: Lanczos",
     (512, 512, 1.5, 0.0)),
])  # fmt: skip
def test_every_way_to_write_a_second_pass(
    size: tuple[int, int], more: str, expected: tuple[int, int, float, float]
) -> None:
    recipe = of_this_size(*size, f", {more}")
    assert second_pass(recipe.job) == expected
    assert recipe.job.strength == 1.0 and not noted(recipe, "starts from")


def test_a_second_pass_without_a_size() -> None:
    more = ", Hires upscaler: Latent, Denoising strength: 0.6"
    assert of_this_size(64, 64, more, (96, 96)).job.upscale == 1.5
    recipe = of_this_size(64, 64, more)
    assert (recipe.job.upscale, recipe.job.upscale_in) == (2.0, "latents") and noted(
        recipe, "second pass's size"
    )


def test_a_second_pass_that_cannot_be_done_here_is_noted() -> None:
    recipe = read(", Hires upscale: 1, Denoising strength: 0.6")
    assert (recipe.job.upscale, recipe.job.strength) == (1.0, 1.0) and noted(recipe, "second pass at 1 times")
    assert noted(
        of_this_size(512, 512, ", Hires resize: 1024x512, Denoising strength: 0.6"), "cropping", "1024x512"
    )


# --- files ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("more", [
    'Lora hashes: "ink: 0123456789ab, pen: ba9876543210", TI hashes: "easyneg: c74b4e810b03"',
    "Lora hashes: ink: 0123456789ab, pen: ba9876543210, TI hashes: easyneg: c74b4e810b03",
    'Hashes: {"model": "6ce0161689", "lora:ink": "0123456789ab", "lora:pen": "ba9876543210", '
    '"embed:easyneg": "c74b4e810b03"}',
    'Lora hashes: "ink: 0123456789ab: 0.8, pen: ba9876543210: 1", TI hashes: "easyneg: c74b4e810b03"',
])  # fmt: skip
def test_hashes_of_files_are_kept(more: str) -> None:
    recipe = webui.read(f"a cat <lora:ink:0.8><lora:pen:1>\n{SETTINGS}, {more}, Version: v1.5.0")
    assert recipe.extras == {
        "Lora hashes": "ink: 0123456789ab, pen: ba9876543210", "TI hashes": "easyneg: c74b4e810b03"
    }  # fmt: skip
    assert (
        noted(recipe, "LoRA ink")
        and noted(recipe, "textual inversion easyneg")
        and not noted(recipe, "left out")
    )
    assert recipe.model_hash == ("6ce0161689" if "model" in more else "")


def test_weights_of_loras_outside_the_prompt() -> None:
    recipe = read(', Lora hashes: "ink: 0123456789", Lora weights: "ink: 0.4", Version: Fooocus v2.5')
    assert recipe.job.loras == (("ink", 0.4, 0.4),)
    more = ", AddNet Module 1: LoRA, AddNet Model 1: ink(0123456789ab), AddNet Weight A 1: 0.4"
    recipe = read(f"{more}, AddNet Weight B 1: 0.6")
    assert recipe.job.loras == (("ink", 0.4, 0.6),) and recipe.extras["Lora hashes"] == "ink: 0123456789ab"
    assert noted(read(', Lora hashes: "ink: 0123456789"'), "left out", "LoRA ink")


def test_loras_in_the_json_of_stable_diffusion_cpp() -> None:
    content = {
        "strength": 0.75,
        "loras": [{"name": "ink.safetensors", "multiplier": 0.4, "is_high_noise": False}],
    }
    recipe = read(f", Version: stable-diffusion.cpp, SDCPP: {json.dumps(content)}")
    assert (recipe.job.loras, recipe.job.strength) == ((("ink", 0.4, 0.4),), 1.0)


def test_the_second_pass_of_stable_diffusion_cpp() -> None:
    more = "Hires upscale: Lanczos, Hires scale: 2.000000, Hires resize: 0x0, Hires steps: 0, Denoising strength: 0.7"
    recipe = read(f", {more}, Version: stable-diffusion.cpp")
    assert second_pass(recipe.job) == (64, 64, 2.0, 0.7) and recipe.job.strength == 1.0


def test_weights_that_are_listed_without_names() -> None:
    recipe = read(', Lora hashes: "ink: 0123456789ab, pen: ba9876543210", loraweights: "0.33,1"')
    assert recipe.job.loras == (("ink", 0.33, 0.33), ("pen", 1.0, 1.0))


def test_words_that_are_listed_without_hashes() -> None:
    after = webui.read(f"{TEXT}\n\nUsed embeddings: easyneg [119b], bad-hands [c74b]")
    assert after.extras == {"TI hashes": "easyneg: , bad-hands: "}
    assert read(", App: SD.Next, Embeddings: easyneg").extras == {"TI hashes": "easyneg: "}
    assert read(', Used embeddings: "easyneg [119b], bad-hands [c74b]"').extras == {
        "TI hashes": "easyneg: , bad-hands: "
    }


ODD = st.sampled_from(
    ["", "0", "-1", "2", "1e999", "nan", "x", "0x0", "64x0", "[1", '{"a": 1}', '"a: b, c: 12345678"', "\x1b"]
)
KEYS = (
    "Steps", "Sampler", "CFG scale", "Seed", "Size", "Hires upscale", "Hires resize", "Hires steps", "Hires upscaler",
    "Hires strength", "First pass size", "Denoising strength", "Lora hashes", "Lora weights", "TI hashes", "Hashes",
    "Civitai resources", "AddNet Model 1", "AddNet Weight 1", "Eta", "ENSD", "Operations", "App", "Schedule type",
    "Embeddings", "VAE", "Variation seed", "Seed resize from", "Clip skip", "RNG", "Version", "Model hash",
)  # fmt: skip


@given(entries=st.dictionaries(st.sampled_from(KEYS), ODD | st.text(max_size=9)), tail=st.text(max_size=20))
@settings(max_examples=100, deadline=None)
def test_hostile_infotexts_are_read_or_refused(entries: dict[str, str], tail: str) -> None:
    table = {"Steps": "12", "Seed": "5", "Sampler": "DDIM"} | entries
    try:
        recipe = read(f"\n{tail}", ", ".join(f"{key}: {value}" for key, value in table.items()), (64, 96))
    except InputError:
        return
    assert read_record(record(recipe.job, {})).job == recipe.job
    assert all(note.isprintable() for note in recipe.notes)


# --- bytes and containers ------------------------------------------------------------------------------------------

FOREIGN = f"café 猫\n{SETTINGS}"


def png_with(path: Path, kind: bytes, data: bytes, *, late: bool = False) -> str:
    """A PNG with one chunk of raw bytes."""
    Image.new("RGB", (64, 64)).save(path)
    png = path.read_bytes()
    chunk = len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")
    at = len(png) - 12 if late else 33
    path.write_bytes(png[:at] + chunk + png[at:])
    return str(path)


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("kind", [b"tEXt", b"zTXt"])
def test_utf_8_in_chunks_of_latin_1(kind: bytes, mark: bytes, late: bool, tmp_path: Path) -> None:
    text = mark + FOREIGN.encode()
    data = b"parameters\0" + (text if kind == b"tEXt" else b"\0" + zlib.compress(text))
    assert read_job(png_with(tmp_path / "x.png", kind, data, late=late)).job.prompt == "café 猫"


def test_latin_1_that_is_not_utf_8_stays_what_it_is(tmp_path: Path) -> None:
    data = b"parameters\0" + f"café\n{SETTINGS}".encode("latin-1")
    assert read_job(png_with(tmp_path / "x.png", b"tEXt", data)).job.prompt == "café"


def test_quotes_and_dashes_of_windows_in_chunks_of_latin_1(tmp_path: Path) -> None:
    data = b"parameters\0" + f"“a cat” – caf\xe9, it’s 5 €\n{SETTINGS}".encode("cp1252")
    assert read_job(png_with(tmp_path / "x.png", b"tEXt", data)).job.prompt == "“a cat” – café, it’s 5 €"


def test_entries_that_are_none_are_not_given() -> None:
    job = webui.read(f"None\n{SETTINGS}, Denoising strength: None, Hires upscale: None, RNG: None").job
    assert (job.prompt, job.strength, job.upscale, job.rng) == ("None", 1.0, 1.0, "philox")


def test_a_record_is_never_taken_for_utf_8(tmp_path: Path) -> None:
    data = b"ldm\0" + record(Job("Ã©", width=512, height=512), {}).encode("latin-1")
    assert read_job(png_with(tmp_path / "x.png", b"tEXt", data)).job.prompt == "Ã©"


def jpeg_with(path: Path, comment: bytes) -> str:
    exif = Image.Exif()
    exif.get_ifd(0x8769)[0x9286] = comment
    Image.new("RGB", (64, 64)).save(path, exif=exif.tobytes())
    return str(path)


@pytest.mark.parametrize("data", [
    b"UNICODE\0" + FOREIGN.encode("utf-16-be"), b"UNICODE\0" + FOREIGN.encode("utf-16-le"),
    b"UNICODE\0" + FOREIGN.encode("utf-16"), b"UNICODE\0\xfe\xff" + FOREIGN.encode("utf-16-be"),
    b"UNICODE\0" + FOREIGN.encode(), b"ASCII\0\0\0" + FOREIGN.encode(), bytes(8) + FOREIGN.encode("utf-8-sig"),
    FOREIGN.encode("utf-16"), FOREIGN.encode(), b"ASCII\0\0\0" + FOREIGN.encode("utf-16-le"),
    b"JIS\0\0\0\0\0" + FOREIGN.encode(), b"Unicode\0" + FOREIGN.encode("utf-16-le"),
])  # fmt: skip
@pytest.mark.parametrize("ending", ["jpg", "webp", *(["avif"] if features.check("avif") else [])])
def test_character_sets_of_exif_comments(data: bytes, ending: str, tmp_path: Path) -> None:
    assert read_job(jpeg_with(tmp_path / f"x.{ending}", data)).job.prompt == "café 猫"


def test_a_long_comment_in_utf_16_that_has_few_latin_letters(tmp_path: Path) -> None:
    data = b"UNICODE\0" + f"{'猫' * 9000}\n{SETTINGS}".encode("utf-16-le")
    assert read_job(jpeg_with(tmp_path / "x.jpg", data)).job.prompt == "猫" * 9000


def test_a_japanese_comment(tmp_path: Path) -> None:
    data = b"JIS\0\0\0\0\0" + f"猫\n{SETTINGS}".encode("iso2022_jp")
    assert read_job(jpeg_with(tmp_path / "x.jpg", data)).job.prompt == "猫"


@pytest.mark.parametrize("tag", [0x010E, 0x010F, 0x9C9C, 0x9286])
def test_other_fields_of_exif(tag: int, tmp_path: Path) -> None:
    """Written byte by byte: Pillow would write only ASCII. 0x9286 is out of place here, as Fooocus has it."""
    data = FOREIGN.encode("utf-16-le" if tag == 0x9C9C else "utf-8")
    kind = 1 if tag == 0x9C9C else 2
    tiff = b"MM\0*" + struct.pack(">IHHHIII", 8, 1, tag, kind, len(data), 26, 0) + data
    Image.new("RGB", (64, 64)).save(tmp_path / "x.jpg", exif=b"Exif\0\0" + tiff)
    assert read_job(str(tmp_path / "x.jpg")).job.prompt == "café 猫"


@pytest.mark.parametrize("content", [b"parameters\0" + FOREIGN.encode() + b"\0", FOREIGN.encode()])
def test_comments_of_a_jpeg(content: bytes, tmp_path: Path) -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (64, 64)).save(buffer, "JPEG")
    data = buffer.getvalue()
    segment = b"\xff\xfe" + struct.pack(">H", len(content) + 2) + content
    other = b"\xff\xfe\x00\x06GIMP"
    (tmp_path / "x.jpg").write_bytes(data[:2] + other + segment + data[2:])
    assert read_job(str(tmp_path / "x.jpg")).job.prompt == "café 猫"


ATTRIBUTE = 'exif:UserComment="{}">'


@pytest.mark.parametrize("form", [ELEMENT, ATTRIBUTE])
@pytest.mark.parametrize("ending", ["jpg", "webp", "png"])
def test_xmp(form: str, ending: str, tmp_path: Path) -> None:
    packet = XMP.format(form.format(FOREIGN.replace("\n", "&#xA;"))).encode()
    path = tmp_path / f"x.{ending}"
    if ending == "png":
        png_with(path, b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + packet)
    else:
        Image.new("RGB", (64, 64)).save(path, xmp=packet)
    assert read_job(str(path)).job.prompt == "café 猫"


def test_entities_of_xmp_are_not_expanded(tmp_path: Path) -> None:
    packet = f'<!DOCTYPE x [<!ENTITY a "{SETTINGS}">]>' + XMP.format(ELEMENT.format("&a;"))
    for content in (packet.encode(), packet.encode("utf-16")):
        Image.new("RGB", (64, 64)).save(tmp_path / "x.jpg", xmp=content)
        with pytest.raises(InputError, match="holds no generation settings"):
            read_job(str(tmp_path / "x.jpg"))


def test_a_comment_of_another_kind_does_not_hide_the_settings(tmp_path: Path) -> None:
    path = jpeg_with(tmp_path / "y.jpg", b"ASCII\0\0\0Created with GIMP")
    with pytest.raises(InputError, match="holds no generation settings"):
        read_job(path)
    exif = Image.Exif()
    exif.get_ifd(0x8769)[0x9286] = b"ASCII\0\0\0Screenshot"
    info = PngInfo()
    info.add_text("parameters", TEXT)
    Image.new("RGB", (64, 64)).save(tmp_path / "x.png", exif=exif, pnginfo=info)
    recipe = read_job(str(tmp_path / "x.png"))
    assert recipe.job.prompt == "a cat" and not noted(recipe, "not used")


UNITS = ["ab: c, ", "ab: c | ", "\n", " ", ".", "steps: 3,x ", "ab: [", 'ab: "x', "x, negative prompt: "]


@pytest.mark.parametrize("unit", UNITS)
def test_reading_takes_linear_time(unit: str) -> None:
    many = unit * (100_000 // len(unit))
    start = time.process_time()
    for text in (many, f"{many}\n{SETTINGS}", f"a {many} {SETTINGS}", f"{TEXT}\n{many}"):
        with contextlib.suppress(InputError):
            webui.read(text)
    assert time.process_time() - start < 20  # far from it; quadratic time would be minutes


# --- ControlNet, and what edits images ------------------------------------------------------------------------------

UNIT = (
    "Module: canny, Model: control_v11p_sd15_canny [d14c016b], Weight: 0.75, Resize Mode: Crop and Resize, "
    "Processor Res: 512, Threshold A: 100, Threshold B: 200, Guidance Start: 0.1, Guidance End: 0.8, "
    "Pixel Perfect: True, Control Mode: My prompt is more important"
)


def test_units_of_the_controlnet_extension_are_read() -> None:
    recipe = read(f', ControlNet 0: "{UNIT}", Version: v1.10.1')
    job = recipe.job
    assert job.controls == (("control_v11p_sd15_canny", "", 0.75, 0.1, 0.8),)
    assert (job.hint, job.control_mode, job.control_resize) == ("canny", "prompt", "fill")
    assert noted(recipe, "control_v11p_sd15_canny", "hint image", "not in the file")
    assert not noted(recipe, "left out")


@pytest.mark.parametrize("module", ["ip-adapter_clip_sd15", "CLIP-ViT-H (IPAdapter)"])
def test_units_that_are_ip_adapters_have_images_and_no_hints(module: str) -> None:
    text = f"Module: {module}, Model: ip-adapter_sd15 [6a3f6166], Weight: 0.7, Resize Mode: Crop and Resize"
    recipe = read(f', ControlNet 0: "{text}", Version: v1.10.1')
    assert recipe.job.controls == (("ip-adapter_sd15", "", 0.7, 0.0, 1.0),)
    assert (recipe.job.hint, recipe.job.control_resize) == ("none", "none")
    assert noted(recipe, "the IP-Adapter ip-adapter_sd15 and its image") and not noted(recipe, "hint")


def test_older_units_and_hints_of_networks_are_read() -> None:
    """The name without a number, brackets around the steps; a depth network makes the second hint."""
    old = (
        "preprocessor: none, model: scribble [fef5e48e], weight: 1, starting/ending: (0, 0.5), "
        "resize mode: Just Resize"
    )
    other = UNIT.replace("canny,", "depth_midas,").replace("control_v11p_sd15_canny", "depth")
    recipe = read(f', ControlNet: "{old}", ControlNet 1: "{other}"')
    assert recipe.job.controls == (("scribble", "", 1.0, 0.0, 0.5), ("depth", "", 0.75, 0.1, 0.8))
    assert (recipe.job.hint, recipe.job.control_mode, recipe.job.control_resize) == (
        "none",
        "balanced",
        "stretch",
    )
    assert noted(recipe, "hint was made by depth_midas; give that image with --control")
    assert noted(recipe, "ControlNets differ in control_mode: prompt is left out")


def test_the_guidance_by_an_image_is_read() -> None:
    recipe = read(", Denoising strength: 1, Image CFG scale: 1.2, Version: v1.10.1")
    assert (recipe.job.image_scale, recipe.job.strength) == (1.2, 1.0)
    assert not noted(recipe, "Image CFG scale")


@pytest.mark.parametrize(
    ("entries", "padding"),
    [
        ("Inpaint area: Only masked, Masked area padding: 48", "48"),
        ("Inpaint area: Only masked", "32"),
        ("Inpaint area: Whole picture, Masked area padding: 48", None),
    ],
)
def test_only_masked_is_read_with_its_padding(entries: str, padding: str | None) -> None:
    recipe = read(f", Denoising strength: 0.75, Mask blur: 4, {entries}, Version: v1.10.1")
    assert recipe.extras.get("Mask padding") == padding
    assert not noted(recipe, "left out: Inpaint area") and not noted(recipe, "left out: Masked area")
