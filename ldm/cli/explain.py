"""Shows how an image was made: the command for it, what can differ, and its watermark. Makes nothing."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ldm import __version__
from ldm.cli.changes import changed, texts_of
from ldm.job_values import values_of_options
from ldm.metadata.command import IN_A_STREAM, MAX_BATCH, arguments, command, count, place, recorded_batch
from ldm.util import InputError, printable

if TYPE_CHECKING:
    import numpy as np

    from ldm.images.watermark import Evidence
    from ldm.metadata.read import Recipe

SURE = 1e-6  # below this probability, a watermark is not explained by chance
UNSURE = 1e-2  # above it, chance is a good explanation


def show(file: Path, recipe: Recipe, typed: Mapping[str, Any], as_json: bool) -> int:
    """Prints the content of a file, without searching for anything but its watermark."""
    recipe = replace(recipe, job=changed(recipe.job, typed))
    changes = texts_of({name: value for name, value in typed.items() if not values_of_options({name: value})})
    script, words = arguments(recipe, changes)
    line = command(recipe, changes)
    samples, sample = count(recipe, changes), place(recipe, changes)
    watermark = _watermark(file, script)
    notes = [*batch_notes(recipe, changes), *_command_notes(recipe), *recipe.notes]
    if as_json:
        fields = {
            "file": str(file),
            "source": recipe.source,
            "command": line,
            "script": script,
            "arguments": words,
        }
        fields |= {"samples": samples, "sample": sample, "model": recipe.model}
        fields |= {"model_hash": recipe.model_hash, "notes": notes, "watermark": watermark}
        print(json.dumps(fields))
        return 0
    print(f"{printable(file)}: made by {_maker(recipe)}\n  {line}")
    others = [f"this makes {samples} images; sample {sample:05d} is this one"] if samples > 1 else []
    for note in (*others, *notes, watermark["found"]):
        print(f"  {note}")
    return 0


def _command_notes(recipe: Recipe) -> list[str]:
    """Returns notes on why the command alone may not make the same image."""
    if recipe.job.seed_mode == "image" or "Stream" not in recipe.extras:
        return stream_notes(recipe)
    return [IN_A_STREAM]


def _maker(recipe: Recipe) -> str:
    if recipe.source != "ldm":
        return recipe.source
    version = printable(recipe.extras.get("Version", "").removeprefix("ldm "))[:20]
    return f"this toolkit ({version or __version__})"


def batch_notes(recipe: Recipe, changes: Mapping[str, Any]) -> list[str]:
    """Returns notes on a recorded batch that cannot be repeated."""
    size = recorded_batch(recipe)
    if size <= MAX_BATCH or "n_samples" in changes:
        return []
    return [f"its file asks for a batch of {size}; it is made alone, so the last bits can differ"]


def stream_notes(recipe: Recipe) -> list[str]:
    """Returns notes on the unknown rest of a run whose one stream of noise an image was part of."""
    if recipe.job.seed_mode == "image" or recipe.source != "ldm" or "Stream" in recipe.extras:
        return []
    return [
        "its file does not say what its run drew before it from the one stream of --seed_mode batch; it is the "
        "same image only if all images of the run had its size and settings and came in full batches"
    ]


def _watermark(file: Path, script: str) -> dict[str, object]:
    from ldm.images.watermark import INPAINTING_TEXT, TEXT, detect

    text = INPAINTING_TEXT if script == "inpaint" else TEXT
    try:
        evidence = detect(pixels_of(file), text)
    except InputError as error:
        return {"text": text, "found": str(error)}
    return {"text": text, "found": describe_watermark(evidence, text), **evidence._asdict()}


def describe_watermark(evidence: Evidence, text: str) -> str:
    """Describes the result of a search for the watermark `text` in one line."""
    if evidence.chance < SURE:
        verdict = "is there"
    elif evidence.chance > UNSURE:
        verdict = "is not to be seen"
    else:
        verdict = "may be there"
    return (
        f"the watermark {printable(text)} {verdict}: {evidence.agreeing_bits} of {evidence.total_bits} bits agree, "
        f"which chance brings about in 1 of {1 / evidence.chance:.3g} images"
    )


def pixels_of(file: Path) -> np.ndarray:
    import numpy as np

    from ldm.images.source import read_image

    return np.asarray(read_image(str(file)).color)
