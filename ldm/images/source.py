"""Reads image files of several formats, bit depths and colour profiles as plain 8-bit pixels."""

from __future__ import annotations

import hashlib
import io
import logging
import os
import stat
import struct
import warnings
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Literal, cast

import numpy as np
from PIL import Image, ImageCms, UnidentifiedImageError

from ldm.files import guarded
from ldm.job import MemoryImage
from ldm.util import InputError, printable

logger = logging.getLogger(__name__)

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF")  # of some forty parsers that Pillow would try
EXTENSIONS = (
    ".png", ".apng", ".jpg", ".jpeg", ".jpe", ".jfif", ".jfi", ".jif", ".webp", ".bmp", ".dib", ".tif", ".tiff",
)  # fmt: skip
MAX_PIXELS = 64_000_000
_MAX_BYTES = 2**30
_READABLE = "give a PNG, JPEG, WEBP, BMP or TIFF file"

_ORIENTATION = 0x0112
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

# Signature at the start of a file and the format's name: formats that are recognised only to be named in errors.
_FOREIGN = (
    (b"GIF8", "is a GIF"),
    (b"%PDF", "is a PDF document"),
    (b"%!PS", "is a PostScript document"),
    (b"8BPS", "is a Photoshop document"),
    (b"<svg", "is an SVG drawing"),
    (b"<?xml", "is an XML document (an SVG drawing?)"),
    (b"<!doctype", "is a web page"),
    (b"<html", "is a web page"),
    (b"PK\x03\x04", "is a zip archive"),
)
_OWN = (b"\x89PNG", b"\xff\xd8\xff", b"RIFF", b"BM", b"II*\x00", b"MM\x00*")


@dataclass(frozen=True, eq=False, slots=True)
class Source:
    """An image file's pixels, upright: `color` (RGB) and `alpha` (L, 255 is opaque; None if all of it is).

    `digest` is the SHA-256 of the file's bytes in hexadecimal; each of `notes` names one thing that was changed.
    The colours under transparent parts are as the file has them.
    """

    color: Image.Image
    alpha: Image.Image | None
    digest: str
    notes: tuple[str, ...]


def read_image(path: str) -> Source:
    """Reads a PNG, JPEG, WEBP, BMP or TIFF file, identified by its content, into upright 8-bit pixels.

    Of several frames the first is used. EXIF's orientation is applied (also where only the file's XMP has it).
    Whole numbers of 16 bits are divided by 257; floating-point ones must be in [0, 1]. Colours with an embedded
    ICC profile (RGB and CMYK; phones' Display P3) become sRGB; a profile that Pillow cannot use is ignored, and
    one that is sRGB already changes nothing. No other metadata is read, and none is returned.

    Every fault of the file is an `InputError` of one line: more than 64 megapixels (by the header, before
    anything is decoded) and any truncation or damage that the format can show.
    """
    with reading(path):
        data = read_bytes(path)
        image, turn, notes = _decode(data)
        color, alpha = _split(image, notes)
        if turn in _TURNS:
            color = color.transpose(_TURNS[turn])
            alpha = None if alpha is None else alpha.transpose(_TURNS[turn])
        return Source(color, alpha, hashlib.sha256(data).hexdigest(), tuple(notes))


def reading(path: str) -> AbstractContextManager[None]:
    """Turns any exception raised inside into an `InputError` of one line that begins with the path."""
    return guarded(path, _damage)


def _damage(error: Exception) -> str:
    if isinstance(error, (Image.DecompressionBombError, Image.DecompressionBombWarning)):
        return f"has more than {MAX_PIXELS // 10**6} megapixels; make it smaller first"
    if "MAX_TEXT" in str(error):
        return "holds text that inflates too far; save the image again without its metadata"
    if "truncated" in str(error).lower():
        return "is truncated; get the whole file"
    return f"is damaged ({type(error).__name__}: {error}); save or download it again"


def read_bytes(path: str) -> bytes:
    """Reads a regular file of up to 1 GiB; a folder, pipe or device is refused, so that it cannot block.

    Call it inside `reading`: its `InputError` does not name the file.
    """
    if isinstance(path, MemoryImage):
        return path.data
    status = os.stat(path)
    if stat.S_ISDIR(status.st_mode):
        raise InputError("is a directory; give the image inside it")
    if not stat.S_ISREG(status.st_mode):
        raise InputError("is a pipe, socket or device, not a regular file")
    if not 0 < status.st_size <= _MAX_BYTES:
        size = (
            f"has {status.st_size:,} bytes, more than {_MAX_BYTES:,}"
            if status.st_size
            else "is empty (0 bytes)"
        )
        raise InputError(f"{size}; {_READABLE}")
    with open(path, "rb") as file:
        return file.read()


