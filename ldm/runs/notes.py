"""Warns of requests that a model does not handle well, before sampling."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Callable, Iterable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from ldm.checkpoints.few_steps import FewSteps, made_for
from ldm.files import read_side_file
from ldm.job import Job
from ldm.places import find
from ldm.runs.models import begins_without_signal, edits_images, own_side
from ldm.util import printable

logger = logging.getLogger("ldm")

BUNDLED_CARD = "models/ldm/shapes/README.md"
_PLMS_STEPS = 25  # below it PLMS, whose first steps are of lower order, is inaccurate
_MOST_WORDS = 10


def note_jobs(
    jobs: Iterable[Job],
    model: Mapping[str, Any],
    ckpt: Path | None = None,
    find_lora: Callable[[str], Path] = Path,
) -> None:
    """Prints warnings for jobs that a model does not handle well: sizes, steps, words that it does not know.

    `ckpt` is its file, and `find_lora` finds those of LoRAs, which may be made for few steps.
    """
    few_steps = _FewSteps(model, ckpt, find_lora)
    side, words = own_side(model), _known_words(model)
    largest, few, unknown, trailing = (0, 0), None, dict[str, None](), False
    for job in jobs:
        few_steps.note(job)
        trailing |= job.schedule == "trailing"
        largest = max(largest, job.upscaled_size, key=math.prod)
        few = job.steps if few is None and job.sampler == "plms" and job.steps < _PLMS_STEPS else few
        if words is not None and len(unknown) <= _MOST_WORDS:
            unknown |= dict.fromkeys(
                w for w in re.findall(r"[^\W\d_]+", job.prompt.lower()) if w not in words
            )
    if edits_images(model):
        logger.info(
            "this model edits the image that it sees, and starts from noise: --strength has no effect"
        )
    if trailing and begins_without_signal(model):
        logger.info("the schedule is trailing: this model was trained without signal at the last timestep")
    if math.prod(largest) > 2 * side * side:
        logger.info(
            "this model was trained at %dx%d; at %dx%d objects may repeat", side, side, *reversed(largest)
        )
    if few is not None:
        logger.info(
            "PLMS needs about 50 steps, not %d; --dpm_solver gives good images in 10 to 20 steps, DDIM in 25",
            few,
        )
    if unknown:
        named = ", ".join(printable(word) for word in list(unknown)[:_MOST_WORDS])
        more = ", ..." if len(unknown) > _MOST_WORDS else ""
        logger.info(
            "the bundled model does not know: %s%s (%s lists what it draws)", named, more, BUNDLED_CARD
        )


class _FewSteps:
    """Warns once of each model or LoRA that was made for few steps, and is used with other settings."""

    def __init__(self, model: Mapping[str, Any], ckpt: Path | None, find_lora: Callable[[str], Path]) -> None:
        from ldm.config import section

        self._find_lora = find_lora
        self._guided = section(model, "unet_config").get("time_cond_proj_dim") is not None
        self._model = None if ckpt is None and not self._guided else _kind_of(ckpt or Path(), self._guided)
        self._named = set[str]()

    def note(self, job: Job) -> None:
        """Warns if the job's settings are not those that its model or one of its LoRAs was made for."""
        found = [("the model", self._model)] if self._model else []
        found += [
            (f"the LoRA {printable(name)}", _kind_of(self._find_lora(name)))
            for name, weight, _ in job.loras
            if weight and not self._guided
        ]
        for name, kind in found:
            wrong = kind.misfits(job) if kind is not None else []
            if kind is not None and wrong and name not in self._named:
                self._named.add(name)
                logger.warning(
                    "%s was made for few steps (%s), not for %s; use %s",
                    name, kind.kind, ", ".join(wrong), kind.command,
                )  # fmt: skip


@lru_cache(maxsize=64)
def _kind_of(path: Path, guided: bool = False) -> FewSteps | None:
    from ldm.checkpoints.adapters.lora_files import notes_in

    return made_for(path, notes_in(path) if path.is_file() else {}, guided)


def _known_words(model: Mapping[str, Any]) -> frozenset[str] | None:
    """Returns the words that a model was trained on, if its vocabulary's folder lists them; else None."""
    from ldm.config import section

    version = section(model, "cond_stage_config").get("version")
    path = find(version) / "words.txt" if isinstance(version, str) else None
    if path is None or not path.is_file():
        return None
    return frozenset(read_side_file(path, 1_000_000).decode("utf-8").split())
