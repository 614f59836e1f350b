"""The table of solvers."""

from __future__ import annotations

import importlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from ldm.util import InputError

if TYPE_CHECKING:
    from ldm.models.diffusion.sampler import Sampler
    from ldm.models.diffusion.schedules import Schedule

HERE = "ldm.models.diffusion"


# the best solver and schedule for so many calls of the model, by `solvers.csv`, which `evaluate.py solvers` writes
RECOMMENDED: Mapping[int, tuple[str, str]] = {10: ("ddim", "karras"), 20: ("ddim", "karras")}


class JobSetting(NamedTuple):
    """A setting that jobs have too: its option, and the value that a solver without it has in effect."""

    option: str
    unset: float


JOB_SETTINGS: Mapping[str, JobSetting] = {
    "eta": JobSetting("ddim_eta", 0.0),
    "s_noise": JobSetting("s_noise", 1.0),
    "s_churn": JobSetting("s_churn", 0.0),
}


@dataclass(frozen=True)
class SolverRow:
    """A solver: its `name`, where its class is, and what options, metadata and estimates need to know of it.

    `order` of convergence on the probability flow ODE (without fresh noise), as measured: a first or last step of
    order 1 limits a method of a higher one to 2; `calls` of the model for a step, and
    `more` for a run; `schedule` is the one that it was published with. `settings` are those that it takes, with their
    defaults: eta (0: no fresh noise), s_noise (factor of the fresh noise), s_churn (noise added before each step, at
    sigmas from s_tmin to s_tmax), order, r (where the middle of a step is). `always_draws`: fresh noise whatever they
    are. `rises`: noise is added between two steps, so that the second begins above the end of the first.
    """

    name: str
    path: str
    about: str
    order: int
    calls: int
    schedule: str
    settings: Mapping[str, float]
    more: int = 0
    always_draws: bool = False
    rises: bool = False

    @property
    def draws(self) -> bool:
        """Whether it adds fresh noise with its default settings."""
        return self.always_draws or self.default("eta") > 0

    def default(self, name: str) -> float:
        """Returns the value that a setting of jobs has if a job does not choose it."""
        return self.settings.get(name, JOB_SETTINGS[name].unset)

    def load(self) -> type[Sampler]:
        """Returns its class."""
        module, _, name = self.path.partition(":")
        return getattr(importlib.import_module(f"{HERE}.{module}"), name)

    def make(self, model: Any, schedule: str | Schedule | None = None, **settings: float) -> Sampler:
        """Returns a sampler of `model` with a schedule (None: its own); `make_schedule` or `sample` comes next.

        Raises `InputError` for a schedule that does not exist, or a setting that it does not take.
        """
        from ldm.models.diffusion.schedules import Schedule

        for name, value in settings.items():
            if name not in self.settings:
                known = ", ".join(self.settings) or "none"
                raise InputError(f"{self.name} has no setting {name} (here {value:g}); its settings: {known}")
        chosen = schedule if isinstance(schedule, Schedule) else Schedule(schedule or self.schedule)
        return self.load()(model, schedule=chosen, **settings)

    def model_calls(self, steps: int, to_zero: bool = True) -> int:
        """Returns how often a run of so many steps calls the model.

        A step that ends at sigma 0 calls it once, whatever the solver; `to_zero`: whether the last one does.
        """
        return max(self.calls * steps - (self.calls - 1 if to_zero else 0) + self.more, 0)


_NONE: Mapping[str, float] = {}
_CHURN = {"s_churn": 0.0, "s_tmin": 0.0, "s_tmax": math.inf, "s_noise": 1.0}
_ANCESTRAL = {"eta": 1.0, "s_noise": 1.0}
_NOISE = {"s_noise": 1.0}

