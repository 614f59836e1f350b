"""The caption of one visit of an image: its parts in another order, or nothing, so that the model generalises."""

from __future__ import annotations

import numpy as np

from ldm.finetuning.data import Example


def caption_for(example: Example, rng: np.random.Generator) -> str:
    """Returns the caption of one visit of an example.

    With the probability `example.drop` it is empty, which is what classifier-free guidance compares with (Ho and
    Salimans 2022). With `example.shuffle` its parts between commas are put into another order, except the first
    `example.keep_tokens`. Three numbers are drawn at most, and the first always.
    """
    if rng.random() < example.drop:
        return ""
    if not example.shuffle:
        return example.caption
    parts = [part.strip() for part in example.caption.split(",")]
    kept, rest = parts[: example.keep_tokens], parts[example.keep_tokens :]
    order: list[int] = rng.permutation(len(rest)).tolist()
    return ", ".join([*kept, *(rest[i] for i in order)])
