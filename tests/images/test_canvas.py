from __future__ import annotations

import hashlib
import io
import logging
import os
import struct
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageCms, ImageFile, ImageOps
from PIL.PngImagePlugin import PngInfo

from ldm.images.canvas import Canvas, open_canvas
from ldm.images.folders import find_images, find_pairs
from ldm.job import Init
from ldm.util import InputError

LANCZOS, BILINEAR = Image.Resampling.LANCZOS, Image.Resampling.BILINEAR
ORIENTATION = 0x0112

Save = Callable[..., str]


@pytest.fixture
def save(tmp_path: Path) -> Save:
    """Writes an image, an array or bytes to a new file and returns its path."""

    def write(content: Image.Image | np.ndarray | bytes, name: str = "a.png", **options: Any) -> str:
        path = tmp_path / name
        if isinstance(content, bytes):
            path.write_bytes(content)
        else:
            (Image.fromarray(content) if isinstance(content, np.ndarray) else content).save(path, **options)
        return str(path)

    return write


def noise(height: int, width: int, *channels: int) -> np.ndarray:
    return np.random.default_rng(1).integers(0, 256, (height, width, *channels), dtype=np.uint8)


def smooth(height: int, width: int) -> np.ndarray:
    """Colours that change slowly, so that a difference of geometry shows and lossy coding does not."""
    y, x = np.mgrid[:height, :width]
    return np.stack([x * 255 // width, y * 255 // height, (x + y) * 255 // (width + height)], -1).astype(
        np.uint8
    )


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def crafted_png(
    width: int, height: int, *, depth: int = 8, color: int = 2, rows: bytes, extra: bytes = b""
) -> bytes:
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0))
    return (
        b"\x89PNG\r\n\x1a\n" + header + extra + chunk(b"IDAT", zlib.compress(rows, 9)) + chunk(b"IEND", b"")
    )


def encoded(picture: Image.Image | np.ndarray, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    (Image.fromarray(picture) if isinstance(picture, np.ndarray) else picture).save(buffer, kind, **options)
    return buffer.getvalue()


def refusal(init: Init, **options: Any) -> str:
    with pytest.raises(InputError) as caught:
        open_canvas(init, **options)
    message = str(caught.value)
    assert message.isprintable()
    assert len(message) < 600
    return message


# Files that cannot be used


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "empty"),
        (b"<!DOCTYPE html><html>", "web page"),
        (b"\n <svg xmlns='http://www.w3.org/2000/svg'/>", "SVG"),
        (b"<?xml version='1.0'?><svg/>", "XML"),
        (b"%PDF-1.7\n", "PDF"),
        (b"GIF89a" + bytes(40), "GIF"),
        (b"8BPS\x00\x01" + bytes(40), "Photoshop"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n", "PostScript"),
        (b"SIMPLE  =                    T" + bytes(80), "not an image"),
        (b"\x00\x00\x00\x0cjP  \r\n\x87\n" + bytes(40), "not an image"),
        (b"\x00\x00\x00\x00\x00\x00\x00\x04" + bytes(300), "not an image"),
        (b"\x00\x00\x00\x18ftypheic" + bytes(40), "HEIC"),
        (b"\x89PNG\r\n\x1a\n\x00\x00", "truncated"),
        (b"hello", "not an image"),
    ],
)
def test_files_of_other_kinds_are_named_and_refused(save: Save, content: bytes, said: str) -> None:
    path = save(content, "a.png")
    message = refusal(Init(path))
    assert message.startswith(path)
    assert said in message


@pytest.mark.parametrize("kind", ["GIF", "EPS", "JPEG2000", "PPM", "TGA", "ICO"])
def test_whatever_else_pillow_reads_is_refused(save: Save, kind: str) -> None:
    try:
        data = encoded(smooth(64, 64), kind)
    except OSError:
        pytest.skip(f"this Pillow writes no {kind}")
    assert "give a PNG, JPEG, WEBP, BMP or TIFF file" in refusal(Init(save(data)))


