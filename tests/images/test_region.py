"""The region around a mask: where it lies, and what it shows."""

import numpy as np
import pytest
from PIL import Image

from ldm.images.canvas import open_canvas
from ldm.images.region import region_around
from ldm.job import Init
from ldm.util import InputError


def drawn(height, width):
    return np.random.RandomState(height).randint(0, 256, (height, width, 3), dtype=np.uint8)


def mask_at(height, width, top, bottom, left, right):
    repaint = np.zeros((height, width), bool)
    repaint[top:bottom, left:right] = True
    return repaint


def region(height, width, box, padding, size):
    return region_around(drawn(height, width), mask_at(height, width, *box), padding, size)


@pytest.mark.parametrize(
    ("box", "padding", "size", "expected"),
    [
        ((100, 140, 100, 140), 10, (64, 64), (90, 90, 150, 150)),
        ((100, 140, 100, 160), 10, (64, 64), (90, 80, 170, 160)),  # grows evenly to a square
        ((100, 140, 100, 140), 10, (32, 64), (60, 90, 180, 150)),  # twice as wide as high
        ((0, 20, 0, 60), 0, (64, 64), (0, 0, 60, 60)),  # at the upper left edge: moves inside
        ((180, 200, 240, 300), 0, (64, 64), (240, 140, 300, 200)),
        ((0, 20, 0, 20), 500, (64, 64), (0, -50, 300, 250)),  # all of the image, and more to be a square
    ],
)
def test_the_place(box, padding, size, expected):
    assert region(200, 300, box, padding, size).box == expected


def test_it_holds_the_mask_and_its_padding_at_any_place():
    random = np.random.RandomState(0)
    for _ in range(300):
        height, width = random.randint(20, 200, 2)
        top, bottom = np.sort(random.choice(height + 1, 2, replace=False))
        left, right = np.sort(random.choice(width + 1, 2, replace=False))
        padding, size = int(random.randint(0, 20)), tuple(random.choice([64, 96, 128], 2))
        found = region(height, width, (top, bottom, left, right), padding, size)
        x0, y0, x1, y1 = found.box
        assert x0 <= max(left - padding, 0) and x1 >= min(right + padding, width)
        assert y0 <= max(top - padding, 0) and y1 >= min(bottom + padding, height)
        assert abs((x1 - x0) * size[0] - (y1 - y0) * size[1]) <= max(size)  # the aspect, to a pixel
        assert (x0 >= 0 and x1 <= width) or x1 - x0 > width
        assert (y0 >= 0 and y1 <= height) or y1 - y0 > height
        rows, columns = found.within
        cut = found.cut(found.pixels, found.size)
        assert np.array_equal(cut[rows, columns], found.pixels[found.visible])


def test_beyond_the_image_its_edge_is_repeated():
    found = region(200, 300, (0, 20, 0, 20), 500, (64, 64))
    cut = found.cut(found.pixels, found.size)
    assert cut.shape == (300, 300, 3)
    assert (cut[:50] == found.pixels[0]).all() and (cut[250:] == found.pixels[-1]).all()


def test_colours_are_resampled_as_pillow_does_and_thin_masks_are_kept():
    repaint = mask_at(200, 200, 0, 200, 100, 101)
    found = region_around(drawn(200, 200), repaint, 0, (64, 64))
    expected = Image.fromarray(found.pixels).resize((64, 64), Image.Resampling.LANCZOS)
    assert np.array_equal(found.cut(found.pixels, (64, 64)), np.asarray(expected))
    assert found.cut(repaint, (64, 64)).any(1).all()  # a line of one pixel, three times smaller


@pytest.fixture
def files(tmp_path):
    Image.fromarray(drawn(90, 150)).save(tmp_path / "image.png")
    Image.fromarray(mask_at(90, 150, 30, 50, 40, 60).astype(np.uint8) * 255).save(tmp_path / "mask.png")
    Image.new("L", (150, 90)).save(tmp_path / "black.png")
    return {"image": str(tmp_path / "image.png"), "mask": str(tmp_path / "mask.png")}


def test_the_canvas_is_the_region_at_the_size_that_is_worked_at(files):
    canvas = open_canvas(Init(**files, crop_to_mask=6), own_side=64)
    assert canvas.region is not None and canvas.region.box == (34, 24, 66, 56)
    assert canvas.pixels.shape == (64, 64, 3) and canvas.finished_size == (90, 150)
    assert np.array_equal(canvas.region.pixels, drawn(90, 150))
    assert "32x32 around the mask are made at 64x64" in canvas.notes
    canvas = open_canvas(Init(**files, crop_to_mask=6, width=128, height=64, resize="fill"))
    assert canvas.pixels.shape == (64, 128, 3) and canvas.region.box == (18, 24, 82, 56)


def test_a_region_needs_a_mask(files, tmp_path):
    with pytest.raises(InputError, match="needs a mask; give --mask"):
        open_canvas(Init(files["image"], crop_to_mask=6))
    with pytest.raises(InputError, match="the mask repaints nothing"):
        open_canvas(Init(files["image"], mask=str(tmp_path / "black.png"), crop_to_mask=6))
