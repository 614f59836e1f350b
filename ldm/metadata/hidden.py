"""Reads the text that NovelAI and web UI extensions hide in the lowest bits of an image's alpha or colours."""

from __future__ import annotations

import zlib

import numpy as np
from PIL import Image

from ldm.images.source import MAX_PIXELS

_MARKS = {
    b"stealth_pnginfo": ("A", False), b"stealth_pngcomp": ("A", True),
    b"stealth_rgbinfo": ("RGB", False), b"stealth_rgbcomp": ("RGB", True),
}  # fmt: skip
_MARK_LENGTH, _COUNT_LENGTH = 15, 4
_GZIP = 31  # zlib's number for its format


def hidden_text(image: Image.Image, most: int) -> str:
    """Returns the text hidden in an image's pixels, of at most `most` bytes; empty if there is none.

    The bits go column by column: a mark of 15 bytes, their count in 32 bits (most significant first), the text in
    UTF-8, compressed by gzip if the mark is one of compressed text.
    """
    if image.mode not in ("RGB", "RGBA") or image.width * image.height > MAX_PIXELS:
        return ""
    pixels = np.asarray(image)
    for channels in (pixels[..., 3:], pixels[..., :3])[image.mode == "RGB" :]:
        mark, count = _bytes(channels, 0, _MARK_LENGTH), _bytes(channels, _MARK_LENGTH, _COUNT_LENGTH)
        kind, is_packed = _MARKS.get(mark, ("", False))
        if kind != ("A" if channels.shape[-1] == 1 else "RGB"):
            continue
        length = min(int.from_bytes(count, "big") // 8, most)
        data = _bytes(channels, _MARK_LENGTH + _COUNT_LENGTH, length)
        try:
            return (zlib.decompressobj(_GZIP).decompress(data, most) if is_packed else data).decode()
        except (zlib.error, UnicodeError):
            return ""
    return ""


def _bytes(channels: np.ndarray, start: int, count: int) -> bytes:
    """Returns bytes of the lowest bits of pixels [height, width, channels], column by column."""
    height, _, depth = channels.shape
    columns = -(-8 * (start + count) // (height * depth))
    bits = (channels[:, :columns] & 1).transpose(1, 0, 2).reshape(-1)
    return np.packbits(bits[8 * start : 8 * (start + count)]).tobytes()
