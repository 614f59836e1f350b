"""All schedule mathematics: betas, timestep subsets, and the coefficients of each denoising step.

Letters as in DDIM (Song et al. 2021), with alpha the cumulative product that DDPM (Ho et al. 2020) writes
alpha-bar: a noisy latent is sqrt(alpha_t) x0 + sqrt(1 - alpha_t) eps.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ldm.models.diffusion.schedules.levels import sigma_of
from ldm.util import InputError

if TYPE_CHECKING:
    from torch import Tensor

Array = NDArray[np.floating]  # float64 throughout

# samplers take this for the level of a timestep without signal (`zero_terminal_snr`): what they divide by stays above
# 0, and in float64, in which predictions of v are converted, the clean latent differs from the exact one by 1e-8
LEAST_ALPHA = 2.0**-52

ORIGINAL_EXACT_COUNTS = (1, 2, 4, 5, 8, 10, 20, 25, 40, 50, 100, 125, 200, 250, 500)


def make_beta_schedule(
    schedule: str,
    n_timestep: int,
    linear_start: float = 1e-4,
    linear_end: float = 2e-2,
    cosine_s: float = 8e-3,
) -> Array:
    """Returns noise variances beta_0 .. beta_{n-1} in float64.

    "linear" is linear in the square root (what Stable Diffusion calls linear), "sqrt_linear" linear, "sqrt" the
    square root of that, "cosine" that of Nichol and Dhariwal 2021, equation 17, clipped to 0.999.
    """
    if schedule == "linear":
        return np.linspace(linear_start**0.5, linear_end**0.5, n_timestep, dtype=np.float64) ** 2
    if schedule == "sqrt_linear":
        return np.linspace(linear_start, linear_end, n_timestep, dtype=np.float64)
    if schedule == "sqrt":
        return np.linspace(linear_start, linear_end, n_timestep, dtype=np.float64) ** 0.5
    if schedule == "cosine":
        times = np.arange(n_timestep + 1, dtype=np.float64) / n_timestep + cosine_s
        alphas = np.cos(times / (1 + cosine_s) * np.pi / 2) ** 2
        return np.clip(1 - alphas[1:] / alphas[:-1], 0, 0.999)
    raise InputError(f"unknown beta_schedule {schedule!r}; it is linear, sqrt_linear, sqrt or cosine")


def zero_terminal_snr(betas: Array) -> Array:
    """Returns `betas` rescaled so that the last noise level has no signal (Lin et al. 2024, algorithm 1).

    sqrt(alpha) is shifted to end in 0 and scaled to begin as before, in float64; the last beta is 1.
    """
    signal = np.sqrt(np.cumprod(1.0 - betas))
    signal = (signal - signal[-1]) * signal[0] / (signal[0] - signal[-1])
    alphas = signal**2
    return 1.0 - alphas / np.append(1.0, alphas[:-1])


def diffusion_buffers(betas: Array, v_posterior: float = 0.0) -> dict[str, Array]:
    """Returns the twelve tables of a checkpoint, by name (DDPM, equations 4 to 7).

    Where no signal is left (`zero_terminal_snr`), the two tables of reciprocals are infinite.
    """
    alphas = 1.0 - betas
    alphas_cumprod = np.cumprod(alphas)
    with np.errstate(divide="ignore"):
        reciprocals = 1 / alphas_cumprod
    previous = np.append(1.0, alphas_cumprod[:-1])
    variance = (1 - v_posterior) * betas * (1 - previous) / (1 - alphas_cumprod) + v_posterior * betas
    return {
        "betas": betas,
        "alphas_cumprod": alphas_cumprod,
        "alphas_cumprod_prev": previous,
        "sqrt_alphas_cumprod": np.sqrt(alphas_cumprod),
        "sqrt_one_minus_alphas_cumprod": np.sqrt(1 - alphas_cumprod),
        "log_one_minus_alphas_cumprod": np.log(1 - alphas_cumprod),
        "sqrt_recip_alphas_cumprod": np.sqrt(reciprocals),
        "sqrt_recipm1_alphas_cumprod": np.sqrt(reciprocals - 1),
        "posterior_variance": variance,
        # the first variance is 0
        "posterior_log_variance_clipped": np.log(np.maximum(variance, 1e-20)),
        "posterior_mean_coef1": betas * np.sqrt(previous) / (1 - alphas_cumprod),
        "posterior_mean_coef2": (1 - previous) * np.sqrt(alphas) / (1 - alphas_cumprod),
    }


def make_timesteps(spacing: str, steps: int, total: int = 1000) -> NDArray[np.int64]:
    """Returns the ascending timesteps that `steps` denoising steps visit, out of 0 .. total-1.

    "uniform": i * total // steps + 1, exactly `steps` of them for 1 to total-1. "compvis": the original's list,
    every (total // steps)-th timestep plus 1, which can hold more entries than asked for; counts at which
    the original exceeded its table are refused. "quad": squares, plus 1.
    """
    if not 1 <= steps < total:
        raise InputError(f"{steps} steps are not possible; give 1 to {total - 1}")
    if spacing == "uniform":
        return np.arange(steps) * total // steps + 1
    if spacing == "compvis":
        timesteps = np.arange(0, total, total // steps) + 1
        if timesteps[-1] >= total:
            nearest = min(ORIGINAL_EXACT_COUNTS, key=lambda count: abs(count - steps))
            raise InputError(
                f"{steps} steps with compvis spacing reach beyond timestep {total - 1}, where the original "
                f"crashed; use {nearest} steps, or uniform spacing"
            )
        return timesteps
    if spacing == "quad":
        return (np.linspace(0, math.sqrt(total * 0.8), steps) ** 2).astype(np.int64) + 1
    raise InputError(f"unknown timestep spacing {spacing!r}; it is uniform, compvis or quad")


@dataclass(frozen=True, slots=True)
class Step:
    """One denoising step: from level `alpha` at timestep `t` to `alpha_prev` at `t_prev`, adding `sigma` noise.

    `index` counts down to 0, the last step. `t` is whole where the step begins at a trained timestep. `start` and
    `end` are the two levels as noise over signal.
    """

    index: int
    t: float
    alpha: float
    alpha_prev: float
    sigma: float
    t_prev: float = 0

    @property
    def without_signal(self) -> bool:
        """Whether the step begins at alpha 0: a prediction there is not averaged with others, sigma is infinite."""
        return self.alpha <= LEAST_ALPHA

    @property
    def start(self) -> float:
        return sigma_of(self.alpha)

    @property
    def end(self) -> float:
        return sigma_of(self.alpha_prev)


@dataclass(frozen=True)
class StepTable:
    """The coefficients of every step, ascending in time, in float64 (DDIM, equations 12 and 16)."""

    timesteps: NDArray[np.int64] | Array
    alphas: Array
    alphas_prev: Array
    sigmas: Array

    @classmethod
    def build(
        cls, alphas_cumprod: Array, timesteps: NDArray[np.int64], eta: float, last: float | None = None
    ) -> StepTable:
        """Builds the table for an ascending subset of timesteps; it ends at `last`, or at the level of timestep 0."""
        end = alphas_cumprod[0] if last is None else last
        return cls.at(timesteps, np.append(end, alphas_cumprod[timesteps]), eta)

    @classmethod
    def at(cls, timesteps: NDArray[np.int64] | Array, levels: Array, eta: float) -> StepTable:
        """Builds the table from alphas `levels` [n + 1], ascending in time; no step begins at the first one."""
        previous, alphas = levels[:-1], levels[1:]
        sigmas = eta * np.sqrt((1 - previous) / (1 - alphas) * (1 - alphas / previous))
        return cls(timesteps, alphas, previous, sigmas)

    def __len__(self) -> int:
        return len(self.timesteps)

    def positive_sigmas(self) -> list[float]:
        """Returns all levels as noise over signal, ascending, but for a 0 at the end."""
        levels = [*self.alphas_prev[:1].tolist(), *self.alphas.tolist()]
        return [sigma_of(alpha) for alpha in levels if alpha < 1]

    def downwards(self, count: int | None = None) -> Iterator[Step]:
        """Yields the steps in the order they are run: from the noisiest of the first `count`, down to index 0."""
        for i in reversed(range(len(self) if count is None else min(count, len(self)))):
            yield self.step(i)

    def step(self, index: int) -> Step:
        """Returns the step that has `index` steps after it."""
        return Step(
            index,
            self.timesteps[index].item(),
            float(self.alphas[index]),
            float(self.alphas_prev[index]),
            float(self.sigmas[index]),
            self.timesteps[index - 1].item() if index else 0,
        )


def make_ddim_timesteps(
    ddim_discr_method: str, num_ddim_timesteps: int, num_ddpm_timesteps: int, verbose: bool = True
) -> NDArray[np.int64]:
    """Returns the original's timesteps of this name: its "uniform" is "compvis" in `make_timesteps`.

    The list can have more entries than requested. Nothing is printed, whatever `verbose` is.
    """
    spacing = "compvis" if ddim_discr_method == "uniform" else ddim_discr_method
    return make_timesteps(spacing, num_ddim_timesteps, num_ddpm_timesteps)


def make_ddim_sampling_parameters(
    alphacums: ArrayLike | Tensor, ddim_timesteps: NDArray[np.int64], eta: float, verbose: bool = True
) -> tuple[Array | Tensor, Array | Tensor, Array]:
    """Returns sigmas, alphas and alphas_prev of a `StepTable`, in the order and the types of the original.

    For a tensor sigmas are a float64 tensor and alphas one of its dtype; the rest are float64 arrays. Nothing
    is printed, whatever `verbose` is.
    """
    import torch  # not needed to count steps, which every run does first

    if not isinstance(alphacums, torch.Tensor):
        table = StepTable.build(np.asarray(alphacums, dtype=np.float64), ddim_timesteps, eta)
        return table.sigmas, table.alphas, table.alphas_prev
    table = StepTable.build(alphacums.detach().cpu().double().numpy(), ddim_timesteps, eta)
    sigmas = torch.tensor(table.sigmas, device=alphacums.device)
    return sigmas, torch.tensor(table.alphas).to(alphacums), table.alphas_prev
