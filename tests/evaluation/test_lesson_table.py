"""The table of what a training taught: exact shares of images that the test rendered."""

import json
from pathlib import Path

import pytest
from PIL import Image

import scripts.evaluate as evaluate
from ldm.data.lessons import draw, lesson_scene
from ldm.data.scenes import image_at
from ldm.evaluation.lessons import as_markdown, measure, write_pairs


def painter(options):
    """Stands in for txt2img: draws the new thing right in the first half, and wrong before the training."""
    outdir, trained = Path(options[options.index("--outdir") + 1]), "--lora" in options
    rows = Path(options[options.index("--from-file") + 1]).read_text().splitlines()
    (outdir / "samples").mkdir(parents=True)
    for number in range(len(rows)):
        assert "prompt" in json.loads(rows[number])
        if outdir.name == "new":
            right = trained and number < len(rows) // 2
            scene = lesson_scene("pyramid", number, "fresh")
            old = lesson_scene("orange", number, "fresh")
            pixels = draw(scene if right else old, 50 + number)
        else:
            split = "fresh" if number < len(rows) // 2 else "heldout"
            pixels = image_at(number if not trained else number + 40, split)
        Image.fromarray(pixels).save(outdir / "samples" / f"{number:05}.png")
    return 0


@pytest.mark.long
def test_shares_before_and_after(tmp_path):
    table = measure("pyramid", tmp_path, 4, [], ["--lora", "x.safetensors"], painter)
    assert [table[side]["a pyramid is one"] for side in ("before", "after")] == [0, 0.5]
    assert table["before"]["usual prompts: all"] == 1  # renderings of the prompts' own scenes
    assert table["after"]["usual prompts: all"] < 1  # those of others
    assert "| a pyramid is one | 0% | 50% |" in as_markdown(table)
    with Image.open(write_pairs(tmp_path)) as pairs:
        assert pairs.size == (4 * 128, 2 * 128)


def test_the_code_of_a_run_that_fails_is_kept(tmp_path):
    assert measure("orange", tmp_path, 2, [], ["--lora", "x"], lambda _: 130) == 130


@pytest.mark.parametrize(
    ("typed", "line"),
    [
        (["blue"], "blue is not a lesson; choose from orange, pyramid, totem, hole"),
        (["orange"], "what was trained is missing; write it after --, such as -- --lora orange.safetensors"),
        (["hole", "--images", "x", "--usual", "0"], "--usual is 0; give 1 to "),
        (["orange", "--images", "."], "--images . exists; give a new folder"),
        (["orange", "--count", "0"], "--count is 0; give 1 to "),
    ],
    ids=lambda typed: typed[0] if isinstance(typed, list) else "",
)
def test_mistakes_are_one_line(typed, line, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert evaluate.main(["lesson", *typed]) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith(f"error: {line}")
