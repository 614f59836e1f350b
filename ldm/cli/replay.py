"""A picture made again: the command that does it, and how two pictures or a watermark compare.

Nothing here prints, loads a model or touches a file.
"""

from __future__ import annotations

import argparse
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

Options = dict[
    str, str | list[str] | None
]  # by name without dashes; None for a switch, a list for several values
Changes = Mapping[str, str | list[str] | None]

_REPEATED = ("lora", "embedding", "allow_targets")  # options that are given once for each value
_SAMPLERS = ("plms", "dpm_solver")


def options(recipe: Recipe, changes: Changes) -> tuple[str, Options]:
    """The script that makes a recipe's picture again, and its options; defaults of a job are left out.

    Of `changes` the size of its batch counts here, which says how many batches there are. What the script cannot
    know from the file stays open: which checkpoint `Recipe.model` is, and in which folder the picture, the mask and
    the LoRAs lie that are named. A picture that was made in a batch is made in one of
    that size again, at its place there, since the sums' last bits depend on both (not on what else is in it); of the
    run's samples `place(recipe)` is the picture.
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
        {"ddim_eta": "eta", "timestep_spacing": "timestep_spacing", "rng": "rng", "seed_mode": "seed_mode"}
        | {"prompt_syntax": "prompt_syntax"},
    )
    chosen |= _count(recipe, changes)
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


def place(recipe: Recipe, changes: Changes | None = None) -> int:
    """Which of the samples of a recipe's command is the picture, from 0."""
    if recipe.job.seed_mode == "batch":
        return recipe.job.batch_index
    entry = recipe.extras.get("Batch pos", "0")
    inside = re.fullmatch("[0-9]{1,5}", entry) and int(entry) < _batch_size(recipe, {})
    return int(entry) if inside and "n_samples" not in (changes or {}) else 0


def count(recipe: Recipe, changes: Changes) -> int:
    """How many pictures a recipe's command makes: whole batches of the recorded size, up to the picture's."""
    per_batch = _batch_size(recipe, changes)
    return (place(recipe, changes) // per_batch + 1) * per_batch


def _batch_size(recipe: Recipe, changes: Changes) -> int:
    size = str(changes.get("n_samples", recipe.extras.get("Batch size", "1")))
    if re.fullmatch("[1-9][0-9]{0,4}", size):
        return int(size)
    if "n_samples" in changes:
        raise InputError(f"--n_samples is {printable(size)[:50]}; give 1 to 99999")
    return 1


def _first_seed(recipe: Recipe, seed: str, changes: Changes) -> str:
    """The seed of a command's first picture where the picture at its place has `seed`; seeds count up."""
    if recipe.job.seed_mode == "batch" or not re.fullmatch("[0-9]{1,10}", seed):
        return seed
    return str((int(seed) - place(recipe, changes)) % 2**32) if int(seed) < 2**32 else seed


def command(recipe: Recipe, changes: Changes | None = None, drop: Sequence[str] = ()) -> str:
    """The command line that makes a recipe's picture again, on one line that can be pasted into bash or zsh.

    See `arguments`.
    """
    script, typed = arguments(recipe, changes or {}, drop)
    return " ".join(map(quoted, ["python", f"scripts/{script}.py", *typed]))


def arguments(recipe: Recipe, changes: Changes, drop: Sequence[str] = ()) -> tuple[str, list[str]]:
    """The script that makes a recipe's picture again, and what is typed behind its name.

    `changes` replace or add options, `drop` leaves some out. A picture or mask to start from changes the script.
    The job's LoRAs are options of their own, whose files are expected to lie where the command runs, or with
    `lora_dir` among the changes tags in the prompt; `lora` among them replaces them all.
    """
    script, chosen = options(recipe, changes)
    loras = recipe.job.loras
    if "lora_dir" in changes and "lora" not in changes and loras:
        tags = "".join(lora_tag(*lora) for lora in loras)
        chosen["prompt"] = " ".join(filter(None, [recipe.job.prompt, tags]))
    elif loras:
        chosen["lora"] = [lora_option(*lora) for lora in loras]
    if not changes.keys().isdisjoint(_SAMPLERS):
        chosen = {name: value for name, value in chosen.items() if name not in _SAMPLERS}
    if "mask" in changes:
        script = "inpaint"
    elif "init_img" in changes and script == "txt2img":
        script = "img2img"
    kept = {name: value for name, value in {**chosen, **changes}.items() if name not in drop}
    if isinstance(seed := kept.get("seed"), str):
        kept["seed"] = _first_seed(recipe, seed, changes)
    return script, _arguments(kept)


def lora_option(file: str, weight: float, on_text: float) -> str:
    """A value of the option that takes LoRAs; the weights are always said, so that no name is taken for one."""
    return f"{file}:{_number(weight)}:{_number(on_text)}"


def as_changes(parser: argparse.ArgumentParser) -> None:
    """Makes the options that a parser has so far changes: only what is typed is kept, as text."""
    parser._defaults.clear()
    for action in parser._actions:
        action.type, action.default = None, argparse.SUPPRESS


def changes_of(typed: Mapping[str, object]) -> Options:
    """What such a parser kept, as options."""
    return {
        name: value if isinstance(value, list) else None if value is True else str(value)
        for name, value in typed.items()
    }


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
    typed: list[str] = []
    for name, value in chosen.items():
        option = "--" + {"init_img": "init-img", "from_file": "from-file"}.get(name, name)
        if value is None:
            typed.append(option)
        elif isinstance(value, list) and name in _REPEATED:
            typed += [f"{option}={one}" for one in value]
        else:
            first, *rest = value if isinstance(value, list) else [value]
            typed += [*([f"{option}={first}"] if first.startswith("-") else [option, first]), *rest]
    return typed


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


def _count(recipe: Recipe, changes: Changes) -> Options:
    """One batch of the recorded size, or with one stream of noise as many as there are up to the picture's."""
    per_batch = _batch_size(recipe, changes)
    n_iter = count(recipe, changes) // per_batch
    return {"n_samples": str(per_batch), "n_iter": str(n_iter), "skip_grid": None}


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
    if extras.get("Watermark") == "off":
        chosen["no_watermark"] = None
    if extras.get("Tiles") == "approximate":
        chosen["tiles"] = "on"
    return chosen


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
