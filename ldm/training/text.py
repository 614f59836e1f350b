"""Trains the text encoder to represent a caption's content: which solids, which colours, where."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from pytorch_lightning.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor, nn

from ldm.data.captions import caption
from ldm.data.scenes import scene_at
from ldm.training.questions import QUESTIONS, answers
from ldm.training.runs import MakeBatch, Optimisation

Tokenize = Callable[[Sequence[str]], Tensor]  # captions -> ids [B, max_length]


class CaptionBatch(NamedTuple):
    """Ids [B, L], answers [B, questions], and places in the padding [B, P] as fractions of it, in [0, 1)."""

    ids: Tensor
    answers: Tensor
    fractions: Tensor


def caption_batches(
    tokenize: Tokenize, split: str, batch_size: int, spare: int = 4, positions: int = 3
) -> MakeBatch:
    """Returns a maker of batches of new scenes of a split, each with a new caption and `positions` places in padding.

    Three batches of four are cut to the longest caption and `spare` positions of padding: in a causal encoder that
    changes no other position. The fourth keeps every position, so that all of them learn.
    """

    def make(number: int, rng: np.random.Generator) -> CaptionBatch:
        scenes = [scene_at(int(i), split) for i in rng.integers(2**40, size=batch_size)]
        ids = tokenize([caption(scene, rng) for scene in scenes])
        if number % 4:
            ids = ids[:, : int(ends(ids).max()) + 1 + spare]
        fractions = rng.random((batch_size, positions), dtype=np.float32)
        truth = torch.tensor([answers(scene) for scene in scenes])
        return CaptionBatch(ids, truth, torch.from_numpy(fractions))

    return make


def ends(ids: Tensor) -> Tensor:
    """Returns the position of the first end token (the largest id) of each row: [B, L] -> [B]."""
    return ids.argmax(dim=1)


class TextTraining(pl.LightningModule):
    """Trains `transformer` (ids [B, L] -> states [B, L, width]) through one linear head for all questions.

    The head reads the state at the end token and at the batch's places of the padding after it, and the loss is the
    mean cross entropy over places and questions. A question that a caption leaves open has no right answer; the head
    then learns the probability of each.
    """

    def __init__(self, transformer: nn.Module, width: int, optimisation: Optimisation) -> None:
        super().__init__()
        self.transformer = transformer
        for embedding in (module for module in transformer.modules() if isinstance(module, nn.Embedding)):
            nn.init.normal_(embedding.weight, std=0.05)
        self.head = nn.Linear(width, sum(QUESTIONS.values()))
        self.optimisation = optimisation

    def logits(self, ids: Tensor, places: Tensor) -> list[Tensor]:
        """Returns the scores of each question at `places` [B, P]: one [B, P, classes] a question."""
        states = self.transformer(ids).last_hidden_state
        picked = states.gather(1, places[..., None].expand(-1, -1, states.shape[-1]))
        return list(self.head(picked).float().split(list(QUESTIONS.values()), dim=-1))

    def training_step(self, batch: CaptionBatch) -> Tensor:
        ids, truth, fractions = batch
        end = ends(ids)[:, None]
        padding = ids.shape[1] - 1 - end
        behind = end + 1 + (fractions * padding).long()
        places = torch.cat([end, behind.clamp(max=ids.shape[1] - 1)], dim=1)
        losses = [
            F.cross_entropy(scores.flatten(0, 1), true.repeat_interleave(places.shape[1]))
            for scores, true in zip(self.logits(ids, places), truth.unbind(1), strict=True)
        ]
        loss = torch.stack(losses).mean()
        self.log("loss", loss.detach())
        return loss

    def validation_step(self, batch: CaptionBatch, batch_idx: int, dataloader_idx: int = 0) -> None:
        ids, truth, _ = batch
        for question, scores, true in zip(
            QUESTIONS, self.logits(ids, ends(ids)[:, None]), truth.unbind(1), strict=True
        ):
            self.log(f"val {question}", (scores[:, 0].argmax(-1) == true).float().mean())

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        return self.optimisation.configure(self.parameters())
