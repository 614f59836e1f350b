"""How a ControlNet is measured: of known shifts, and through the command."""

import numpy as np
import pytest
from PIL import Image

from ldm.evaluation.control import Measured, _measured, _write_renderings, as_markdown
from ldm.evaluation.lessons import READER
from ldm.training.evaluate import Captioned
from ldm.training.quality import load_reader
from tests.support.paths import ROOT


@pytest.fixture(scope="module")
def renderings(tmp_path_factory):
    captioned = Captioned.draw(6, seed=0)
    return captioned, _write_renderings(tmp_path_factory.mktemp("renderings"), captioned, "anywhere")


def test_the_reader_sees_in_the_hints_what_the_prompts_say(tmp_path):
    """Of both splits: else right images would be drawn by hints of other scenes."""
    captioned = Captioned.draw(12, seed=0)
    images = _write_renderings(tmp_path / "renderings", captioned, "middle")
    assert all(mark["all"] for mark in captioned.marks(load_reader(ROOT / READER), images))


@pytest.mark.parametrize("shift", [0, 3, 12])
def test_a_shift_is_its_own_distance(renderings, shift):
    captioned, images = renderings
    padded = np.pad(images, ((0, 0), (shift, 0), (0, 0), (0, 0)), mode="edge")[:, : images.shape[1]]
    marks = [{"all": True}] * 3 + [{"all": False}] * 3
    found = _measured("middle", "with", padded, images, captioned.scenes, marks)
    assert found.near == (shift <= 8) and found.right == 0.5
    assert abs(found.distance - shift) < 1.0  # what leaves the frame moves a centre


def test_what_is_not_drawn_is_a_side_away(renderings):
    captioned, images = renderings
    blank = np.broadcast_to(np.array([230, 163, 181], np.uint8), images.shape)  # the pink of backgrounds
    found = _measured("anywhere", "with", blank, images, captioned.scenes, None)
    assert found == Measured("anywhere", "with", 0.0, 128.0, None)
    assert "| anywhere | with | 0.0% | 128.0 px |  |" in as_markdown([found])


@pytest.mark.long
def test_the_command(tmp_path, monkeypatch, capsys):
    pytest.importorskip("cv2")
    from scripts.evaluate import main

    monkeypatch.chdir(tmp_path)
    assert main(["control", "--images", "set", "--count", "2"]) == 0
    assert sorted(path.name for path in (tmp_path / "set").iterdir()) == [
        "000.png",
        "000.txt",
        "001.png",
        "001.txt",
    ]
    assert main(["control", "--control", "none.safetensors", "--count", "2"]) == 2
    assert "none.safetensors" in capsys.readouterr().err.splitlines()[-1]
    assert main(["control", "--count", "2", "--quiet", "--", "--steps", "2"]) == 0
    table = capsys.readouterr().out
    assert all(
        f"| {place} | {drawn} |" in table for place in ("anywhere", "middle") for drawn in ("without", "with")
    )
    assert Image.open("outputs/control/control.png").size == (256, 384)
