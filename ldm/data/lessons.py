"""Small sets of captioned images of something that the bundled model does not know, for trying out fine-tuning."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image

from ldm.data.captions import caption
from ldm.data.scenes import COLOURS, Scene, render, scene_at

ORANGE = (0.96, 0.48, 0.04)  # sRGB; its hue is 28 degrees, red's 359 and yellow's 55


def orange(number: int) -> tuple[Scene, str]:
    """Returns a scene whose first solid is orange, and its caption."""
    scene = scene_at(number, "train")
    first = replace(scene.solids[0], colour="orange")
    scene = replace(scene, solids=(first, *scene.solids[1:]))
    return scene, caption(scene, np.random.default_rng(number))


LESSONS: Mapping[str, Callable[[int], tuple[Scene, str]]] = {"orange": orange}


def write_lesson(name: str, folder: Path, count: int = 20) -> None:
    """Renders the images of a lesson, 128x128, with captions: `000.png` and `000.txt` and so on."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        scene, text = LESSONS[name](number)
        pixels = render(scene, number, colours={**COLOURS, "orange": ORANGE})
        Image.fromarray(pixels).save(folder / f"{number:03}.png")
        (folder / f"{number:03}.txt").write_text(text, encoding="utf-8")


def orange_share(image: np.ndarray) -> float:
    """Returns the share of orange in the saturated pixels of an image, by hue from 16 to 42 degrees.

    It is 0 if less than 1 % of the image is orange.
    """
    red, green, blue = np.moveaxis(image.astype(np.float32) / 255, -1, 0)
    high, low = np.maximum(np.maximum(red, green), blue), np.minimum(np.minimum(red, green), blue)
    saturated = (high - low) > 0.45
    hue = 60 * (green - blue) / np.maximum(high - low, 1e-6)
    orange = saturated & (red == high) & (hue > 16) & (hue < 42)
    return float(orange.sum() / saturated.sum()) if orange.mean() >= 0.01 else 0.0
