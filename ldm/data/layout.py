"""Where solids stand: scenes with their solids anywhere in the frame, and the centres of solids in an image."""

from __future__ import annotations

import colorsys
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from PIL import Image

from ldm.data.captions import caption
from ldm.data.scenes import COLOURS, Scene, render, scene_at

Point = tuple[float, float]  # x, y in pixels

_HUES: Mapping[str, float] = {  # in turns, of the colours that have one
    name: colorsys.rgb_to_hsv(*colour)[0]
    for name, colour in COLOURS.items()
    if name not in ("white", "black")
}
_LEAST = 0.003  # of an image's pixels: fewer of a colour are not a solid


def anywhere(number: int, split: str = "train") -> tuple[Scene, np.ndarray]:
    """Returns scene `number` of a split, and an image of it, uint8 [128, 128, 3], with its solids anywhere."""
    scene = scene_at(number, split)
    return scene, render(scene, number, anywhere=True)


def write_anywhere(folder: Path, count: int) -> None:
    """Writes images of scenes, and captions: `000.png` and `000.txt` and so on.

    The solids of every third are in the middle, as in all that the bundled model has seen; of the others anywhere.
    """
    folder.mkdir(parents=True)
    for number in range(count):
        scene = scene_at(number, "train")
        pixels = render(scene, number, anywhere=number % 3 > 0)
        Image.fromarray(pixels).save(folder / f"{number:03}.png")
        text = caption(scene, np.random.default_rng(number))
        (folder / f"{number:03}.txt").write_text(text, encoding="utf-8")


def centres(image: np.ndarray, scene: Scene) -> dict[str, Point | None]:
    """Returns the centre of each colour of a scene's solids in an image, uint8 [H, W, 3]; None where there is none.

    It is the mean place of the pixels of this colour: of those with a strong colour the nearest hue, of the others
    white by brightness and black by darkness.
    """
    names = dict.fromkeys(solid.colour for solid in scene.solids)
    # white in the shade is as bright as the one background without a colour
    least = 0.62 if scene.background == "grey" else 0.35
    return {name: _centre(_mask(image.astype(np.float32) / 255, name, least)) for name in names}


def _mask(image: np.ndarray, colour: str, white: float) -> np.ndarray:
    high, low = image.max(-1), image.min(-1)
    if colour == "black":
        return high < 0.22
    strength = (high - low) / np.maximum(high, 1e-6)
    if colour == "white":
        return (strength < 0.12) & (high > white)
    difference = [np.abs((_hue(image) - hue + 0.5) % 1 - 0.5) for hue in _HUES.values()]
    return (strength > 0.55) & (high > 0.12) & (np.argmin(difference, axis=0) == list(_HUES).index(colour))


def _hue(image: np.ndarray) -> np.ndarray:
    """Returns the hue of each pixel in turns, as `colorsys` has it."""
    red, green, blue = np.moveaxis(image, -1, 0)
    high = image.max(-1)
    span = np.maximum(high - image.min(-1), 1e-6)
    of_red, of_green, of_blue = (green - blue) / span, 2 + (blue - red) / span, 4 + (red - green) / span
    return np.select([high == red, high == green], [of_red, of_green], of_blue) / 6 % 1


def _centre(mask: np.ndarray) -> Point | None:
    if mask.mean() < _LEAST:
        return None
    rows, columns = np.nonzero(mask)
    return float(columns.mean()), float(rows.mean())
