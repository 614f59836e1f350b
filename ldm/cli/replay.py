"""A picture made again: the command that does it, and how two pictures or a watermark compare.

Nothing here prints, loads a model or touches a file.
"""

from __future__ import annotations

import math
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ldm.job import Init, Job, lora_tag
from ldm.util import InputError, printable

if TYPE_CHECKING:
    import numpy as np

    from ldm.images.foreign import Recipe
    from ldm.images.watermark import Evidence

SURE = 1e-6  # below this probability, chance is no explanation of a watermark
UNSURE = 1e-2  # above it, it is a good one

Options = dict[str, str | None]  # by name without dashes; None for a switch


def options(recipe: Recipe) -> tuple[str, Options]:
    """The script that makes a recipe's picture again, and its options; defaults of a job are left out.

    What the script cannot know from the file stays open: which checkpoint `Recipe.model` is, and in which folder
    the picture, the mask and the LoRAs lie that are named. A picture of a batch with one stream of noise comes
    last of as many as that takes.
    """
    job = recipe.job
    init = job.init
    chosen: Options = {"prompt": job.prompt}
    if job.negative_prompt:
        chosen["negative_prompt"] = job.negative_prompt
    chosen |= {"seed": str(job.seed), "ddim_steps": str(job.steps), "scale": _number(job.scale)}
    chosen |= {job.sampler: None} if job.sampler != "ddim" else {}
    chosen |= _unless_default(
        job,
        {"ddim_eta": "eta", "timestep_spacing": "timestep_spacing", "rng": "rng", "seed_mode": "seed_mode"},
    )
    chosen |= _count(recipe)
    if init is None and job.strength == 1:
        chosen |= {"W": str(job.width), "H": str(job.height)}
    else:
        chosen |= {"strength": _number(job.strength)}
        chosen |= {"posterior_mean": None} if job.posterior == "mean" else {}
        chosen |= _picture(init) if init else {}
        chosen |= {} if job.paste else {"no_paste": None}
    chosen |= _unless_default(
        job, {"upscale": "upscale", "upscale_in": "upscale_in", "upscale_strength": "upscale_strength"}
    )
    chosen |= _of_the_run(recipe)
    return _script(job), chosen


def command(recipe: Recipe, changes: Mapping[str, str | None] | None = None, drop: Sequence[str] = ()) -> str:
    """The command line that makes a recipe's picture again, on one line that can be pasted into bash or zsh.

    `changes` replace or add options, `drop` leaves some out. The job's LoRAs are options of their own, whose files
    are expected to lie where the command runs, or with `lora_dir` among the changes tags in the prompt.
    """
    script, chosen = options(recipe)
    arguments = [f"--lora={lora}" for lora in _loras(recipe.job)]
    if "lora_dir" in (changes or {}) and arguments:
        chosen["prompt"] = " ".join(
            [recipe.job.prompt, "".join(lora_tag(*lora) for lora in recipe.job.loras)]
        )
        arguments = []
    chosen = {name: value for name, value in {**chosen, **(changes or {})}.items() if name not in drop}
    return " ".join(map(quoted, ["python", f"scripts/{script}.py", *_arguments(chosen), *arguments]))


def quoted(argument: str) -> str:
    """An argument as bash and zsh read it back. Controls, which a terminal might obey on pasting, are escaped.

    NUL, which no argument can hold, becomes a space.
    """
    argument = argument.replace("\0", " ")
    if argument.isprintable():
        return shlex.quote(argument)
    return "$'" + "".join(map(_ansi_c, argument)) + "'"


def _ansi_c(character: str) -> str:
    if character in "\\'":
        return f"\\{character}"
    if character.isprintable():
        return character
    return "".join(f"\\x{byte:02x}" for byte in character.encode("utf-8", "surrogatepass"))


def _arguments(chosen: Options) -> list[str]:
    """Options as arguments; a value that begins with a dash is joined to its option, else it would pose as one."""
    arguments: list[str] = []
    for name, value in chosen.items():
        option = "--" + {"init_img": "init-img", "from_file": "from-file"}.get(name, name)
        if value is None:
            arguments.append(option)
        else:
            arguments += [f"{option}={value}"] if value.startswith("-") else [option, value]
    return arguments


def _script(job: Job) -> str:
    if job.init is None:
        return "txt2img" if job.strength == 1 else "img2img"
    return "inpaint" if job.init.mask or job.init.alpha_mask else "img2img"


