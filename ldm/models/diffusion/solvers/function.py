"""Any solver as one function in k-diffusion's convention, for Python users."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, cast

import torch
from numpy.typing import ArrayLike
from torch import Tensor

from ldm.models.diffusion.guidance import Conditioning
from ldm.models.diffusion.noise import NoiseSource, TorchNoise
from ldm.models.diffusion.schedules import Schedule
from ldm.models.diffusion.solvers.registry import K_DIFFUSION, SOLVERS
from ldm.util import InputError


class _Model:
    """A model of which only `apply_model` and `alphas_cumprod` are known."""

    def __init__(self, model: Any, x: Tensor) -> None:
        self.apply_model = model.apply_model
        self.alphas_cumprod = torch.as_tensor(model.alphas_cumprod).to(x.device)
        self.num_timesteps = len(self.alphas_cumprod)
        self.parameterization = getattr(model, "parameterization", "eps")


class _GivenNoise:
    """The given arrays, one a draw, as a source of noise."""

    def __init__(self, arrays: Iterable[Any], like: Tensor) -> None:
        self._arrays: Iterator[Any] = iter(arrays)
        self._like, self._drawn = like, 0

    def draw(self, shape: Sequence[int]) -> Tensor:
        try:
            array = torch.as_tensor(next(self._arrays)).to(self._like)
        except StopIteration:
            raise InputError(
                f"noise has {self._drawn} arrays, and the solver draws more; give one a draw"
            ) from None
        if array.shape != tuple(shape):
            raise InputError(f"noise must have the shape of x, {tuple(shape)}, not {tuple(array.shape)}")
        self._drawn += 1
        return array

    def skip(self, shape: Sequence[int]) -> None:
        """Noise that is not used takes no array."""


def solve(
    name: str,
    model: Any,
    x: Tensor,
    sigmas: ArrayLike | Tensor,
    cond: Conditioning = None,
    noise: Iterable[Any] | None = None,
    **settings: float,
) -> Tensor:
    """Runs the solver `name` from `x` [N, ...] at the level sigmas[0] down to the last of `sigmas`.

    The name is one of `SOLVERS`, or k-diffusion's for it (`K_DIFFUSION`).
    In k-diffusion's convention: `x` is x_0 + sigma eps, and so is what is returned, the clean latents if `sigmas`
    end in 0, as they should. `model` needs no more than `apply_model(x / sqrt(1 + sigma^2), t [N], cond)`, which
    returns the predicted noise, and `alphas_cumprod` [T], from which the timestep t at each level is interpolated,
    linearly in log sigma. `noise` holds standard normal arrays of the shape of `x`, one a draw (None: torch's
    global generator). `settings` are those of its row. Everything is computed in the dtype of `x`. Raises
    `InputError` for an unknown name or setting, levels that do not fall, and noise that runs out.
    """
    x, name = torch.as_tensor(x), K_DIFFUSION.get(name, name)
    if name not in SOLVERS:
        raise InputError(f"unknown solver {name!r}; it is one of {', '.join(SOLVERS)}")
    values = tuple(cast("list[float]", torch.as_tensor(sigmas, dtype=torch.float64).tolist()))
    sampler = SOLVERS[name].make(_Model(model, x), Schedule("sigmas", values=values), **settings)
    sampler.make_schedule(len(values) - 1, verbose=False)
    source: NoiseSource = TorchNoise(None, x.device) if noise is None else _GivenNoise(noise, x)
    latents = sampler.decode(x / (1 + values[0] ** 2) ** 0.5, cond, len(values) - 1, noise=source)
    return latents * (1 + values[-1] ** 2) ** 0.5
