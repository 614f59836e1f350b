"""The recipe of an image, and the draft with which every program's reader builds it."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from ldm.job import V1_DEFAULTS, Init, Job, lora_name
from ldm.job_values import override, read_held, values_of
from ldm.metadata.infotext import file_name
from ldm.metadata.record import without_folders
from ldm.setting import shown
from ldm.util import InputError, printable

_MAX_NOTES, _MAX_NOTE = 40, 300
_WEIGHTS = re.compile(r"(?<!\\)[()\[\]]|\bBREAK\b|\bAND\b|\w[+-]{1,9}(?=\s|,|$)")
_TAG = re.compile(r"<(lora|lyco|hypernet):[^<>]{1,200}>")


class Origin(NamedTuple):
    """The file of a text, as far as it is known: its name, and its width and height in pixels."""

    name: str = ""
    size: tuple[int, int] | None = None


UNKNOWN = Origin()


@dataclass(frozen=True, slots=True)
class Recipe:
    """How an image was made: the `job`, as far as it was understood, and the other entries of its file.

    `source` is the program: "ldm", "A1111", "stable-diffusion.cpp", "ComfyUI", "InvokeAI", ... `model` and
    `model_hash` are the checkpoint's in the file, or empty. `extras` are this toolkit's entries
    (`Config`, `Precision`, ...); of other programs, `Lora hashes` and `TI hashes`. Each of `notes` is one thing
    that will differ, in a printable line. Of files that the job starts from only the names are known.
    """

    job: Job
    source: str
    model: str = ""
    model_hash: str = ""
    extras: Mapping[str, str] = field(default_factory=dict[str, str])
    notes: tuple[str, ...] = ()


def checked(job: Job) -> Job:
    """Returns `job` without folders. Raises InputError, which names the field, for an invalid value."""
    job = without_folders(job)
    return override(job, {name: read_held(name, value) for name, value in values_of(job).items()})


MASK_PADDING = "Mask padding"  # pixels around a mask that were made with it, if the mask has no name


class Draft:
    """An unfinished recipe: fields of the job as they are found, and notes."""

    def __init__(self, source: str) -> None:
        self.source = source
        self.model = self.model_hash = ""
        self.values: dict[str, Any] = {"prompt": ""}
        self.notes: list[str] = []
        self.loras: list[tuple[str, float, float]] = []
        self.controls: list[tuple[str, str, float, float, float]] = []
        self.extras: dict[str, str] = {}

    def note(self, text: str) -> None:
        """Adds a note on one thing that will differ; repeated notes are kept once."""
        text = printable(text)[:_MAX_NOTE]
        if text not in self.notes and len(self.notes) < _MAX_NOTES:
            self.notes.append(text)

    def leave_out(self, what: str, value: object) -> None:
        """Notes a setting that has no counterpart here, unless it is off."""
        if value not in (None, "", 0, False, [], {}):
            self.note(
                f"left out: {what} {str(value)[:100] if isinstance(value, (str, int, float)) else ''}".rstrip()
            )

    def whole(self, name: str, value: object) -> None:
        """Sets a field that is a whole number; any other value is noted."""
        if type(value) is int:
            self.values[name] = value
        else:
            self._refuse(name, value)

    def number(self, name: str, value: object) -> None:
        """Sets a field that is a finite number; any other value is noted."""
        if isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < math.inf:
            self.values[name] = value
        else:
            self._refuse(name, value)

    def _refuse(self, name: str, value: object) -> None:
        reason = "is not stated" if value is None else f"cannot be {shown(value)}"
        self.note(f"{name} {reason}; using {getattr(V1_DEFAULTS, name)}")

    def _check(self) -> None:
        """Removes and notes invalid values; InputError for a number that is not finite."""
        for name in ("width", "height"):
            if type(side := self.values.get(name)) is int and side > 8 and side % 8:
                self.values[name] = side - side % 8
                self.note(f"{name} {shown(side)} is not a multiple of 8; using {shown(side - side % 8)}")
        for name in [name for name in self.values if name != "init"]:
            try:
                self.values[name] = read_held(name, self.values[name])
            except InputError:
                if isinstance(self.values[name], float) and not math.isfinite(self.values[name]):
                    raise
                self._refuse(name, self.values.pop(name))

    def spacing_of_compvis(self) -> None:
        """Sets the original's timesteps for DDIM or PLMS, where they exist for this count of steps."""
        steps, sampler = self.values.get("steps", V1_DEFAULTS.steps), self.values["sampler"]
        if sampler not in ("ddim", "plms") or not 1 <= steps <= 999 or 1000 % steps == 0:
            return
        stride = 1000 // steps
        if math.ceil(1000 / stride) * stride - stride + 1 <= 999:
            self.values["timestep_spacing"] = "compvis"
        else:
            self.note(f"its timesteps for {steps} steps are not supported; using evenly spaced ones")

    def cpu_noise(self) -> None:
        """Sets noise of torch's generator on the CPU."""
        self.values["rng"] = "cpu"

    def gpu_noise(self) -> None:
        """Notes that the noise is assumed to be an NVIDIA card's, whose generator uses all 64 bits of a seed."""
        self.note("its noise is assumed to be an NVIDIA card's; another GPU's would differ")

    def lora(self, name: object, weight: object, text_weight: object) -> None:
        """Adds a LoRA by the name of its file, with its weights on the U-Net and on the text encoder."""
        if isinstance(name, str) and name:
            weights = [
                float(w) if isinstance(w, (int, float)) and abs(w) < 1e9 else 1.0
                for w in (weight, text_weight)
            ]
            self.loras.append((lora_name(file_name(name)), weights[0], weights[1]))

    def control(
        self,
        file: str,
        image: str,
        weight: float,
        start: float,
        end: float,
        needs: str = "the ControlNet {} and its hint {}",
    ) -> None:
        """Adds a control network by the names of its file and its image, which may be empty."""
        names = file_name(file), file_name(image)
        self.controls.append((*names, weight, start, end))
        self.note(f"it needs {needs.format(names[0], names[1] or 'image')}, which are not in the file")

    def start_from(self, name: str, strength: object) -> None:
        """Sets the image that the job starts from; its name may be empty."""
        self.number("strength", strength)
        if name:
            self.values["init"] = Init(name)
        self.note(f"it starts from an image{f', {name},' if name else ''} that is not in the file")

    def crop_to_mask(self, padding: int) -> None:
        """Records that only the region around the mask was made, of an image and a mask that are not in the file."""
        self.extras[MASK_PADDING] = str(padding)

    def hashes(self, loras: Mapping[str, str], inversions: Mapping[str, str]) -> None:
        """Adds hashes of LoRAs and textual inversions by name, empty ones included, by which files are searched."""
        for key, listed in (("Lora hashes", loras), ("TI hashes", inversions)):
            if listed:
                self.extras[key] = ", ".join(f"{name}: {digest}" for name, digest in listed.items())
        for name in inversions:
            self.note(f"it needs the textual inversion {name}")

    def finish(self) -> Recipe:
        """Returns the recipe, with notes on the syntax of its prompts."""
        for prompt in (self.values["prompt"], self.values.get("negative_prompt", "")):
            for tag in _TAG.finditer(prompt):
                self.note(f"left out: {tag[0]}")
            if "prompt_syntax" not in self.values and _WEIGHTS.search(prompt):
                self.note(f"signs in its prompts are weights to {self.source}")
        for name, *_ in self.loras:
            self.note(f"it needs the LoRA {name}")
        self.values |= {"loras": tuple(self.loras), "controls": tuple(self.controls)}
        self._check()
        self.values.setdefault("prompt", "")
        job = checked(replace(V1_DEFAULTS, **self.values))
        return Recipe(job, self.source, self.model, self.model_hash, self.extras, tuple(self.notes))