def test_paths_that_are_no_files(tmp_path: Path) -> None:
    assert "no such file" in refusal(Init(str(tmp_path / "none.png")))
    assert "directory" in refusal(Init(str(tmp_path)))
    assert "\\x1b" in refusal(Init(str(tmp_path / "\x1b[31m.png")))
    assert "damaged" in refusal(Init(str(tmp_path / "a\0.png")))
    os.mkfifo(tmp_path / "pipe.png")
    assert "pipe" in refusal(Init(str(tmp_path / "pipe.png")))


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "BMP", "TIFF"])
@pytest.mark.parametrize("share", [0.2, 0.5, 0.99])
def test_truncated_files_are_one_line(save: Save, kind: str, share: float) -> None:
    data = encoded(noise(64, 64, 3), kind)
    message = refusal(Init(save(data[: int(len(data) * share)])))
    assert "truncated" in message or "damaged" in message
    assert not ImageFile.LOAD_TRUNCATED_IMAGES
    if kind in ("PNG", "JPEG"):
        assert "is truncated" in message


def test_no_flipped_bit_of_a_png_is_overlooked(save: Save) -> None:
    data = encoded(noise(32, 32, 3), "PNG")
    end = len(data) - 12  # the chunk that only marks the end of the file
    for position in [*range(8, end, 29), *range(end - 8, end)]:
        flipped = bytearray(data)
        flipped[position] ^= 4
        refusal(Init(save(bytes(flipped))))


@pytest.mark.parametrize("kind", ["JPEG", "WEBP", "BMP", "TIFF"])
def test_damage_gives_pixels_or_one_line(save: Save, kind: str) -> None:
    data = encoded(smooth(32, 32), kind)
    rng = np.random.default_rng(1)
    for _ in range(40):
        damaged = np.frombuffer(data, np.uint8).copy()
        damaged[rng.integers(0, len(data), 3)] = rng.integers(0, 256, 3)
        try:
            assert open_canvas(Init(save(damaged.tobytes()))).pixels.ndim == 3
        except InputError as error:
            assert str(error).isprintable()


def test_too_many_pixels_are_refused_by_the_header(save: Save, monkeypatch: pytest.MonkeyPatch) -> None:
    def decode(_: Image.Image) -> None:
        raise AssertionError("decoded")

    monkeypatch.setattr(ImageFile.ImageFile, "load", decode)
    for width, height in ((30000, 30000), (12000, 12000), (8001, 8000)):
        message = refusal(Init(save(crafted_png(width, height, rows=b""))))
        assert "64 megapixels" in message


def test_inflating_text_is_refused(save: Save) -> None:
    bomb = chunk(b"zTXt", b"parameters\0\0" + zlib.compress(bytes(8_000_000), 9))
    pixels = b"".join(b"\0" + row.tobytes() for row in smooth(32, 32))
    assert "inflates" in refusal(Init(save(crafted_png(32, 32, rows=pixels, extra=bomb))))
    assert open_canvas(Init(save(crafted_png(32, 32, rows=pixels)))).pixels.shape == (32, 32, 3)


def test_content_counts_not_the_extension(save: Save) -> None:
    pixels = smooth(32, 32)
    assert np.array_equal(open_canvas(Init(save(encoded(pixels, "BMP"), "a.jpg"))).pixels, pixels)


# The file's pixels


def test_a_plain_picture_is_given_back_as_it_is(save: Save) -> None:
    pixels = noise(64, 96, 3)
    path = save(pixels)
    canvas = open_canvas(Init(path))
    assert np.array_equal(canvas.pixels, pixels)
    assert canvas.pixels.dtype == np.uint8
    assert canvas.repaint is None
    assert canvas.notes == ()
    assert canvas.digest == hashlib.sha256(Path(path).read_bytes()).hexdigest()


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_orientation_is_turned_upright(save: Save, kind: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    options = {"lossless": True} if kind == "WEBP" else {}
    path = save(encoded(smooth(32, 64), kind, exif=exif, **options))
    with Image.open(path) as image:
        expected = ImageOps.exif_transpose(image).convert("RGB")
    canvas = open_canvas(Init(path))
    assert np.array_equal(canvas.pixels, np.asarray(expected))
    assert canvas.pixels.shape[:2] == ((64, 32) if orientation > 4 else (32, 64))
    assert canvas.notes == (() if orientation == 1 else (f"turned upright (EXIF orientation {orientation})",))


def test_a_broken_exif_block_does_no_harm(save: Save) -> None:
    path = save(encoded(smooth(32, 32), "WEBP", lossless=True, exif=b"Exif\0\0MM-*broken"))
    assert np.array_equal(open_canvas(Init(path)).pixels, smooth(32, 32))


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "CMYK", "YCbCr"])
def test_opaque_modes_are_converted(save: Save, mode: str) -> None:
    picture = Image.fromarray(smooth(32, 64)).convert(mode)
    canvas = open_canvas(Init(save(picture, "a.tif")))
    assert np.array_equal(canvas.pixels, np.asarray(picture.convert("RGB")))
    assert canvas.notes == ()


