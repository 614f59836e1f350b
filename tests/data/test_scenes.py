import colorsys
from itertools import product

import numpy as np
import pytest

from ldm.data.scenes import (
    BACKGROUNDS,
    COLOURS,
    RELATIONS,
    SHAPES,
    Scene,
    Solid,
    held_out,
    image_at,
    pair_key,
    render,
    scene_at,
)


def pair(first: str, second: str, relation: str) -> Scene:
    """Such as pair("red cube", "blue sphere", "behind"), both large."""
    solids = tuple(
        Solid(shape, colour, "large") for colour, shape in (text.split() for text in (first, second))
    )
    return Scene(solids, relation, "grey")


def mask(image: np.ndarray, colour: str) -> np.ndarray:
    """The pixels whose hue is near the colour's and that are far from grey."""
    hue = colorsys.rgb_to_hsv(*COLOURS[colour])[0]
    hsv = np.apply_along_axis(lambda rgb: colorsys.rgb_to_hsv(*rgb), 2, image / 255)
    apart = np.abs((hsv[..., 0] - hue + 0.5) % 1 - 0.5)
    return (apart < 0.06) & (hsv[..., 1] > 0.4)


def centre(where: np.ndarray) -> tuple[float, float]:
    """(row, column) of the middle of a mask."""
    rows, columns = np.nonzero(where)
    return rows.mean(), columns.mean()


def test_an_index_gives_the_same_bytes_in_any_order():
    forward = [image_at(i, "train", 64).tobytes() for i in (0, 1, 2)]
    backward = [image_at(i, "train", 64).tobytes() for i in (2, 1, 0)]
    assert forward == backward[::-1]
    assert len(set(forward)) == 3


def test_the_seed_moves_things_a_little_and_only_a_little():
    scene = Scene((Solid("sphere", "green", "large"),), None, "pink")
    places = [centre(mask(render(scene, seed, 64), "green")) for seed in range(6)]
    spread = np.ptp(places, axis=0)
    assert (spread > 0).all()
    assert (spread < 0.08 * 64).all()


@pytest.mark.parametrize("size", [32, 96])
def test_size_and_type(size: int):
    image = image_at(0, "train", size)
    assert image.shape == (size, size, 3)
    assert image.dtype == np.uint8


def test_training_never_sees_a_held_out_pair_and_heldout_sees_nothing_else():
    train = [scene_at(i, "train") for i in range(1000)]
    assert not any(map(held_out, train))
    assert not any(map(held_out, (scene_at(i, "fresh") for i in range(500))))
    heldout = [scene_at(i, "heldout") for i in range(500)]
    assert all(map(held_out, heldout))
    assert not {pair_key(s) for s in train if s.relation} & {pair_key(s) for s in heldout}


@pytest.mark.parametrize("relation", RELATIONS)
def test_red_cube_with_blue_sphere_is_held_out_in_both_orders(relation: str):
    assert held_out(pair("red cube", "blue sphere", relation))
    assert held_out(pair("blue sphere", "red cube", relation))


def test_a_fifth_of_the_pairs_is_held_out():
    looks = [f"{colour} {shape}" for colour, shape in product(COLOURS, SHAPES)]
    pairs = [pair(a, b, "behind") for a, b in product(looks, looks) if a < b]
    assert 0.17 < np.mean([held_out(scene) for scene in pairs]) < 0.23


def test_every_single_look_is_trained_on():
    seen = {(s.colour, s.shape) for i in range(1500) for s in scene_at(i, "train").solids}
    assert seen == set(product(COLOURS, SHAPES))


def test_train_and_fresh_are_different_streams():
    train, fresh = ([image_at(i, split, 32).tobytes() for i in range(20)] for split in ("train", "fresh"))
    assert not set(train) & set(fresh)


def test_sampled_scenes_can_be_told_in_words():
    for scene in (scene_at(i, "train") for i in range(1000)):
        assert len(scene.solids) == (1 if scene.relation is None else 2)
        assert len({(s.colour, s.shape) for s in scene.solids}) == len(scene.solids)
        if scene.relation == "on top of":
            assert [s.size for s in scene.solids] != ["large", "small"]


def test_an_unknown_split_is_refused():
    with pytest.raises(ValueError, match="'test'"):
        scene_at(0, "test")


@pytest.mark.parametrize("shape", [shape for shape in SHAPES if shape != "torus"])
def test_the_colour_in_the_middle_of_a_solid_is_nearest_to_its_own(shape: str):
    backgrounds = ("grey", "pink", "mint")
    white = {b: render(Scene((Solid(shape, "white", "large"),), None, b), 3, 64) / 255 for b in backgrounds}
    for colour, background in product(COLOURS, backgrounds):
        image = render(Scene((Solid(shape, colour, "large"),), None, background), 3, 64) / 255
        empty = white[background]
        changed = np.abs(image - empty).max(axis=2) > 0.1
        if colour == "white":
            changed = image.min(axis=2) > 0.85
        row, column = (round(x) for x in centre(changed))
        pixel = image[row, column]
        # Compare directions: shading scales a colour, it does not turn it.
        towards = {name: np.dot(pixel, rgb) / np.linalg.norm(rgb) for name, rgb in COLOURS.items()}
        assert max(towards, key=towards.__getitem__) == colour


@pytest.mark.parametrize(("first", "second"), [("cube", "sphere"), ("cone", "cylinder"), ("torus", "torus")])
def test_relations_are_where_the_words_say(first: str, second: str):
    for seed in range(3):

        def places(relation: str, seed: int = seed) -> tuple[tuple[float, float], tuple[float, float]]:
            image = render(pair(f"red {first}", f"green {second}", relation), seed, 64)
            return centre(mask(image, "red")), centre(mask(image, "green"))

        (row, column), (other_row, other_column) = places("on top of")
        assert row < other_row - 6
        assert abs(column - other_column) < 5
        (row, column), (other_row, other_column) = places("left of")
        assert column < other_column - 18
        assert abs(row - other_row) < 6
        (row, column), (other_row, other_column) = places("behind")
        assert row < other_row - 6
        assert abs(column - other_column) > 6


def test_most_of_the_solid_behind_stays_visible():
    for first in SHAPES:
        alone = mask(render(Scene((Solid(first, "red", "large"),), None, "grey"), 1, 64), "red").sum()
        for second in SHAPES:
            image = render(pair(f"red {first}", f"green {second}", "behind"), 1, 64)
            assert mask(image, "red").sum() > 0.5 * alone


def test_nothing_leaves_the_frame():
    for first, relation in product(SHAPES, RELATIONS):
        image = render(pair(f"red {first}", "green cube", relation), 0, 64)
        solid = mask(image, "red") | mask(image, "green")
        assert not (solid[0].any() or solid[-1].any() or solid[:, 0].any() or solid[:, -1].any())


def test_a_torus_shows_the_ground_through_its_hole():
    image = render(Scene((Solid("torus", "red", "large"),), None, "mint"), 0)
    ring = mask(image, "red")
    row, column = (round(x) for x in centre(ring))
    assert not ring[row - 1 : row + 2, column - 4 : column + 5].any()
    assert ring[row, :column].any()
    assert ring[row, column:].any()
    assert ring[:row, column].any()
    assert ring[row:, column].any()


def test_backgrounds_are_muted_and_solids_are_not():
    def saturation(rgb: tuple[float, float, float]) -> float:
        return colorsys.rgb_to_hsv(*rgb)[1]

    assert max(map(saturation, BACKGROUNDS.values())) < 0.4
    assert min(saturation(rgb) for name, rgb in COLOURS.items() if name not in ("white", "black")) > 0.75
