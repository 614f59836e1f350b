"""English captions for the small scenes of `ldm.data.scenes`, from one canonical line to many wordings."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ldm.data.scenes import Scene, Solid

SHAPE_WORDS: dict[str, tuple[str, ...]] = {  # a word given twice is chosen twice as often
    "cube": ("cube", "cube", "cube", "box", "block"),
    "sphere": ("sphere", "sphere", "sphere", "ball", "orb"),
    "cone": ("cone",),
    "cylinder": ("cylinder",),
    "torus": ("torus", "torus", "ring", "donut"),
}
SIZE_WORDS: dict[str, tuple[str, ...]] = {
    "small": ("small", "small", "little", "tiny"),
    "large": ("large", "large", "big", "huge"),
}
BACKGROUND_WORDS: dict[str, tuple[str, ...]] = {
    "grey": ("grey", "gray"),
    "pink": ("pink",),
    "beige": ("beige",),
    "light blue": ("light blue", "pale blue"),
    "mint": ("mint", "mint green"),
}
FORWARD: dict[str, tuple[str, ...]] = {  # first solid, words, second solid
    "on top of": ("on top of", "on top of", "on top of", "above", "on", "over", "resting on", "sitting on"),
    "left of": ("left of", "left of", "to the left of", "to the left of", "on the left of"),
    "behind": ("behind",),
}
INVERSE: dict[str, tuple[str, ...]] = {  # second solid, words, first solid
    "on top of": ("under", "below", "beneath", "underneath"),
    "left of": ("right of", "to the right of", "to the right of", "on the right of"),
    "behind": ("in front of",),
}
UNORDERED: tuple[str, ...] = ("next to", "beside", "by")  # for "left of" scenes
SPLIT: dict[str, tuple[str, ...]] = {  # {a} is the first solid, {b} the second
    "on top of": ("{b} with {a} on top", "{a} at the top and {b} at the bottom"),
    "left of": ("{a} on the left and {b} on the right", "{b} on the right and {a} on the left"),
    "behind": ("{b} with {a} behind it", "{b} in front and {a} at the back"),
}
OPENERS: tuple[str, ...] = ("", "", "", "there is ", "a picture of ", "an image of ", "a render of ")
SETTINGS: tuple[str, ...] = ("on a {} background", "with a {} background", "with a {} backdrop")


def _pick(words: Sequence[str], rng: np.random.Generator) -> str:
    return words[int(rng.integers(len(words)))]


def _with_article(words: str) -> str:
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def _name(solid: Solid, rng: np.random.Generator) -> str:
    """Names a solid, such as "a small red cube", "a black cone" or "a ball that is green"."""
    shape = _pick(SHAPE_WORDS.get(solid.shape, (solid.shape,)), rng)
    size = _pick(SIZE_WORDS[solid.size], rng) if rng.random() < 0.3 else ""
    if rng.random() < 0.08:
        return f"{_with_article(f'{size} {shape}'.strip())} that is {solid.colour}"
    return _with_article(f"{size} {solid.colour} {shape}".strip())


def _pair(scene: Scene, rng: np.random.Generator) -> str:
    assert scene.relation is not None
    first, second = (_name(solid, rng) for solid in scene.solids)
    way = rng.random()
    if way < 0.12:
        return _pick(SPLIT[scene.relation], rng).format(a=first, b=second)
    if way < 0.24 and scene.relation == "left of":
        pair = [first, second] if rng.random() < 0.5 else [second, first]
        return f"{pair[0]} {_pick(UNORDERED, rng)} {pair[1]}"
    words = FORWARD
    if rng.random() < 0.3:
        words, first, second = INVERSE, second, first
    place = _pick(words[scene.relation], rng)
    if rng.random() < 0.12 and not place.endswith("ing on"):
        return f"{place} {second} {_pick(('is', 'sits', 'stands'), rng)} {first}"
    return f"{first} {place} {second}"


def _with_background(text: str, background: str, rng: np.random.Generator) -> str:
    setting = _pick(SETTINGS, rng).format(_pick(BACKGROUND_WORDS[background], rng))
    if rng.random() < 0.15 and not setting.startswith("with"):
        return f"{setting}, {text}"
    return f"{text}{_pick((' ', ', '), rng)}{setting}"


def caption(scene: Scene, rng: np.random.Generator) -> str:
    """Returns one of many English wordings of the scene, such as "There is a big ball under a red box.".

    Every solid's colour and shape (or a synonym) is named, each solid's size in about a third and the background in
    about half of the captions. "next to", "beside" and "by" leave open which solid is left and which right; "on",
    "above" and "over" all mean on top of. Every other wording determines the relation.
    """
    text = _pair(scene, rng) if scene.relation else _name(scene.solids[0], rng)
    return worded(text, scene.background, rng)


def worded(text: str, background: str, rng: np.random.Generator) -> str:
    """Returns one of many captions of `text`, such as "a red cube", in half of them with the background."""
    if rng.random() < 0.5:
        text = _with_background(text, background, rng)
    if text.startswith(("a ", "an ")):
        text = _pick(OPENERS, rng) + text
    if rng.random() < 0.3:
        text = text[0].upper() + text[1:]
    return text + "." if rng.random() < 0.3 else text


def plain_caption(scene: Scene) -> str:
    """Returns the scene in canonical words, without sizes and background: "a red cube on top of a blue sphere"."""
    names = [_with_article(f"{solid.colour} {solid.shape}") for solid in scene.solids]
    return f" {scene.relation} ".join(names)
