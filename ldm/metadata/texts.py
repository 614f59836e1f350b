"""Reads the texts of an image file by keyword, without decoding its pixels where that can be avoided."""

from __future__ import annotations

import contextlib
import json
import re
import struct
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any, TypeAlias
from xml.etree import ElementTree

from PIL import Image
from PIL.PngImagePlugin import iTXt

from ldm.files import read_side_file
from ldm.images.keywords import INFOTEXT_KEYWORD, RECORD_KEYWORD
from ldm.images.source import FORMATS, open_image, read_bytes, reading
from ldm.json_value import load_object
from ldm.metadata.hidden import hidden_text
from ldm.metadata.infotext import has_settings
from ldm.util import InputError

MAX_TEXT = 4_000_000  # characters; ComfyUI's graphs are the longest, some 100,000
_ExifValue: TypeAlias = "str | bytes | float | tuple[Any, ...] | None"
_FORMATS = ("PNG", "JPEG", "WEBP", "AVIF")  # the last where Pillow was built with it
_EXIF, _USER_COMMENT, _MAKER_NOTE, _SOFTWARE = 0x8769, 0x9286, 0x927C, 0x0131
_DESCRIPTIONS = (0x010E, 0x010F, 0x0110, 0x9C9C)  # ImageDescription, Make and Model (ComfyUI), XPComment
_CODE_LENGTH = 8  # bytes that name the character set of a comment
_CODES = (b"ASCII\0\0\0", b"UNICODE\0", b"JIS\0\0\0\0\0", bytes(_CODE_LENGTH))
_UTF_16 = (b"\xff\xfe", b"\xfe\xff")  # byte order marks
_LATIN_1_CONTROL = re.compile("[\x80-\x9f]")
_LABEL = re.compile(
    r"([A-Za-z][\w-]{1,30})(?:\0|:\s*(?=\{))"
)  # stable-diffusion.cpp's, and ComfyUI's in WebP
_HOLDS_TEXTS = {
    "workflow",
    "parameters",
    "invokeai_metadata",
    "sd-metadata",
    "Comment",
}  # an object of texts does
_FIELD = re.compile(r"\n([A-Z][A-Za-z ]{2,30}): ?")
_MOCHI = "Include in Image: "  # how Mochi Diffusion's description begins, in which semicolons part the fields
_MOCHI_FIELD = re.compile(
    r"(?:^|; )(Include in Image|Exclude from Image|Model|Steps|Guidance Scale|Seed|Size|Scheduler|Upscaler|"
    r"ML Compute Unit|Generator|Date): ?"
)
_DECLARED = re.compile(rb"<!(?:DOCTYPE|ENTITY)", re.IGNORECASE)  # entities may grow without end
_IN_XMP = ("UserComment", "parameters", "description")  # the first is the most complete in Draw Things' files


def read_texts(path: str, known: Collection[str] = ()) -> tuple[dict[str, str], tuple[int, int]]:
    """Reads the texts of an image by keyword, and its width and height in pixels.

    A PNG's chunks have their keywords. A text of an EXIF field, XMP or a JPEG's comment gets the keyword that it
    contains, or `parameters`, the web UI's keyword, if it looks like settings. Chunks after the pixels
    are read, and texts hidden in the pixels, where none before them has a keyword of `known`.

    Raises InputError for a file that is not an image; text that is too long or cannot be decoded is left out.
    """
    with reading(path):
        image = open_image(read_bytes(path), (*FORMATS, *_FORMATS))
        if image.format not in _FORMATS:
            raise InputError(f"is a {image.format} file; give the PNG, JPEG or WebP file that was generated")
        texts = _chunks(image)
        if image.format == "PNG" and texts.keys().isdisjoint(known):
            with (
                contextlib.nullcontext()
                if not texts
                else contextlib.suppress(OSError, SyntaxError, ValueError)
            ):
                image.load()
            texts = _chunks(image)
        exif = _exif(image)
        for i, text in enumerate(_free_texts(image, exif)):
            for keyword, part in _parts(text[: MAX_TEXT + 1]):
                # EXIF's comment comes first, also before a PNG's chunk, as in the web UI
                if keyword != INFOTEXT_KEYWORD or part.startswith("{") or has_settings(part):
                    texts[keyword] = part if i == 0 else texts.get(keyword, part)
        if texts.keys().isdisjoint(known) and image.format != "JPEG":
            texts |= dict(_parts(hidden_text(image, MAX_TEXT)))
        for keyword, part in _parts(texts.get(INFOTEXT_KEYWORD, "")):
            texts.setdefault(keyword, part)
        for keyword, tag in (("Software", _SOFTWARE), ("fooocus_scheme", _MAKER_NOTE)):
            if value := _text(exif.get(tag)):
                texts.setdefault(keyword, value)
    return {key: text for key, text in texts.items() if len(text) <= MAX_TEXT}, image.size


