from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from ldm.data.dataset import SceneImages, render_many, scenes_path
from ldm.data.scenes import image_at
from ldm.util import InputError

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


def test_an_item(folder: Path):
    item = SceneImages(COUNT, "fresh", folder, SIZE)[5]
    assert item["image"].shape == (SIZE, SIZE, 3)
    assert item["image"].dtype == torch.float32
    back = ((item["image"] + 1) * 127.5).round().to(torch.uint8)
    np.testing.assert_array_equal(back.numpy(), image_at(5, "fresh", SIZE))
    assert item["index"] == 5
    assert item["image"].min() >= -1
    assert item["image"].max() <= 1


def test_captions_change_with_the_epoch_and_only_with_it(folder: Path):
    images = SceneImages(COUNT, "fresh", folder, SIZE)
    first = [images[i]["caption"] for i in range(20)]
    assert first == [images[i]["caption"] for i in range(20)]
    images.set_epoch(1)
    again = [images[i]["caption"] for i in range(20)]
    assert sum(a != b for a, b in zip(first, again, strict=True)) > 10


def test_crops_are_cut_from_the_picture(folder: Path):
    images, cut = (
        SceneImages(COUNT, "fresh", folder, SIZE),
        SceneImages(COUNT, "fresh", folder, SIZE, crop=12),
    )
    for index in range(10):
        small = cut[index]["image"]
        windows = images[index]["image"].unfold(0, 12, 1).unfold(1, 12, 1).permute(0, 1, 3, 4, 2)
        assert (windows == small).flatten(2).all(dim=2).any()
        assert small.shape == (12, 12, 3)


def test_a_loader_with_workers_batches_it(folder: Path):
    batch = next(iter(DataLoader(SceneImages(COUNT, "fresh", folder, SIZE), batch_size=4, num_workers=1)))
    assert batch["image"].shape == (4, SIZE, SIZE, 3)
    assert len(batch["caption"]) == 4
    assert batch["index"].tolist() == [0, 1, 2, 3]


def test_faults_are_named(folder: Path, tmp_path: Path):
    with pytest.raises(InputError, match="render_many"):
        SceneImages(3, "train", tmp_path)
    with pytest.raises(ValueError, match="crop is 17"):
        SceneImages(COUNT, "fresh", folder, SIZE, crop=17)
    with pytest.raises(ValueError, match="count is 0"):
        render_many(0, "train", tmp_path)
    with pytest.raises(IndexError, match="70"):
        SceneImages(COUNT, "fresh", folder, SIZE)[COUNT]
