from pathlib import Path

import numpy as np
import pytest

from ldm.data.dataset import render_many, scenes_path
from ldm.data.scenes import image_at

COUNT, SIZE = 70, 16  # more than one chunk


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("scenes")
    render_many(COUNT, "fresh", folder, workers=1, size=SIZE)
    return folder


def test_the_file_holds_the_scenes_in_order(folder: Path):
    pictures = np.load(scenes_path(COUNT, "fresh", folder, SIZE))
    assert pictures.shape == (COUNT, SIZE, SIZE, 3)
    for index in (0, 63, 64, 69):
        np.testing.assert_array_equal(pictures[index], image_at(index, "fresh", SIZE))
    assert [path.name for path in folder.iterdir()] == [f"fresh-{SIZE}-{COUNT}.npy"]


def test_two_workers_draw_the_same(folder: Path, tmp_path: Path):
    heard = []
    path = render_many(COUNT, "fresh", tmp_path, 2, SIZE, lambda done, count: heard.append((done, count)))
    assert path.read_bytes() == scenes_path(COUNT, "fresh", folder, SIZE).read_bytes()
    assert heard[-1] == (COUNT, COUNT)


def test_a_good_file_is_kept_and_a_bad_one_redrawn(tmp_path: Path):
    def drawn() -> bool:
        heard = []
        render_many(3, "train", tmp_path, 1, SIZE, lambda *done: heard.append(done))
        return bool(heard)

    assert drawn()
    path = scenes_path(3, "train", tmp_path, SIZE)
    whole = path.read_bytes()
    assert not drawn()
    for bad in (whole[:-100], whole[:-1] + bytes([whole[-1] ^ 1]), b""):
        path.write_bytes(bad)
        assert drawn()
        assert path.read_bytes() == whole


def test_a_run_that_is_cut_off_leaves_nothing(tmp_path: Path):
    def stop(done: int, count: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        render_many(3, "train", tmp_path, 1, SIZE, stop)
    assert list(tmp_path.iterdir()) == []


def test_two_runs_at_once_do_not_meet(tmp_path: Path):
    def meanwhile(done: int, count: int) -> None:
        render_many(3, "train", tmp_path, 1, SIZE)

    path = render_many(3, "train", tmp_path, 1, SIZE, meanwhile)
    np.testing.assert_array_equal(np.load(path)[2], image_at(2, "train", SIZE))
    assert list(tmp_path.iterdir()) == [path]


def test_no_scenes_are_refused(tmp_path: Path):
    with pytest.raises(ValueError, match="count is 0"):
        render_many(0, "train", tmp_path)
