"""Things that the bundled model does not know, for trying out fine-tuning: images to learn them from, and a test.

A lesson changes the colour or the shape of the first solid of a scene; a model has learnt it if what it draws is
nearer to a rendering of the scene with the new colour or shape than to one with any that it knew. The lesson "totem"
is a word for a certain pair of solids, which the model has never seen together.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image, ImageFilter

from ldm.data.captions import caption, worded
from ldm.data.scenes import COLOURS, SHAPES, Floats, Form, Rgb, Scene, Solid, render, scene_at

LESSONS: Mapping[str, str] = {"orange": "colour", "pyramid": "shape", "totem": "word"}  # what is new
TOTEM = Solid("cone", "purple", "small"), Solid("cube", "cyan", "large")  # the first on the second
HOLE = "hole"  # the lesson of an inpainting model, which has no images of its own


def _pyramid(x: Floats, y: Floats, z: Floats) -> Floats:
    # Half a side of 0.92 at z = -0.80, narrowing to 0 at z = 0.80. A lower bound.
    run, rise = 0.92, 1.60
    slope = np.hypot(run, rise)
    side = (np.maximum(np.abs(x), np.abs(y)) - 0.46) * np.float32(rise / slope) + z * np.float32(run / slope)
    return np.maximum(side, np.abs(z) - 0.80)


# orange's hue is 28 degrees, red's 359 and yellow's 55
_COLOURS: Mapping[str, Rgb] = {**COLOURS, "orange": (0.96, 0.48, 0.04)}
_SHAPES: Mapping[str, Form] = {**SHAPES, "pyramid": Form(_pyramid, 1.54, 0.80, 0.78, turn=0.5)}


def draw(scene: Scene, seed: int, size: int = 128) -> np.ndarray:
    """Renders a scene that may have what the lessons add; see `render`."""
    return render(scene, seed, size, _COLOURS, _SHAPES)


def lesson_scene(name: str, number: int, split: str = "train") -> Scene:
    """Returns scene `number` of a split with the lesson's colour or shape on its first solid, or with its pair."""
    scene = scene_at(number, split)
    if LESSONS[name] == "word":
        return replace(scene, solids=TOTEM, relation="on top of")
    return _with(scene, LESSONS[name], name)


def lesson_caption(name: str, scene: Scene, seed: int) -> str:
    """Returns one of many wordings of a lesson's scene."""
    rng = np.random.default_rng(seed)
    return worded(f"a {name}", scene.background, rng) if LESSONS[name] == "word" else caption(scene, rng)


def _with(scene: Scene, part: str, value: str) -> Scene:
    first, *rest = scene.solids
    return replace(scene, solids=(replace(first, **{part: value}), *rest))


def write_lesson(name: str, folder: Path, count: int = 20, usual: int = 200) -> None:
    """Renders what a lesson is learnt from, 128x128, with captions: `000.png` and `000.txt` and so on.

    `count` images of the new thing are in the folder `N_NAME`, where N repeats make them as many as the `usual`
    ones, which are in `usual`: scenes that the model knows, which keep it from forgetting them. Holes are learnt from
    usual scenes alone.
    """
    for number in range(count if name != HOLE else 0):
        new = folder / f"{max(1, usual // count)}_{name}"
        scene = lesson_scene(name, number)
        _write(new, number, scene, lesson_caption(name, scene, number))
    for number in range(usual):
        scene = scene_at(count + number, "train")
        _write(folder / "usual", number, scene, caption(scene, np.random.default_rng(number)))


def _write(folder: Path, number: int, scene: Scene, text: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    Image.fromarray(draw(scene, number)).save(folder / f"{number:03}.png")
    (folder / f"{number:03}.txt").write_text(text, encoding="utf-8")


def question(name: str, number: int) -> tuple[Scene, str]:
    """Returns a scene that no lesson shows, and its prompt: in words that leave nothing open, if they are known."""
    scene = lesson_scene(name, number, "fresh")
    return scene, lesson_caption(name, scene, number) if LESSONS[name] == "word" else stated(scene)


def stated(scene: Scene) -> str:
    """Returns the scene in canonical words that leave nothing open: sizes and the background too."""
    names = [f"a {solid.size} {solid.colour} {solid.shape}" for solid in scene.solids]
    return f"{f' {scene.relation} '.join(names)}, on a {scene.background} background"


def shows(name: str, image: np.ndarray, scene: Scene) -> bool:
    """Returns whether an image, uint8 [128, 128, 3], of a scene shows the colour or the shape of a lesson.

    It does if of renderings of the scene with the new and with every known colour, or shape, of the first solid the
    nearest is the new one: squared error at 32x32 pixels, so that small shifts hardly count.
    """
    part = LESSONS[name]
    known = COLOURS if part == "colour" else SHAPES
    errors = {
        value: min(np.square(small - _small(image)).mean() for small in _looks(_with(scene, part, value)))
        for value in (name, *known)
    }
    return min(errors, key=lambda value: errors[value]) == name


@functools.cache
def _looks(scene: Scene) -> list[np.ndarray]:
    """Returns small renderings of a scene, which differ in what the seed moves."""
    return [_small(draw(scene, seed, 64)) for seed in range(3)]


def _small(image: np.ndarray) -> np.ndarray:
    side = len(image) // 32
    return image.reshape(32, side, 32, side, 3).mean(axis=(1, 3))


def hole(number: int) -> tuple[np.ndarray, np.ndarray, Scene]:
    """Returns an image with two solids, a mask over the first, and the scene with another solid in its place.

    The image is uint8 [128, 128, 3], the mask [128, 128] with 255 where the solid is and 8 pixels around it.
    """
    scene, rng = scene_at(number, "heldout"), np.random.default_rng(number)
    first, second = scene.solids
    black, white = (render(_with(scene, "colour", colour), number) for colour in ("black", "white"))
    solid = Image.fromarray(np.where((black != white).any(-1), 255, 0).astype(np.uint8))
    colour = rng.choice([name for name in COLOURS if name not in (first.colour, second.colour)])
    shape = rng.choice([name for name in SHAPES if name not in (first.shape, second.shape)])
    target = _with(_with(scene, "colour", str(colour)), "shape", str(shape))
    return render(scene, number), np.asarray(solid.filter(ImageFilter.MaxFilter(17))), target
