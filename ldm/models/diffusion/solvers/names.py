"""Names that other programs give to solvers and schedules: "DPM++ 2M Karras", "euler_ancestral", "k_dpmpp_2m"."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import NamedTuple

from ldm.models.diffusion.schedules import LISTS, SCHEDULES
from ldm.models.diffusion.solvers.registry import K_DIFFUSION, RECOMMENDED, SOLVERS


class Named(NamedTuple):
    """A solver, and the schedule that its name contains; "" if it contains none."""

    sampler: str
    schedule: str = ""

    def __str__(self) -> str:
        return "/".join(filter(None, self))


def plain(name: str) -> str:
    """Returns a name in lower case without anything but letters and digits; a plus sign is a p."""
    return re.sub(r"[^a-z0-9]", "", name.lower().replace("+", "p"))


# plain names that differ from the plain names here. A1111, ComfyUI, InvokeAI, stable-diffusion.cpp, kohya, diffusers
_SOLVERS: Mapping[str, str] = {
    **{plain(name): name for name in SOLVERS},
    **{plain(name): solver for name, solver in K_DIFFUSION.items()},
    "eulerdiscrete": "euler",
    "eulerancestraldiscrete": "euler_a",
    "dpm2discrete": "dpm2",
    "dpm2ancestraldiscrete": "dpm2_a",
    "heundiscrete": "heun",
    "lmsdiscrete": "lms",
    "pndm": "plms",
    "dpmsolver": "dpm_solver",
    "dpmsolverpp": "dpm_solver",
    "dpmsolvermultistep": "dpm_solver",
    "dpmsolversde": "dpmpp_sde",
    "unipcmultistep": "unipc",
    "deismultistep": "deis",
    "dpmpp3m": "dpmpp_3m_sde",
}
_SCHEDULES: Mapping[str, str] = {
    **{plain(name): name for name in SCHEDULES if name not in LISTS},
    "ays": "align_your_steps",
    "discrete": "uniform",
    "ddim": "ddim_uniform",
}
# all names of a solver and a schedule as one value of a job's sampler
WITH_SCHEDULE = frozenset(
    f"{solver}/{schedule}" for solver in SOLVERS for schedule in SCHEDULES if schedule not in LISTS
)
# the names that AUTOMATIC1111's web UI writes, where it has the solver and the schedule
SOLVER_LABELS: Mapping[str, str] = {
    "ddim": "DDIM", "plms": "PLMS", "euler": "Euler", "euler_a": "Euler a", "heun": "Heun", "dpm2": "DPM2",
    "dpm2_a": "DPM2 a", "lms": "LMS", "dpmpp_2m": "DPM++ 2M", "dpmpp_2s_a": "DPM++ 2S a", "dpmpp_sde": "DPM++ SDE",
    "dpmpp_2m_sde": "DPM++ 2M SDE", "dpmpp_2m_sde_heun": "DPM++ 2M SDE Heun", "dpmpp_3m_sde": "DPM++ 3M SDE",
    "unipc_bh1": "UniPC", "restart": "Restart", "lcm": "LCM",
}  # fmt: skip
SCHEDULE_LABELS: Mapping[str, str] = {
    "auto": "Automatic", "uniform": "Uniform", "karras": "Karras", "exponential": "Exponential",
    "polyexponential": "Polyexponential", "sgm_uniform": "SGM Uniform", "simple": "Simple", "normal": "Normal",
    "ddim_uniform": "DDIM", "beta_a1111": "Beta", "kl_optimal_a1111": "KL Optimal",
    "align_your_steps_a1111": "Align Your Steps",
}  # fmt: skip
# after a name, what makes no other solver: where noise is drawn, diffusers' endings
_ENDINGS = re.compile(r"(?:scheduler|sampler|gpu)+$")
# before a name: k-diffusion's
_BEGINNINGS = re.compile(r"^(?:sampler?|k)(?!loptimal)")


def find_schedule(name: str) -> str | None:
    """Returns the schedule of a name, or None if there is none; "" for names that leave the choice to the sampler."""
    key = plain(name)
    if key in ("", "automatic", "auto", "default"):
        return ""
    return _SCHEDULES.get(key.removesuffix("scheduler"))


def find_solver(name: str) -> Named | None:
    """Returns the solver of a name and the schedule that follows it in the name, or None if there is none.

    InvokeAI's `_k` is Karras, ComfyUI's `_gpu` makes no difference, and a `k_` or `sample_` before the name is
    k-diffusion's.
    """
    key = _ENDINGS.sub("", plain(name))
    for whole in dict.fromkeys((key, _BEGINNINGS.sub("", key))):
        if whole in _SOLVERS:
            return Named(_SOLVERS[whole])
        for ending, schedule in ({"k": "karras"} | dict(_SCHEDULES)).items():
            if whole.endswith(ending) and (solver := _SOLVERS.get(whole.removesuffix(ending))):
                return Named(solver, schedule)
    return None


def spell_solver(text: str) -> str:
    """Returns the name here of a solver, "solver/schedule" if it contains a schedule, or an unknown name as it is."""
    named = find_solver(text)
    return "_".join(text.lower().split()) if named is None else str(named)


def spell_schedule(text: str) -> str:
    """Returns the name here of a schedule, "auto" if it leaves the choice, or an unknown name as it is."""
    name = find_schedule(text)
    return "_".join(text.lower().split()) if name is None else name or "auto"


def advice() -> str:
    """Returns what the measured table of solvers recommends, for the help."""
    best = {calls: "/".join(pair) for calls, pair in RECOMMENDED.items()}
    alike = len(set(best.values())) == 1
    each = f"in 10 and 20 steps {best[10]}" if alike else f"in 10 steps {best[10]}, in 20 {best[20]}"
    return f"{each} was best on the bundled model"
