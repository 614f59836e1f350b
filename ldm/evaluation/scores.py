"""Scores of single images: how well they show their prompts, and how they please."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from ldm.evaluation.networks import ClipFeatures, load_strictly
from ldm.evaluation.prompts import Question
from ldm.evaluation.weights import NETWORKS
from ldm.util import need, printable

if TYPE_CHECKING:
    from ldm.data.scenes import Scene, Solid

_TEXTS = 64  # at a time


def clip_scores(images: np.ndarray, prompts: Sequence[str], clip: ClipFeatures) -> np.ndarray:
    """Returns max(100 cos, 0) of embeddings of images [N, D] and of their prompts: [N] (Hessel, arXiv:2104.08718)."""
    parts = [clip.texts(list(prompts[i : i + _TEXTS])).numpy() for i in range(0, len(prompts), _TEXTS)]
    return np.maximum(100 * np.einsum("nd,nd->n", images, np.concatenate(parts)), 0)


def answer_scores(scores: np.ndarray, questions: Sequence[Question]) -> np.ndarray:
    """Returns how probable the reader of scenes finds what the prompts describe, in percent: [N].

    `scores` are those of all answers [N, classes]. For each image it is the mean probability of the true shapes,
    colours and relation. A pair side by side whose caption leaves the order open counts in the better order.
    """
    from ldm.data.scenes import scene_at
    from ldm.training.questions import QUESTIONS

    parts = torch.split(torch.from_numpy(np.array(scores)), list(QUESTIONS.values()), 1)
    shares = {name: part.softmax(1) for name, part in zip(QUESTIONS, parts, strict=True)}
    found: list[float] = []
    for i, question in enumerate(questions):
        need(
            question.scene is not None,
            f"the prompt {printable(question.prompt)[:60]!r} describes no known scene: --metrics clip",
        )
        split, index = question.scene or ("", 0)
        scene = scene_at(index, split)
        ways = [scene.solids]
        if scene.relation and not any("position" in entry for entry in question.include):
            ways.append(scene.solids[::-1])
        found.append(max(_mean_probability(shares, i, _replaced(scene, solids)) for solids in ways))
    return np.array(found)


_ASKED = ("relation", "shape 1", "colour 1", "shape 2", "colour 2")


def _mean_probability(shares: dict[str, Tensor], image: int, scene: Scene) -> float:
    from ldm.training.questions import ANSWERS, describe

    truth = describe(scene)
    return 100 * float(np.mean([shares[name][image, ANSWERS[name].index(truth[name])] for name in _ASKED]))


def _replaced(scene: Scene, solids: tuple[Solid, ...]) -> Scene:
    from dataclasses import replace

    return replace(scene, solids=solids)


class Aesthetic(nn.Module):
    """LAION's aesthetic predictors of CLIP ViT-L/14's embeddings: a score of about 1 to 10.

    `sac+logos+ava1-l14-linearMSE.pth` has five layers without activations, `sa_0_4_vit_l_14_linear.pth` one.
    """

    WIDTHS = (768, 1024, 128, 64, 16, 1)
    PLACES = (0, 2, 4, 6, 7)  # of the layers in the published network, where dropout is between them

    def __init__(self, path: str | None = None) -> None:
        super().__init__()
        file = NETWORKS["aesthetic"].find(path)
        if "linear.pth" in file.name and "MSE" not in file.name:
            self.layers: Any = load_strictly(nn.Linear(768, 1), file)
        else:
            chain = zip(self.PLACES, zip(self.WIDTHS[:-1], self.WIDTHS[1:], strict=True), strict=True)
            layers = nn.ModuleDict({str(place): nn.Linear(*sides) for place, sides in chain})
            self.layers = nn.Sequential(*load_strictly(layers, file, prefix="layers.").values())

    @torch.inference_mode()
    def forward(self, features: np.ndarray) -> np.ndarray:
        """Returns the scores of embeddings of length 1, [N, 768]: [N]."""
        width = features.shape[1]
        need(
            width == 768,
            f"the aesthetic predictor needs CLIP ViT-L/14 with 768 features, and this one has {width}",
        )
        scores: Tensor = self.layers(torch.from_numpy(np.array(features)))
        return scores.squeeze(1).numpy()
