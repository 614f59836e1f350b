"""Finds objects in images with a detector of transformers from a local folder, and names their colours with CLIP.

Thresholds and rules are those of GenEval's program: a score of 0.3, of 0.9 where objects are counted, at most 16
objects of a class, and a position only where the centres are apart by more than a tenth of the boxes' sides.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image

from ldm.evaluation.networks import ClipFeatures, of_transformers
from ldm.evaluation.prompts import Question
from ldm.evaluation.skills import Found
from ldm.evaluation.weights import NETWORKS
from ldm.util import need, printable

CERTAIN, COUNTED, MOST, APART = 0.3, 0.9, 16, 0.1
COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
RELATIONS = ("left of", "right of", "above", "below")
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_SHORT, _LONG = 800, 1333  # sides that DETR and its kin were trained with


class Detector:
    """An object detector of a folder, as `AutoModelForObjectDetection` reads it.

    `questions` are checked first: InputError for a class that it does not know and a position that boxes do not show.
    CLIP is read only if a question has a colour.
    """

    def __init__(
        self,
        path: str | None,
        clip: str | None,
        questions: Sequence[Question],
        device: torch.device | str = "cpu",
    ) -> None:
        folder = NETWORKS["detector"].find(path)
        with of_transformers(folder):
            from transformers import AutoModelForObjectDetection

            self._net: Any = AutoModelForObjectDetection.from_pretrained(folder, local_files_only=True).eval()
        self._net.to(device)
        self._device, self.name = device, f"detector {folder.name}"
        self._labels: Mapping[int, str] = self._net.config.id2label
        self._check(questions)
        asks = any("color" in entry for question in questions for entry in question.include)
        self._clip = ClipFeatures(clip, device=device) if asks else None

    def _check(self, questions: Sequence[Question]) -> None:
        known = set(self._labels.values())
        for question in questions:
            shown = printable(question.prompt)[:60]
            need(
                bool(question.include),
                f"the prompt {shown!r} asks nothing: give a file of questions such as GenEval's",
            )
            for entry in (*question.include, *question.exclude):
                need(
                    entry["class"] in known,
                    f"{self.name} knows no {printable(entry['class'])[:40]}, of the prompt {shown!r}",
                )
                relation = entry.get("position", (RELATIONS[0],))[0]
                need(
                    relation in RELATIONS,
                    f"{shown!r}: boxes do not show {printable(relation)}; use {', '.join(RELATIONS)}",
                )

    def __call__(self, pixels: np.ndarray, question: Question) -> list[Found]:
        """Returns the objects in an image, uint8 [H, W, 3], the most certain first."""
        scores, names, boxes = self._detected(pixels)
        threshold = COUNTED if question.tag == "counting" else CERTAIN
        kept: list[int] = []
        for i in map(int, np.argsort(-scores, kind="stable")):
            if scores[i] > threshold and sum(names[j] == names[i] for j in kept) < MOST:
                kept.append(i)
        coloured = {entry["class"] for entry in question.include if "color" in entry}
        return [
            Found(
                names[i],
                self._colour(pixels, boxes[i], names[i]) if names[i] in coloured else None,
                {place: relations(boxes[i], boxes[j]) for place, j in enumerate(kept) if j != i},
            )
            for i in kept
        ]

    def _detected(self, pixels: np.ndarray) -> tuple[np.ndarray, list[str], np.ndarray]:
        """Returns scores [N], class names, and boxes [N, 4]: left, top, right, bottom in pixels."""
        height, width, _ = pixels.shape
        factor = min(_SHORT / min(height, width), _LONG / max(height, width))
        image = Image.fromarray(pixels).resize(
            (round(width * factor), round(height * factor)), Image.Resampling.BILINEAR
        )
        x = torch.from_numpy(np.asarray(image).transpose(2, 0, 1).astype(np.float32) / 255)
        x = (x - torch.tensor(_MEAN).view(3, 1, 1)) / torch.tensor(_STD).view(3, 1, 1)
        with torch.inference_mode():
            out = self._net(pixel_values=x[None].to(self._device))
        logits = out.logits[0].float().cpu()
        # with one class more than the labels the last is "no object" (DETR), else each class has a chance of its own
        more = logits.shape[-1] > len(self._labels)
        chances = logits.softmax(-1)[:, :-1] if more else logits.sigmoid()
        scores, classes = chances.max(-1)
        cx, cy, w, h = out.pred_boxes[0].float().cpu().unbind(-1)
        corners = torch.stack([cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2], -1)
        boxes = corners * torch.tensor([width, height, width, height])
        return scores.numpy(), [self._labels[int(i)] for i in classes], boxes.numpy()

    def _colour(self, pixels: np.ndarray, box: np.ndarray, name: str) -> str | None:
        """Returns the colour whose description CLIP finds nearest to the part of the image in a box."""
        height, width, _ = pixels.shape
        left, top = (max(int(edge), 0) for edge in box[:2])
        right, bottom = min(int(np.ceil(box[2])), width), min(int(np.ceil(box[3])), height)
        if self._clip is None or right <= left or bottom <= top:
            return None
        with torch.inference_mode():
            seen = self._clip.features(self._clip.prepare(pixels[top:bottom, left:right])[None]).cpu()
        texts = self._clip.texts([f"a photo of a {colour} {name}" for colour in COLOURS])
        return COLOURS[int((texts @ seen[0]).argmax())]


def relations(first: np.ndarray, second: np.ndarray) -> frozenset[str]:
    """Returns where a box is relative to another (left, top, right, bottom): some of `RELATIONS`.

    A direction counts if, after a tenth of both boxes' sides is subtracted, it has more than half of the distance.
    """
    a, b = (np.asarray(box, np.float64).reshape(2, 2) for box in (first, second))
    apart = a.mean(0) - b.mean(0)
    margin = APART * (np.ptp(a, axis=0) + np.ptp(b, axis=0))
    rest = np.sign(apart) * np.maximum(np.abs(apart) - margin, 0)
    if np.all(np.abs(rest) < 1e-3):
        return frozenset()
    across, down = rest / np.linalg.norm(apart)
    shown = (across < -0.5, across > 0.5, down < -0.5, down > 0.5)
    return frozenset(name for name, seen in zip(RELATIONS, shown, strict=True) if seen)