def test_lab_comes_back_to_the_colours_it_was_made_of(save: Save) -> None:
    srgb, lab = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
    pixels = smooth(32, 64) // 2 + 64  # inside the gamut
    picture = ImageCms.profileToProfile(Image.fromarray(pixels), srgb, lab, outputMode="LAB")
    assert picture is not None
    canvas = open_canvas(Init(save(picture, "a.tif")))
    assert np.abs(canvas.pixels.astype(int) - pixels).max() <= 8  # 8 bits of Lab are coarse


@pytest.mark.parametrize("dtype", ["<u2", ">u2", "<i4"])
def test_sixteen_bits_are_divided_by_257(save: Save, dtype: str) -> None:
    values = np.linspace(0, 65535, 32 * 64).round().astype(dtype).reshape(32, 64)
    kind = "TIFF" if dtype == "<i4" else "PNG"
    canvas = open_canvas(Init(save(encoded(values, kind))))
    assert np.array_equal(canvas.pixels[..., 0], np.rint(values.astype(float) / 257))
    assert canvas.pixels.max() == 255
    assert canvas.notes == ("16-bit values scaled to 8 bits",)


def test_big_endian_sixteen_bits(save: Save) -> None:
    values = np.linspace(0, 65535, 32 * 32).round().astype(">u2").reshape(32, 32)
    picture = Image.frombytes("I;16B", (32, 32), values.tobytes())
    canvas = open_canvas(Init(save(encoded(picture, "TIFF"))))
    assert np.array_equal(canvas.pixels[..., 1], np.rint(values.astype(float) / 257))


def test_wide_numbers_out_of_range_are_refused(save: Save) -> None:
    assert "0 to 70000" in refusal(
        Init(save(np.linspace(0, 70000, 1024).astype(np.int32).reshape(32, 32), "a.tif"))
    )
    assert "-1 to " in refusal(Init(save(np.arange(-1, 1023, dtype=np.int32).reshape(32, 32), "a.tif")))


def test_floating_point_is_scaled_or_refused(save: Save) -> None:
    values = np.linspace(0, 1, 1024, dtype=np.float32).reshape(32, 32)
    canvas = open_canvas(Init(save(values, "a.tif")))
    assert np.array_equal(canvas.pixels[..., 2], np.rint(values * 255))
    assert "0..1" in refusal(Init(save(values * 255, "a.tif")))
    values[3, 3] = np.nan
    assert "nan" in refusal(Init(save(values, "a.tif")))


@pytest.mark.parametrize("background", ["white", "#204060"])
@pytest.mark.parametrize("mode", ["LA", "PA", "RGBA", "P"])
def test_transparency_is_laid_on_the_background(save: Save, mode: str, background: str) -> None:
    rgba = Image.fromarray(np.dstack([smooth(32, 64), np.tile(np.arange(64, dtype=np.uint8) * 4, (32, 1))]))
    picture = rgba.quantize(16) if mode == "P" else rgba.convert(mode)
    canvas = open_canvas(Init(save(picture, "a.png" if mode == "P" else "a.tif"), background=background))
    ground = Image.new("RGBA", picture.size, background)
    expected = np.asarray(Image.alpha_composite(ground, picture.convert("RGBA")).convert("RGB"))
    assert np.abs(canvas.pixels.astype(int) - expected).max() <= 1
    assert canvas.notes == (f"transparency laid on {background}",)


def test_transparent_colours_of_files_without_an_alpha_channel(save: Save) -> None:
    pixels = smooth(32, 32)
    pixels[:8] = (9, 8, 7)
    canvas = open_canvas(Init(save(pixels, transparency=(9, 8, 7)), background="red"))
    assert (canvas.pixels[:8] == (255, 0, 0)).all()
    assert np.array_equal(canvas.pixels[8:], pixels[8:])
    rows = b"".join(b"\0" + struct.pack(">32H", *[5, 60000] * 16) for _ in range(32))
    grey = crafted_png(32, 32, depth=16, color=0, rows=rows, extra=chunk(b"tRNS", struct.pack(">H", 5)))
    canvas = open_canvas(Init(save(grey), background="red"))
    assert canvas.pixels[0, :2].tolist() == [[255, 0, 0], [233, 233, 233]]