def _unless_default(job: Job | Init, names: Mapping[str, str]) -> Options:
    """Options by the names of the fields they set, where those are not the default."""
    default = Job("") if isinstance(job, Job) else Init("")
    values = {option: (getattr(job, field), getattr(default, field)) for option, field in names.items()}
    return {option: _text(value) for option, (value, usual) in values.items() if value != usual}


def _text(value: object) -> str:
    if isinstance(value, tuple):
        return ",".join(map(str, value))
    return _number(value) if isinstance(value, float) else str(value)


def _number(value: float) -> str:
    return repr(float(value)).removesuffix(".0")


def _picture(init: Init) -> Options:
    chosen: Options = {"init_img": init.image}
    chosen |= {"mask": init.mask} if init.mask else {}
    names = {
        "W": "width",
        "H": "height",
        "background": "background",
        "outpaint": "outpaint",
        "mask_blur": "mask_blur",
    }
    chosen |= _unless_default(init, names)
    if init.width is not None or init.height is not None:
        chosen["resize"] = init.resize
    return chosen | ({"invert_mask": None} if init.invert_mask else {})


def _count(recipe: Recipe) -> Options:
    """One picture, or in a batch with one stream of noise as many as come before it."""
    size = recipe.extras.get("Batch size", "1")
    per_batch = int(size) if re.fullmatch("[1-9][0-9]{0,4}", size) else 1
    per_batch = per_batch if recipe.job.seed_mode == "batch" else 1
    return {
        "n_samples": str(per_batch),
        "n_iter": str(recipe.job.batch_index // per_batch + 1),
        "skip_grid": None,
    }


def _of_the_run(recipe: Recipe) -> Options:
    """What this toolkit notes of a run beside the job."""
    extras = recipe.extras
    chosen: Options = {}
    if extras.get("Precision"):
        chosen["precision"] = "full" if extras["Precision"] == "full" else "autocast"
    if extras.get("EMA") in ("on", "off"):
        chosen["ema"] = extras["EMA"]
    if extras.get("Fixed code") == "on" and recipe.job.seed_mode == "batch":
        chosen["fixed_code"] = None
    return chosen


def _loras(job: Job) -> list[str]:
    """Values of the option that takes LoRAs; the weights are always said, so that no name is taken for one."""
    return [f"{name}:{_number(weight)}:{_number(on_text)}" for name, weight, on_text in job.loras]


# --- comparing ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Difference:
    """How far two pictures are apart: pixels that are equal in all channels, and the values' largest difference.

    `psnr` is the peak signal-to-noise ratio in decibels, infinite for equal pictures.
    """

    equal: int
    total: int
    largest: int
    psnr: float

    def __str__(self) -> str:
        if self.equal == self.total:
            return f"identical: all {self.total} pixels are equal"
        share = math.floor(1000 * self.equal / self.total) / 10
        return (
            f"different: {self.equal} of {self.total} pixels ({share:g}%) are equal, the largest difference is "
            f"{self.largest} of 255, PSNR {self.psnr:.1f} dB"
        )


def compare(first: np.ndarray, second: np.ndarray) -> Difference:
    """How far two uint8 pictures [H, W, 3] are apart. Raises InputError if their sizes differ."""
    import numpy as np

    if first.shape != second.shape:
        sizes = [f"{picture.shape[1]}x{picture.shape[0]}" for picture in (first, second)]
        raise InputError(f"pictures of {sizes[0]} and {sizes[1]} cannot be compared; make them the same size")
    apart = np.abs(first.astype(np.int16) - second)
    mean_square = float(np.square(apart, dtype=np.float64).mean())
    psnr = 10 * math.log10(255**2 / mean_square) if mean_square else math.inf
    equal = int((apart == 0).all(axis=-1).sum())
    return Difference(equal, apart[..., 0].size, int(apart.max()), psnr)


def describe_watermark(evidence: Evidence, text: str) -> str:
    """What a search for the watermark `text` found, in one line."""
    if evidence.chance < SURE:
        verdict = "is there"
    elif evidence.chance > UNSURE:
        verdict = "is not to be seen"
    else:
        verdict = "may be there"
    return (
        f"the watermark {printable(text)} {verdict}: {evidence.agreeing_bits} of {evidence.total_bits} bits agree, "
        f"which chance brings about in 1 of {1 / evidence.chance:.3g} pictures"
    )
