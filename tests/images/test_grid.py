from __future__ import annotations

import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from ldm.images import grid
from ldm.images.grid import GridWriter


def pictures(count: int, height: int, width: int) -> np.ndarray:
    return np.random.default_rng(count).integers(1, 256, (count, height, width, 3), np.uint8)


def sheets_of(folder: Path, columns: int, images: np.ndarray) -> list[np.ndarray]:
    sheets: list[np.ndarray] = []
    with GridWriter(folder, columns, sheets.append) as writer:
        for image in images:
            writer.add(image)
        writer.finish()
    return sheets


def laid_out(images: np.ndarray, columns: int) -> np.ndarray:
    """The layout built independently: frame each image, join rows, join columns."""
    across = min(columns, len(images))
    tiles = [np.pad(image, ((2, 0), (2, 0), (0, 0))) for image in images]
    tiles += [np.zeros_like(tiles[0])] * (-len(images) % across)
    rows = [np.concatenate(tiles[i : i + across], axis=1) for i in range(0, len(tiles), across)]
    return np.pad(np.concatenate(rows), ((0, 2), (0, 2), (0, 0)))


@pytest.mark.parametrize(
    ("count", "columns", "shape"),  # height = rows * (10 + 2) + 2, width = columns * (6 + 2) + 2
    [
        (2, 3, (14, 18)),
        (3, 3, (14, 26)),
        (4, 3, (26, 26)),
        (6, 3, (26, 26)),
        (7, 2, (50, 18)),
        (3, 1, (38, 10)),
    ],
)
def test_layout(tmp_path: Path, count: int, columns: int, shape: tuple[int, int]) -> None:
    images = pictures(count, 10, 6)
    (sheet,) = sheets_of(tmp_path, columns, images)
    assert sheet.shape == (*shape, 3)
    np.testing.assert_array_equal(sheet, laid_out(images, columns))


@pytest.mark.parametrize("count", [1, 2, 5, 6, 11])
@pytest.mark.parametrize("columns", [1, 3, 6])
def test_layout_equals_torchvision(tmp_path: Path, count: int, columns: int) -> None:
    utils = pytest.importorskip("torchvision.utils")
    import torch

    images = pictures(count, 10, 6)
    made = utils.make_grid(torch.from_numpy(images).permute(0, 3, 1, 2) / 255, nrow=columns)
    expected = (255 * made.permute(1, 2, 0)).round().to(torch.uint8).numpy()
    (sheet,) = sheets_of(tmp_path, columns, images)
    np.testing.assert_array_equal(sheet, expected)


def test_a_single_picture_has_no_frame(tmp_path: Path) -> None:
    for columns in (1, 3):
        images = pictures(1, 10, 6)
        (sheet,) = sheets_of(tmp_path, columns, images)
        np.testing.assert_array_equal(sheet, images[0])


def test_nothing_added_delivers_nothing(tmp_path: Path) -> None:
    assert sheets_of(tmp_path, 3, pictures(0, 10, 6)) == []


def test_another_size_starts_another_sheet(tmp_path: Path) -> None:
    small, large = pictures(3, 8, 8), pictures(2, 16, 8)
    sheets: list[np.ndarray] = []
    with GridWriter(tmp_path, 2, sheets.append) as writer:
        for image in [*small, *large]:
            writer.add(image)
        writer.finish()
    assert len(sheets) == 2
    np.testing.assert_array_equal(sheets[0], laid_out(small, 2))
    np.testing.assert_array_equal(sheets[1], laid_out(large, 2))


def test_a_full_page_starts_the_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = pictures(11, 10, 6)
    monkeypatch.setattr(grid, "MAX_PAGE_PIXELS", 2 * 12 * 26 + 2 * 26)  # two rows of three and the last frame
    sheets = sheets_of(tmp_path, 3, images)
    assert len(sheets) == 2
    np.testing.assert_array_equal(sheets[0], laid_out(images[:6], 3))
    np.testing.assert_array_equal(sheets[1], laid_out(images[6:], 3))


def test_the_stated_page_size() -> None:
    rows, width = 252 // 6, 6 * 514 + 2
    assert (rows * 514 + 2) * width <= grid.MAX_PAGE_PIXELS < ((rows + 1) * 514 + 2) * width


def test_memory_stays_at_one_row(tmp_path: Path) -> None:
    picture = pictures(1, 256, 256)[0]
    tracemalloc.start()
    with GridWriter(tmp_path, 2, lambda sheet: None) as writer:
        for _ in range(150):
            writer.add(picture)
        peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8 * picture.nbytes


def test_no_file_is_left_behind_even_without_finish(tmp_path: Path) -> None:
    with GridWriter(tmp_path, 1, lambda sheet: None) as writer:
        writer.add(pictures(1, 8, 8)[0])
    assert list(tmp_path.iterdir()) == []


def test_zero_columns_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="0"):
        GridWriter(tmp_path, 0, lambda sheet: None)