def test_an_alpha_channel_that_hides_nothing_is_not_noted(save: Save) -> None:
    pixels = smooth(32, 32)
    canvas = open_canvas(Init(save(np.dstack([pixels, np.full((32, 32), 255, np.uint8)])), background="red"))
    assert np.array_equal(canvas.pixels, pixels)
    assert canvas.notes == ()


@pytest.mark.parametrize("background", ["nocolour", "#12", "#ff000080", "", "\x1b[31m"])
def test_a_wrong_background_is_named(save: Save, background: str) -> None:
    assert "--background: unknown colour" in refusal(Init(save(smooth(32, 32)), background=background))


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "TIFF"])
def test_of_several_frames_the_first_counts(save: Save, kind: str) -> None:
    frames = [Image.fromarray(smooth(32, 32)), Image.new("RGB", (32, 32), "red")]
    options = {"lossless": True} if kind == "WEBP" else {}
    data = encoded(frames[0], kind, save_all=True, append_images=frames[1:], **options)
    canvas = open_canvas(Init(save(data)))
    assert np.array_equal(canvas.pixels, smooth(32, 32))
    assert canvas.notes == ("took the first frame only",)


def test_sixteen_bit_colours_keep_their_high_bytes(save: Save) -> None:
    rows = b"".join(b"\0" + struct.pack(">96H", *range(0, 48000, 500)) for _ in range(32))
    canvas = open_canvas(Init(save(crafted_png(32, 32, depth=16, color=2, rows=rows))))
    assert canvas.pixels[0].ravel().tolist() == [value >> 8 for value in range(0, 48000, 500)]


def xyz_profile(exponent: float, swap: bool = False) -> bytes:
    """An RGB matrix profile: sRGB's primaries (two of them exchanged with `swap`) and a power curve."""
    primaries = [(0.4361, 0.2225, 0.0139), (0.3851, 0.7169, 0.0971), (0.1431, 0.0606, 0.7141)]
    order = [1, 0, 2] if swap else [0, 1, 2]

    def fixed(*numbers: float) -> bytes:
        return b"".join(struct.pack(">i", round(number * 65536)) for number in numbers)

    tags = {b"wtpt": b"XYZ \0\0\0\0" + fixed(0.9642, 1.0, 0.8249)}
    for name, index in zip(b"rgb", order, strict=True):
        tags[bytes([name]) + b"XYZ"] = b"XYZ \0\0\0\0" + fixed(*primaries[index])
        tags[bytes([name]) + b"TRC"] = b"curv\0\0\0\0" + struct.pack(">IHxx", 1, round(exponent * 256))
    table, body, start = struct.pack(">I", len(tags)), b"", 128 + 4 + 12 * len(tags)
    for name, data in tags.items():
        table += name + struct.pack(">II", start + len(body), len(data))
        body += data
    head = struct.pack(">I4sI4s4s4s", start + len(body), b"none", 0x02100000, b"mntr", b"RGB ", b"XYZ ")
    head += struct.pack(">6H", 2024, 1, 1, 0, 0, 0) + b"acsp" + bytes(28) + fixed(0.9642, 1.0, 0.8249)
    return head.ljust(128, b"\0") + table + body


def test_an_embedded_profile_other_than_srgb_is_applied(save: Save) -> None:
    pixels = smooth(32, 64)
    canvas = open_canvas(Init(save(pixels, icc_profile=xyz_profile(2.2, swap=True))))
    assert np.abs(canvas.pixels.astype(int) - pixels[..., [1, 0, 2]]).max() < 25  # red and green are swapped
    assert canvas.notes == ("colours converted from the file's ICC profile to sRGB",)


def test_an_embedded_srgb_profile_changes_nothing(save: Save) -> None:
    pixels = noise(32, 32, 3)
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    canvas = open_canvas(Init(save(pixels, icc_profile=profile)))
    assert np.array_equal(canvas.pixels, pixels)
    assert canvas.notes == ()


def test_a_broken_profile_is_ignored(save: Save) -> None:
    pixels = noise(32, 32, 3)
    assert np.array_equal(open_canvas(Init(save(pixels, icc_profile=b"no profile"))).pixels, pixels)


