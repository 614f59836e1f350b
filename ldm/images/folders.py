"""Image files, and pairs of images and masks, in the folders that are given."""

from __future__ import annotations

import logging
import math
import os
import re
from collections.abc import Sequence

from ldm.images.source import EXTENSIONS
from ldm.util import InputError, printable

logger = logging.getLogger(__name__)

_MASK_ENDING = "_mask"
_MOST_NAMED = 5


def find_images(paths: Sequence[str]) -> list[str]:
    """Returns image files: files as given, and the images of a folder by extension, in natural order.

    Hidden files and masks (`NAME_mask.png`) of a folder are left out. Raises InputError for a path that does not
    exist and a folder without images.
    """
    return [
        image for path in paths for image in (_images_in(path) if os.path.isdir(path) else [_existing(path)])
    ]


def _images_in(folder: str) -> list[str]:
    names = [name for name in _image_names(folder) if not _stem(name).endswith(_MASK_ENDING)]
    if not names:
        raise InputError(f"{printable(folder)}: has no images ({', '.join(EXTENSIONS)})")
    return [os.path.join(folder, name) for name in names]


def _existing(path: str) -> str:
    if not os.path.lexists(path):
        raise InputError(f"{printable(path)}: no such file or folder; check the path")
    return path


def _image_names(folder: str) -> list[str]:
    """Returns the names of the images that are not hidden; img2 comes before img10."""
    try:
        with os.scandir(folder) as entries:
            files = [entry.name for entry in entries if not entry.name.startswith(".") and entry.is_file()]
    except OSError as error:
        raise InputError(f"{printable(folder)}: cannot be read: {error.strerror}; give a folder") from error
    names = sorted((name for name in files if name.lower().endswith(EXTENSIONS)), key=_natural)
    if left_out := sorted(set(files) - set(names), key=_natural):
        named = ", ".join(map(printable, left_out[:_MOST_NAMED]))
        more = ", ..." if len(left_out) > _MOST_NAMED else ""
        logger.info(
            "%s: %d files are not images by name and are left out: %s%s",
            printable(folder),
            len(left_out),
            named,
            more,
        )
    return names


def _natural(name: str) -> tuple[list[tuple[float, str]], str]:
    parts = re.findall(r"([0-9]+)|([^0-9]+)", name.casefold())
    return [(int(number) if number else math.inf, text) for number, text in parts], name


def _stem(name: str) -> str:
    return os.path.splitext(name)[0]


def find_pairs(folder: str) -> list[tuple[str, str]]:
    """Returns the images of a folder that have a mask in it: `NAME.*` and `NAME_mask.*`, in natural order.

    Images without a mask are skipped with one warning. Raises InputError for a folder without pairs and for a
    mask that does not belong to exactly one image.
    """
    names = _image_names(folder)
    masks = [name for name in names if _stem(name).endswith(_MASK_ENDING)]
    images = [name for name in names if name not in set(masks)]
    pairs = [(_image_of(mask, images, folder), mask) for mask in masks]
    if not pairs:
        raise InputError(f"{printable(folder)}: has no pairs of NAME.png and NAME{_MASK_ENDING}.png")
    _warn_of_single({image for image, _ in pairs}, images)
    return [(os.path.join(folder, image), os.path.join(folder, mask)) for image, mask in pairs]


def _image_of(mask: str, images: Sequence[str], folder: str) -> str:
    stem = _stem(mask).removesuffix(_MASK_ENDING)
    found = [name for name in images if _stem(name) == stem]
    if len(found) != 1:
        what = (
            f"belongs to several images: {', '.join(found)}" if found else f"has no image {stem}.* next to it"
        )
        raise InputError(f"{printable(os.path.join(folder, mask))}: {printable(what)}")
    return found[0]


def _warn_of_single(paired: set[str], images: Sequence[str]) -> None:
    single = [printable(name) for name in images if name not in paired]
    if single:
        more = ", ..." if len(single) > _MOST_NAMED else ""
        named = ", ".join(single[:_MOST_NAMED])
        logger.warning("%d images without a mask are skipped: %s%s", len(single), named, more)
