"""The texts that a picture file carries, by keyword, without decoding its pixels."""

from __future__ import annotations

import struct

from PIL import Image

from ldm.images.metadata import INFOTEXT_KEYWORD
from ldm.images.source import open_image, read_bytes, reading
from ldm.util import InputError

MAX_TEXT = 4_000_000  # characters; ComfyUI's graphs are the longest, some 100,000
_EXIF, _USER_COMMENT = 0x8769, 0x9286
_CODE_LENGTH = 8  # bytes that name the character set of a comment


def read_texts(path: str) -> tuple[dict[str, str], tuple[int, int]]:
    """A PNG's text chunks, and the EXIF comment of any picture as `parameters`, where the web UI puts it.

    With them comes the image's width and height in pixels.

    Raises InputError for a file that is no picture; text that is too long or cannot be decoded is left out.
    """
    with reading(path):
        image = open_image(read_bytes(path))
        if image.format not in ("PNG", "JPEG", "WEBP"):
            raise InputError(f"is a {image.format} file; give the PNG, JPEG or WEBP file that was generated")
        texts = _strings(image)
        if image.format == "PNG" and not texts:
            image.load()  # some programs put text behind the pixels
            texts = _strings(image)
        if comment := _comment(image):
            texts[INFOTEXT_KEYWORD] = comment
    return {key: text for key, text in texts.items() if len(text) <= MAX_TEXT}, image.size


def _strings(image: Image.Image) -> dict[str, str]:
    # Pillow's iTXt texts are of a class of their own
    return {str(key): str(text) for key, text in image.info.items() if isinstance(text, str)}


def _comment(image: Image.Image) -> str:
    """EXIF's UserComment, or nothing."""
    try:
        comment = image.getexif().get_ifd(_EXIF).get(_USER_COMMENT, b"")
    except (SyntaxError, ValueError, TypeError, LookupError, OSError, struct.error):
        return ""
    if not isinstance(comment, bytes):
        return comment if isinstance(comment, str) else ""
    return _decoded(comment[:_CODE_LENGTH], comment[_CODE_LENGTH:])


def _decoded(code: bytes, data: bytes) -> str:
    """A comment's text. UTF-16 is big-endian as the web UI has it, unless the other order gives more sense."""
    if code != b"UNICODE\0":
        named = code in (b"ASCII\0\0\0", bytes(_CODE_LENGTH))
        return (data if named else code + data).decode("utf-8", "replace")
    big, little = data.decode("utf-16-be", "replace"), data.decode("utf-16-le", "replace")
    return little if "Steps:" in little else big