def test_only_pixels_leave(save: Save) -> None:
    exif, text = Image.Exif(), PngInfo()
    exif.get_ifd(0x8825)[1] = "N"
    exif[0x010E] = "SECRET-EXIF"
    text.add_text("parameters", "SECRET-TEXT")
    canvas = open_canvas(Init(save(smooth(32, 32), exif=exif, pnginfo=text)))
    assert type(canvas.pixels) is np.ndarray
    assert canvas.pixels.base is None
    assert b"SECRET" not in encoded(canvas.pixels, "PNG")
    assert "SECRET" not in repr(canvas)


# Sizes


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((544, 400), (544, 384)),
        ((800, 400), (800, 384)),
        ((96, 96), (96, 96)),
        ((100, 70), (96, 64)),
        ((33, 63), (32, 32)),
    ],
)
def test_sizes_are_floored_and_resized_as_the_original_did(
    save: Save, size: tuple[int, int], expected: tuple[int, int]
) -> None:
    picture = Image.fromarray(smooth(size[1], size[0]))
    canvas = open_canvas(Init(save(picture)))
    assert np.array_equal(canvas.pixels, np.asarray(picture.resize(expected, resample=LANCZOS)))
    old, new = (f"{width}x{height}" for width, height in (size, expected))
    assert canvas.notes == (() if old == new else (f"{old} floored to {new}",))


def test_another_multiple(save: Save) -> None:
    assert open_canvas(Init(save(smooth(130, 200))), multiple=64).pixels.shape == (128, 192, 3)


@pytest.mark.parametrize("size", [(1, 1), (31, 200), (200, 31)])
def test_too_small_pictures_are_refused(save: Save, size: tuple[int, int]) -> None:
    message = refusal(Init(save(smooth(size[1], size[0]))))
    assert f"too small ({size[0]}x{size[1]}); at least 32x32" in message


@pytest.mark.parametrize(
    ("resize", "width", "height", "expected"),
    [
        ("fit", 256, 256, (256, 160)),  # 256 x 170.7
        ("fit", 256, 128, (192, 128)),  # 192 x 128
        ("fit", 256, None, (256, 160)),
        ("fit", None, 136, (192, 128)),  # 204 x 136
        ("fit", None, None, (288, 192)),
        ("fit", 600, 600, (576, 384)),  # 600 x 400
        ("fill", 256, 256, (256, 256)),
        ("fill", 136, None, (136, 64)),  # 136 x 90.7
        ("stretch", 64, 256, (64, 256)),
        ("stretch", None, 200, (288, 200)),  # 300 x 200
        ("pad", 256, 256, (256, 256)),
        ("pad", 72, 256, (72, 256)),
        ("pad", None, 200, (288, 200)),
    ],
)
def test_sizes_of_each_way_to_resize(
    save: Save, resize: Any, width: int | None, height: int | None, expected: tuple[int, int]
) -> None:
    canvas = open_canvas(Init(save(smooth(200, 300)), width, height, resize))
    assert canvas.pixels.shape[1::-1] == expected
    assert canvas.notes == (f"resized from 300x200 to {expected[0]}x{expected[1]} ({resize})",)


@pytest.mark.parametrize("size", [(300, 200), (123, 457), (256, 136), (20, 20)])
@pytest.mark.parametrize("target", [(256, 136), (96, 256)])
def test_pixels_of_each_way_to_resize_equal_pillows(
    save: Save, size: tuple[int, int], target: tuple[int, int]
) -> None:
    picture = Image.fromarray(noise(size[1], size[0], 3))
    path = save(picture)
    expected = {
        "stretch": picture.resize(target, LANCZOS),
        "fill": ImageOps.fit(picture, target, LANCZOS),
        "pad": ImageOps.pad(picture, target, LANCZOS, color="#102030"),
    }
    for resize, reference in expected.items():
        canvas = open_canvas(Init(path, *target, resize, background="#102030"))  # type: ignore[arg-type]
        assert np.abs(canvas.pixels.astype(int) - np.asarray(reference)).max() <= 1, resize


