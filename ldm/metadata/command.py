"""Writes the command line that recreates an image, for people: no program of this toolkit reads it.

Nothing here prints, loads a model or touches a file.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from ldm.fields import DEFAULTS, FIELDS, MASK, SIZE, START, Field
from ldm.job import Job, lora_tag
from ldm.job_values import values_of
from ldm.metadata.recipe import Recipe
from ldm.places import is_checkout
from ldm.seeds import MAX_SEEDS, count_up
from ldm.util import InputError, printable

IN_A_STREAM = (
    "its noise is a part of the one stream of its run: the command makes the same image only if all images of the "
    "run had its size and settings and came in full batches; replay.py makes it exactly from its file"
)

Options = dict[
    str, str | list[str] | None
]  # by name without dashes; None for a switch, a list for several values
Changes = Mapping[str, str | list[str] | None]

_REPEATED = ("lora", "control", "embedding", "allow_targets")  # options that are given once for each value
_ALWAYS = ("prompt", "seed", "steps", "scale")  # fields whose options are always written
MAX_PLACE = 20_000  # images of a run whose noise can be drawn before that of the image
MAX_BATCH = 1_000  # the largest batch that a file can ask for


def options(recipe: Recipe, changes: Changes) -> tuple[str, Options]:
    """Returns the script that recreates a recipe's image, and its options; defaults of a job are left out.

    Of `changes` only the batch size matters here, which determines the number of batches. The file does not
    determine the checkpoint of `Recipe.model`, nor the folders of the image, the mask and the LoRAs.
    An image that was made in a batch is recreated in one of that size, at its place there, since rounding depends
    on both (not on the other images); of the run's samples, `place(recipe)` is the image.
    """
    job = recipe.job
    begins = job.init is not None or job.strength != 1
    written = (*_ALWAYS, "strength", "init.image") if begins else (*_ALWAYS, *SIZE)
    if job.init is not None and (job.init.width, job.init.height) != (None, None):
        written = (*written, "init.resize")
    held = values_of(job)
    chosen: Options = {}
    for row in FIELDS:
        value = held.get(row.name)
        if value is None or (row.name in SIZE if begins else row.group in (START, MASK)):
            continue
        if row.name in written or value != DEFAULTS[row.name]:
            chosen |= _option(row, value)
    if job.init is not None:
        sides = {"W": job.init.width, "H": job.init.height}
        chosen |= {option: str(side) for option, side in sides.items() if side is not None}
    chosen |= _count(recipe, changes)
    chosen |= {name: None if value is True else value for name, value in of_the_run(recipe).items()}
    return _script(job), chosen


def command_alone(recipe: Recipe) -> str:
    """Returns the command for a recipe's image alone, or with those before it where they share a noise stream."""
    return command(recipe, {} if recipe.job.seed_mode == "batch" else {"n_samples": "1"})


def remark_alone(recipe: Recipe) -> str:
    """Returns a remark on what may differ in the image of `command_alone`; empty if nothing does."""
    if recipe.job.seed_mode == "batch":
        return IN_A_STREAM
    if (size := recorded_batch(recipe)) == 1:
        return ""
    return f"made in a batch of {size}: alone, its last bits can differ; replay.py makes it exactly from its file"


def place(recipe: Recipe, changes: Changes | None = None) -> int:
    """Returns the index of the image among the samples of a recipe's command, from 0."""
    if recipe.job.seed_mode == "batch":
        return recipe.job.batch_index
    entry = recipe.extras.get("Batch pos", "0")
    inside = re.fullmatch("[0-9]{1,5}", entry) and int(entry) < batch_size(recipe, {})
    return int(entry) if inside and "n_samples" not in (changes or {}) else 0


