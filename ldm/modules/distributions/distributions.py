"""The latent distribution that the encoder of a KL autoencoder outputs."""

from __future__ import annotations

import torch
from torch import Tensor

from ldm.util import InputError


def normal_kl(
    mean1: Tensor | float, logvar1: Tensor | float, mean2: Tensor | float, logvar2: Tensor | float
) -> Tensor:
    """Returns the KL divergence of two normal distributions, per value; shapes broadcast. One must be a tensor."""
    like = next((value for value in (mean1, logvar1, mean2, logvar2) if isinstance(value, Tensor)), None)
    if like is None:
        raise InputError("normal_kl needs a tensor among its arguments")
    mean1, logvar1, mean2, logvar2 = (
        torch.as_tensor(value).to(like) for value in (mean1, logvar1, mean2, logvar2)
    )
    ratio = logvar1 - logvar2
    return 0.5 * (ratio.exp() - 1.0 - ratio + (mean1 - mean2) ** 2 * torch.exp(-logvar2))


class DiagonalGaussianDistribution:
    """A normal distribution per latent value, from `parameters` [B, 2C, h, w] = (mean, log variance).

    The log variance is clamped to [-30, 20]. `deterministic` sets the variance to 0.
    """

    def __init__(self, parameters: Tensor, deterministic: bool = False):
        self.parameters = parameters
        self.deterministic = deterministic
        self.mean, logvar = parameters.chunk(2, dim=1)
        self.logvar = logvar.clamp(-30.0, 20.0)
        self.std = torch.zeros_like(self.mean) if deterministic else torch.exp(0.5 * self.logvar)
        self.var = self.std**2

    def sample(self, noise: Tensor | None = None) -> Tensor:
        """Draws a sample; `noise` is standard normal, shaped like the mean, by default from the CPU's generator."""
        if noise is None:
            noise = torch.randn(self.mean.shape)
        return self.mean + self.std * noise.to(self.mean)

    def mode(self) -> Tensor:
        """Returns the most likely latent: the mean."""
        return self.mean

    def kl(self, other: DiagonalGaussianDistribution | None = None) -> Tensor:
        """Returns the KL divergence from `other`, or the standard normal, summed over all but the batch axis: [B]."""
        if self.deterministic:
            return self.mean.new_zeros(1)
        if other is None:
            terms = self.mean**2 + self.var - 1.0 - self.logvar
        else:
            terms = (self.mean - other.mean) ** 2 / other.var + self.var / other.var - 1.0
            terms = terms - self.logvar + other.logvar
        return 0.5 * terms.flatten(1).sum(dim=1)
