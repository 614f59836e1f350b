"""Pseudo linear multistep sampling (PNDM, Liu et al. 2022, equations 9, 12 and 13): DDIM with a better noise."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ldm.models.diffusion.guidance import Conditioning
from ldm.models.diffusion.sampler import Sampler, TakeStep
from ldm.models.diffusion.sampling_run import SamplingRun, times_of
from ldm.models.diffusion.schedule import Step

# Adams-Bashforth weights by the number of available predictions, newest first
WEIGHTS = {
    2: (3 / 2, -1 / 2),
    3: (23 / 12, -16 / 12, 5 / 12),
    4: (55 / 24, -59 / 24, 37 / 24, -9 / 24),
}


class PLMSSampler(Sampler):
    """Feeds the update rule with a mixture of the last four predictions; the first step predicts twice.

    A `p_sample_plms` or `plms_sampling` with which an extension replaces this class's runs the steps of
    every run.
    """

    name = "plms"
    loop = "plms_sampling"
    plms_sampling = Sampler.denoise

    @torch.no_grad()
    def p_sample_plms(
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
        old_eps: Sequence[Tensor] | None = None,
        t_next: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Runs one step; returns the next latents [N, ...], the predicted clean ones, and the predicted noise.

        `old_eps` are the predictions of the steps before, the newest last; without any `t_next` [N] must be the
        timesteps of the step after this one. The rest is as in `DDIMSampler.p_sample_ddim`.
        """
        run, step = self._single(
            c, index, repeat_noise, use_original_steps, quantize_denoised, temperature, noise_dropout,
            score_corrector, corrector_kwargs, unconditional_guidance_scale, unconditional_conditioning,
        )  # fmt: skip
        if not old_eps and t_next is None:
            raise ValueError("the first step of PLMS needs t_next, the timesteps of the step after it")
        return _multistep(run, x, step, t, t_next, old_eps or ())

    def _stepper(self, run: SamplingRun) -> TakeStep:
        foreign = getattr(self.p_sample_plms, "__func__", None) is not _OWN_STEP
        past: deque[Tensor] = deque(maxlen=3)

        def take(x: Tensor, step: Step) -> tuple[Tensor, Tensor]:
            t = times_of(x, step.t)
            # the original's last step has no next timestep: it repeats its own
            t_next = times_of(x, step.t_prev) if step.index else t
            if foreign:
                x, pred_x0, eps = self.p_sample_plms(
                    x, run.guidance.cond, t, **run.arguments(step), old_eps=list(past), t_next=t_next
                )
            else:
                x, pred_x0, eps = _multistep(run, x, step, t, t_next, past)
            past.append(eps)
            return x, pred_x0

        return take


def _multistep(
    run: SamplingRun, x: Tensor, step: Step, t: Tensor, t_next: Tensor | None, past: Sequence[Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """Computes the next latent, the clean one and the prediction, from it and the last three of `past`."""
    eps = run.predict(x, t, step.alpha)
    if not past and step.without_signal:
        mixed = eps
    elif not past:  # Heun's method: average with the prediction at the far end of the step
        assert t_next is not None
        ahead, _ = run.advance(x, eps, step)
        mixed = (eps + run.predict(ahead, t_next, step.alpha_prev)) / 2
    else:
        recent = [eps, *reversed(past)][: max(WEIGHTS)]
        mixed = sum((w * e for w, e in zip(WEIGHTS[len(recent)], recent, strict=True)), 0 * eps)
    return *run.advance(x, mixed, step), eps


_OWN_STEP = PLMSSampler.p_sample_plms
