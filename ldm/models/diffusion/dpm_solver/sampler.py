"""DPM-Solver++ (2M) (Lu et al. 2022, algorithm 2): DDIM with an extrapolation of the last two clean latents."""

from __future__ import annotations

import numpy as np
from torch import Tensor

from ldm.models.diffusion.sampler import Sampler, TakeStep
from ldm.models.diffusion.sampling_run import SamplingRun, clean_latent, implied_noise
from ldm.models.diffusion.schedule import Step, StepTable
from ldm.util import InputError

FEW_STEPS = 15  # below this count the last step is of first order


class DPMSolverSampler(Sampler):
    """Feeds the update rule with the noise that implies an extrapolated clean latent.

    The steps are evenly spaced in time between the ends of the training schedule, so they fall between its
    timesteps; the noise levels there are interpolated. `ddim_discretize` has only this one spacing. With another
    schedule it is the solver dpmpp_2m, but for the last of a few steps.
    """

    name = "dpm_solver"
    draws_always = False
    starts_above = False

    def _choose_table(self, steps: int, spacing: str, eta: float) -> StepTable:
        if self.noise_schedule.name != "original":
            return super()._choose_table(steps, spacing, eta)
        total = self.ddpm_num_timesteps
        if not 1 <= steps < total:
            raise InputError(f"{steps} steps are not possible; give 1 to {total - 1}")
        if spacing != "uniform":
            raise InputError(f"DPM-Solver has uniform spacing only, not {spacing!r}")
        # points in units of timesteps, from 0 (the cleanest) to total - 1; the logarithm is interpolated
        points = np.linspace(0, total - 1, steps + 1)
        alphas = np.exp(np.interp(points, np.arange(total), np.log(self._alphas_cumprod())))
        return StepTable(points[1:], alphas[1:], alphas[:-1], np.zeros(steps))

    def _stepper(self, run: SamplingRun) -> TakeStep:
        last: list[tuple[Tensor, Step]] = []
        few = len(self.table) < FEW_STEPS

        def take(x: Tensor, step: Step) -> tuple[Tensor, Tensor]:
            eps = run.predict(x, step.t, step.alpha)
            clean = clean_latent(x, eps, step)
            first_order = step.alpha_prev == 1 or (few and step.index == 0)
            if last and not first_order:
                before, step_before = last.pop()
                ahead = clean + _reach(step_before, step) * (clean - before)
                eps = implied_noise(x, ahead, step)
            last[:] = [(clean, step)]
            return run.advance(x, eps, step)

        return take


def _reach(before: Step, now: Step) -> float:
    """Returns the extrapolation factor: half of this step's length over the last one's, in log SNR."""
    return (
        0.5
        * (_log_snr(now.alpha_prev) - _log_snr(now.alpha))
        / (_log_snr(now.alpha) - _log_snr(before.alpha))
    )


def _log_snr(alpha: float) -> float:
    return 0.5 * float(np.log(alpha / (1 - alpha)))
