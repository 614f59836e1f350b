import re

import numpy as np
import pytest

from ldm.data.captions import BACKGROUND_WORDS, SHAPE_WORDS, SIZE_WORDS, UNORDERED, caption, plain_caption
from ldm.data.scenes import BACKGROUNDS, COLOURS, RELATIONS, SHAPES, SIZES, Scene, Solid, scene_at

FIRST, SECOND = Solid("cube", "red", "large"), Solid("sphere", "blue", "small")


def captions(scene: Scene, count: int = 300) -> list[str]:
    return [caption(scene, np.random.default_rng(i)).lower() for i in range(count)]


def test_every_caption_names_colour_and_shape_of_every_solid():
    for i in range(1000):
        scene = scene_at(i, "train")
        text = caption(scene, np.random.default_rng(i)).lower()
        for solid in scene.solids:
            shapes = "|".join(SHAPE_WORDS[solid.shape])
            names = rf"{solid.colour} ({shapes})\b|\b({shapes}) that is {solid.colour}\b"
            assert re.search(names, text), (text, scene)


def test_captions_name_no_colour_that_is_not_there():
    for i in range(500):
        scene = scene_at(i, "train")
        text = caption(scene, np.random.default_rng(i)).lower()
        for words in BACKGROUND_WORDS[scene.background]:
            text = text.replace(f"{words} back", "back")
        assert {c for c in COLOURS if re.search(rf"\b{c}\b", text)} == {s.colour for s in scene.solids}


def test_words_exist_for_everything_that_is_drawn():
    assert (set(SHAPE_WORDS), set(SIZE_WORDS), set(BACKGROUND_WORDS)) == (
        set(SHAPES),
        set(SIZES),
        set(BACKGROUNDS),
    )


def test_articles_fit():
    for i in range(500):
        text = caption(scene_at(i, "train"), np.random.default_rng(i))
        assert not re.search(r"\ba [aeiou]|\ban [^aeiou]", text, re.IGNORECASE), text


def test_the_generator_decides_and_the_wordings_vary():
    scene = Scene((FIRST, SECOND), "on top of", "pink")
    assert captions(scene) == captions(scene)
    assert len(set(captions(scene))) > 150


# Captions that are true of A (the red cube) and B (the blue sphere), as patterns over the letters.
MEANING = {
    "on top of": r"A (on top of|above|on|over|resting on|sitting on) B"
    r"|(on top of|above|on|over) B (is|sits|stands) A"
    r"|B (under|below|beneath|underneath) A|(under|below|beneath|underneath) A (is|sits|stands) B"
    r"|B with A on top|A at the top and B at the bottom",
    "left of": r"A (to the |on the )?left of B|(to the |on the )?left of B (is|sits|stands) A"
    r"|B (to the |on the )?right of A|(to the |on the )?right of A (is|sits|stands) B"
    r"|A on the left and B on the right|B on the right and A on the left",
    "behind": r"A behind B|behind B (is|sits|stands) A|B in front of A|in front of A (is|sits|stands) B"
    r"|B with A behind it|B in front and A at the back",
}


def in_letters(text: str) -> str:
    """The caption without opener, background and full stop, the red solid as A and the blue one as B."""
    text = re.sub(r",? (on|with) a gr[ae]y (background|backdrop)", "", text.rstrip("."))
    text = re.sub(r"^on a gr[ae]y background, ", "", text)
    text = re.sub(r"^(there is|a picture of|an image of|a render of) ", "", text)
    kinds = "cube|box|block|sphere|ball|orb"
    sizes = "small|little|tiny|large|big|huge"
    noun = rf"an? (?:(?:{sizes}) )?(?:(?:red|blue) )?(?:{kinds})\b(?: that is (?:red|blue))?"
    return re.sub(noun, lambda found: "A" if re.search(r"\bred\b", found.group()) else "B", text)


@pytest.mark.parametrize("relation", RELATIONS)
def test_the_wording_settles_the_relation_unless_it_says_it_does_not(relation: str):
    plain = 0
    for text in captions(Scene((FIRST, SECOND), relation, "grey")):
        letters = in_letters(text)
        if re.fullmatch(MEANING[relation], letters):
            plain += 1
        else:
            assert relation == "left of", text
            assert re.fullmatch(rf"A ({'|'.join(UNORDERED)}) B|B ({'|'.join(UNORDERED)}) A", letters), text
    assert plain > (300 if relation != "left of" else 240) - 1


@pytest.mark.parametrize("relation", RELATIONS)
def test_every_kind_of_wording_occurs(relation: str):
    letters = {in_letters(text) for text in captions(Scene((FIRST, SECOND), relation, "grey"), 600)}
    assert any(text.startswith("A ") for text in letters)
    assert any(text.startswith("B ") for text in letters)
    assert any(text[0].islower() for text in letters)
    assert not any(re.search(r"\b(red|blue|background)\b", text) for text in letters)


def test_sizes_and_backgrounds_are_mentioned_sometimes():
    texts = captions(Scene((FIRST,), None, "mint"), 600)
    assert 0.2 < np.mean([bool(re.search("large|big|huge", text)) for text in texts]) < 0.4
    assert 0.4 < np.mean(["mint" in text for text in texts]) < 0.6


def test_plain_captions():
    assert plain_caption(Scene((FIRST, SECOND), "on top of", "pink")) == "a red cube on top of a blue sphere"
    assert plain_caption(Scene((Solid("torus", "black", "small"),), None, "grey")) == "a black torus"
