"""The domain of the bundled model: prompts and questions about rendered scenes, and the scenes as references."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from ldm.data.captions import UNORDERED, caption
from ldm.data.scenes import COLOURS, RELATIONS, SHAPES, scene_at
from ldm.evaluation.prompts import Question

SPLIT = "fresh"
REFERENCES_FROM = (
    1_000_000  # the first index of the scenes that are rendered as references: prompts use those below
)
SKILLS = ("single_object", "colors", "color_attr", "counting", "position")


def scene_questions(count: int, seed: int) -> list[Question]:
    """Returns the captions of `count` scenes in varied English, and what they ask for."""
    rng = np.random.default_rng(seed)
    return [_asked(i, rng) for i in range(count)]


def _asked(index: int, rng: np.random.Generator) -> Question:
    scene = scene_at(index, SPLIT)
    prompt = caption(scene, rng)
    solids = scene.solids[::-1]
    entries: list[dict[str, Any]] = [{"class": s.shape, "count": 1, "color": s.colour} for s in solids]
    if scene.relation and not any(f" {word} " in f" {prompt} " for word in UNORDERED):
        entries[1]["position"] = [scene.relation, 0]
    return Question(prompt, "scene", tuple(entries), scene=(SPLIT, index))


def skill_questions(count: int, seed: int) -> list[Question]:
    """Returns `count` questions on the solids that the bundled model draws, as many of each of `SKILLS`.

    The skills are GenEval's: a shape, its colour, two colours bound to two shapes, a number of solids, and positions.
    Pairs that the model's training held out are among them.
    """
    rng = np.random.default_rng(seed)
    makers = [_skill(skill, rng) for skill in SKILLS]
    return [next(makers[i % len(makers)]) for i in range(count)]


def _skill(skill: str, rng: np.random.Generator) -> Iterator[Question]:
    while True:
        (shape, colour), (other, tint) = _solid(rng), _solid(rng)
        one, two = {"class": shape, "count": 1}, {"class": other, "count": 1}
        if skill == "single_object":
            yield Question(f"a {shape}", skill, (one,))
        elif skill == "colors":
            yield Question(f"a {colour} {shape}", skill, ({**one, "color": colour},))
        elif skill == "counting":
            number = int(rng.integers(1, 3))
            text = f"a {colour} {shape}" if number == 1 else f"a {colour} {shape} next to a {tint} {shape}"
            if number == 1 or colour != tint:
                yield Question(
                    text, skill, ({**one, "count": number},), ({"class": "solid", "count": number + 1},)
                )
        elif colour != tint and shape != other:
            bound = ({**two, "color": tint}, {**one, "color": colour})
            if skill == "color_attr":
                yield Question(f"a {colour} {shape} next to a {tint} {other}", skill, bound)
            else:
                relation = RELATIONS[int(rng.integers(len(RELATIONS)))]
                placed = {**bound[1], "position": [relation, 0]}
                yield Question(f"a {colour} {shape} {relation} a {tint} {other}", skill, (bound[0], placed))


def _solid(rng: np.random.Generator) -> tuple[str, str]:
    return str(rng.choice(list(SHAPES))), str(rng.choice(list(COLOURS)))
