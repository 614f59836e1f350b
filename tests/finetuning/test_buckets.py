"""Sizes of one area: the list that kohya's scripts have at 512, and the laws that any such list obeys."""

import math

import pytest

from ldm.finetuning.buckets import bucket_sizes, place, step_for


def test_the_sizes_at_512_are_those_of_the_field():
    """Written down from the rule by hand: the height of each width from 256 to 1024 in steps of 64."""
    wide = [(512, 512), (576, 448), (640, 384), (704, 320), (704, 320), (768, 320), (832, 256), (896, 256)]
    wide += [(960, 256), (1024, 256)]
    narrow = [(height, width) for width, height in wide]
    # and what widths below 512 give: 256 -> 1024, 320 -> 768 (819), 384 -> 640 (682), 448 -> 576 (585)
    assert set(bucket_sizes(512, 64)) == {*wide, *narrow}


@pytest.mark.parametrize(("side", "step"), [(512, 64), (128, 16), (64, 8), (768, 64), (520, 64)])
def test_each_size_is_as_large_as_the_area_allows(side, step):
    for width, height in bucket_sizes(side, step):
        assert width % step == height % step == 0
        assert width * height <= side * side
        longest = min(side * side // max(width, height), 2 * side) // step * step
        assert min(width, height) == longest or width == height


@pytest.mark.parametrize("size", [(512, 512), (1920, 1080), (1080, 1920), (3000, 500), (37, 900), (640, 427)])
def test_an_image_covers_the_bucket_of_the_nearest_proportions(size):
    sizes = bucket_sizes(512, 64)
    placed = place(size, sizes)
    ratio = size[0] / size[1]
    best = min(abs(math.log(w / h / ratio)) for w, h in sizes)
    assert abs(math.log(placed.size[0] / placed.size[1] / ratio)) == pytest.approx(best)
    assert all(long >= short for long, short in zip(placed.scaled, placed.size, strict=True))
    assert any(long == short for long, short in zip(placed.scaled, placed.size, strict=True))
    assert placed.scaled[0] / placed.scaled[1] == pytest.approx(ratio, rel=0.05)
    left, top = placed.corner
    assert (left, top) == tuple(
        round((long - short) / 2) for long, short in zip(placed.scaled, placed.size, strict=True)
    )


def test_small_models_have_smaller_steps():
    assert [step_for(side, 8) for side in (64, 128, 512, 768)] == [8, 16, 64, 64]
