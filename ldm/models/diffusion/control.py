"""Control networks in a run: which act at a step, on which half of a guided batch, and how much."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol, cast

import torch
from torch import Tensor

from ldm.job import Job
from ldm.modules.attention import ImagePrompt
from ldm.util import need, printable

SOFT = 0.825  # of which the web UI's ControlNet extension takes powers where something else is more important


class Network(Protocol):
    """The part of a control network that a step needs; see `ldm.modules.diffusionmodules.controlnet.ControlNet`."""

    def add(self, x: Tensor, features: Tensor, timesteps: Tensor, context: Tensor | None) -> list[Tensor]: ...


def shares_of(mode: str, maps: int, pooled: bool = False) -> list[float]:
    """The factors of the maps of a control network, from the finest to that of the middle block.

    In the mode "balanced" all are 1. In the modes "prompt" and "control", named by what is more important, they fall
    from the middle to the finest by `SOFT`, as in AUTOMATIC1111's extension; in "guess" from 1 to 0.1, evenly in
    their logarithms, as in diffusers, where averaged maps have 1.
    """
    if mode in ("prompt", "control"):
        return [SOFT**i for i in reversed(range(maps))]
    if mode == "guess" and not pooled:
        return cast("list[float]", torch.logspace(-1, 0, maps).tolist())
    return [1.0] * maps


@dataclass(frozen=True, eq=False)
class Unit:
    """One control network with the features of its hint [1, C, h, w], and its factor of each map.

    It acts in the steps within `interval`, shares of the steps of a pass; `alone` on the predictions with the prompt
    only, not on those to move away from. With `pools` its maps are averaged over height and width.
    """

    network: Network
    features: Tensor
    factors: Sequence[float]
    interval: tuple[float, float] = (0.0, 1.0)
    alone: bool = False
    pools: bool = False

    def acts(self, step: int, steps: int) -> bool:
        """Whether it acts in a step, from 0, of so many: one that is wholly inside of the interval."""
        return acts_within(self.interval, step, steps)


@dataclass(frozen=True, eq=False)
class FeatureUnit:
    """Maps that an adapter made of its hint: [1, C, h, w] by the numbers of the input blocks that they are added to.

    It acts as a `Unit` in the steps within `interval`.
    """

    maps: Mapping[int, Tensor]
    interval: tuple[float, float] = (0.0, 1.0)

    def acts(self, step: int, steps: int) -> bool:
        """Whether it acts in a step, from 0, of so many."""
        return acts_within(self.interval, step, steps)


@dataclass(frozen=True, eq=False)
class ImageUnit:
    """Keys and values of an image for each layer of cross-attention, [2, M, C]: of no image and of the image.

    The predictions to move away from see no image. It acts as a `Unit` in the steps within `interval`.
    """

    layers: Sequence[tuple[Tensor, Tensor]]
    weight: float
    interval: tuple[float, float] = (0.0, 1.0)

    def acts(self, step: int, steps: int) -> bool:
        """Whether it acts in a step, from 0, of so many."""
        return acts_within(self.interval, step, steps)


AnyUnit = Unit | FeatureUnit | ImageUnit


def acts_within(interval: tuple[float, float], step: int, steps: int) -> bool:
    """Whether a step, from 0, of so many is wholly inside of an interval, shares of the steps."""
    start, end = interval
    return start <= step / steps and (step + 1) / steps <= end


@dataclass(frozen=True, eq=False)
class Control:
    """The control of a batch of predictions, of which the first `without` rows are those to move away from."""

    units: tuple[AnyUnit, ...]
    without: int = 0
    _images: dict[int, list[list[ImagePrompt]]] = field(default_factory=dict[int, list[list[ImagePrompt]]])
    _sliced: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict[int, tuple[Tensor, Tensor]])

    def joined(self, other: Control) -> Control:
        """The control of a batch whose first part, to move away from, is this one's."""
        return replace(other, without=self.without, _sliced={}, _images={})

    def added(self, x: Tensor, t: Tensor, context: Tensor | None) -> list[Tensor]:
        """The sum of all units: maps added to those of the U-Net, for latents x [N, ...] at timesteps t [N]."""
        total: list[Tensor] = []
        for unit in self.units:
            if not isinstance(unit, Unit):
                continue
            maps = self._of(unit, x, t, context)
            total = [_sum(a, b) for a, b in zip(total, maps, strict=True)] if total else maps
        return total

    def features(self) -> dict[int, Tensor]:
        """The sum of the maps of all adapters, by the numbers of the input blocks."""
        total: dict[int, Tensor] = {}
        for unit in self.units:
            for block, one in unit.maps.items() if isinstance(unit, FeatureUnit) else ():
                total[block] = total[block] + one if block in total else one
        return total

    def images(self, rows: int) -> list[list[ImagePrompt]] | None:
        """The images that each layer of cross-attention sees, for a batch of so many rows; None without any."""
        units = [unit for unit in self.units if isinstance(unit, ImageUnit) and unit.weight]
        if units and rows not in self._images:
            seen = torch.tensor([0] * self.without + [1] * (rows - self.without))
            self._images[rows] = [
                [
                    ImagePrompt(k[seen], v[seen], unit.weight)
                    for unit, (k, v) in zip(units, of_layer, strict=True)
                ]
                for of_layer in zip(*(unit.layers for unit in units), strict=True)
            ]
        return self._images[rows] if units else None

    def _of(self, unit: Unit, x: Tensor, t: Tensor, context: Tensor | None) -> list[Tensor]:
        skipped = self.without if unit.alone else 0
        if skipped:
            x, t, context = x[skipped:], t[skipped:], self._with_prompt(context)
        maps = unit.network.add(x, unit.features, t, context)
        if unit.pools:
            maps = [one.mean((2, 3), keepdim=True) for one in maps]
        scaled = [one if f == 1 else one * f for one, f in zip(maps, unit.factors, strict=True)]
        if not skipped:
            return scaled
        rows = len(x)
        return [torch.cat([one.new_zeros(skipped, *one.shape[1:]), _repeated(one, rows)]) for one in scaled]

    def _with_prompt(self, context: Tensor | None) -> Tensor | None:
        """The rows of a context with the prompt: the same object at each step, as a network keeps values for it."""
        if context is None:
            return None
        whole, part = self._sliced.get(0, (None, None))
        if whole is not context or part is None:
            part = context[self.without :]
            self._sliced[0] = context, part
        return part


