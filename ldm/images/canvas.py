"""Prepares the pixels that a job starts from: the resized image, its mask and outpainted borders."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from typing import Any, NoReturn

import numpy as np
from PIL import Image, ImageChops, ImageColor

from ldm.former import moved
from ldm.images.region import Region, region_around
from ldm.images.source import MAX_PIXELS, Source, read_image
from ldm.job import RESIZES, Init
from ldm.util import InputError, printable

logger = logging.getLogger(__name__)

_STEP = 8  # explicit sizes and outpainted borders are multiples of it


_SIDES = ("left", "top", "right", "bottom")

_Size = tuple[int, int]  # width, height
_Borders = tuple[int, int, int, int]  # left, top, right, bottom


@dataclass(frozen=True, eq=False, slots=True)
class Canvas:
    """The image that a job starts from: uint8 `pixels` [H, W, 3], and which of them are repainted.

    `repaint` is bool [H, W], True where pixels are repainted, or with levels how much they are, float32 from 0 to 1;
    None without a mask. `digest` and `mask_digest`
    are the SHA-256 of the files' bytes in hexadecimal ("" without a mask file). Each of `notes` names in one clause
    what was changed. A canvas that is only a part of the image around the mask has its place as `region`.
    """

    pixels: np.ndarray
    repaint: np.ndarray | None
    digest: str
    mask_digest: str
    notes: tuple[str, ...]
    region: Region | None = None

    @property
    def finished_size(self) -> tuple[int, int]:
        """Height and width of an image that is made on it, unless it is enlarged: those of the whole image."""
        height, width, _ = (self.pixels if self.region is None else self.region.pixels).shape
        return height, width


def open_canvas(init: Init, multiple: int = 32, mask_needed: bool = False, own_side: int = 512) -> Canvas:
    """Reads the image of `init`, upright and opaque, and resizes it and its mask.

    Sides that the user did not give are floored to `multiple`: with "none" the image is resized to them, as
    the original's img2img did. Lanczos for the image, bilinear for the mask, which gets the image's geometry
    (a mask of another size is first stretched to the image's) and repaints where it is at least half white.
    A mask that is transparent around one colour repaints where it is opaque. Padding is kept and outpainted
    borders are repainted, whether the mask is inverted or not.

    With `crop_to_mask` the image keeps its size, and the canvas is the region around the mask, resized to the width
    and height of `init`, or where these are None to `own_side`.

    Only pixels leave, no metadata of the files. Raises InputError for faults of the files and of `init`, and
    with `mask_needed` if nothing would be repainted.
    """
    background = _background(init.background)
    borders = _borders(init.outpaint)
    source = read_image(init.image)
    size, padding = source.color.size, init.crop_to_mask
    layout = _layout(size, init, multiple) if padding is None else _fitted(size, size, "none")
    mask, mask_digest, mask_notes = _mask(init, source)
    repaint = _repainted(mask, layout, init.mask_levels)
    if mask_needed and not any(borders):
        _require_something(init, repaint)
    notes = [*source.notes]
    if source.alpha is not None:
        notes.append(f"transparency laid on {printable(init.background)}")
    notes += [*layout.notes, *mask_notes, *_extremes(repaint)]
    notes += [
        f"outpainted by {b} instead of {a} pixels at the {side}"
        for side, a, b in zip(_SIDES, init.outpaint, borders, strict=True)
        if a != b
    ]
    placed = layout.place(_opaque(source, background), Image.Resampling.LANCZOS, background)
    whole = Canvas(
        _grown(np.asarray(placed), borders),
        _with_borders(repaint, layout.canvas, borders),
        source.digest,
        mask_digest,
        tuple(notes),
    )
    return whole if padding is None else _cropped(whole, init, padding, own_side)


def _cropped(whole: Canvas, init: Init, padding: int, own_side: int) -> Canvas:
    """The region of a canvas around its mask, at the size of `init`."""
    _check_sides(init)
    repaint = _require_something(init, whole.repaint)
    size = init.height or own_side, init.width or own_side
    region = region_around(whole.pixels, repaint, padding, size)
    height, width = region.size
    note = f"{width}x{height} around the mask are made at {size[1]}x{size[0]}"
    pixels, repaint = region.cut(whole.pixels, size), region.cut(repaint, size)
    return replace(whole, pixels=pixels, repaint=repaint, notes=(*whole.notes, note), region=region)


def fit_image(path: str, size: _Size, resize: str, background: tuple[int, int, int]) -> np.ndarray:
    """An image file's pixels [H, W, 3] at width and height `size`, fitted as `resize` has it."""
    source = read_image(path)
    layout = _fitted(source.color.size, size, resize)
    return np.asarray(layout.place(_opaque(source, background), Image.Resampling.LANCZOS, background))


def _background(name: str) -> tuple[int, int, int]:
    try:
        color = ImageColor.getrgb(name)
    except ValueError:
        color = ()
    if len(color) != 3:  # four with an alpha channel
        raise InputError(
            f"--background: unknown colour {printable(name[:50])!r}; give a name such as white, or #rrggbb"
        )
    return color


def _borders(asked: _Borders) -> _Borders:
    if min(asked) < 0:
        raise InputError(
            f"outpaint is {asked}; give pixels at the left, top, right and bottom, 0 or more of each"
        )
    left, top, right, bottom = (-(-border // _STEP) * _STEP for border in asked)
    return left, top, right, bottom


@dataclass(frozen=True, slots=True)
class _Layout:
    """The placement of an image: its part `box` (left, top, right, bottom), scaled to `size`, centred on `canvas`."""

    box: tuple[float, float, float, float]
    size: _Size
    canvas: _Size
    notes: tuple[str, ...]

    def place(
        self, image: Image.Image, resample: Image.Resampling, background: int | tuple[int, int, int]
    ) -> Image.Image:
        resized = image.resize(self.size, resample, box=self.box)
        if self.size == self.canvas:
            return resized
        frame = Image.new(image.mode, self.canvas, background)
        left, top = (round((outer - inner) / 2) for outer, inner in zip(self.canvas, self.size, strict=True))
        frame.paste(resized, (left, top))
        return frame


def _layout(size: _Size, init: Init, multiple: int) -> _Layout:
    _check_request(init)
    canvas = _canvas_size(size, init, multiple)
    if min(canvas) < 1:
        _refuse_small(size, init, multiple)
    _check_area(canvas, init)
    return _fitted(size, canvas, init.resize)


def _fitted(size: _Size, canvas: _Size, resize: str) -> _Layout:
    scales = [new / old for new, old in zip(canvas, size, strict=True)]
    box, inner = _centre(size, size), canvas
    if resize == "fill":
        box = _centre(size, (canvas[0] / max(scales), canvas[1] / max(scales)))
    elif resize == "pad":
        inner = (max(1, round(size[0] * min(scales))), max(1, round(size[1] * min(scales))))
    return _Layout(box, inner, canvas, _size_notes(size, canvas, resize))


def _check_request(init: Init) -> None:
    if init.resize not in RESIZES:
        raise InputError(
            f"no way to resize is called {printable(init.resize)!r}; there are {', '.join(RESIZES)}"
        )
    for name, side in (("W", init.width), ("H", init.height)):
        if side is None:
            continue
        if init.resize == "none":
            raise InputError(f"--{name} {side} needs a way to resize: {', '.join(RESIZES[:-1])}")
    _check_sides(init)


def _check_sides(init: Init) -> None:
    for name, side in (("W", init.width), ("H", init.height)):
        if side is None:
            continue
        below = side // _STEP * _STEP
        nearest = f"{below} or {below + _STEP}" if below >= _STEP else str(_STEP)
        if side < 1:
            raise InputError(f"--{name} is {side}; give a multiple of {_STEP}, at least {_STEP}")
        if side % _STEP:
            raise InputError(f"--{name} is {side}, not a multiple of {_STEP}; use {nearest}")


def _canvas_size(size: _Size, init: Init, multiple: int) -> _Size:
    """Returns the size before outpainting; a side is 0 where flooring leaves nothing."""
    width, height = (side - side % multiple for side in _in_proportion(size, init.width, init.height))
    if init.resize == "fit":
        return width, height
    return init.width or width, init.height or height


def _in_proportion(size: _Size, width: int | None, height: int | None) -> _Size:
    """Returns the largest size in the proportions of `size` within `width` and `height`; `size` if both are None."""
    if height is not None and (width is None or height * size[0] <= width * size[1]):
        return size[0] * height // size[1], height
    if width is not None:
        return width, size[1] * width // size[0]
    return size


def _refuse_small(size: _Size, init: Init, multiple: int) -> NoReturn:
    path, extent = printable(init.image), f"{size[0]}x{size[1]}"
    if init.width is None and init.height is None:
        raise InputError(f"{path}: too small ({extent}); at least {multiple}x{multiple}")
    raise InputError(
        f"{path}: too narrow ({extent}): a side would be under {multiple}; give a larger --W and --H"
    )


def _check_area(canvas: _Size, init: Init) -> None:
    left, top, right, bottom = init.outpaint
    width, height = canvas[0] + left + right, canvas[1] + top + bottom
    if width * height > MAX_PIXELS:
        raise InputError(
            f"a canvas of {width}x{height} is asked for; the most is {MAX_PIXELS // 10**6} megapixels"
        )


def _centre(size: _Size, part: tuple[float, float]) -> tuple[float, float, float, float]:
    left, top = (max(0.0, (whole - inner) / 2) for whole, inner in zip(size, part, strict=True))
    return left, top, size[0] - left, size[1] - top


def _size_notes(size: _Size, canvas: _Size, resize: str) -> tuple[str, ...]:
    if size == canvas:
        return ()
    old, new = f"{size[0]}x{size[1]}", f"{canvas[0]}x{canvas[1]}"
    return (f"{old} floored to {new}",) if resize == "none" else (f"resized from {old} to {new} ({resize})",)


def _opaque(source: Source, background: tuple[int, int, int]) -> Image.Image:
    if source.alpha is None:
        return source.color
    return Image.composite(source.color, Image.new("RGB", source.color.size, background), source.alpha)


def _mask(init: Init, source: Source) -> tuple[Image.Image | None, str, list[str]]:
    """Returns the grey mask at the image's size (white is repainted; None without one), its digest, and notes."""
    notes: list[str] = []
    digest = ""
    if init.mask:
        given = read_image(init.mask)
        notes += [f"mask: {note}" for note in given.notes]
        digest = given.digest
        mask = _grey(given)
        if mask.size != source.color.size:
            old, new = (f"{width}x{height}" for width, height in (mask.size, source.color.size))
            notes.append(f"mask of {old} resized to the image's {new}")
            mask = mask.resize(source.color.size, Image.Resampling.BILINEAR)
    elif init.alpha_mask and source.alpha is not None:
        mask = ImageChops.invert(source.alpha)
    else:
        missed = init.alpha_mask and not any(init.outpaint)
        return None, "", ["no transparency to use as the mask"] if missed else []
    return ImageChops.invert(mask) if init.invert_mask else mask, digest, notes


def _grey(mask: Source) -> Image.Image:
    """Returns a mask's luminance on black, or its alpha channel if all visible pixels have one colour."""
    if mask.alpha is None:
        return mask.color.convert("L")
    visible = np.asarray(mask.color)[np.asarray(mask.alpha) > 0]
    if (visible == visible[:1]).all():
        return mask.alpha
    return ImageChops.multiply(mask.color.convert("L"), mask.alpha)


def _repainted(mask: Image.Image | None, layout: _Layout, levels: bool) -> np.ndarray | None:
    """Returns the pixels whose mask is at least half white, as bool [H, W] in the layout; or how white it is."""
    if mask is None:
        return None
    grey = np.asarray(layout.place(mask, Image.Resampling.BILINEAR, 0))
    return grey.astype(np.float32) / 255 if levels else grey >= 128


def _require_something(init: Init, repaint: np.ndarray | None) -> np.ndarray:
    if repaint is None and init.alpha_mask:
        raise InputError(f"{printable(init.image)}: has no transparency to use as the mask; give --mask")
    if repaint is None:
        raise InputError(f"{printable(init.image)}: needs a mask; give --mask, whose white is repainted")
    if not repaint.any():
        raise InputError(
            f"{printable(init.mask or init.image)}: the mask repaints nothing; its white is repainted"
        )
    return repaint


def _extremes(repaint: np.ndarray | None) -> list[str]:
    if repaint is None or (repaint.any() and not repaint.all()):
        return []
    return [f"the mask repaints {'everything' if repaint.all() else 'nothing'}"]


def _grown(pixels: np.ndarray, borders: _Borders) -> np.ndarray:
    """Returns `pixels` with borders that repeat the nearest pixel of the edge, contiguous and writable."""
    left, top, right, bottom = borders
    return np.pad(pixels, ((top, bottom), (left, right), (0, 0)), mode="edge")


def _with_borders(repaint: np.ndarray | None, size: _Size, borders: _Borders) -> np.ndarray | None:
    if not any(borders):
        return repaint
    left, top, right, bottom = borders
    inner = np.zeros(size[::-1], bool) if repaint is None else repaint
    return np.pad(inner, ((top, bottom), (left, right)), constant_values=True)


def __getattr__(name: str) -> Any:
    """Returns what was here in earlier commits."""
    return moved(__name__, name)