def count(recipe: Recipe, changes: Changes) -> int:
    """Returns how many images a recipe's command makes: whole batches of the recorded size, up to the image's."""
    per_batch = batch_size(recipe, changes)
    return (place(recipe, changes) // per_batch + 1) * per_batch


def batch_size(recipe: Recipe, changes: Changes) -> int:
    """Returns the size of the batch in which a recipe's image is recreated."""
    if "n_samples" not in changes:
        size = recorded_batch(recipe)
        return size if size <= MAX_BATCH else 1
    size = str(changes["n_samples"])
    if re.fullmatch("[1-9][0-9]{0,4}", size):
        return int(size)
    raise InputError(f"--n_samples is {printable(size)[:50]}; give 1 to 99999")


def recorded_batch(recipe: Recipe) -> int:
    """Returns the batch size that a recipe's file records: an untrusted number."""
    size = recipe.extras.get("Batch size", "1")
    return int(size) if re.fullmatch("[1-9][0-9]{0,6}", size) else 1


def _first_seed(recipe: Recipe, seed: str, changes: Changes) -> str:
    """Returns the seed of a command's first image where the image at its place has `seed`; seeds count up."""
    rng = str(changes.get("rng", recipe.job.rng))
    if (
        recipe.job.seed_mode == "batch"
        or recipe.job.variation_strength
        or not re.fullmatch("[0-9]{1,20}", seed)
        or int(seed) > MAX_SEEDS[rng]
    ):
        return seed
    return str(count_up(int(seed), -place(recipe, changes), rng))


def command(recipe: Recipe, changes: Changes | None = None, drop: Sequence[str] = ()) -> str:
    """Returns the command that recreates a recipe's image, on one line that can be pasted into bash or zsh.

    See `arguments`.
    """
    script, typed = arguments(recipe, changes or {}, drop)
    return " ".join(map(quoted, [*_program(script), *typed]))


def _program(script: str) -> list[str]:
    """Returns a script of the checkout, or the same subcommand where the package is installed without one."""
    return ["python", f"scripts/{script}.py"] if is_checkout() else ["ldm", script]


def arguments(recipe: Recipe, changes: Changes, drop: Sequence[str] = ()) -> tuple[str, list[str]]:
    """Returns the script that recreates a recipe's image, and its arguments.

    `changes` replace or add options, `drop` leaves some out. The job's LoRAs are separate options, whose files
    are expected in the folder where the command runs. With `lora_dir` among the changes they are tags in the
    prompt instead; `lora` among the changes replaces them all.
    """
    script, chosen = options(recipe, changes)
    loras = recipe.job.loras
    if "lora_dir" in changes and "lora" not in changes and loras:
        tags = "".join(lora_tag(*lora) for lora in loras)
        chosen["prompt"] = " ".join(filter(None, [recipe.job.prompt, tags]))
    elif loras:
        chosen["lora"] = [lora_option(*lora) for lora in loras]
    kept = {name: value for name, value in {**chosen, **changes}.items() if name not in drop}
    if isinstance(seed := kept.get("seed"), str):
        kept["seed"] = _first_seed(recipe, seed, changes)
    if recipe.job.variation_strength and "variation_seed" not in changes:
        first = count_up(recipe.job.variation_seed, -place(recipe, changes), recipe.job.rng)
        kept["variation_seed"] = str(first)
    return script, _arguments(kept)


def lora_option(file: str, weight: float, on_text: float) -> str:
    """Returns a value of the option for LoRAs; the weights are always given, so that no name is read as one."""
    return f"{file}:{_number(weight)}:{_number(on_text)}"


def quoted(argument: str) -> str:
    """Quotes an argument for bash and zsh. Control characters, which a terminal might obey on pasting, are escaped.

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
    """Returns options as arguments; a value that begins with a dash is joined to its option by an equals sign."""
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


def _option(row: Field, value: Any) -> Options:
    """Returns the option that sets a field to a value: the switch for it, if there is one; none for some fields."""
    for switch in row.switches:
        if switch.value == value:
            return {switch.option: None}
    if row.entry is not None:
        return {row.dest: [row.entry_text(*entry) for entry in value]}
    return {row.dest: text_of(value)} if row.option else {}


def text_of(value: str | float | tuple[str | float, ...]) -> str:
    if isinstance(value, tuple):
        return ",".join(map(str, value))
    return _number(value) if isinstance(value, float) else str(value)


def _number(value: float) -> str:
    return repr(float(value)).removesuffix(".0")


def _count(recipe: Recipe, changes: Changes) -> Options:
    """Returns one batch of the recorded size, or with one noise stream per run all batches up to the image's."""
    per_batch = batch_size(recipe, changes)
    n_iter = count(recipe, changes) // per_batch
    return {"n_samples": str(per_batch), "n_iter": str(n_iter), "skip_grid": None}


def of_the_run(recipe: Recipe) -> dict[str, Any]:
    """Returns the options, parsed, that this toolkit records of a run besides the job."""
    extras = recipe.extras
    chosen: dict[str, Any] = {}
    if extras.get("Precision"):
        chosen["precision"] = extras["Precision"] if extras["Precision"] in ("full", "int8") else "autocast"
    if extras.get("EMA") in ("on", "off"):
        chosen["ema"] = extras["EMA"]
    if extras.get("Prediction") in ("eps", "v"):
        chosen["prediction"] = extras["Prediction"]
    if extras.get("Fixed code") == "on" and recipe.job.seed_mode == "batch":
        chosen["fixed_code"] = True
    if extras.get("Watermark") == "off":
        chosen["no_watermark"] = True
    if extras.get("Tiles") == "approximate":
        chosen["tiles"] = "on"
    return chosen
