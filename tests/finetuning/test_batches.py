"""Batches: what an epoch holds, what a step's number determines, and the latents on disk."""

from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image

from ldm.finetuning.batches import Epochs, batch_maker
from ldm.finetuning.buckets import Placement, bucket_sizes
from ldm.finetuning.data import Example
from ldm.finetuning.inpainting import random_mask
from ldm.finetuning.latents import Placed, Placer, place_all
from ldm.util import InputError


def placed(tmp_path, count=7):
    images = []
    for number in range(count):
        size = (16, 8) if number % 3 == 0 else (8, 8)
        file = tmp_path / f"{number}.npy"
        moments = np.full((2, 4, size[1] // 8, size[0] // 8), number, np.float32)
        moments[1] = 0
        np.save(file, moments)
        example = Example(file, f"caption {number}", repeats=1 + number % 2, regular=number == 5)
        images.append(Placed(example, Placement(size, size, (0, 0)), (file,)))
    return images


def test_an_epoch_holds_each_image_as_often_as_it_repeats(tmp_path):
    images = placed(tmp_path)
    epochs = Epochs(images, 2, seed=3)
    for epoch in range(3):
        batches = [epochs.batch(epoch * epochs.batches + i) for i in range(epochs.batches)]
        seen = Counter(image.example.path.stem for batch in batches for image in batch)
        assert seen == {str(n): 1 + n % 2 for n in range(7)}
        assert all(len({image.placement.size for image in batch}) == 1 for batch in batches)
        assert all(len(batch) <= 2 for batch in batches)
    orders = [
        [[i.example.path.stem for i in epochs.batch(e * epochs.batches + b)] for b in range(3)]
        for e in (0, 1)
    ]
    assert orders[0] != orders[1]


def test_a_batch_depends_on_its_number_alone(tmp_path):
    images = placed(tmp_path)
    make = batch_maker(Epochs(images, 2, 0), 1000, noise_offset=0.1, regular_weight=0.5)
    first, again = (make(11, np.random.default_rng([0, 11])) for _ in range(2))
    other = batch_maker(Epochs(images, 2, 0), 1000, 0.1, 0.5)(11, np.random.default_rng([0, 11]))
    for batch in (again, other):
        assert torch.equal(first.noise, batch.noise) and torch.equal(first.t, batch.t)
        assert first.captions == batch.captions
    for number in range(9):
        batch = make(number, np.random.default_rng([0, number]))
        stems = [image.example.path.stem for image in batch.images]
        assert [float(x.mean()) for x in batch.latents] == [float(stem) for stem in stems]
        assert batch.weights.tolist() == [0.5 if stem == "5" else 1.0 for stem in stems]


def test_the_noise_offset_is_common_to_a_channel(tmp_path):
    images = placed(tmp_path, 1)
    images[0].latents[0].unlink()
    np.save(images[0].latents[0], np.zeros((2, 4, 32, 32), np.float32))
    make = batch_maker(Epochs(images, 1, 0), 1000, noise_offset=0.5)
    means = torch.cat([make(n, np.random.default_rng([1, n])).noise.mean(dim=(2, 3)) for n in range(200)])
    expected = (0.25 + 1 / 1024) ** 0.5  # of the mean of 1,024 unit normals and the offset
    assert float(means.std()) == pytest.approx(expected, rel=0.1)


def test_latents_are_encoded_once_by_content(tmp_path, caplog):
    calls = []

    def encode(pixels):
        calls.append(pixels)
        return torch.zeros(2, 4, pixels.shape[2] // 8, pixels.shape[3] // 8)

    for name, size in (("a.png", (64, 64)), ("b.png", (200, 100)), ("same.png", (64, 64))):
        Image.new("RGB", size, "red" if size[0] == 64 else "blue").save(tmp_path / name)
    (tmp_path / "damaged.png").write_bytes((tmp_path / "b.png").read_bytes()[:100])
    names = ("a.png", "damaged.png", "b.png", "same.png")
    examples = [Example(tmp_path / name, "x", flip=name == "b.png") for name in names]
    placer = Placer(bucket_sizes(64, 8))
    found = place_all(examples, placer, encode, tmp_path / "cache")
    assert [image.example.path.name for image in found] == ["a.png", "b.png", "same.png"]
    assert [tuple(pixels.shape) for pixels in calls] == [(1, 3, 64, 64)] + 2 * [(1, 3, 40, 88)]
    assert found[0].latents == found[2].latents and len(found[1].latents) == 2
    assert "damaged.png" in caplog.text and "left out" in caplog.text
    (tmp_path / "cache/.x.npy.0.part").write_bytes(b"killed")
    place_all(examples, placer, encode, tmp_path / "cache")
    assert len(calls) == 3
    with pytest.raises(InputError, match="none of the 1 images can be read"):
        place_all(examples[1:2], placer, encode, tmp_path / "cache")


def test_a_mirrored_image_is_the_mirror_of_the_pixels(tmp_path):
    pixels = np.random.default_rng(0).integers(256, size=(64, 64, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    placer = Placer([(64, 64)])
    source, placement = placer.read(Example(tmp_path / "a.png", ""))
    upright, mirrored = (placer.pixels(source, placement, flip) for flip in (False, True))
    assert torch.equal(upright.flip(3), mirrored)
    assert torch.allclose(
        (upright[0].permute(1, 2, 0) + 1) * 127.5, torch.from_numpy(pixels).float(), atol=1e-3
    )


def test_a_quarter_of_the_masks_cover_everything():
    masks = [random_mask(16, 16, np.random.default_rng(n)) for n in range(800)]
    whole = sum(mask.all() for mask in masks) / 800
    assert abs(whole - 0.25) < 0.06
    assert np.mean([m.mean() for m in masks]) > 0.3