def _decode(data: bytes) -> tuple[Image.Image, int, list[str]]:
    """Returns the decoded first frame, the EXIF orientation that is still to be applied, and notes."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about odd metadata: only the pixels matter
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        image = open_image(data)
        width, height = image.size
        if width * height > MAX_PIXELS:
            raise InputError(
                f"is {width}x{height}, more than {MAX_PIXELS // 10**6} megapixels; make it smaller first"
            )
        if image.format == "PNG":
            open_image(data).verify()  # all checksums; decoding alone overlooks a flipped bit at the end
        stored = _orientation(image) if image.format == "TIFF" else 1  # Pillow itself turns these
        image.load()
        turn = _orientation(image)
    notes = ["took the first frame only"] if getattr(image, "is_animated", False) else []
    if max(stored, turn) in _TURNS:
        notes.append(f"turned upright (EXIF orientation {max(stored, turn)})")
    return image, turn, notes


def open_image(data: bytes, formats: tuple[str, ...] = FORMATS) -> Image.Image:
    """Opens an image file: its header is read and its pixels are not yet decoded.

    Call it inside `reading`: a file of another format is an `InputError` that names the format, but not
    the file.
    """
    try:
        return Image.open(io.BytesIO(data), formats=formats)
    except UnidentifiedImageError:
        raise InputError(_foreign(data)) from None


def _foreign(data: bytes) -> str:
    if data.startswith(_OWN):
        return "is truncated or damaged: its header cannot be read; get the whole file"
    if data[4:8] == b"ftyp":
        return f"is a HEIC, AVIF or video file; {_READABLE}"
    head = data[:64].lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    what = next((what for start, what in _FOREIGN if head.startswith(start.lower())), "is not an image")
    return f"{what}; {_READABLE}"


def _orientation(image: Image.Image) -> int:
    """Returns EXIF's orientation, 1 to 8; 1 if the file has none or its EXIF block cannot be read."""
    try:
        value = image.getexif().get(_ORIENTATION, 1)
    except (SyntaxError, ValueError, TypeError, LookupError, OSError, struct.error) as error:
        logger.debug("EXIF ignored: %s", printable(error))
        return 1
    return value if value in _TURNS else 1


def _split(image: Image.Image, notes: list[str]) -> tuple[Image.Image, Image.Image | None]:
    """Returns the colours in RGB, and the alpha channel unless it is opaque throughout."""
    if image.mode == "F" or image.mode.startswith("I"):
        return _split_numbers(image, notes)
    alpha = None
    colors = image
    if image.has_transparency_data:
        colors = (image.convert("LA") if image.mode == "La" else image).convert("RGBA")
        alpha = colors.getchannel("A")
        colors = colors.convert("RGB")
    return _srgb(colors, image.info.get("icc_profile"), notes), _unless_opaque(alpha)


def _split_numbers(image: Image.Image, notes: list[str]) -> tuple[Image.Image, Image.Image | None]:
    """Does the same as `_split` for one channel of more than 8 bits, which Pillow would clamp instead of scaling."""
    values = np.asarray(image)
    top = 1 if image.mode == "F" else 65535
    if not (values.min() >= 0 and values.max() <= top):  # NaN is refused too
        raise InputError(
            f"holds numbers from {values.min():g} to {values.max():g}; scale them to 0..{top}, or save it with 8 bits"
        )
    if image.mode == "F":
        grey = np.rint(values * 255)
        notes.append("floating-point values scaled to 8 bits")
    else:
        grey = (values.astype(np.uint32) + 128) // 257
        notes.append("16-bit values scaled to 8 bits")
    alpha = None
    if "transparency" in image.info:
        alpha = Image.fromarray(np.where(values == image.info["transparency"], 0, 255).astype(np.uint8))
    return Image.fromarray(grey.astype(np.uint8)).convert("RGB"), _unless_opaque(alpha)


def _unless_opaque(alpha: Image.Image | None) -> Image.Image | None:
    return None if alpha is None or alpha.getextrema() == (255, 255) else alpha


def _srgb(image: Image.Image, profile: bytes | None, notes: list[str]) -> Image.Image:
    """Returns `image` in RGB, converted from its profile where that is usable and is not sRGB."""
    if image.mode != "LAB" and not (profile and image.mode in ("RGB", "CMYK")):
        return image.convert("RGB")
    try:
        transform = _transform(image.mode, profile)
        if image.mode == "RGB" and _changes_nothing(transform):
            return image
        converted = ImageCms.applyTransform(image, transform)
    except (ImageCms.PyCMSError, OSError, ImportError) as error:  # or a Pillow without littleCMS
        if image.mode == "LAB":
            raise InputError(f"is in Lab colours, which cannot be read here; {_READABLE} in RGB") from error
        logger.debug("ICC profile ignored: %s", printable(error))
        return image.convert("RGB")
    if converted is None:
        raise ValueError("a transform that is not in place returns its image")
    if image.mode != "LAB":
        notes.append("colours converted from the file's ICC profile to sRGB")
    return converted


def _transform(mode: str, profile: bytes | None) -> ImageCms.ImageCmsTransform:
    if mode == "LAB":
        source = _profile("LAB")
    else:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile or b""))
    return ImageCms.buildTransform(source, _profile("sRGB"), mode, "RGB")


def _profile(space: Literal["LAB", "sRGB"]) -> ImageCms.ImageCmsProfile:
    return ImageCms.ImageCmsProfile(cast("Any", ImageCms.createProfile(space)))


def _changes_nothing(transform: ImageCms.ImageCmsTransform) -> bool:
    """Returns whether the profile is sRGB under some name: it moves no colour of the cube by more than 2 of 255."""
    levels = np.arange(0, 256, 51, dtype=np.uint8)
    cube = np.stack(np.meshgrid(levels, levels, levels), axis=-1).reshape(6, 36, 3)
    converted = np.asarray(ImageCms.applyTransform(Image.fromarray(cube), transform))
    return int(np.abs(converted.astype(int) - cube).max()) <= 2