def test_wrong_sizes_name_their_flag(save: Save) -> None:
    path = save(smooth(64, 64))
    assert "--W is 513, not a multiple of 8; use 512 or 520" in refusal(Init(path, 513, 512, "fit"))
    assert "--H is 0; give a multiple of 8, at least 8" in refusal(Init(path, None, 0, "fill"))
    assert "--H is -8" in refusal(Init(path, None, -8, "fill"))
    assert "--W 64 needs a way to resize" in refusal(Init(path, 64))
    assert "'crop'" in refusal(Init(path, 64, 64, "crop"))  # type: ignore[arg-type]
    assert "64 megapixels" in refusal(Init(path, 8008, 8000, "stretch"))
    assert "64 megapixels" in refusal(Init(path, outpaint=(10**9, 0, 0, 0)))
    assert "too narrow" in refusal(Init(save(smooth(20, 1000), "b.png"), 512, 512, "fit"))
    assert "too narrow" in refusal(Init(save(smooth(20, 1000), "b.png"), 512, None, "stretch"))


# Masks


def half(height: int, width: int, value: int = 255) -> np.ndarray:
    """White (or `value`) on the left half."""
    mask = np.zeros((height, width), np.uint8)
    mask[:, : width // 2] = value
    return mask


def masked(save: Save, mask: np.ndarray | Image.Image, init: Init | None = None, **options: Any) -> Canvas:
    image = save(smooth(64, 96), "image.png")
    init = replace(init or Init(image), image=image, mask=save(mask, "mask.tif"))
    return open_canvas(init, mask_needed=True, **options)


def test_white_is_repainted(save: Save) -> None:
    canvas = masked(save, half(64, 96))
    assert canvas.repaint is not None
    assert canvas.repaint.dtype == bool
    assert np.array_equal(canvas.repaint, half(64, 96) > 0)
    assert canvas.notes == ()


@pytest.mark.parametrize(("value", "repainted"), [(127, False), (128, True)])
def test_the_threshold_is_half_of_white(save: Save, value: int, repainted: bool) -> None:
    mask = half(64, 96, value)
    mask[0] = 255
    repaint = masked(save, mask).repaint
    assert repaint is not None
    assert repaint[1:, :48].all() == repaint[1:, :48].any() == repainted
    assert not repaint[1:, 48:].any()


def test_an_inverted_mask_is_the_exact_opposite(save: Save) -> None:
    mask = noise(64, 96)
    as_given, inverted = (masked(save, mask, Init("", invert_mask=flag)).repaint for flag in (False, True))
    assert as_given is not None
    assert np.array_equal(as_given, mask / 255 >= 0.5)
    assert np.array_equal(as_given, ~np.asarray(inverted))


@pytest.mark.parametrize("mode", ["1", "RGB", "CMYK", "I;16", "P"])
def test_masks_of_every_mode(save: Save, mode: str) -> None:
    picture = Image.fromarray(half(64, 96)).convert(mode)
    if mode == "I;16":
        picture = Image.fromarray(half(64, 96).astype(np.uint16) * 257)
    repaint = masked(save, picture).repaint
    assert np.array_equal(np.asarray(repaint), half(64, 96) > 0)


def test_coloured_masks_count_by_luminance(save: Save) -> None:
    mask = np.zeros((64, 96, 3), np.uint8)
    mask[:, :32], mask[:, 32:64] = (0, 255, 0), (255, 0, 0)  # luminance 0.59 and 0.30
    repaint = np.asarray(masked(save, mask).repaint)
    assert repaint[:, :32].all()
    assert not repaint[:, 32:].any()


@pytest.mark.parametrize("color", [0, 90, 255])
def test_a_mask_of_one_colour_counts_by_its_opacity(save: Save, color: int) -> None:
    mask = np.full((64, 96, 4), color, np.uint8)
    mask[..., 3] = half(64, 96)
    mask[:, 48:, :3] = 37  # under full transparency anything may be stored
    assert np.array_equal(np.asarray(masked(save, mask).repaint), half(64, 96) > 0)


def test_an_opaque_or_coloured_mask_with_alpha_counts_by_luminance_where_it_shows(save: Save) -> None:
    mask = np.dstack([half(64, 96)] * 3 + [np.full((64, 96), 255, np.uint8)])
    assert np.array_equal(np.asarray(masked(save, mask).repaint), half(64, 96) > 0)
    mask[:32, :, 3] = 0
    expected = half(64, 96) > 0
    expected[:32] = False
    assert np.array_equal(np.asarray(masked(save, mask).repaint), expected)


def test_a_mask_of_another_size_is_resized_and_noted(save: Save) -> None:
    mask = half(20, 30)
    canvas = masked(save, mask)
    expected = np.asarray(Image.fromarray(mask).resize((96, 64), BILINEAR)) >= 128
    assert np.array_equal(np.asarray(canvas.repaint), expected)
    assert canvas.notes == ("mask of 30x20 resized to the image's 96x64",)


def test_image_and_mask_are_turned_each_by_its_own_exif(save: Save) -> None:
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    image = save(smooth(64, 96), "image.png", exif=exif)
    mask = save(half(96, 64), "mask.png")
    canvas = open_canvas(Init(image, mask=mask))
    assert np.array_equal(np.asarray(canvas.repaint), half(96, 64) > 0)
    assert canvas.notes == ("turned upright (EXIF orientation 6)",)
    canvas = open_canvas(Init(mask, mask=image, invert_mask=True))
    assert canvas.notes == ("mask: turned upright (EXIF orientation 6)",)


@pytest.mark.parametrize("resize", ["fit", "fill", "stretch", "pad"])
def test_the_mask_goes_where_the_picture_goes(save: Save, resize: Any) -> None:
    """An image that is its own mask is white exactly where it is repainted."""
    mask = half(200, 300)
    path = save(mask)
    canvas = open_canvas(Init(path, 128, 160, resize, background="black", mask=path))
    white = canvas.pixels[..., 0] >= 128
    assert canvas.repaint is not None
    assert 0 < canvas.repaint.sum() < canvas.repaint.size
    assert np.array_equal(canvas.repaint, white)


def test_padding_is_kept_also_if_the_mask_is_inverted(save: Save) -> None:
    for invert in (False, True):
        repaint = masked(save, half(64, 96), Init("", 96, 96, "pad", invert_mask=invert)).repaint
        assert repaint is not None
        assert not repaint[:16].any()
        assert not repaint[80:].any()
        assert repaint[40, 10] != invert
        assert repaint[40, 90] == invert


def test_masks_that_repaint_nothing_or_everything(save: Save) -> None:
    with pytest.raises(InputError, match="repaints nothing"):
        masked(save, np.zeros((64, 96), np.uint8))
    assert masked(save, np.full((64, 96), 255, np.uint8)).notes == ("the mask repaints everything",)
    black = save(np.zeros((64, 96), np.uint8), "black.png")
    canvas = open_canvas(Init(save(smooth(64, 96)), mask=black))
    assert not np.asarray(canvas.repaint).any()
    assert canvas.notes == ("the mask repaints nothing",)


def test_faults_of_the_mask_name_its_file(save: Save) -> None:
    mask = save(b"<html>", "mask.png")
    assert refusal(Init(save(smooth(64, 96)), mask=mask)).startswith(mask)


def test_transparent_parts_are_repainted(save: Save) -> None:
    alpha = 255 - half(64, 96)
    image = save(np.dstack([smooth(64, 96), alpha]))
    canvas = open_canvas(Init(image, alpha_mask=True, background="red"), mask_needed=True)
    assert np.array_equal(np.asarray(canvas.repaint), alpha == 0)
    assert (canvas.pixels[alpha == 0] == (255, 0, 0)).all()
    inverted = open_canvas(Init(image, alpha_mask=True, invert_mask=True), mask_needed=True)
    assert np.array_equal(np.asarray(inverted.repaint), alpha > 0)
    mask = save(255 - half(64, 96), "mask.png")
    both = open_canvas(Init(image, alpha_mask=True, mask=mask))
    assert np.array_equal(np.asarray(both.repaint), alpha > 0), "the mask has precedence"


def test_no_transparency_to_use(save: Save) -> None:
    path = save(smooth(64, 64))
    message = refusal(Init(path, alpha_mask=True), mask_needed=True)
    assert message == f"{path}: has no transparency to use as the mask; give --mask"
    canvas = open_canvas(Init(path, alpha_mask=True))
    assert canvas.repaint is None
    assert canvas.notes == ("no transparency to use as the mask",)
    assert "give --mask" in refusal(Init(path), mask_needed=True)


# Outpainting


def test_outpainted_borders_repeat_the_edge_and_are_repainted(save: Save) -> None:
    pixels = noise(64, 96, 3)
    canvas = open_canvas(Init(save(pixels), outpaint=(8, 16, 24, 0)), mask_needed=True)
    assert canvas.pixels.shape == (80, 128, 3)
    assert canvas.repaint is not None
    assert np.array_equal(canvas.pixels[16:, 8:104], pixels)
    assert not canvas.repaint[16:, 8:104].any()
    assert canvas.repaint.sum() == 80 * 128 - 64 * 96
    assert (canvas.pixels[:17, 50] == pixels[0, 42]).all()
    assert (canvas.pixels[40, 103:] == pixels[24, 95]).all()
    assert (canvas.pixels[:17, :9] == pixels[0, 0]).all(), "corners too"
    assert canvas.notes == ()


def test_borders_are_rounded_up_and_come_after_resizing(save: Save) -> None:
    canvas = open_canvas(Init(save(smooth(100, 100)), 64, 64, "stretch", outpaint=(1, 0, 9, 0)))
    assert canvas.pixels.shape == (64, 8 + 64 + 16, 3)
    assert canvas.notes == (
        "resized from 100x100 to 64x64 (stretch)",
        "outpainted by 8 instead of 1 pixels at the left",
        "outpainted by 16 instead of 9 pixels at the right",
    )


def test_outpainting_with_a_mask(save: Save) -> None:
    for invert in (False, True):
        init = Init("", outpaint=(0, 0, 8, 8), invert_mask=invert)
        repaint = masked(save, half(64, 96), init).repaint
        assert repaint is not None
        assert np.array_equal(repaint[:64, :96], (half(64, 96) > 0) != invert)
        assert repaint[64:].all()
        assert repaint[:, 96:].all()
    black = masked(save, np.zeros((64, 96), np.uint8), Init("", outpaint=(0, 0, 0, 8)))
    assert np.asarray(black.repaint).sum() == 8 * 96


def test_negative_borders_are_refused(save: Save) -> None:
    assert "(0, -1, 0, 0)" in refusal(Init(save(smooth(64, 64)), outpaint=(0, -1, 0, 0)))


# Folders


def touch(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).touch()


def names_of(paths: list[str]) -> list[str]:
    return [os.path.basename(path) for path in paths]


def test_a_folder_gives_its_pictures_in_natural_order(tmp_path: Path) -> None:
    touch(
        tmp_path, "b10.png", "b2.PNG", "A.jpeg", "c.tif", "b2_mask.png", ".hidden.png", "notes.txt", "7.webp"
    )
    (tmp_path / "folder.png").mkdir()
    assert names_of(find_images([str(tmp_path)])) == ["7.webp", "A.jpeg", "b2.PNG", "b10.png", "c.tif"]


def test_every_ending_of_a_format_counts_and_the_rest_is_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    touch(tmp_path, "a.png", "b.jfif", "c.JPE", "d.dib", "notes.txt", "e.heic")
    with caplog.at_level(logging.INFO):
        assert names_of(find_images([str(tmp_path)])) == ["a.png", "b.jfif", "c.JPE", "d.dib"]
    assert "2 files are not images by name and are left out: e.heic, notes.txt" in caplog.text


def test_files_are_taken_as_they_are(tmp_path: Path) -> None:
    touch(tmp_path, "odd.xyz", "a_mask.png")
    paths = [str(tmp_path / "odd.xyz"), str(tmp_path / "a_mask.png")]
    assert find_images(paths) == paths


def test_missing_paths_and_empty_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file"):
        find_images([str(tmp_path / "none")])
    touch(tmp_path, "a_mask.png", "b.txt")
    with pytest.raises(InputError, match="no images"):
        find_images([str(tmp_path)])


def test_pairs_and_the_pictures_left_over(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    touch(tmp_path, "a10.jpg", "a10_mask.png", "a9.png", "a9_mask.TIF", *(f"x{i}.png" for i in range(7)))
    with caplog.at_level(logging.WARNING):
        pairs = find_pairs(str(tmp_path))
    assert [names_of(list(pair)) for pair in pairs] == [
        ["a9.png", "a9_mask.TIF"],
        ["a10.jpg", "a10_mask.png"],
    ]
    assert [record.getMessage() for record in caplog.records] == [
        "7 images without a mask are skipped: x0.png, x1.png, x2.png, x3.png, x4.png, ..."
    ]


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["a.png"], "no pairs"),
        (["a_mask.png", "b.png"], r"a_mask\.png: has no image a\.\*"),
        (["a_mask.png", "a.png", "a.jpg"], "several images: a.jpg, a.png"),
    ],
)
def test_folders_without_clear_pairs_are_refused(tmp_path: Path, names: list[str], said: str) -> None:
    touch(tmp_path, *names)
    with pytest.raises(InputError, match=said):
        find_pairs(str(tmp_path))


def test_pairs_of_no_folder(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be read"):
        find_pairs(str(tmp_path / "none"))
