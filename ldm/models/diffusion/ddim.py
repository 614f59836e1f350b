"""DDIM (Song et al. 2021): one prediction a step."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ldm.models.diffusion.guidance import Conditioning
from ldm.models.diffusion.sampler import Sampler, TakeStep
from ldm.models.diffusion.sampling_run import SamplingRun, times_of
from ldm.models.diffusion.schedule import Step


class DDIMSampler(Sampler):
    """Feeds the update rule with the noise predicted at each step; `eta` between 0 (none) and 1 adds noise.

    A `p_sample_ddim` or `ddim_sampling` with which an extension replaces this class's runs the steps of
    every run.
    """

    name = "ddim"
    loop = "ddim_sampling"
    ddim_sampling = Sampler.denoise

    @torch.no_grad()
    def p_sample_ddim(
        self,
        x: Tensor,
        c: Conditioning,
        t: Tensor,
        index: int,
        repeat_noise: bool = False,
        use_original_steps: bool = False,
        quantize_denoised: bool = False,
        temperature: float = 1.0,
        noise_dropout: float = 0.0,
        score_corrector: Any = None,
        corrector_kwargs: Mapping[str, Any] | None = None,
        unconditional_guidance_scale: float | Tensor = 1.0,
        unconditional_conditioning: Conditioning = None,
    ) -> tuple[Tensor, Tensor]:
        """Runs one step; returns the next latents [N, ...] and the predicted clean ones.

        `index` counts the steps after it in the schedule made by `make_schedule`, and `t` [N] are its timesteps.
        The rest is as in `sample`; with `repeat_noise` all entries of the batch get the same fresh noise.
        """
        run, step = self._single(
            c, index, repeat_noise, use_original_steps, quantize_denoised, temperature, noise_dropout,
            score_corrector, corrector_kwargs, unconditional_guidance_scale, unconditional_conditioning,
        )  # fmt: skip
        return run.advance(x, run.predict(x, t, step.alpha), step)

    def _stepper(self, run: SamplingRun) -> TakeStep:
        foreign = getattr(self.p_sample_ddim, "__func__", None) is not _OWN_STEP

        def take(x: Tensor, step: Step) -> tuple[Tensor, Tensor]:
            if foreign:
                return self.p_sample_ddim(x, run.guidance.cond, times_of(x, step.t), **run.arguments(step))
            return run.advance(x, run.predict(x, step.t, step.alpha), step)

        return take


_OWN_STEP = DDIMSampler.p_sample_ddim
