"""The one denoising loop, and the public API of every sampler."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from ldm.models.diffusion.guidance import Conditioning, Guidance, GuidancePlan
from ldm.models.diffusion.noise import NoiseSource, RepeatedNoise, TorchNoise
from ldm.models.diffusion.sampling_run import MaskLevels, SamplingRun
from ldm.models.diffusion.schedule import LEAST_ALPHA, Step, StepTable
from ldm.models.diffusion.schedules import SCHEDULES, Schedule
from ldm.models.diffusion.solvers.registry import SOLVERS
from ldm.util import warn_of_ignored

logger = logging.getLogger(__name__)

Intermediates = dict[str, list[Tensor]]
# (x, step) -> (next x, predicted clean latent)
TakeStep = Callable[[Tensor, Step], tuple[Tensor, Tensor]]


_STEPS = ("ddim_timesteps", "ddim_alphas", "ddim_alphas_prev", "ddim_sigmas")
_MODEL_TABLES = (
    "betas", "alphas_cumprod", "alphas_cumprod_prev", "sqrt_alphas_cumprod", "sqrt_one_minus_alphas_cumprod",
    "log_one_minus_alphas_cumprod", "sqrt_recip_alphas_cumprod", "sqrt_recipm1_alphas_cumprod",
)  # fmt: skip


def _changes(value: Any) -> int:
    return value._version if isinstance(value, Tensor) and not value.is_inference() else 0


class Sampler:
    """Samples latents from a model; a subclass defines one step in `_stepper`, and has a row in `SOLVERS`.

    The model offers `apply_model`, `alphas_cumprod` and `num_timesteps`. Noise comes from a `NoiseSource`; the
    default is torch's global generator on the device of `alphas_cumprod`, drawn in the order of the original:
    start noise, then per step the re-noised original (masked runs) and the step's noise, the latter also
    where its factor is 0.
    """

    name: ClassVar[str] = ""
    draws_always: ClassVar[bool] = True  # whether the original drew a step's noise also where its factor is 0
    # image to image noises to the level one step above its first, as the original did
    starts_above: ClassVar[bool] = True
    loop: ClassVar[str] = "denoise"  # the original's name of the method that runs the steps

    # an extension may replace what sets these
    eta: float = 0.0
    _source: NoiseSource | None = None  # of the last run
    _made: tuple[StepTable, list[tuple[Any, int]]] | None = None

    def __init__(self, model: Any, schedule: str | Schedule = "linear", **kwargs: Any):
        """`schedule` is one of `SCHEDULES`, or a `Schedule`; any other name is that of the sampler's own.

        `kwargs` are settings of its row of `SOLVERS`. Other arguments, of extensions of the original, are ignored
        with a warning.
        """
        row = SOLVERS.get(self.name)
        own: Mapping[str, float] = {"eta": 0.0} if row is None else row.settings
        self.settings = {name: float(kwargs.pop(name, value)) for name, value in own.items()}
        warn_of_ignored(type(self).__name__, kwargs)
        self.model = model
        self.schedule = schedule
        if not isinstance(schedule, Schedule):
            schedule = Schedule(schedule if schedule in SCHEDULES else row.schedule if row else "original")
        self.noise_schedule = schedule
        self.ddpm_num_timesteps: int = model.num_timesteps

    def __getattr__(self, name: str) -> Any:
        """Returns the training schedule's tables, of which the original's samplers kept a copy."""
        if name in _MODEL_TABLES:
            return getattr(self.model, name)
        if name == "ddim_sigmas_for_original_num_steps":
            return torch.tensor(self._table_for(True).sigmas, device=self._device)
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def register_buffer(self, name: str, attr: Any) -> None:
        """Keeps `attr` as the attribute `name`, a tensor on the model's device. `make_schedule` calls it."""
        setattr(self, name, attr.to(self._device) if isinstance(attr, Tensor) else attr)

    def make_schedule(
        self,
        ddim_num_steps: int,
        ddim_discretize: str = "uniform",
        ddim_eta: float | None = None,
        verbose: bool = True,
    ) -> None:
        """Chooses the levels of the steps and computes their coefficients.

        `ddim_discretize` is the spacing of the original's timesteps, where the schedule is that: `uniform`, `compvis`
        or `quad`. `ddim_eta` is the share of fresh noise (None: the sampler's setting).
        """
        ddim_eta = self.settings.get("eta", 0.0) if ddim_eta is None else ddim_eta
        if ddim_eta != 0 and "eta" not in self.settings:
            raise ValueError(f"{type(self).__name__} needs eta 0, not {ddim_eta}")
        table = self._choose_table(ddim_num_steps, ddim_discretize, ddim_eta)
        self.eta = ddim_eta
        self.ddim_timesteps = table.timesteps
        tensors = {
            "ddim_sigmas": table.sigmas,
            "ddim_alphas": table.alphas,
            "ddim_sqrt_one_minus_alphas": np.sqrt(1 - table.alphas),
        }
        for name, values in tensors.items():
            self.register_buffer(name, torch.tensor(values, dtype=torch.float32, device=self._device))
        self.register_buffer("ddim_alphas_prev", table.alphas_prev)
        self._made = table, self._steps_state()
        if verbose:
            logger.info("%s: %d steps, eta %g", type(self).__name__, len(table), ddim_eta)

    @property
    def table(self) -> StepTable:
        """The steps of `make_schedule`, or those that an extension has since assigned to the `ddim_` attributes."""
        if self._made is not None:
            table, before = self._made
            if all(a is b and n == m for (a, n), (b, m) in zip(before, self._steps_state(), strict=True)):
                return table
        timesteps, *levels = (torch.as_tensor(getattr(self, name)).cpu() for name in _STEPS)
        return StepTable(timesteps.numpy(), *(values[: len(timesteps)].double().numpy() for values in levels))

    def _steps_state(self) -> list[tuple[Any, int]]:
        """Returns the attributes of the steps, and how often each was changed in place."""
        values = [getattr(self, name) for name in _STEPS]
        return [(value, _changes(value)) for value in values]

    @torch.no_grad()
    def sample(
        self,
        S: int,
        batch_size: int,
        shape: Sequence[int],
        conditioning: Conditioning = None,
        callback: Callable[[int], object] | None = None,
        normals_sequence: None = None,
        img_callback: Callable[[Tensor, int], object] | None = None,
        quantize_x0: bool = False,
        eta: float | None = None,
        mask: Tensor | None = None,
        x0: Tensor | None = None,
        temperature: float = 1.0,
        noise_dropout: float = 0.0,
        score_corrector: Any = None,
        corrector_kwargs: Mapping[str, Any] | None = None,
        verbose: bool = True,
        x_T: Tensor | None = None,
        log_every_t: int = 100,
        unconditional_guidance_scale: float | Tensor = 1.0,
        unconditional_conditioning: Conditioning = None,
        ddim_discretize: str = "uniform",
        noise: NoiseSource | None = None,
        guidance_rescale: float | Tensor = 0.0,
        **kwargs: Any,
    ) -> tuple[Tensor, Intermediates]:
        """Runs `S` steps from noise to latents [batch_size, *shape]; returns the latents and the intermediates.

        `x_T` is the start noise, drawn if absent. `eta` is the share of fresh noise (None: the sampler's setting).
        `mask` [batch or 1, 1, h, w] is 1 where the latent `x0` is kept. `callback(i)` and `img_callback(pred_x0, i)`
        are called after step i. The intermediates `x_inter` and `pred_x0` hold the start and every `log_every_t`-th
        step. `temperature` scales the fresh
        noise, `noise_dropout` is the share of it that is zeroed; `score_corrector.modify_score(model, eps, x, t,
        cond, **corrector_kwargs)` may alter the predicted noise; `quantize_x0` sends the predicted clean
        latent through the first stage's quantizer; `guidance_rescale` is that of `Guidance`, which steps of
        extensions do without. `normals_sequence` is accepted and has never had a use; a warning names `kwargs`,
        which are ignored. The steps are the rows of `ddim_timesteps` as they are after `make_schedule`, which an
        extension may have replaced.
        """
        warn_of_ignored(type(self).__name__, kwargs)
        rescales = isinstance(guidance_rescale, Tensor) or guidance_rescale != 0
        # by name and only where needed: a replaced method may accept the original's keywords only
        spacing = {} if ddim_discretize == "uniform" else {"ddim_discretize": ddim_discretize}
        eta = self.settings.get("eta", 0.0) if eta is None else eta
        self.make_schedule(ddim_num_steps=S, ddim_eta=eta, verbose=verbose, **spacing)
        return getattr(self, self.loop)(
            conditioning,
            (batch_size, *shape),
            callback=callback,
            img_callback=img_callback,
            quantize_denoised=quantize_x0,
            mask=mask,
            x0=x0,
            ddim_use_original_steps=False,
            noise_dropout=noise_dropout,
            temperature=temperature,
            score_corrector=score_corrector,
            corrector_kwargs=corrector_kwargs,
            x_T=x_T,
            log_every_t=log_every_t,
            unconditional_guidance_scale=unconditional_guidance_scale,
            unconditional_conditioning=unconditional_conditioning,
            **({} if noise is None else {"noise": noise}),
            **({"guidance_rescale": guidance_rescale} if rescales else {}),
        )

    @torch.no_grad()
    def denoise(
        self,
        cond: Conditioning,
        shape: Sequence[int],
        x_T: Tensor | None = None,
        ddim_use_original_steps: bool = False,
        callback: Callable[[int], object] | None = None,
        timesteps: int | None = None,
        quantize_denoised: bool = False,
        mask: Tensor | None = None,
        x0: Tensor | None = None,
        img_callback: Callable[[Tensor, int], object] | None = None,
        log_every_t: int = 100,
        temperature: float = 1.0,
        noise_dropout: float = 0.0,
        score_corrector: Any = None,
        corrector_kwargs: Mapping[str, Any] | None = None,
        unconditional_guidance_scale: float | Tensor = 1.0,
        unconditional_conditioning: Conditioning = None,
        noise: NoiseSource | None = None,
        guidance_rescale: float | Tensor = 0.0,
    ) -> tuple[Tensor, Intermediates]:
        """Runs the steps of the current schedule, from noise to latents of `shape` [N, ...]; the rest as in `sample`.

        `timesteps` runs fewer: that many of the whole training schedule, or one less of the chosen rows,
        as in the original.
        """
        run = SamplingRun(
            model=self.model,
            noise=self._noise(noise),
            guidance=Guidance(
                cond, unconditional_conditioning, unconditional_guidance_scale, guidance_rescale
            ),
            draws_always=self.draws_always,
            mask=mask,
            x0=x0,
            temperature=temperature,
            noise_dropout=noise_dropout,
            quantize_x0=quantize_denoised,
            score_corrector=score_corrector,
            corrector_kwargs=corrector_kwargs,
            original_steps=ddim_use_original_steps,
        )
        x = self.starting(run.noise.draw(shape) if x_T is None else x_T, ddim_use_original_steps)
        table = self._table_for(ddim_use_original_steps)
        count = timesteps
        if timesteps is not None and not ddim_use_original_steps:
            count = max(min(timesteps, len(table)) - 1, 0)
        return self._run(run, x, table, count, callback, img_callback, log_every_t)

    @torch.no_grad()
    def stochastic_encode(
        self, x0: Tensor, t: Tensor, use_original_steps: bool = False, noise: Tensor | None = None
    ) -> Tensor:
        """Noises clean latents to row `t` [N] of the step table (or of the whole training schedule)."""
        alphas = self._table_for(use_original_steps).alphas[t.cpu().numpy()]
        signal, spread = (
            torch.tensor(level, dtype=x0.dtype, device=x0.device).reshape(-1, *[1] * (x0.dim() - 1))
            for level in (np.sqrt(alphas), np.sqrt(1 - alphas))
        )
        noise = torch.randn_like(x0) if noise is None else noise
        return signal * x0 + spread * noise

    def starting(self, noise: Tensor, use_original_steps: bool = False) -> Tensor:
        """Returns the latents with which all steps begin, from standard normal `noise` [N, ...]."""
        if use_original_steps or self.noise_schedule.from_plain_noise:
            return noise
        return (1 - self.table.alphas[-1]) ** 0.5 * noise

    def start_from(self, x0: Tensor, count: int, noise: Tensor) -> Tensor:
        """Noises clean latents to the start of the last `count` steps; with all steps it is noise alone.

        With DDIM and PLMS that is one step more than they remove, as in the original.
        """
        if count >= len(self.table) and self.noise_schedule.share == 1:
            return self.starting(noise)
        above = self.starts_above and self.noise_schedule.name == "original"
        row = max(count if above else count - 1, 0)
        return self.stochastic_encode(x0, torch.full((len(x0),), row), noise=noise)

    @torch.no_grad()
    def decode(
        self,
        x_latent: Tensor,
        cond: Conditioning,
        t_start: int,
        unconditional_guidance_scale: float | Tensor = 1.0,
        unconditional_conditioning: Conditioning = None,
        use_original_steps: bool = False,
        callback: Callable[[int], object] | None = None,
        noise: NoiseSource | None = None,
        mask: Tensor | MaskLevels | None = None,
        x0: Tensor | None = None,
        img_callback: Callable[[Tensor, int], object] | None = None,
        guidance_rescale: float | Tensor = 0.0,
        plan: GuidancePlan | None = None,
    ) -> Tensor:
        """Denoises latents through the last `t_start` steps of the schedule made by `make_schedule`.

        `mask` is 1 where the latent `x0` is kept; `callback` and `img_callback` are those of `sample`. `plan` takes
        the place of the conditionings and the scale where the steps differ in them.
        """
        run = SamplingRun(
            model=self.model,
            noise=self._noise(noise),
            guidance=Guidance(
                cond, unconditional_conditioning, unconditional_guidance_scale, guidance_rescale
            ),
            draws_always=self.draws_always,
            mask=mask,
            x0=x0,
            original_steps=use_original_steps,
            plan=plan,
        )
        table = self._table_for(use_original_steps)
        return self._run(run, x_latent, table, t_start, callback, img_callback)[0]

    def _stepper(self, run: SamplingRun) -> TakeStep:
        """Returns the function that runs a step; called once per run, so that history belongs to the run."""
        raise TypeError(f"{type(self).__name__} does not define _stepper")

    def _single(
        self,
        c: Conditioning,
        index: int,
        repeat_noise: bool,
        use_original_steps: bool,
        quantize_denoised: bool,
        temperature: float,
        noise_dropout: float,
        score_corrector: Any,
        corrector_kwargs: Mapping[str, Any] | None,
        unconditional_guidance_scale: float | Tensor,
        unconditional_conditioning: Conditioning,
    ) -> tuple[SamplingRun, Step]:
        """Returns the run for a step that is called directly; its noise is that of the run it belongs to."""
        noise = self._noise(self._source)
        run = SamplingRun(
            model=self.model,
            noise=RepeatedNoise(noise) if repeat_noise else noise,
            guidance=Guidance(c, unconditional_conditioning, unconditional_guidance_scale),
            draws_always=self.draws_always,
            temperature=temperature,
            noise_dropout=noise_dropout,
            quantize_x0=quantize_denoised,
            score_corrector=score_corrector,
            corrector_kwargs=corrector_kwargs,
            original_steps=use_original_steps,
        )
        return run, self._table_for(use_original_steps).step(index)

    def _run(
        self,
        run: SamplingRun,
        x: Tensor,
        table: StepTable,
        count: int | None,
        callback: Callable[[int], object] | None = None,
        img_callback: Callable[[Tensor, int], object] | None = None,
        log_every_t: int = 100,
    ) -> tuple[Tensor, Intermediates]:
        self._source = run.noise
        take_step = self._stepper(run)
        trail: Intermediates = {"x_inter": [x], "pred_x0": [x]}
        for i, step in enumerate(table.downwards(count)):
            run.begin(step, i, table)
            x, pred_x0 = take_step(run.keep_masked(x, step), step)
            if callback is not None:
                callback(i)
            if img_callback is not None:
                img_callback(pred_x0, i)
            if step.index % log_every_t == 0 or i == 0:
                trail["x_inter"].append(x)
                trail["pred_x0"].append(pred_x0)
        return x, trail

    @property
    def _device(self) -> torch.device:
        return self.model.alphas_cumprod.device

    def _alphas_cumprod(self) -> np.ndarray:
        return self.model.alphas_cumprod.cpu().double().clamp(min=LEAST_ALPHA).numpy()

    def _choose_table(self, steps: int, spacing: str, eta: float) -> StepTable:
        chosen = replace(self.noise_schedule, spacing=spacing)
        levels = chosen.levels(steps, self._alphas_cumprod())
        return StepTable.at(levels.timesteps[::-1].copy(), levels.alphas[::-1].copy(), eta)

    def _table_for(self, use_original_steps: bool) -> StepTable:
        if not use_original_steps:
            return self.table
        timesteps = np.arange(self.ddpm_num_timesteps)
        return StepTable.build(self._alphas_cumprod(), timesteps, self.eta, last=1.0)

    def _noise(self, noise: NoiseSource | None) -> NoiseSource:
        return TorchNoise(None, self._device) if noise is None else noise
