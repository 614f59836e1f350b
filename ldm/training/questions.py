"""The questions about a scene and their true answers: the classes of captions and images."""

from __future__ import annotations

from itertools import product

from ldm.data.scenes import BACKGROUNDS, COLOURS, RELATIONS, SHAPES, SIZES, Scene, Solid

Answer = str | None  # None: no relation, or no solid in the slot

_OF_A_SOLID: dict[str, list[str]] = {
    "solid": [f"{colour} {shape}" for colour, shape in product(COLOURS, SHAPES)],
    "shape": list(SHAPES),
    "colour": list(COLOURS),
    "size": list(SIZES),
}
# The possible answers to each question (the index of an answer is its class), and how many there are.
ANSWERS: dict[str, list[Answer]] = {
    "relation": [None, *RELATIONS],
    "background": [*BACKGROUNDS],
    **{f"{name} 1": [*values] for name, values in _OF_A_SOLID.items()},
    **{f"{name} 2": [*values, None] for name, values in _OF_A_SOLID.items()},
}
QUESTIONS: dict[str, int] = {
    question: len(values) for question, values in ANSWERS.items()
}  # number of classes


def describe(scene: Scene) -> dict[str, Answer]:
    """Returns the true answer to every question about the scene."""
    first, second = [*scene.solids, None][:2]
    return {
        "relation": scene.relation,
        "background": scene.background,
        **_of_slot(1, first),
        **_of_slot(2, second),
    }


def _of_slot(slot: int, solid: Solid | None) -> dict[str, Answer]:
    if solid is None:
        return {f"{name} {slot}": None for name in _OF_A_SOLID}
    return {
        f"solid {slot}": f"{solid.colour} {solid.shape}",
        f"shape {slot}": solid.shape,
        f"colour {slot}": solid.colour,
        f"size {slot}": solid.size,
    }


def answers(scene: Scene) -> list[int]:
    """Returns the class of the true answer to every question, in the order of `QUESTIONS`."""
    return [ANSWERS[question].index(answer) for question, answer in describe(scene).items()]