def read_texts_beside(path: str) -> tuple[str, dict[str, str]]:
    """Reads the sidecar file of an image, in which Easy Diffusion and the web UI keep its settings: name and texts.

    It has the image's name with the ending .json or .txt. Both are empty if there is none that holds settings.
    """
    for ending in (".json", ".txt"):
        file = Path(path).with_suffix(ending)
        with contextlib.suppress(InputError):
            text = _text(read_side_file(file, MAX_TEXT)).replace("\r\n", "\n")
            first, *fields = _FIELD.split(
                f"\n{text}"
            )  # a prompt without a name, then names and values by turns
            table = dict(zip(fields[::2], map(str.strip, fields[1::2]), strict=True))
            if table.keys() >= {"Seed", "Guidance Scale"}:
                if first.strip():
                    # the versions that write no name for the prompt write a strength in any case
                    table |= {"Prompt": first.strip(), "Perhaps strength": table.pop("Prompt Strength", "")}
                return file.name, table
            if text.lstrip().startswith("{") or has_settings(text):
                return file.name, {INFOTEXT_KEYWORD: text}
    return "", {}


def _chunks(image: Image.Image) -> dict[str, str]:
    """Returns a PNG's texts. Many programs write UTF-8 where the standard has Latin-1."""
    texts: dict[str, str] = {}
    for key, text in image.info.items():
        if isinstance(text, str):  # Pillow has a separate class for iTXt texts, which are UTF-8
            is_latin = not isinstance(text, iTXt) and key != RECORD_KEYWORD
            plain = _text(text) if is_latin else str(text)
            name = INFOTEXT_KEYWORD if str(key).lower() == INFOTEXT_KEYWORD else str(key)
            texts[name] = plain if name == RECORD_KEYWORD else plain.removeprefix("\ufeff")
    return texts


def _exif(image: Image.Image) -> dict[int, Any]:
    """Returns the fields of EXIF's first directory and of its Exif directory."""
    fields: dict[int, Any] = {}
    with contextlib.suppress(SyntaxError, ValueError, TypeError, LookupError, OSError, struct.error):
        exif = image.getexif()
        fields |= dict(exif)
        fields |= exif.get_ifd(_EXIF)
    return fields


def _free_texts(image: Image.Image, exif: dict[int, Any]) -> Iterator[str]:
    """Yields texts without a keyword: EXIF's comment, which may be empty, then all others."""
    yield _comment(exif.get(_USER_COMMENT, b""))
    for kind, content in getattr(image, "applist", []):
        if kind == "COM":
            yield _text(content)
    for tag in _DESCRIPTIONS:
        yield _text(exif.get(tag))
    xmp = image.info.get("xmp", image.info.get("XML:com.adobe.xmp"))
    yield from _xmp(xmp if isinstance(xmp, bytes) else str(xmp or "").encode())
    for key in ("Description", "Comment", "comment"):
        yield _text(image.info.get(key))


