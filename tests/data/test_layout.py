"""Scenes with solids anywhere, and centres of solids, against masks from renderings in two colours."""

from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from ldm.data.layout import anywhere, centres, write_anywhere
from ldm.data.scenes import render


def mask_of(number, split="train"):
    """Where the first solid is seen: its pixels change with its colour; shadows do not."""
    scene = anywhere(number, split)[0]
    first, *rest = scene.solids
    black, white = (
        render(replace(scene, solids=(replace(first, colour=colour), *rest)), number, anywhere=True)
        for colour in ("black", "white")
    )
    return np.abs(black.astype(int) - white).sum(-1) > 100


def middle(mask):
    rows, columns = np.nonzero(mask)
    return np.array([columns.mean(), rows.mean()])


def test_solids_stand_anywhere_and_in_the_frame():
    masks = [mask_of(number) for number in range(16)]
    places = np.array([middle(mask) for mask in masks])
    assert np.ptp(places, axis=0).min() > 50
    edges = [mask[0].any() or mask[:, 0].any() or mask[:, -1].any() or mask[-1].any() for mask in masks]
    assert not any(edges)


def test_images_to_train_on_have_solids_in_the_middle_too(tmp_path):
    write_anywhere(tmp_path / "set", 3)
    for number in range(3):
        scene, pixels = anywhere(number)
        written = np.asarray(Image.open(tmp_path / f"set/{number:03}.png"))
        assert np.array_equal(written, render(scene, number) if number == 0 else pixels)


def test_centres_are_those_of_what_changes_with_the_colour():
    seen = set()
    for number in range(14):
        scene, image = anywhere(number)
        first, *rest = scene.solids
        if first.colour in [solid.colour for solid in rest]:
            continue
        found = centres(image, scene)[first.colour]
        shaded = (first.colour, scene.background) == ("white", "grey")  # its dark side is as the background
        assert found is not None
        assert np.hypot(*(found - middle(mask_of(number)))) < (5 if shaded else 2.5), (number, first)
        seen.add(first.colour)
    assert len(seen) >= 5


@pytest.mark.parametrize("colour", [128, 0])
def test_a_colour_that_is_not_there(colour):
    scene = anywhere(0)[0]
    found = centres(np.full((128, 128, 3), colour, np.uint8), scene)
    assert found[scene.solids[0].colour] is None
