"""The judge of images: its questions, its scores, and its training."""

import numpy as np
import pytest

from ldm.data.scenes import Scene, Solid, render
from ldm.training.quality import judge, load_reader, save_reader, score, train_reader
from ldm.training.questions import ANSWERS, answers, describe
from ldm.training.runs import Optimisation

CUBE, BALL = Solid("cube", "red", "large"), Solid("sphere", "blue", "small")
PAIR = Scene((CUBE, BALL), "left of", "grey")
SWAPPED = Scene((BALL, CUBE), "left of", "grey")
SINGLE = Scene((CUBE,), None, "grey")


@pytest.mark.parametrize("scene", [PAIR, SWAPPED, SINGLE])
def test_classes_stand_for_the_true_answers(scene):
    named = [values[c] for values, c in zip(ANSWERS.values(), answers(scene), strict=True)]
    assert named == list(describe(scene).values())


def test_marks():
    assert score(describe(PAIR), PAIR) == {"shape": True, "colour": True, "relation": True, "all": True}
    wrong_colour = {**describe(PAIR), "colour 2": "green"}
    assert score(wrong_colour, PAIR) == {"shape": True, "colour": False, "relation": True, "all": False}
    assert score(describe(SINGLE), PAIR) == {"shape": False, "colour": False, "relation": False, "all": False}
    assert score(describe(PAIR), SINGLE)["all"] is False


def test_side_by_side_counts_either_way_round_only_where_the_order_is_free():
    assert score(describe(SWAPPED), PAIR)["all"] is False
    assert score(describe(SWAPPED), PAIR, ordered=False)["all"] is True
    behind, before = Scene((CUBE, BALL), "behind", "grey"), Scene((BALL, CUBE), "behind", "grey")
    assert score(describe(before), behind, ordered=False)["all"] is False


@pytest.mark.long
def test_a_reader_learns_pictures_and_survives_the_file(tmp_path):
    scenes = [PAIR, SWAPPED, SINGLE, Scene((BALL,), None, "mint"), Scene((BALL, CUBE), "on top of", "pink")]
    images = np.stack([render(scene, seed, 64) for seed, scene in enumerate(scenes)])
    reader = train_reader(images, scenes, Optimisation(3e-3, steps=60, warm_up_steps=5), batch_size=10)
    save_reader(reader, tmp_path / "judge.pt")
    assert (tmp_path / "judge.pt").stat().st_size < 2**20
    for verdict, scene in zip(judge(load_reader(tmp_path / "judge.pt"), images), scenes, strict=True):
        assert verdict == describe(scene)