def _parts(text: str) -> Iterator[tuple[str, str]]:
    """Yields the keywords and texts contained in one text."""
    if label := _LABEL.match(text):
        key = label[1].lower() if label[1].lower() in ("prompt", "workflow", INFOTEXT_KEYWORD) else label[1]
        yield key, text[label.end() :].strip("\0")
        return
    if text.startswith(_MOCHI):
        _, *fields = _MOCHI_FIELD.split(text)
        yield from zip(fields[::2], fields[1::2], strict=True)
        return
    content = load_object(text) if text.startswith("{") and len(text) <= MAX_TEXT else {}
    if any(isinstance(node, dict) and "class_type" in node for node in content.values()):
        yield "prompt", text  # ComfyUI's graph
    elif not _HOLDS_TEXTS.isdisjoint(content):
        for key, value in content.items():
            yield key, value if isinstance(value, str) else json.dumps(value)
    elif text:
        yield INFOTEXT_KEYWORD, text


def _xmp(packet: bytes) -> Iterator[str]:
    """Yields the texts of an XMP packet that can hold settings."""
    packet = packet.strip(b"\0 \r\n")
    if not packet or len(packet) > MAX_TEXT or b"\0" in packet or _DECLARED.search(packet):
        return
    try:
        root = ElementTree.fromstring(packet)
    except (ElementTree.ParseError, ValueError, LookupError):
        return
    found: dict[str, list[str]] = {name: [] for name in _IN_XMP}
    for element in root.iter():
        for name, value in [(element.tag, _first(element)), *element.items()]:
            if _local(name) in found:
                found[_local(name)].append(value.strip())
    for name in _IN_XMP:
        yield from found[name]


def _first(element: ElementTree.Element) -> str:
    """Returns the text of an element, or of the first of several languages."""
    items = (item.text for item in element.iter() if _local(item.tag) == "li" and item.text)
    return next(items, element.text or "")


def _local(name: object) -> str:
    return str(name).rpartition("}")[2]


# --- bytes ---------------------------------------------------------------------------------------------------------


def _comment(value: _ExifValue) -> str:
    """Decodes EXIF's UserComment, which should begin with the name of its character set."""
    data = value if isinstance(value, bytes) else str(value).encode("latin-1", "replace")
    code, rest = data[:_CODE_LENGTH].upper(), data[_CODE_LENGTH:]
    if code == _CODES[2] and b"\x1b" in rest:
        return rest.decode("iso2022_jp", "replace")
    if code == _CODES[1] and b"\0" in rest and not rest.startswith(_UTF_16):
        return _utf_16(rest)
    return _text(rest if code in _CODES else data)


def _text(value: _ExifValue) -> str:
    """Decodes bytes, or text that Pillow read as Latin-1: UTF-8, UTF-16 of either order, or Latin-1."""
    if isinstance(value, str):
        if value.isascii():
            return value.strip("\0")
        try:
            value = value.encode("latin-1")
        except UnicodeError:
            return value.removeprefix("\ufeff").strip("\0")
    if isinstance(value, tuple) and all(isinstance(byte, int) and 0 <= byte < 256 for byte in value):
        value = bytes(value)
    if not isinstance(value, bytes):
        return ""
    if value.startswith(_UTF_16):
        return value.decode("utf-16", "replace").strip("\0\ufffd")
    if value.count(0) > len(value) // 8:
        return _utf_16(value)
    try:
        return value.decode("utf-8-sig").strip("\0")
    except UnicodeError:
        return _LATIN_1_CONTROL.sub(_of_windows, value.decode("latin-1")).strip("\0")


def _of_windows(control: re.Match[str]) -> str:
    """Decodes bytes that are controls in Latin-1 as Windows-1252: quotes, dashes, the euro sign."""
    return control[0].encode("latin-1").decode("cp1252", "replace")


def _utf_16(data: bytes) -> str:
    """Decodes UTF-16 without a byte order mark, by the zero bytes of Latin letters; big-endian if there are none."""
    order = "le" if data[1::2].count(0) > data[0::2].count(0) else "be"
    return data[: len(data) // 2 * 2].decode(f"utf-16-{order}", "replace").removeprefix("\ufeff").strip("\0")
