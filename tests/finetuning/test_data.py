"""What folders, lists and TOML files of images mean, and the one line that a faulty one gets."""

import json

import numpy as np
import pytest
from PIL import Image

from ldm.finetuning.captions import caption_for
from ldm.finetuning.data import Example, read_examples
from ldm.util import InputError

NONE = Example(path=None, caption="")


def picture(path, text=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8)).save(path)
    if text is not None:
        path.with_suffix(".txt").write_text(text)


def found(source, defaults=NONE, **options):
    return [(e.path.name, e.caption, e.repeats) for e in read_examples(source, defaults, **options)]


def test_captions_are_next_to_the_images(tmp_path):
    picture(tmp_path / "b.png", "two\n")
    picture(tmp_path / "a.JPG", "\ufeffone")
    (tmp_path / "notes.md").write_text("not an image")
    assert found(tmp_path) == [("a.JPG", "one", 1), ("b.png", "two", 1)]


def test_an_image_without_a_caption_gets_the_common_one_or_is_named(tmp_path):
    picture(tmp_path / "a.png", "one")
    picture(tmp_path / "b.png")
    assert found(tmp_path, Example(None, "a dog")) == [("a.png", "one", 1), ("b.png", "a dog", 1)]
    with pytest.raises(InputError, match=r"1 of 2 images have no caption.*b\.png.*b\.txt.*--caption"):
        found(tmp_path)


def test_folders_with_a_number_repeat(tmp_path):
    picture(tmp_path / "10_sks dog/a.png")
    picture(tmp_path / "2_a_cat/b.png", "own words")
    assert found(tmp_path) == [("a.png", "sks dog", 10), ("b.png", "own words", 2)]


@pytest.mark.parametrize("name", ["metadata.jsonl", "metadata.csv"])
def test_lists_name_files_and_captions(tmp_path, name):
    picture(tmp_path / "x/a.png")
    rows = {
        "metadata.jsonl": json.dumps({"file_name": "x/a.png", "text": 'a "red", cube'}) + "\n\n",
        "metadata.csv": 'file_name,text\nx/a.png,"a ""red"", cube"\n',
    }
    (tmp_path / name).write_text(rows[name])
    assert found(tmp_path) == [("a.png", 'a "red", cube', 1)]


def test_kohyas_toml(tmp_path):
    picture(tmp_path / "mine/a.png", "one, two")
    picture(tmp_path / "class/b.png")
    (tmp_path / "set.toml").write_text(
        "[general]\nshuffle_caption = true\nkeep_tokens = 1\n"
        "[[datasets]]\nresolution = 512\n"
        "[[datasets.subsets]]\nimage_dir = 'mine'\nnum_repeats = 4\nflip_aug = true\ncaption_dropout_rate = 0.2\n"
        "[[datasets.subsets]]\nimage_dir = 'class'\nis_reg = true\nclass_tokens = 'a dog'\nkeep_tokens = 0\n"
    )
    mine, general = read_examples(tmp_path / "set.toml", NONE)
    assert mine == Example(tmp_path / "mine/a.png", "one, two", 4, False, True, True, 1, 0.2)
    assert general == Example(tmp_path / "class/b.png", "a dog", 1, True, False, True, 0, 0.0)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, r"no images in .*; put PNG"),
        ({"metadata.jsonl": "[]"}, r"metadata\.jsonl, line 1 is not a JSON object"),
        ({"metadata.jsonl": "{}"}, r"line 1 has no file_name"),
        ({"metadata.jsonl": '{"file_name": "no.png"}'}, r"line 1: .*no\.png does not exist"),
        ({"metadata.csv": "a,b\n1,2\n"}, r"line 2 has no file_name"),
        ({"s.toml": "[[datasets]]"}, r"has no \[\[datasets\]\] with"),
        ({"s.toml": "x = ["}, r"is not TOML"),
        (
            {"s.toml": "[[datasets]]\n[[datasets.subsets]]\nimage_dir = 'no'"},
            r"image_dir .*no is not a folder",
        ),
        (
            {"s.toml": "[[datasets]]\n[[datasets.subsets]]\nnum_repeats = true"},
            r"num_repeats is 'True', not a int",
        ),
    ],
    ids=str,
)
def test_what_is_wrong_is_one_line(tmp_path, files, message):
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(InputError, match=message) as caught:
        read_examples(tmp_path / "s.toml" if "s.toml" in files else tmp_path, NONE)
    assert "\n" not in str(caught.value)


def test_parts_of_a_caption_are_shuffled_behind_the_kept_ones():
    example = Example(None, "a, b,c , d", shuffle=True, keep_tokens=1)
    seen = {caption_for(example, np.random.default_rng(seed)) for seed in range(200)}
    assert seen == {f"a, {x}, {y}, {z}" for x, y, z in ["bcd", "bdc", "cbd", "cdb", "dbc", "dcb"]}


def test_captions_are_left_out_as_often_as_asked():
    example = Example(None, "a", drop=0.3)
    empty = sum(caption_for(example, np.random.default_rng(seed)) == "" for seed in range(2000))
    assert abs(empty / 2000 - 0.3) < 4 * (0.3 * 0.7 / 2000) ** 0.5
