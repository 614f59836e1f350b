"""The one update rule, and the settings of one run of the denoising loop."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ldm.models.diffusion.course import Moment
from ldm.models.diffusion.guidance import Guidance, GuidancePlan
from ldm.models.diffusion.noise import NoiseSource
from ldm.models.diffusion.schedule import Step, StepTable
from ldm.models.diffusion.schedules.levels import sigma_of
from ldm.models.diffusion.step_noise import SeparateSteps, StepNoise


def times_of(x: Tensor, t: float) -> Tensor:
    """Returns the timestep for each entry of the batch `x`: [N], in float64 if `x` is and `t` is not an integer."""
    exact = isinstance(t, float) and x.dtype == torch.float64
    return torch.full((x.shape[0],), t, device=x.device, dtype=x.dtype if exact else None)


def clean_latent(x: Tensor, eps: Tensor, step: Step) -> Tensor:
    """Returns the clean latent that `eps`, the noise predicted in `x`, implies."""
    return (x - (1 - step.alpha) ** 0.5 * eps) / step.alpha**0.5


def implied_noise(x: Tensor, clean: Tensor, step: Step) -> Tensor:
    """Returns the noise in `x` that makes `clean` its clean latent."""
    return (x - step.alpha**0.5 * clean) / (1 - step.alpha) ** 0.5


def noise_of_velocity(x: Tensor, v: Tensor, alpha: float) -> Tensor:
    """Returns the noise in `x` of noise level `alpha` that v = sqrt(alpha) eps - sqrt(1 - alpha) x_0 implies.

    With x = sqrt(alpha) x_0 + sqrt(1 - alpha) eps (Salimans and Ho 2022, appendix D). The result is in float64,
    except on MPS, which has none.
    """
    wide = torch.float32 if x.device.type == "mps" else torch.float64
    return alpha**0.5 * v.to(wide) + (1 - alpha) ** 0.5 * x.to(wide)


def previous_latent(pred_x0: Tensor, eps: Tensor, step: Step) -> Tensor:
    """Returns the latent one step less noisy, before fresh noise is added (DDIM, Song et al. 2021, equation 12)."""
    # an eta above 1 can ask for more noise than there is
    kept = max(1 - step.alpha_prev - step.sigma**2, 0.0)
    return step.alpha_prev**0.5 * pred_x0 + kept**0.5 * eps


@dataclass(frozen=True)
class MaskLevels:
    """A mask that shrinks from step to step: `kept` [batch or 1, 1, h, w] are shares of the steps, the first ones.

    Differential Diffusion (Levin and Fried 2023, arXiv 2306.00950).
    """

    kept: Tensor

    def at(self, done: float) -> Tensor:
        """Returns the mask, 1 where it keeps, of a step that has this share of the run's steps before it."""
        return (self.kept > done).to(self.kept.dtype)


@dataclass
class SamplingRun:
    """One run of the denoising loop: the model, its guidance, the source of noise, and the other settings.

    `guidance` is that of the current step, which `plan` chooses if there is one; `steps` is the noise of steps, where
    it has another source than `noise`.
    """

    model: Any
    noise: NoiseSource
    guidance: Guidance
    draws_always: bool = True
    mask: Tensor | MaskLevels | None = None
    x0: Tensor | None = None
    temperature: float = 1.0
    noise_dropout: float = 0.0
    quantize_x0: bool = False
    score_corrector: Any = None
    corrector_kwargs: Mapping[str, Any] | None = None
    original_steps: bool = False
    plan: GuidancePlan | None = None
    steps: StepNoise | None = None
    _done: float = 0.0  # the share of the run's steps before the current one

    def begin(self, step: Step, before: int, table: StepTable) -> None:
        """Chooses the guidance of a step of a schedule that has `before` steps of this run before it.

        A solver that predicts several times in a step uses it for all of them. With the first step a separate noise
        of steps begins.
        """
        if before == 0 and isinstance(self.noise, SeparateSteps):
            self.steps = self.noise.start_run(table.positive_sigmas(), step.start)
        self._done = before / (before + step.index + 1)
        if self.plan is not None:
            rows = len(table)
            self.guidance = self.plan.at(Moment(before, rows - 1 - step.index, rows, step.alpha))

    def predict(self, x: Tensor, t: float | Tensor, alpha: float) -> Tensor:
        """Predicts the guided noise in `x` [N, ...] of noise level `alpha`, at timestep `t` or timesteps [N].

        The output of a model whose `parameterization` is "v" is converted, after guidance; the noise is then in
        float64, so that `advance` also gets the clean latent from it where there is almost no signal.
        """
        times = t if isinstance(t, Tensor) else times_of(x, t)
        eps = self.guidance.noise(self.model, x, times)
        if getattr(self.model, "parameterization", "eps") == "v":
            eps = noise_of_velocity(x, eps, alpha)
        if self.score_corrector is not None:
            kwargs = self.corrector_kwargs or {}
            eps = self.score_corrector.modify_score(self.model, eps, x, times, self.guidance.cond, **kwargs)
        return eps

    def advance(self, x: Tensor, eps: Tensor, step: Step) -> tuple[Tensor, Tensor]:
        """Applies the update rule; returns the next latent and the clean one, given the noise `eps` in `x`."""
        pred_x0 = clean_latent(x, eps, step)
        if self.quantize_x0:
            pred_x0 = self.model.first_stage_model.quantize(pred_x0)[0]
        x_prev = previous_latent(pred_x0, eps, step)
        if step.sigma == 0:
            if self.draws_always:
                (self.steps or self.noise).skip(x.shape)
        else:
            fresh = self._fresh(x, step.start, step.end)
            if self.noise_dropout > 0:
                fresh = torch.nn.functional.dropout(fresh, p=self.noise_dropout)
            x_prev = x_prev + step.sigma * self.temperature * fresh
        return x_prev.to(x.dtype), pred_x0.to(x.dtype)

    def add_noise(self, x: Tensor, alpha: float, higher: float) -> Tensor:
        """Returns `x`, of noise level `alpha`, with fresh noise added up to the level `higher` (a smaller alpha)."""
        share = higher / alpha
        fresh = self._fresh(x, sigma_of(alpha), sigma_of(higher))
        return share**0.5 * x + (1 - share) ** 0.5 * self.temperature * fresh

    def _fresh(self, x: Tensor, start: float, end: float) -> Tensor:
        return self.noise.draw(x.shape) if self.steps is None else self.steps.between(x.shape, start, end)

    def keep_masked(self, x: Tensor, step: Step) -> Tensor:
        """Returns `x` with the masked part replaced by `x0` at the noise level of this step."""
        if self.mask is None or self.x0 is None:
            return x
        mask = self.mask.at(self._done) if isinstance(self.mask, MaskLevels) else self.mask
        noise = self.noise.draw(self.x0.shape)
        original = step.alpha**0.5 * self.x0 + (1 - step.alpha) ** 0.5 * noise
        return original * mask + (1.0 - mask) * x

    def arguments(self, step: Step) -> dict[str, Any]:
        """Returns the keyword arguments with which the original's loop called the method of a step."""
        return {
            "index": step.index,
            "use_original_steps": self.original_steps,
            "quantize_denoised": self.quantize_x0,
            "temperature": self.temperature,
            "noise_dropout": self.noise_dropout,
            "score_corrector": self.score_corrector,
            "corrector_kwargs": self.corrector_kwargs,
            "unconditional_guidance_scale": self.guidance.scale,
            "unconditional_conditioning": self.guidance.uncond,
        }