def _sum(a: Tensor, b: Tensor) -> Tensor:
    rows = max(len(a), len(b))
    return _repeated(a, rows) + _repeated(b, rows)


def _repeated(x: Tensor, rows: int) -> Tensor:
    """`x`, of which a network gave what both halves of a batch share only once, with so many rows."""
    return x if len(x) == rows else x.repeat(rows // len(x), *[1] * (x.dim() - 1))


def check_control(job: Job) -> None:
    """Raises `InputError` for a control with an impossible weight or interval, and for a hint without one."""
    for file, _, weight, start, end in job.controls:
        shown = f"--control {printable(file)[:100]}"
        need(abs(weight) <= 10, f"{shown} has the weight {weight:g}; give -10 to 10, as a rule 0 to 2")
        need(
            0 <= start < end <= 1,
            f"{shown} acts from {start:g} to {end:g}; give shares of the steps from 0 to 1, the lower first",
        )
    need(
        bool(job.controls) or job.hint == "none",
        f"--hint {job.hint} is made for a ControlNet; give one with --control, or leave it out",
    )
    need(
        job.hint != "inpaint" or (job.init is not None and bool(job.init.mask or job.init.alpha_mask)),
        "--hint inpaint shows the image without its masked part; give an image with --init-img and a --mask",
    )
