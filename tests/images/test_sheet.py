"""Labelled sheets: images keep their pixels, names are inside their bands, all else is white."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import ImageFont

from ldm.images.sheet import FONT_SIZE, LINE, Box, layout, sheet, wrap
from ldm.util import InputError

ROWS, COLUMNS = ["scale 1", "scale 7.5"], ["10 steps", "20 steps", "50 steps"]


def tiles(*sizes: tuple[int, int]) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.integers(0, 255, (height, width, 3), dtype=np.uint8) for width, height in sizes]


def part(page: np.ndarray, box: Box) -> np.ndarray:
    left, top, right, bottom = box
    return page[top:bottom, left:right]


def test_pictures_keep_their_pixels_and_all_else_is_white() -> None:
    pictures = tiles((96, 64), (96, 80), (128, 64), (96, 64), (96, 64), (96, 64))
    page = np.array(sheet(pictures, ROWS, COLUMNS, "a cat"))
    placed = layout([(p.shape[1], p.shape[0]) for p in pictures], ROWS, COLUMNS, "a cat")
    assert page.shape == (placed.size[1], placed.size[0], 3)
    for picture, box in zip(pictures, placed.images, strict=True):
        np.testing.assert_array_equal(part(page, box), picture)
    for box in (placed.title, *placed.rows, *placed.columns):
        assert part(page, box).min() < 128, "a label without ink"
    for box in (placed.title, *placed.rows, *placed.columns, *placed.images):
        part(page, box)[:] = 255
    assert page.min() == 255


def test_boxes_do_not_overlap_and_stand_in_rows_and_columns() -> None:
    sizes = [(96, 64), (96, 80), (128, 64), (96, 64), (96, 64), (96, 64)]
    placed = layout(sizes, ROWS, COLUMNS, "a cat")
    covered = np.zeros(placed.size[::-1], int)
    for box in (placed.title, *placed.rows, *placed.columns, *placed.images):
        part(covered, box)[:] += 1
    assert covered.max() == 1
    for i, box in enumerate(placed.images):
        assert box[0] == placed.columns[i % 3][0]
        assert box[1] == placed.rows[i // 3][1]
    assert placed.rows[1][1] - placed.rows[0][1] >= 80


def test_the_same_label_looks_the_same_everywhere() -> None:
    pictures = tiles(*[(64, 64)] * 4)
    page = np.array(sheet(pictures, ["same", "same"], ["x", "x"]))
    placed = layout([(64, 64)] * 4, ["same", "same"], ["x", "x"])
    np.testing.assert_array_equal(*(part(page, box) for box in placed.rows))
    np.testing.assert_array_equal(*(part(page, box) for box in placed.columns))
    other = np.array(sheet(pictures, ["same", "else"], ["x", "x"]))
    assert np.any(part(page, placed.rows[1]) != part(other, placed.rows[1]))


def test_missing_pictures_leave_white_cells() -> None:
    (picture,) = tiles((64, 64))
    page = np.array(sheet([picture, None], ["a"], ["b", ""]))
    left = layout([(64, 64), None], ["a"], ["b", ""]).images[1][0]
    assert page[:, left:].min() == 255


def test_without_labels_there_are_no_bands() -> None:
    (picture,) = tiles((100, 50))
    page = np.array(sheet([picture], [""], [""]))
    assert page.shape == (50 + 12, 100 + 12, 3)
    np.testing.assert_array_equal(page[6:-6, 6:-6], picture)


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(InputError, match="20 by 20"):
        layout([(512, 512)] * 400, ["r"] * 20, ["c"] * 20)
    with pytest.raises(ValueError, match="2 rows of 3"):
        layout([(8, 8)] * 5, ROWS, COLUMNS)


HOSTILE = [
    "",
    " \n ",
    "\x1b[31m\u202e",
    "日本語 👩‍🚀",
    "W" * 5_000,
    "a " * 5_000,
    "\ud800",
    "%s {} <b>",
    "two\nlines",
]


@given(text=st.text() | st.sampled_from(HOSTILE), width=st.integers(64, 300), lines=st.integers(1, 4))
@settings(deadline=None)
def test_any_text_is_wrapped_to_its_width(text: str, width: int, lines: int) -> None:
    font = ImageFont.load_default(FONT_SIZE)
    wrapped = wrap(text, width, lines)
    assert len(wrapped) <= lines
    assert all(line.isprintable() and font.getlength(line) <= width for line in wrapped)


def test_words_stay_whole_and_what_is_cut_is_marked() -> None:
    text = "the quick brown fox jumps over the lazy dog"
    assert " ".join(wrap(text, 120, 9)) == text
    short = wrap(text, 120, 2)
    assert len(short) == 2
    assert short[-1].endswith("...")
    assert text.startswith(" ".join(short).removesuffix("..."))


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_labels_stay_in_their_bands(text: str) -> None:
    pictures = tiles(*[(64, 64)] * 4)
    page = np.array(sheet(pictures, [text, "b"], [text, "d"], text))
    placed = layout([(64, 64)] * 4, [text, "b"], [text, "d"], text)
    for picture, box in zip(pictures, placed.images, strict=True):
        np.testing.assert_array_equal(part(page, box), picture)
    assert placed.size[0] < 600 and placed.size[1] < 200 + 12 * LINE
