"""Lessons: what they teach is distinguished from what the model knows, on renderings that the test made itself."""

from dataclasses import replace

import numpy as np
import pytest

from ldm.data.lessons import (
    HOLE,
    LESSONS,
    TOTEM,
    draw,
    hole,
    lesson_scene,
    question,
    shows,
    stated,
    write_lesson,
)
from ldm.data.scenes import COLOURS, SHAPES, held_out, scene_at
from ldm.finetuning.data import Example, read_examples


@pytest.mark.parametrize("name", ["orange", "pyramid"])
def test_the_new_thing_is_told_from_every_known_one(name):
    known = list(COLOURS if LESSONS[name] == "colour" else SHAPES)
    for number in range(4):
        scene = lesson_scene(name, number, "fresh")
        assert shows(name, draw(scene, 900 + number), scene), number
        first, *rest = scene.solids
        old = replace(first, **{LESSONS[name]: known[number]})
        assert not shows(name, draw(replace(scene, solids=(old, *rest)), 900 + number), scene), number


def test_a_folder_holds_as_many_visits_of_the_new_thing_as_of_usual_scenes(tmp_path):
    write_lesson("pyramid", tmp_path / "p", count=2, usual=4)
    examples = read_examples(tmp_path / "p", Example(tmp_path, ""))
    assert [example.repeats for example in examples] == [2, 2]
    assert all("pyramid" in example.caption for example in examples)
    usual = read_examples(tmp_path / "p" / "usual", Example(tmp_path, ""))
    assert len(usual) == 4 and not any("pyramid" in example.caption for example in usual)


def test_holes_are_learnt_from_usual_scenes_alone(tmp_path):
    write_lesson(HOLE, tmp_path / "h", usual=3)
    assert [path.name for path in (tmp_path / "h").iterdir()] == ["usual"]
    assert len(read_examples(tmp_path / "h/usual", Example(tmp_path, ""))) == 3


def test_a_hole_hides_a_solid_and_little_else():
    for number in range(4):
        image, mask, target = hole(number)
        scene = scene_at(number, "heldout")
        assert target.solids[1] == scene.solids[1] and target.relation == scene.relation
        first, new = scene.solids[0], target.solids[0]
        assert new.colour != first.colour and new.shape != first.shape
        other = replace(scene, solids=(replace(first, colour=new.colour), scene.solids[1]))
        changed = np.abs(image.astype(int) - draw(other, number)).max(-1) > 8
        assert changed.any() and not changed[mask == 0].any()
        assert 0.01 < (mask == 255).mean() < 0.4 and set(np.unique(mask)) == {0, 255}


def test_the_totem_is_a_pair_that_training_never_showed():
    scene, prompt = question("totem", 3)
    assert held_out(scene) and scene.solids == TOTEM and "totem" in prompt
    assert not {"cone", "cube", "purple", "cyan"} & set(prompt.lower().split())


def test_a_prompt_of_the_test_leaves_nothing_open():
    scene = lesson_scene("orange", 3, "fresh")
    words = stated(scene)
    for solid in scene.solids:
        assert f"a {solid.size} {solid.colour} {solid.shape}" in words
    assert words.endswith(f"on a {scene.background} background") and HOLE not in LESSONS
