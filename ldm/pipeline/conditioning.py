"""Prompts -> the conditioning of the U-Net."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from ldm.job import Job
from ldm.models.diffusion.course import Course
from ldm.models.diffusion.ddpm import HybridDiffusion, LatentDiffusion
from ldm.models.diffusion.guidance import Conditioning, Guidance, GuidancePlan
from ldm.modules.encoders.modules import FrozenCLIPEmbedder
from ldm.pipeline.placement import Placement
from ldm.prompts.conditioning import count_chunks, encode_weighted
from ldm.prompts.editing import Script, scripts_of
from ldm.util import is_mapping

logger = logging.getLogger(__name__)


class Channels(NamedTuple):
    """Channels next to the latents, each [1 or N, C, h, w]; of a model that edits, `nothing` are those of no image.

    Of an inpainting model they are a mask, 1 is repainted, and the latents of the rest.
    """

    seen: tuple[Tensor, ...]
    nothing: tuple[Tensor, ...] | None = None


class TextConditioning:
    """Encodes the prompts of jobs, and keeps what it has encoded."""

    def __init__(self, model: LatentDiffusion, placement: Placement) -> None:
        self._model, self._placement = model, placement
        self._warned = False
        self.clear()

    def clear(self) -> None:
        """Forgets all encoded prompts, as after a change of the text encoder."""
        self._encode_prompt = lru_cache(maxsize=64)(self._encode)
        # few, as a rule one for the whole run: apart, so that many prompts do not push it out
        self._encode_negative = lru_cache(maxsize=8)(self._encode)

    def remove_embeddings(self) -> None:
        """Takes all textual inversions off the text encoder, and forgets what it has encoded."""
        if isinstance(self._model.cond_stage_model, FrozenCLIPEmbedder):
            self._model.cond_stage_model.use_embeddings({})
        self.clear()

    def plan(self, jobs: Sequence[Job], channels: Channels | None, upscaled: bool = False) -> GuidancePlan:
        """The guidance of each step of a batch, in its first pass or in its upscaled one."""
        scripts = [Script.of(job, upscaled) for job in jobs]
        made: dict[tuple[str, ...], Guidance] = {}
        entries: list[tuple[int, Guidance]] = []
        with self._placement.running(self._model.cond_stage_model):
            for end in sorted(set[int]().union(*(script.ends() for script in scripts))):
                # all first parts, all second ones, and so on
                turns = zip(*(script.parts for script in scripts), strict=True)
                prompts = [part.at(end) for parts in turns for part in parts]
                negatives = [script.negative.at(end) for script in scripts]
                texts = (*prompts, *negatives)
                if texts not in made:
                    made[texts] = self._guidance(jobs, scripts, prompts, negatives, channels)
                entries.append((end, made[texts]))
        return GuidancePlan(entries, Course.of(jobs[0]))

    def _guidance(
        self,
        jobs: Sequence[Job],
        scripts: Sequence[Script],
        prompts: Sequence[str],
        negatives: Sequence[str],
        channels: Channels | None,
    ) -> Guidance:
        """The conditioning of texts, that of the negative prompts if any job has guidance, and the scales."""
        chunks = self._count_chunks(jobs[0], scripts[0])
        skips = [job.clip_skip for job in jobs]

        def joined(
            encode: Callable[[str, int | None, int], Tensor], texts: Sequence[str], sees: bool = True
        ) -> Conditioning:
            skip_of_each = skips * (len(texts) // len(skips))
            encoded = [encode(text, chunks, skip) for text, skip in zip(texts, skip_of_each, strict=True)]
            shown = None if channels is None else channels.seen if sees else channels.nothing
            return self._joined(encoded, shown)

        cond = joined(self._encode_prompt, prompts)
        weights = self._weights(scripts)
        if self._model.embeds_guidance:
            self._warn_of_negative_prompts(jobs)
            scales = [job.scale for job in jobs] * len(scripts[0].parts)
            return Guidance(self._with_scales(cond, scales), weights=weights)
        image_scale = 1.0 if channels is None or channels.nothing is None else jobs[0].image_scale
        if weights is None and image_scale == 1.0 and all(job.scale == 1.0 for job in jobs):
            return Guidance(cond, scale=1.0)
        scale = self._per_job([job.scale for job in jobs])
        rescale = self._per_job([job.guidance_rescale for job in jobs])
        away = joined(self._encode_negative, negatives)
        if image_scale == 1.0:
            return Guidance(cond, away, scale, rescale, weights)
        blind = joined(self._encode_negative, negatives, sees=False)
        return Guidance(cond, blind, scale, rescale, weights, away, image_scale)

    def _weights(self, scripts: Sequence[Script]) -> Tensor | None:
        """The weights of the parts of prompts [K, N, 1, 1, 1]; None if there is one part, of weight 1."""
        if not any(script.is_composed for script in scripts):
            return None
        weights = [[part.weight for part in script.parts] for script in scripts]
        return torch.tensor(weights, device=self._model.device).T[..., None, None, None]

    def _with_scales(self, cond: Conditioning, scales: Sequence[float]) -> Conditioning:
        """A conditioning with the guidance scales as an input of the U-Net."""
        parts = cond if is_mapping(cond) else {"c_crossattn": [cond]}
        return {**parts, "guidance": torch.tensor(scales, device=self._model.device)}

    def _warn_of_negative_prompts(self, jobs: Sequence[Job]) -> None:
        """Warns once that the model is distilled for one prediction, that of the prompt."""
        if self._warned or not any(job.negative_prompt for job in jobs):
            return
        self._warned = True
        logger.warning(
            "this model was distilled with its guidance: negative prompts have no effect; leave them out"
        )

    def _per_job(self, values: Sequence[float]) -> float | Tensor:
        """The value that all jobs of a batch have, or where they differ those of each [N, 1, 1, 1]."""
        if len(set(values)) == 1:
            return values[0]
        return torch.tensor(values, device=self._model.device)[:, None, None, None]

    def by_length(self, jobs: Sequence[Job]) -> list[list[int]]:
        """Indices of the jobs of a batch, grouped: those of as many parts and chunks of text are made together."""
        groups: dict[tuple[tuple[int, int | None], ...], list[int]] = {}
        for place, job in enumerate(jobs):
            lengths = tuple((len(s.parts), self._count_chunks(job, s)) for s in scripts_of(job))
            groups.setdefault(lengths, []).append(place)
        return list(groups.values())

    def cut_words(self, job: Job) -> str:
        """The end of a job's prompt that the text encoder does not see; empty if it sees all of it."""
        # another package's text encoder may lack it
        cut_words = getattr(self._model.cond_stage_model, "cut_words", None)
        return cut_words(job.prompt) if cut_words and job.prompt_syntax == "plain" else ""

    def _encode(self, prompt: str, chunks: int | None, clip_skip: int) -> Tensor:
        """A prompt [1, L, width]: as it is, or with weights and in so many chunks of 75 tokens."""
        if chunks is None:
            skip = {"clip_skip": clip_skip} if clip_skip != 1 else {}  # which a replaced method may not know
            return self._model.get_learned_conditioning([prompt], **skip)
        return encode_weighted(self._model.cond_stage_model, [prompt], chunks, clip_skip)

    def _count_chunks(self, job: Job, script: Script) -> int | None:
        """How many chunks all texts of a job's pass are read in; None where they are read plainly."""
        if job.prompt_syntax == "plain":
            return None
        return count_chunks(self._model.cond_stage_model, script.texts())

    def _joined(self, encoded: Sequence[Tensor], channels: Sequence[Tensor] | None) -> Conditioning:
        context = torch.cat(list(encoded))
        if channels is None:
            return context
        assert isinstance(self._model, HybridDiffusion)
        repeated = (part.repeat(len(context) // len(part), 1, 1, 1) for part in channels)
        return self._model.hybrid_conditioning(context, *repeated)
