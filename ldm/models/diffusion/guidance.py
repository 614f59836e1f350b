"""Classifier-free guidance (Ho and Salimans 2022): the joint batch of conditionings, and the formula."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from ldm.models.diffusion.control import AnyUnit, Control
from ldm.models.diffusion.course import CONSTANT, Course, Moment
from ldm.util import is_list, is_mapping

# a tensor, a list of conditionings, or a dict of them, as accepted by LatentDiffusion.apply_model
Conditioning = Any
T = TypeVar("T")


class Denoiser(Protocol):
    """The part of a model that a sampler needs: the noise in x [N, ...] at timesteps t [N] for a conditioning."""

    def apply_model(self, x_noisy: Tensor, t: Tensor, cond: Conditioning) -> Tensor: ...


class ZeroDenoiser:
    """Predicts zeros: a sampler with it draws the same noise as with a model of this schedule, at no cost."""

    def __init__(self, alphas_cumprod: Tensor) -> None:
        self.alphas_cumprod, self.num_timesteps = alphas_cumprod, len(alphas_cumprod)

    def apply_model(self, x_noisy: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        return torch.zeros_like(x_noisy)


def join(first: T, second: T) -> T:
    """Concatenates two conditionings of one structure along the batch axis."""
    if isinstance(first, Control):
        return first.joined(second)  # type: ignore[arg-type, return-value]
    if isinstance(first, dict):
        return {key: join(first[key], second[key]) for key in first}  # type: ignore[index, return-value]
    if isinstance(first, list | tuple):
        return [join(a, b) for a, b in zip(first, second, strict=True)]  # type: ignore[return-value, arg-type]
    return torch.cat([first, second])  # type: ignore[list-item, return-value]


def rescaled(guided: Tensor, conditional: Tensor, share: float | Tensor) -> Tensor:
    """Returns guided predictions [N, ...] with a contrast closer to that of the conditional ones.

    `share` (phi, 0 to 1, a number or [N, 1, 1, 1]) mixes the prediction that has the conditional one's standard
    deviation over each sample with the unchanged one (Lin et al. 2024, equations 15 and 16).
    """
    axes = tuple(range(1, guided.dim()))
    spread = guided.std(axes, keepdim=True).clamp(min=torch.finfo(guided.dtype).tiny)
    ratio = conditional.std(axes, keepdim=True) / spread
    return guided * (share * ratio + (1 - share))


@dataclass(frozen=True)
class Guidance:
    """The conditioning of the noise prediction, and the scale by which to move away from another one.

    With scale 1 or without `uncond` the model runs on `cond` alone, otherwise on both as one batch. `rescale`, 0 to
    1, is the share of `rescaled` in the result, whatever the model predicts. Of scale and rescale several numbers
    [N, 1, 1, 1] have one for each sample.

    With `weights` [K, N, 1, 1, 1] `cond` holds K conditionings of each sample, K * N entries with the first of every
    sample in front, and their directions away from `uncond` are added with these weights (Liu et al. 2022, Composable
    Diffusion, equation 11). Without `uncond` the first takes its place, with scale 1.

    With `image`, the conditioning of an image to edit without the prompt, there are three: `uncond` has neither, and
    with e(...) their predictions the result is e(uncond) + image_scale (e(image) - e(uncond)) + scale (e(cond) -
    e(image)) (Brooks et al. 2023, InstructPix2Pix, equation 3).
    """

    cond: Conditioning
    uncond: Conditioning | None = None
    scale: float | Tensor = 1.0
    rescale: float | Tensor = 0.0
    weights: Tensor | None = None
    image: Conditioning | None = None
    image_scale: float = 1.0

    @cached_property
    def both(self) -> Conditioning:
        """All conditionings as one batch, the same object at every step, so that models can cache derived values."""
        away = self.uncond if self.image is None else join(self.uncond, self.image)
        return join(away, self.cond)

    def with_share(self, factor: float) -> Guidance:
        """Returns the guidance with `factor` times (scale - 1); with 0 that of the conditioning alone."""
        if factor == 1 or self.uncond is None:
            return self
        if factor == 0:
            return replace(self, uncond=None, image=None)
        scales = (1 + (scale - 1) * factor for scale in (self.scale, self.image_scale))
        other = replace(self, **dict(zip(("scale", "image_scale"), scales, strict=True)))
        other.__dict__["both"] = self.both  # the same object: what models derived from it is computed once
        return other

    def controlled(self, units: Sequence[AnyUnit]) -> Guidance:
        """Returns the guidance with these control networks in its conditionings; without any, itself."""
        if not units:
            return self
        cond = _with_control(self.cond, Control(tuple(units)))
        if self.uncond is None:
            return replace(self, cond=cond)
        rows = _rows(self.uncond) * (1 if self.image is None else 2)
        other = replace(self, cond=cond, uncond=_with_control(self.uncond, Control(tuple(units), rows)))
        other.__dict__["both"] = _with_control(
            self.both, Control(tuple(units), rows)
        )  # with the same context
        return other

    def noise(self, model: Denoiser, x: Tensor, t: Tensor) -> Tensor:
        """Returns the guided prediction for `x` [N, ...] at timesteps t [N], in the dtype of `x`."""
        if self.weights is not None or self.image is not None:
            return self._composed(model, x, t)
        if self.uncond is None or (isinstance(self.scale, float | int) and self.scale == 1.0):
            return model.apply_model(x, t, self.cond).to(x.dtype)
        both = model.apply_model(torch.cat([x, x]), torch.cat([t, t]), self.both)
        without, with_ = both.to(x.dtype).chunk(2)
        return self._rescaled(without + self.scale * (with_ - without), with_)

    def _composed(self, model: Denoiser, x: Tensor, t: Tensor) -> Tensor:
        """The prediction of more than two conditionings."""
        alone, away = self.uncond is None, [self.uncond, self.image]
        weights = [1.0] if self.weights is None else list(self.weights)
        count = len(weights) + sum(one is not None for one in away)
        found = model.apply_model(
            torch.cat([x] * count), torch.cat([t] * count), self.cond if alone else self.both
        )
        base, *parts = found.to(x.dtype).chunk(count)
        if self.image is None:
            first = base
        else:
            seen, *parts = parts
            first, base = base + self.image_scale * (seen - base), seen
        direction = sum(
            (w * (part - base) for w, part in zip(weights[1:] if alone else weights, parts, strict=True)),
            torch.zeros_like(base),
        )
        return base + direction if alone else self._rescaled(first + self.scale * direction, base + direction)

    def _rescaled(self, guided: Tensor, conditional: Tensor) -> Tensor:
        off = isinstance(self.rescale, float | int) and self.rescale == 0
        return guided if off else rescaled(guided, conditional, self.rescale)


def _with_control(cond: Conditioning, control: Control) -> dict[str, Any]:
    parts: Any = cond if is_mapping(cond) else {"c_crossattn": cond if is_list(cond) else [cond]}
    return {**parts, "control": control}


def _rows(cond: Conditioning) -> int:
    parts = cond["c_crossattn"] if is_mapping(cond) else cond
    return len(parts[0]) if is_list(parts) else len(parts)


@dataclass(frozen=True)
class GuidancePlan:
    """The guidance of each step of a run: `entries` hold the last step of each, ascending, and `course` its share.

    `units` are the control networks of the run.
    """

    entries: Sequence[tuple[float, Guidance]]
    course: Course = CONSTANT
    units: tuple[AnyUnit, ...] = ()
    _controlled: dict[Any, Guidance] = field(default_factory=dict[Any, Guidance])

    @property
    def first(self) -> Guidance:
        """The guidance of the first step, before the course, with all control networks."""
        return self._with_units(0, self.units)

    @property
    def changes(self) -> bool:
        """Whether it is more than one pair of conditionings and a scale for all steps."""
        first = self.entries[0][1]
        varied = len(self.entries) > 1 or first.weights is not None or first.image is not None
        return varied or self.course != CONSTANT or any(unit.interval != (0.0, 1.0) for unit in self.units)

    def at(self, moment: Moment) -> Guidance:
        """Returns the guidance of a step."""
        last = len(self.entries) - 1
        index = next((i for i, (end, _) in enumerate(self.entries) if moment.step <= end), last)
        units = tuple(unit for unit in self.units if unit.acts(moment.step, moment.steps))
        return self._with_units(index, units).with_share(self.course.factor(moment))

    def _with_units(self, index: int, units: tuple[AnyUnit, ...]) -> Guidance:
        key = index, units
        if key not in self._controlled:
            self._controlled[key] = self.entries[index][1].controlled(units)
        return self._controlled[key]