# fmt: off
_ROWS = (
    # name, class, about, order, calls, schedule, settings
    SolverRow("ddim", "ddim:DDIMSampler", "DDIM", 1, 1, "original", {"eta": 0.0}),
    SolverRow("plms", "plms:PLMSSampler", "PLMS: linear multistep", 2, 1, "original", _NONE, more=1),
    SolverRow(
        "dpm_solver", "dpm_solver:DPMSolverSampler", "DPM-Solver++ (2M) of the original",
        2, 1, "original", _NONE,
    ),
    SolverRow("euler", "solvers.euler:Euler", "Euler", 1, 1, "uniform", _CHURN),
    SolverRow("euler_a", "solvers.euler:EulerAncestral", "Euler, ancestral", 1, 1, "uniform", _ANCESTRAL),
    SolverRow("heun", "solvers.heun:Heun", "Heun", 2, 2, "uniform", _CHURN),
    SolverRow("dpm2", "solvers.dpm2:DPM2", "DPM-Solver-2", 2, 2, "uniform", _CHURN),
    SolverRow("dpm2_a", "solvers.dpm2:DPM2Ancestral", "DPM-Solver-2, ancestral", 2, 2, "uniform", _ANCESTRAL),
    SolverRow("lms", "solvers.multistep:LMS", "linear multistep in sigma", 2, 1, "uniform", {"order": 4.0}),
    SolverRow("ipndm", "solvers.multistep:IPNDM", "iPNDM", 2, 1, "uniform", {"order": 4.0}),
    SolverRow("deis", "solvers.multistep:DEIS", "DEIS, log rho", 2, 1, "uniform", {"order": 2.0}),
    SolverRow("dpmpp_2m", "solvers.dpmpp_multistep:DPMpp2M", "DPM-Solver++ (2M)", 2, 1, "uniform", _NONE),
    SolverRow(
        "dpmpp_2s_a", "solvers.dpmpp_singlestep:DPMpp2SAncestral", "DPM-Solver++ (2S), ancestral",
        2, 2, "uniform", _ANCESTRAL,
    ),
    SolverRow(
        "dpmpp_sde", "solvers.dpmpp_singlestep:DPMppSDE", "DPM-Solver++ (SDE)",
        2, 2, "uniform", {**_ANCESTRAL, "r": 0.5},
    ),
    SolverRow(
        "dpmpp_2m_sde", "solvers.dpmpp_multistep:DPMpp2MSDE", "DPM-Solver++ (2M SDE), midpoint",
        2, 1, "uniform", _ANCESTRAL,
    ),
    SolverRow(
        "dpmpp_2m_sde_heun", "solvers.dpmpp_multistep:DPMpp2MSDEHeun", "DPM-Solver++ (2M SDE), Heun",
        2, 1, "uniform", _ANCESTRAL,
    ),
    SolverRow(
        "dpmpp_3m_sde", "solvers.dpmpp_multistep:DPMpp3MSDE", "DPM-Solver++ (3M SDE)",
        2, 1, "uniform", _ANCESTRAL,
    ),
    SolverRow("unipc", "solvers.unipc:UniPC", "UniPC (bh2)", 2, 1, "uniform", {"order": 2.0}),
    SolverRow(
        "unipc_bh1", "solvers.unipc:UniPCBh1", "UniPC (bh1) of order 3", 2, 1, "time_uniform", {"order": 3.0}
    ),
    SolverRow(
        "unipc_bh2", "solvers.unipc:UniPCBh2", "UniPC (bh2) of order 3", 2, 1, "time_uniform", {"order": 3.0}
    ),
    SolverRow(
        "restart", "solvers.restart:Restart", "Heun, with some steps repeated from more noise",
        2, 2, "karras", _NOISE, always_draws=True, rises=True,
    ),
    SolverRow(
        "er_sde", "solvers.er_sde:ERSDE", "ER-SDE-Solver-3", 1, 1, "uniform", {"order": 3.0, **_NOISE},
        always_draws=True,
    ),
    SolverRow("ddpm", "solvers.euler:DDPM", "DDPM", 1, 1, "original", _NOISE, always_draws=True),
    SolverRow("lcm", "solvers.consistency:LCM", "latent consistency", 1, 1, "lcm", _NOISE, always_draws=True),
    SolverRow(
        "tcd", "solvers.consistency:TCD", "trajectory consistency", 1, 1, "tcd", {"eta": 0.3, **_NOISE}
    ),
)
# fmt: on

SOLVERS: dict[str, SolverRow] = {row.name: row for row in _ROWS}

# k-diffusion's names of those that have another one here
K_DIFFUSION: dict[str, str] = {
    "euler_ancestral": "euler_a", "dpm_2": "dpm2", "dpm_2_ancestral": "dpm2_a", "dpmpp_2s_ancestral": "dpmpp_2s_a",
}  # fmt: skip
