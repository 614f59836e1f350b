"""Reads images of this and other programs as jobs that can be repeated.

`read_job` finds the text that a program wrote into a PNG, JPEG or WebP file; each program's format has
a module here. Settings that this toolkit does not support are listed in the notes of the `Recipe`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial

from ldm.images.keywords import INFOTEXT_KEYWORD, RECORD_KEYWORD
from ldm.metadata import read_own as own
from ldm.metadata.foreign import comfyui, invokeai, programs, webui
from ldm.metadata.infotext import file_name
from ldm.metadata.recipe import Origin, Recipe
from ldm.metadata.record import FieldError
from ldm.metadata.texts import read_texts, read_texts_beside
from ldm.util import InputError, printable

__all__ = ["Recipe", "read_job"]

# The first keyword that a file has and that can be read is used. ComfyUI's graph comes before the infotext,
# since extensions of ComfyUI write both, and the graph determines how the noise was drawn.
_READERS: tuple[tuple[str, Callable[[str, Origin], Recipe]], ...] = (
    ("prompt", comfyui.read),
    (INFOTEXT_KEYWORD, webui.read),
    ("invokeai_metadata", invokeai.read_metadata),
    ("sd-metadata", invokeai.read_sd_metadata),
    ("Dream", invokeai.read_dream),
    ("workflow", comfyui.read),  # the editor's form, which is not read but named in the error
)
_KNOWN = (RECORD_KEYWORD, *(keyword for keyword, _ in _READERS))


def read_job(path: str) -> Recipe:
    """Reads how the image at `path` was made from the text in its file.

    Raises InputError, of one line that begins with the path, for a file that is not a PNG, JPEG or WebP image or
    that holds no known settings.
    """
    texts, size = read_texts(path, _KNOWN)
    origin = Origin(file_name(path), size)
    try:
        recipe, faults = _read(texts, origin)
        if recipe is None and not faults:
            name, texts = read_texts_beside(path)
            recipe, faults = _read(texts, origin)
            faults = [f"its settings are from {printable(name)}, next to it", *faults] if name else []
    except FieldError as error:  # a damaged or forged record is not replaced by another text
        raise InputError(f"{printable(path)}: {error}") from None
    if recipe is not None:
        return replace(recipe, notes=(*faults, *recipe.notes))
    reason = (
        "; ".join(faults) or "holds no generation settings; images lose them when they are edited or uploaded"
    )
    raise InputError(f"{printable(path)}: {reason}")


def _read(texts: Mapping[str, str], origin: Origin) -> tuple[Recipe | None, list[str]]:
    """Returns the recipe of the first of these texts that can be read, and the errors of those before it."""
    faults: list[str] = []
    for name, read in _ways(texts, origin):
        try:
            if recipe := read():
                return recipe, faults
        except FieldError:
            raise
        except InputError as error:
            faults.append(f"its text `{name}` is not used: {error}" if name else str(error))
    return None, faults


def _ways(texts: Mapping[str, str], origin: Origin) -> Iterator[tuple[str, Callable[[], Recipe | None]]]:
    """Yields the readers of these texts, the best first, each with the keyword of its text if there is one."""
    if RECORD_KEYWORD in texts:
        yield RECORD_KEYWORD, partial(own.read, texts[RECORD_KEYWORD], origin)
    yield "", partial(programs.read, texts, origin)
    for keyword, read in _READERS:
        if keyword in texts:
            yield keyword, partial(read, texts[keyword], origin)
