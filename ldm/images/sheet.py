"""Labelled contact sheets: images in a table whose rows and columns have names."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from ldm.images.grid import MAX_PAGE_PIXELS
from ldm.util import InputError, printable

Box = tuple[int, int, int, int]  # left, top, right, bottom in pixels; right and bottom are exclusive

PADDING = 6  # pixels between images, and around texts
FONT_SIZE = 16
LINE = 20  # pixels from line to line
MAX_ROW_LABEL = 220  # pixels across
MIN_COLUMN = 64  # pixels across, so that a name fits
MAX_LINES = 4
_MAX_CHARACTERS = 400  # of a label; more than any band can show
_CUT = "..."
_PAPER, _INK = (255, 255, 255), (0, 0, 0)


@dataclass(frozen=True, slots=True)
class Layout:
    """The boxes of all images, row by row, and of the labels on a sheet of `size` (width, height)."""

    size: tuple[int, int]
    title: Box
    rows: tuple[Box, ...]
    columns: tuple[Box, ...]
    images: tuple[Box, ...]


def sheet(
    images: Sequence[np.ndarray | None], rows: Sequence[str], columns: Sequence[str], title: str = ""
) -> Image.Image:
    """Draws uint8 images [H, W, 3], row by row, as a table on white, with names left of rows and above columns.

    Images keep their pixels; a smaller one is at the top left of its cell, and a cell whose image is None
    is white. Texts are wrapped, and cut where they do not fit; control characters in them are escaped.
    Raises InputError if the sheet would be larger than 67 million pixels.
    """
    placed = layout([None if p is None else (p.shape[1], p.shape[0]) for p in images], rows, columns, title)
    page = Image.new("RGB", placed.size, _PAPER)
    labels = (
        (title, placed.title),
        *zip(rows, placed.rows, strict=True),
        *zip(columns, placed.columns, strict=True),
    )
    for text, box in labels:
        _write(page, text, box)
    for image, box in zip(images, placed.images, strict=True):
        if image is not None:
            page.paste(Image.fromarray(image), box[:2])
    return page


def layout(
    sizes: Sequence[tuple[int, int] | None], rows: Sequence[str], columns: Sequence[str], title: str = ""
) -> Layout:
    """Returns where `sheet` places images of these sizes (width, height)."""
    if len(sizes) != len(rows) * len(columns) or not sizes:
        raise ValueError(f"{len(sizes)} images do not fill {len(rows)} rows of {len(columns)} columns")
    table = [
        [size or (0, 0) for size in sizes[i : i + len(columns)]] for i in range(0, len(sizes), len(columns))
    ]
    widths = [max(*(row[j][0] for row in table), MIN_COLUMN) for j in range(len(columns))]
    heights = [max(max(height for _, height in row), LINE if any(rows) else 0) for row in table]
    beside = _widest(rows)
    left = beside + PADDING if beside else 0
    lefts = _starts(left, widths)
    top = _band([title], sum(widths) + left)
    head = top + max(_band([text], width) for text, width in zip(columns, widths, strict=True))
    tops = _starts(head, heights)
    width, height = lefts[-1] + widths[-1] + PADDING, tops[-1] + heights[-1] + PADDING
    if width * height > MAX_PAGE_PIXELS:
        raise InputError(
            f"a sheet of {len(rows)} by {len(columns)} images has {width}x{height} pixels, more than "
            f"{MAX_PAGE_PIXELS // 10**6} million; make a smaller one"
        )
    return Layout(
        (width, height),
        (PADDING, 0, width, top),
        tuple((PADDING, y, left, y + h) for y, h in zip(tops, heights, strict=True)),
        tuple((x, top, x + w, head) for x, w in zip(lefts, widths, strict=True)),
        tuple(
            (x, y, x + w, y + h)
            for y, row in zip(tops, table, strict=True)
            for x, (w, h) in zip(lefts, row, strict=True)
        ),
    )


def _starts(first: int, lengths: Sequence[int]) -> list[int]:
    """Returns the start of each of these lengths laid out in sequence, with padding before each."""
    return list(accumulate((length + PADDING for length in lengths[:-1]), initial=first + PADDING))


def _widest(labels: Sequence[str]) -> int:
    """Returns the width in pixels of the row names."""
    return max(min(int(_length(_plain(label))) + 1, MAX_ROW_LABEL) if label else 0 for label in labels)


def _band(labels: Sequence[str], width: int) -> int:
    """Returns the height in pixels of the labels, wrapped to at most `width` pixels."""
    lines = max(len(wrap(label, width, MAX_LINES)) for label in labels)
    return lines * LINE + PADDING if lines else 0


def wrap(text: str, width: int, lines: int) -> list[str]:
    """Wraps `text` to at most `lines` lines of at most `width` pixels; the last one shows whether text was cut."""
    rest = _plain(text)
    done: list[str] = []
    while rest and len(done) < lines:
        fitting = _fitting(rest, width)
        last = len(done) == lines - 1
        if len(fitting) < len(rest) and last:
            fitting = _fitting(rest, width - int(_length(_CUT)) - 1)
            return [*done, f"{fitting.rstrip()}{_CUT}"]
        space = fitting.rfind(" ")
        if len(fitting) < len(rest) and rest[len(fitting)] != " " and space > 0:
            fitting = fitting[:space]
        done.append(fitting.rstrip())
        rest = rest[len(fitting) :].lstrip()
    return done


def _fitting(text: str, width: int) -> str:
    """Returns the longest prefix of a text that is at most `width` pixels wide, at least one character."""
    low, high = 1, len(text)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if _length(text[:middle]) <= width else (low, middle - 1)
    return text[:low]


def _plain(text: str) -> str:
    return printable(" ".join(text[:_MAX_CHARACTERS].split()))


@lru_cache(maxsize=1)
def _font() -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(FONT_SIZE)


def _length(text: str) -> float:
    return _font().getlength(text)


def _write(page: Image.Image, text: str, box: Box) -> None:
    """Draws a text inside its box and nowhere else."""
    left, top, right, bottom = box
    lines = wrap(text, right - left, min(MAX_LINES, (bottom - top) // LINE))
    if not lines:
        return
    band = Image.new("RGB", (right - left, bottom - top), _PAPER)
    draw = ImageDraw.Draw(band)
    for i, line in enumerate(lines):
        draw.text((0, i * LINE), line, fill=_INK, font=_font())
    page.paste(band, (left, top))
