"""Models and LoRAs that were distilled to a few steps: what they are made for, by their names and notes.

LCM (Luo et al. 2023, and LCM-LoRA: guidance scale 1 to 2, or as an input of the U-Net 3 to 13), TCD (Zheng et al.
2024) and Hyper-SD (Ren et al. 2024), whose files have their number of steps in their names; its authors give the
settings on their model page.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ldm.job import Job
from ldm.models.diffusion.passes import schedule_of

_NOTES = (
    "ss_output_name",
    "ss_training_comment",
    "modelspec.title",
    "modelspec.description",
    "modelspec.usage_hint",
)
_LCM = re.compile(r"(?<![a-z])lcm(?![a-z])|latent[ _-]?consistency")
_TCD = re.compile(r"(?<![a-z])tcd(?![a-z])|trajectory[ _-]?consistency")
_HYPER = re.compile(r"hyper[ _-]?sd[^/]*?(?<![0-9])([0-9]{1,2})[ _-]?steps?([ _-]?cfg)?")
_NAMELESS = re.compile(r"pytorch_lora_weights|adapter_model|diffusion_pytorch_model|model|weights")


@dataclass(frozen=True, slots=True)
class FewSteps:
    """A kind of such a model: its sampler and schedule, the most steps, the range of guidance scales, a command."""

    kind: str
    sampler: str
    schedule: str
    most: int
    scales: tuple[float, float]
    command: str

    def __str__(self) -> str:
        low, high = self.scales
        scale = f"{low:g}" if low == high else f"{low:g} to {high:g}"
        return f"{self.kind}: up to {self.most} steps, guidance scale {scale}; {self.command}"

    def misfits(self, job: Job) -> list[str]:
        """Returns the options of a job that it was not made for, with their values."""
        schedule = schedule_of(job).name
        levels = bool(job.sigmas or job.timesteps)
        fits = {
            f"--sampler {job.sampler}": job.sampler == self.sampler,
            f"--schedule {schedule}": schedule == self.schedule or levels or job.sampler != self.sampler,
            f"--ddim_steps {job.steps}": job.steps <= self.most,
            f"--scale {job.scale:g}": self.scales[0] <= job.scale <= self.scales[1],
        }
        return [option for option, fit in fits.items() if not fit]


LCM = FewSteps("LCM", "lcm", "lcm", 8, (1, 2), "--sampler lcm --ddim_steps 4 --scale 1")
# with the scale as an input, which costs no second prediction
GUIDED_LCM = FewSteps("LCM", "lcm", "lcm", 8, (3, 13), "--sampler lcm --ddim_steps 4 --scale 8")
TCD = FewSteps("TCD", "tcd", "tcd", 8, (1, 2), "--sampler tcd --ddim_steps 4 --scale 1")
HYPER_ONE = FewSteps(
    "Hyper-SD, 1 step", "tcd", "tcd", 8, (1, 1), "--sampler tcd --ddim_eta 1 --ddim_steps 1 --scale 1"
)


def _hyper(steps: int, guided: bool) -> FewSteps:
    if steps == 1:
        return HYPER_ONE
    scale = 6 if guided else 1
    return FewSteps(
        f"Hyper-SD, {steps} steps{' with guidance' * guided}", "ddim", "trailing", steps,
        (5, 8) if guided else (1, 1),
        f"--sampler ddim --schedule trailing --ddim_steps {steps} --scale {scale}",
    )  # fmt: skip


def made_for(path: Path, notes: Mapping[str, object], guided: bool = False) -> FewSteps | None:
    """Returns the kind of a model or a LoRA by its file's name and the `notes` in it; None if it is of none.

    A file with a name that all such files have is known by its folder. `guided`: the guidance scale is an input.
    """
    if guided:
        return GUIDED_LCM
    stem = path.name.lower().partition(".")[0]
    name = f"{path.absolute().parent.name.lower()}/{stem}" if _NAMELESS.fullmatch(stem) else path.name.lower()
    for text in (name, *(str(notes.get(note, "")).lower()[:10_000] for note in _NOTES)):
        if hyper := _HYPER.search(text):
            return _hyper(int(hyper[1]), hyper[2] is not None)
        if _TCD.search(text):
            return TCD
        if _LCM.search(text):
            return LCM
    return None
