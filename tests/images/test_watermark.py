from __future__ import annotations

import builtins
import logging
import sys
from typing import Any

import numpy as np
import pytest

from ldm.images import watermark
from ldm.images.watermark import Watermark, detect, too_small
from ldm.util import InputError

imwatermark = pytest.importorskip("imwatermark")


def picture(height: int, width: int, seed: int = 0) -> np.ndarray:
    """A smooth coloured image with some grain."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:height, 0:width]
    waves = [np.sin(x / rng.uniform(20, 60) + y / rng.uniform(20, 60) + c) for c in range(3)]
    return (
        (127 + 90 * np.stack(waves, -1) + rng.normal(0, 3, (height, width, 3))).clip(0, 255).astype(np.uint8)
    )


def marked_by_the_library(rgb: np.ndarray, text: str) -> np.ndarray:
    encoder = imwatermark.WatermarkEncoder()
    encoder.set_watermark("bytes", text.encode())
    return encoder.encode(np.ascontiguousarray(rgb[:, :, ::-1]), "dwtDct")[:, :, ::-1]


@pytest.mark.parametrize("size", [(256, 256), (520, 300), (129, 515)])
@pytest.mark.parametrize("text", ["StableDiffusionV1", "SDV2"])
def test_pixels_are_those_of_the_library(size: tuple[int, int], text: str) -> None:
    rgb = picture(*size)
    before = rgb.copy()
    marked = Watermark(text).mark(rgb)
    np.testing.assert_array_equal(marked, marked_by_the_library(rgb, text))
    np.testing.assert_array_equal(rgb, before)
    assert (marked != rgb).any()


@pytest.mark.parametrize(("size", "strips"), [((610, 259), 2), ((1033, 260), 4)])
def test_strips_change_nothing(size: tuple[int, int], strips: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watermark, "_STRIP_PIXELS", 2**16 + 8 * 260)
    rgb = picture(*size)
    assert len(watermark._strips(size[1], size[0])) == strips
    np.testing.assert_array_equal(Watermark().mark(rgb), marked_by_the_library(rgb, "StableDiffusionV1"))


def test_read_only_pictures_can_be_marked() -> None:
    rgb = picture(256, 256)
    rgb.setflags(write=False)
    assert Watermark().mark(rgb).shape == rgb.shape


def test_area_decides_what_is_too_small() -> None:
    assert not too_small(512, 128)
    assert too_small(255, 256)


def test_small_pictures_come_back_unmarked_with_one_note(caplog: pytest.LogCaptureFixture) -> None:
    mark, rgb = Watermark().mark, picture(64, 64)
    with caplog.at_level(logging.INFO, "ldm"):
        results = [mark(rgb) for _ in range(3)]
    assert all((result == rgb).all() for result in results)
    assert [record.getMessage() for record in caplog.records] == [
        "images of 64x64 are too small for the invisible watermark"
    ]


def test_detection_tells_marked_from_unmarked() -> None:
    rgb = picture(512, 512, seed=3)
    marked, unmarked = detect(Watermark().mark(rgb)), detect(rgb)
    assert marked.total_bits == unmarked.total_bits == 136
    assert marked.chance < 1e-9
    assert unmarked.chance > 1e-3


def test_detection_counts_what_the_library_decodes() -> None:
    marked = Watermark().mark(picture(512, 512, seed=5))
    decoder = imwatermark.WatermarkDecoder("bytes", 136)
    decoded = decoder.decode(np.ascontiguousarray(marked[:, :, ::-1]), "dwtDct")
    pairs = zip(decoded, b"StableDiffusionV1", strict=True)
    assert detect(marked).agreeing_bits == 136 - sum((a ^ b).bit_count() for a, b in pairs)


def test_chance_is_the_binomial_tail() -> None:
    assert watermark._binomial_tail(0, 136) == 1
    assert watermark._binomial_tail(136, 136) == 2.0**-136
    assert watermark._binomial_tail(3, 4) == 5 / 16


def test_detection_refuses_pictures_without_room() -> None:
    for height, width in ((64, 64), (4, 2**15)):
        with pytest.raises(InputError, match=f"{width}x{height}"):
            detect(np.zeros((height, width, 3), np.uint8))


def test_a_missing_library_is_named_before_anything_is_marked(monkeypatch: pytest.MonkeyPatch) -> None:
    real_import = builtins.__import__

    def without_opencv(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "imwatermark":
            raise ImportError("libGL.so.1: cannot open shared object file\nNo such file")
        return real_import(name, *args, **kwargs)

    monkeypatch.delitem(sys.modules, "imwatermark")
    monkeypatch.setattr(builtins, "__import__", without_opencv)
    with pytest.raises(InputError, match=r"libGL.*pip install invisible-watermark.*--no_watermark") as caught:
        Watermark()
    assert "\n" not in str(caught.value)
