"""InvokeAI's modes, and its old commands with prompts of all kinds."""

from __future__ import annotations

import json

import pytest

from ldm.job import Init
from ldm.metadata.foreign import invokeai
from tests.support.metadata import INVOKE, noted


@pytest.mark.parametrize(
    "mode", ["img2img", "inpaint", "outpaint", "sdxl_img2img", "flux_inpaint", "sd3_outpaint"]
)
def test_modes_that_start_from_an_image(mode: str) -> None:
    recipe = invokeai.read_metadata(json.dumps(INVOKE | {"generation_mode": mode, "strength": 0.6}))
    assert recipe.job.strength == 0.6 and noted(recipe, "starts from")
    assert noted(recipe, "repaints") == ("paint" in mode)
    assert noted(recipe, "mode", mode) == ("_" in mode)


@pytest.mark.parametrize("mode", ["txt2img", "sdxl_txt2img", "flux_txt2img", "novel"])
def test_modes_that_do_not(mode: str) -> None:
    recipe = invokeai.read_metadata(json.dumps(INVOKE | {"generation_mode": mode, "strength": 0.6}))
    assert recipe.job.strength == 1 and not noted(recipe, "starts from")
    assert noted(recipe, "mode", mode) == (mode != "txt2img")


def test_a_model_of_another_kind_is_named() -> None:
    content = INVOKE | {"model": {"name": "x", "base": "sdxl"}}
    assert noted(invokeai.read_metadata(json.dumps(content)), "sdxl")


def test_strength_steps_of_version_2() -> None:
    image = {
        "prompt": "a cat",
        "type": "img2img",
        "strength_steps": 0.4,
        "seed": 1,
        "steps": 50,
        "sampler": "ddim",
    }
    assert invokeai.read_sd_metadata(json.dumps({"image": image})).job.strength == 0.4


@pytest.mark.parametrize(
    ("prompt", "plain"),
    [
        ('"a "big" cat"', 'a "big" cat'),
        ('"a "big""', 'a "big"'),
        ('"a \\"big\\" cat"', 'a "big" cat'),
        ('"a well-known -big cat"', "a well-known -big cat"),
        ('a cat\'s -big "hat"', 'a cat\'s -big "hat"'),
        ('""', ""),
        ("", ""),
    ],
)
def test_prompts_of_old_commands(prompt: str, plain: str) -> None:
    for options in ("-s 20 -S 5 -W 64 -H 64 -C 7.5 -A ddim", "-s20 -W64 -H64 -C7.5 -Addim -S5"):
        job = invokeai.read_dream(f"{prompt} {options}").job
        assert (job.prompt, job.steps, job.seed, job.width) == (plain, 20, 5, 64)


def test_options_of_old_commands() -> None:
    recipe = invokeai.read_dream(
        '"a cat" -s 20 -S 5 -I "a/b.png" -M m.png -f 0.4 -ft gfpgan -V 3:0.1 --seamless'
    )
    assert (recipe.job.init, recipe.job.strength) == (Init("b.png"), 0.4)
    assert all(noted(recipe, word) for word in ("repaints", "gfpgan", "-V 3:0.1", "--seamless"))
    assert invokeai.read_dream('"a cat" --steps 20 --seed 5 --strength=0.4 -Ib.png').job.strength == 0.4


def test_weighted_parts_of_a_prompt_are_noted() -> None:
    assert noted(invokeai.read_dream('"a cat:1 a dog:2" -s20 -S5'), "colon")


def test_textual_inversions_in_angle_brackets_are_noted() -> None:
    content = INVOKE | {"positive_prompt": "a cat, <midjourney-style>, 1 < 2", "negative_prompt": "<easyneg>"}
    recipe = invokeai.read_metadata(json.dumps(content))
    assert recipe.job.negative_prompt == "<easyneg>"
    assert noted(recipe, "inversion easyneg") and noted(recipe, "inversion midjourney-style")
    assert sum("inversion" in note for note in recipe.notes) == 2


def test_options_of_old_commands_with_several_values() -> None:
    recipe = invokeai.read_dream('"a cat" -s 20 -S 5 -U 2 0.75 -I my photo.png -f 0.4 -G 0.8')
    assert (recipe.job.init, recipe.job.strength) == (Init("my photo.png"), 0.4)
    assert noted(recipe, "-U 2 0.75") and noted(recipe, "-G 0.8")


@pytest.mark.parametrize("kind", ["controlLayers", "regionalGuidance", "referenceImages"])
@pytest.mark.parametrize(
    ("entities", "is_noted"),
    [
        ([{"id": "a"}], True), ([{"isEnabled": False}, {"isEnabled": True}], True), ([{"isEnabled": False}], False),
        ([], False), (None, False), ("x", False), ([None], False),
    ],
)  # fmt: skip
def test_what_guides_an_image_on_a_canvas_is_noted(kind: str, entities: object, is_noted: bool) -> None:
    content = INVOKE | {"canvas_v2_metadata": {"rasterLayers": [{"id": "b"}], kind: entities}}
    assert noted(invokeai.read_metadata(json.dumps(content)), kind) == is_noted
