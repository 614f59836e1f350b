"""The safety check of Stable Diffusion v1: how near an image's CLIP embedding is to concepts to be withheld."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ldm.modules.encoders.clip import CLIPVisionModel

_CONCEPTS = 17
_SPECIAL_CARE = 3
_ADJUSTMENT = 0.01


class SafetyChecker(nn.Module):
    """Images -> whether each shows something to be withheld.

    Parameter names and rule are those of CompVis/stable-diffusion-safety-checker (Rando et al. 2022 describe
    it); by default it has the published sizes: CLIP ViT-L/14 with a projection to 768. Its weights come from a file;
    a new object holds no usable ones.
    """

    concept_embeds: Tensor
    special_care_embeds: Tensor
    concept_embeds_weights: Tensor
    special_care_embeds_weights: Tensor

    def __init__(
        self,
        side: int = 224,
        patch: int = 14,
        width: int = 1024,
        layers: int = 24,
        heads: int = 16,
        inner: int = 4096,
        projection: int = 768,
    ):
        super().__init__()
        self.side = side
        self.vision_model = CLIPVisionModel(side, patch, width, layers, heads, inner)
        self.visual_projection = nn.Linear(width, projection, bias=False)
        self.register_buffer("concept_embeds", torch.zeros(_CONCEPTS, projection))
        self.register_buffer("special_care_embeds", torch.zeros(_SPECIAL_CARE, projection))
        self.register_buffer("concept_embeds_weights", torch.zeros(_CONCEPTS))
        self.register_buffer("special_care_embeds_weights", torch.zeros(_SPECIAL_CARE))

    def forward(self, images: Tensor) -> Tensor:
        """Flags CLIP-normalised images [N, 3, side, side], on any device; returns bool [N].

        Raises ArithmeticError if a score is not finite: every comparison with it would mean "not flagged".
        """
        return _exceed(self.scores(self.embed(images)))

    def embed(self, images: Tensor) -> Tensor:
        """Maps normalised images [N, 3, side, side] to CLIP image embeddings [N, projection], of any length."""
        return self.visual_projection(self.vision_model(images.to(self.visual_projection.weight)))

    def scores(self, embeddings: Tensor) -> Tensor:
        """Returns how far embeddings [N, projection] exceed each concept's threshold: [N, 17].

        An embedding beyond a special-care threshold gets 0.01 on all its scores.
        """
        special = _cosines(embeddings, self.special_care_embeds) - self.special_care_embeds_weights
        adjustment = _ADJUSTMENT * _exceed(special)[:, None]
        return _cosines(embeddings, self.concept_embeds) - self.concept_embeds_weights + adjustment


def _cosines(a: Tensor, b: Tensor) -> Tensor:
    return F.normalize(a) @ F.normalize(b).T


def _exceed(scores: Tensor) -> Tensor:
    """Returns bool [N]: whether any score of a row is above zero when rounded to three decimals, as published."""
    if not scores.isfinite().all():
        raise ArithmeticError("the scores of the safety check are not finite")
    return (torch.round(1000 * scores) > 0).any(dim=1)
