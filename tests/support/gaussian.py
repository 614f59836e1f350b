"""Data of which everything is known: a Gaussian per channel, whose denoiser and whose ODE have closed forms."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from ldm.models.diffusion.schedule import make_beta_schedule

# the training schedule of v1, in float64
ALPHAS = np.cumprod(1 - make_beta_schedule("linear", 1000, 0.00085, 0.012))
SIGMAS = np.sqrt((1 - ALPHAS) / ALPHAS)


def sigmas_at(times: Tensor) -> Tensor:
    """sigma at fractional timesteps, log sigma interpolated."""
    return torch.from_numpy(np.exp(np.interp(times, np.arange(len(SIGMAS)), np.log(SIGMAS))))


class GaussianModel:
    """Predicts the noise in data of this mean and variance [C]; with `wave` a nonlinear part is added to it."""

    num_timesteps = len(ALPHAS)

    def __init__(self, mean: Tensor, var: Tensor, wave: float = 0.0) -> None:
        self.mean, self.var = (values.reshape(-1, 1, 1) for values in (mean, var))
        self.wave, self.calls = wave, 0
        self.alphas_cumprod = torch.from_numpy(ALPHAS)

    def apply_model(self, x: Tensor, t: Tensor, cond: object) -> Tensor:
        self.calls += 1
        sigma = sigmas_at(t).reshape(-1, 1, 1, 1)
        z = x * (1 + sigma**2).sqrt()
        eps = (z - self.mean) * sigma / (self.var + sigma**2)
        level = self.alphas_cumprod[t.round().long()].reshape(-1, 1, 1, 1)
        return (eps + self.wave * torch.sin(3 * x) * (1 - level).sqrt()).to(x.dtype)

    def exact(self, x: Tensor, start: float, end: float) -> Tensor:
        """The solution of the probability flow ODE, from x_0 + start eps."""
        return self.mean + (x - self.mean) * ((end**2 + self.var) / (start**2 + self.var)) ** 0.5


def noise_of(seed: int, shape: tuple[int, ...]) -> Iterator[np.ndarray]:
    """Standard normal arrays without end."""
    generator = np.random.RandomState(seed)
    while True:
        yield generator.randn(*shape)
