"""Compositional questions, answered by a network that finds objects: the reader of scenes, or an object detector.

The rules are those of GenEval (Ghosh et al., arXiv:2310.11513, section 3): enough objects of each class, the right
colours and positions among the most certain ones, and none too many of what is excluded.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ldm.evaluation.images import ImageSet
from ldm.evaluation.prompts import Question

if TYPE_CHECKING:
    from ldm.evaluation.score import Request, Scorer

ANY = "solid"  # the class of every object of a scene
_ABOVE = "above"


@dataclass(frozen=True)
class Found:
    """An object in an image: its class, its colour if it is known, and the relations that it has to others.

    `relations` maps the number of another object to names such as "left of".
    """

    name: str
    colour: str | None
    relations: Mapping[int, frozenset[str]]


def is_right(question: Question, objects: Sequence[Found]) -> bool:
    """Returns whether the objects of an image, the most certain first, answer a question."""
    groups: list[list[int]] = []
    for entry in question.include:
        count = entry.get("count", 1)
        chosen = _of_class(objects, entry["class"])[:count]
        if len(chosen) < count:
            return False
        if "color" in entry and sum(objects[i].colour == entry["color"] for i in chosen) < count:
            return False
        groups.append(chosen)
    placed: list[tuple[tuple[str, int], list[int]]] = [
        (entry["position"], chosen)
        for entry, chosen in zip(question.include, groups, strict=True)
        if "position" in entry
    ]
    for (relation, other), chosen in placed:
        if not all(
            relation in objects[i].relations.get(j, ()) for i in chosen for j in groups[other] if i != j
        ):
            return False
    return all(len(_of_class(objects, entry["class"])) < entry.get("count", 1) for entry in question.exclude)


def _of_class(objects: Sequence[Found], name: str) -> list[int]:
    return [i for i, found in enumerate(objects) if name in (found.name, ANY)]


def objects_of_scene(answers: Mapping[str, Any]) -> list[Found]:
    """Returns the objects that the reader of scenes saw, by its answers; what is above is also on top."""
    from ldm.data.scenes import RELATIONS

    on_top, left, far = RELATIONS
    inverse = {on_top: {"below"}, left: {"right of"}, far: {"in front of"}}
    relation = answers["relation"]
    first = frozenset({relation, _ABOVE} if relation == on_top else {relation})
    found = [Found(str(answers["shape 1"]), answers["colour 1"], {1: first})]
    if answers["shape 2"] is not None:
        found.append(
            Found(answers["shape 2"], answers["colour 2"], {0: frozenset(inverse.get(relation, set()))})
        )
    return found


def answered(
    images: ImageSet, questions: Sequence[Question], request: Request, scorer: Scorer
) -> tuple[list[bool], str]:
    """Returns whether each image answers its question, and the name of the network that looked."""
    if request.network == "shapes":
        scores = scorer.features(images, "shapes-answers").values
        objects = [objects_of_scene(row) for row in _answers(scores)]
        return [
            is_right(question, seen) for question, seen in zip(questions, objects, strict=True)
        ], "shapes-answers"
    from ldm.evaluation.detector import Detector

    detector = Detector(request.paths.get("detector"), request.paths.get("clip"), questions, request.device)
    pairs = zip(images.items, questions, strict=True)
    return [is_right(question, detector(item.pixels(), question)) for item, question in pairs], detector.name


def _answers(scores: np.ndarray) -> list[dict[str, Any]]:
    """Returns the most probable answer to each question, for each row of scores."""
    from ldm.training.questions import ANSWERS, QUESTIONS

    ends = np.cumsum([*QUESTIONS.values()])[:-1]
    classes = [part.argmax(1) for part in np.split(np.asarray(scores), ends, axis=1)]
    return [
        {name: values[c[i]] for (name, values), c in zip(ANSWERS.items(), classes, strict=True)}
        for i in range(len(scores))
    ]
