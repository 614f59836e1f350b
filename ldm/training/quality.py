"""An independent judge of the bundled model: a small network that classifies the scene in an image."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.data.scenes import Scene
from ldm.training.export import save_atomically
from ldm.training.questions import ANSWERS, QUESTIONS, Answer, answers, describe
from ldm.training.runs import Optimisation, load_state
from ldm.util import InputError, printable

logger = logging.getLogger(__name__)

Verdict = dict[str, Answer]  # the answer to each question


class SceneReader(nn.Module):
    """Maps images [N, 3, H, W] in [0, 1] to the scores of all answers [N, sum of classes]."""

    def __init__(self, width: int = 32, side: int = 64) -> None:
        super().__init__()
        self.side = side

        def block(entering: int, leaving: int, stride: int) -> nn.Sequential:
            conv = nn.Conv2d(entering, leaving, 3, stride, padding=1, bias=False)
            return nn.Sequential(conv, nn.BatchNorm2d(leaving), nn.ReLU())

        self.features = nn.Sequential(
            block(3, width, 2),
            block(width, 2 * width, 2),
            block(2 * width, 2 * width, 1),
            block(2 * width, 4 * width, 2),
            block(4 * width, 4 * width, 1),
            nn.Conv2d(4 * width, 16, 1),
        )
        self.head = nn.Sequential(
            nn.Flatten(),
            nn.Linear(16 * (side // 8) ** 2, 160),
            nn.ReLU(),
            nn.Linear(160, sum(QUESTIONS.values())),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = F.interpolate(x, size=(self.side, self.side), mode="area")
        return self.head(self.features(2 * x - 1))


def split_answers(scores: Tensor) -> Iterator[Tensor]:
    """Splits scores by question [N, classes], in the order of `QUESTIONS`."""
    return iter(torch.split(scores, list(QUESTIONS.values()), dim=-1))


def to_unit(images: np.ndarray) -> Tensor:
    """Converts uint8 [N, H, W, 3] to float [N, 3, H, W] in [0, 1]."""
    return torch.tensor(np.asarray(images)).movedim(-1, -3).float() / 255


def roughen(x: Tensor, rng: np.random.Generator) -> Tensor:
    """Adds small faults of generated images: shift, blur, noise, and a slight tint; [N, 3, H, W]."""
    count, side = len(x), x.shape[-1]
    down, right = rng.integers(9, size=2)
    x = F.pad(x, (4, 4, 4, 4), mode="replicate")[..., down : down + side, right : right + side]
    if rng.random() < 0.5:
        x = F.avg_pool2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    if rng.random() < 0.25:  # blocks, as coarse compression leaves them
        x = F.interpolate(F.avg_pool2d(x, 2), scale_factor=2.0, mode="bilinear")
    gain = torch.tensor(rng.uniform(0.94, 1.06, (count, 3, 1, 1)), dtype=torch.float32)
    noise = torch.tensor(rng.standard_normal(x.shape, dtype=np.float32))
    return (x * gain + noise * float(rng.uniform(0, 0.06))).clamp(0, 1)


def train_reader(
    images: np.ndarray,
    scenes: Sequence[Scene],
    optimisation: Optimisation,
    batch_size: int = 64,
    seed: int = 0,
) -> SceneReader:
    """Trains a reader on images (uint8 [N, H, W, 3]) and their scenes."""
    torch.manual_seed(seed)
    reader, rng = SceneReader(), np.random.default_rng(seed)
    truth = torch.tensor([answers(scene) for scene in scenes])
    optimizer, scheduler = optimisation.adamw(reader.parameters())
    for step in range(optimisation.steps):
        chosen = np.sort(rng.integers(len(scenes), size=batch_size))
        scores = split_answers(reader(roughen(to_unit(images[chosen]), rng)))
        true = truth[torch.from_numpy(chosen)].unbind(1)
        loss = torch.stack([F.cross_entropy(s, t) for s, t in zip(scores, true, strict=True)]).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
        if step % 100 == 99:
            logger.info("step %d of %d  loss %.4f", step + 1, optimisation.steps, loss.item())
    return reader.eval()


def save_reader(reader: SceneReader, path: Path) -> None:
    """Writes the weights in half precision."""
    save_atomically(
        {name: v.half() if v.is_floating_point() else v for name, v in reader.state_dict().items()}, path
    )


def load_reader(path: Path) -> SceneReader:
    """Loads a reader with the weights that `save_reader` wrote."""
    reader = SceneReader().eval()
    try:
        reader.load_state_dict(load_state(path))
    except (RuntimeError, TypeError, AttributeError):
        raise InputError(f"{printable(path)} does not hold the weights of a judge; train one") from None
    return reader


@torch.no_grad()
def judge(reader: SceneReader, images: np.ndarray, batch_size: int = 64) -> list[Verdict]:
    """Classifies images (uint8 [N, H, W, 3]): returns the answer to every question for each."""
    verdicts: list[Verdict] = []
    for start in range(0, len(images), batch_size):
        scores = split_answers(reader(to_unit(images[start : start + batch_size])))
        classes = cast("list[list[int]]", torch.stack([s.argmax(dim=1) for s in scores], dim=1).tolist())
        verdicts += [
            {question: values[c] for (question, values), c in zip(ANSWERS.items(), row, strict=True)}
            for row in classes
        ]
    return verdicts


def accuracies(verdicts: Sequence[Verdict], scenes: Sequence[Scene]) -> dict[str, float]:
    """Returns the fraction of correct answers to each question."""
    truth = [describe(scene) for scene in scenes]
    return {
        question: sum(v[question] == t[question] for v, t in zip(verdicts, truth, strict=True)) / len(truth)
        for question in QUESTIONS
    }


def score(verdict: Mapping[str, Answer], scene: Scene, ordered: bool = True) -> dict[str, bool]:
    """Returns whether shapes, colours and relation of a verdict are the scene's, and whether all three are.

    With `ordered` off (for a caption with "next to") a pair side by side counts in either order.
    """
    right = _compare(verdict, describe(scene))
    if ordered or scene.relation != "left of":
        return right
    swapped = _compare(verdict, describe(Scene(scene.solids[::-1], scene.relation, scene.background)))
    return max(right, swapped, key=lambda result: (result["all"], sum(result.values())))


def _compare(verdict: Mapping[str, Answer], truth: Mapping[str, Answer]) -> dict[str, bool]:
    result = {
        "shape": all(verdict[f"shape {slot}"] == truth[f"shape {slot}"] for slot in (1, 2)),
        "colour": all(verdict[f"colour {slot}"] == truth[f"colour {slot}"] for slot in (1, 2)),
        "relation": verdict["relation"] == truth["relation"],
    }
    return {**result, "all": all(result.values())}
